"""The page: well-formed, alone, every run on it, its cells those of the CSV; seen by a browser where there is one."""

import csv
import io
import re
import shutil
import statistics
import subprocess
from xml.etree import ElementTree

import pytest
from scipy.stats import t

from ki_ds.reports.page import page
from ki_ds.reports.results import read_run
from ki_ds.reports.savings import compare
from ki_ds.reports.tables import csv_text
from tests.fake_runs import teacher_record, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """Two sizes; the larger one alone and inheriting from the smaller, two seeds each."""
    folder = tmp_path_factory.mktemp("page")
    size = {"num_parameters": 9000, "dense_parameters": 9000}
    runs = [write_run(folder / "small<&>", [400, 100, 80])]
    grandparent = {"path": "t", "weights_sha256": "e" * 64, "num_parameters": 7}
    grandparent["lineage"] = teacher_record(name="grandparent", weights="e" * 64, flops=1e6)
    teacher = teacher_record(name="parent", flops=1e7, teachers=[grandparent])
    for seed, end in ((1, 40), (2, 44)):
        runs.append(write_run(folder / f"self{seed}", [400, 60, 48, end], seed=seed, student=size))
        runs.append(write_run(folder / f"ki{seed}", [400, 44, 39, 36], seed=seed, student=size, teacher=teacher))
    return compare([read_run(run) for run in runs])


@pytest.fixture(scope="module")
def text(sections):
    return page(sections, title="Two sizes & more")


def tree_of(text):
    return ElementTree.fromstring(text.removeprefix("<!doctype html>\n"))


def test_the_page_is_well_formed_and_needs_nothing(text):
    root = tree_of(text)
    assert root.find("./head/title").text == root.find("./body/h1").text == "Two sizes & more"
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert {"svg", "table"} <= tags
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "foreignObject"}
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] in ("href", "src", "srcset", "data", "action"):
                assert value.startswith("#")
                assert value[1:] in ids
            assert not name.startswith("on")
    assert "@import" not in text
    assert all(link.startswith("#") and link[1:] in ids for link in re.findall(r"url\(([^)]*)\)", text))


def test_drawings_take_the_pages_ink_and_no_ground(text):
    assert "currentColor" in text
    assert "#123456" not in text
    assert not re.search(r"fill: *(#ffffff|white|#000000|black)\b", text)


def test_every_run_and_every_ancestor_is_on_the_page(sections, text):
    root = tree_of(text)
    heads = [cell.text for cell in root.iter("th")]
    for section in sections:
        for run in section.runs:
            assert run.title in heads
    branches = [element for element in root.iter("div") if element.get("class") == "lineage"]
    assert len(branches) == 5
    words = ["".join(branch.itertext()) for branch in branches]
    assert sum("no lineage record" in word for word in words) == 3
    heir = next(branch for branch in branches if "ki1" in "".join(branch.itertext()))
    third = heir.find("./ul/li/ul/li/ul/li/b")  # the run, its teacher, the teacher's teacher
    assert third.text.startswith("taught by grandparent")


def cells_of(table):
    return [["\n".join(cell.itertext()) for cell in row.iter("td")] for row in table.iter("tr")][1:]


def written(values, form, suffix="", scale=1.0):
    """As a cell shows it, by another road than the program's."""
    values = [float(value) / scale for value in values]
    mean = format(statistics.fmean(values), form)
    if len(values) == 1 or min(values) == max(values):
        return mean + suffix
    half = t.interval(0.95, len(values) - 1, 0, statistics.stdev(values) / len(values) ** 0.5)[1]
    low, high = (format(edge, form) for edge in (min(values), max(values)))
    return f"{mean} ± {format(half, form).lstrip('+')}{suffix}\n{low} to {high}{suffix}"


def test_cells_equal_the_csv(sections, text):
    rows = list(csv.DictReader(io.StringIO(csv_text(sections))))
    tables = [table for table in tree_of(text).iter("table") if table.find("caption") is not None]
    assert len(tables) == len(sections) == 2
    for section, table in zip(sections, tables, strict=True):
        found = cells_of(table)
        for arm in section.arms:
            own = [r for r in rows if r["arm"] == arm.label and r["student_parameters"] == str(section.num_parameters)]
            place = next(i for i, cells in enumerate(found) if cells[0] == arm.label)
            assert found[place][1] == written([r["steps"] for r in own], ",.0f")
            assert found[place][5] == written([r["seconds"] for r in own], ".2f", " min", 60)
            assert found[place][6] == written([r["final_ppl"] for r in own], ".2f")
            if arm is not section.baseline:
                costs = ("steps", "student_flops", "flops_with_teacher", "flops_with_ancestors", "seconds")
                expected = [written([r[f"saved_{cost}"] for r in own], ".1f", "%", 0.01) for cost in costs]
                assert found[place + 1][1:6] == expected
                assert found[place + 1][6] == written([r["ppl_change"] for r in own], "+.1f", "%", 0.01)
                assert len({expected[0], expected[2], expected[3]}) == 3  # none is a copy of another


def test_words_where_a_gap_is_not_drawn(tmp_path):
    runs = [write_run(tmp_path / "self", [400, 50]), write_run(tmp_path / "ki", [400, 45], inherits=True)]
    text = page(compare([read_run(run) for run in runs]))
    assert "Not drawn for ki: it has no only teacher" in text
    assert "ki: no lineage record" in text
    assert "1,000 parameters" in tree_of(text).find("./head/title").text


# --- as a browser shows it --------------------------------------------------------------------------------------


def chromium(tmp_path, *arguments):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *arguments, f"file://{tmp_path}/page.html"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_in_light_in_dark_and_on_paper(text, tmp_path):
    from PIL import Image

    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    for name, scheme in (("light", 1), ("dark", 0)):
        shot = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1200,1600"]
        chromium(tmp_path, *shot, f"--screenshot={tmp_path}/{name}.png")
    shades = {name: Image.open(tmp_path / f"{name}.png").convert("L") for name in ("light", "dark")}
    ground = {name: image.getpixel((2, 2)) for name, image in shades.items()}
    assert ground["light"] > 240
    assert ground["dark"] < 40
    ink = {name: image.getextrema() for name, image in shades.items()}
    assert ink["light"][0] < 80
    assert ink["dark"][1] > 180
    chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path}/page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    if shutil.which("pdftotext"):
        said = subprocess.run(["pdftotext", tmp_path / "page.pdf", "-"], capture_output=True, text=True, check=True)
        for words in ("small<&>", "ki2", "grandparent", "validation perplexity", "saving"):
            assert words in said.stdout, words
