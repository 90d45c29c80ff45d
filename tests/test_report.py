"""What may be compared, and what the table and the three files say."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from ki_ds.errors import UserError
from ki_ds.report import table_rows, text_table, write_report
from ki_ds.savings import (
    compare,
    read_run,
)
from tests.fake_runs import write_run

ROOT = Path(__file__).resolve().parent.parent


def test_table_of_two_runs(tmp_path):
    alone = read_run(write_run(tmp_path / "self", [400, 100, 60, 50]))
    heir = read_run(write_run(tmp_path / "ki", [400, 80, 50, 45], inherits=True))
    rows = table_rows(compare([heir, alone]))  # the order does not matter
    assert [row[0] for row in rows] == ["self-learning", "inheriting", "  saving"]
    assert [row[1] for row in rows] == ["300", "200", "33.3%"]
    assert rows[2][2:] == ("33.3%", "27.8%", "33.3%", "-10.0%")  # 1 - 2/3 * 6500/6000 = 27.8%
    assert [row[4] for row in rows[:2]] == ["10.00 min", "6.67 min"]
    assert [row[5] for row in rows[:2]] == ["50.00", "45.00"]


def test_not_reached_is_said_and_no_number_made_up(tmp_path):
    alone = read_run(write_run(tmp_path / "self", [400, 100, 50]))
    heir = read_run(write_run(tmp_path / "ki", [400, 120, 55], inherits=True))
    rows = table_rows(compare([alone, heir]))
    assert rows[1][1:5] == rows[2][1:5] == ("not reached", "-", "-", "-")
    assert rows[2][5] == "+10.0%"


def test_one_seed_of_two_not_reached_gives_no_mean(tmp_path):
    runs = [
        read_run(write_run(tmp_path / f"{kind}{seed}", [400, 100, last], seed=seed, inherits=kind == "ki"))
        for kind, seed, last in (("self", 1, 50), ("self", 2, 50), ("ki", 1, 40), ("ki", 2, 60))
    ]
    rows = table_rows(compare(runs))
    assert rows[2][1] == "not reached in 1 of 2"
    assert rows[0][5] == "50.00 ± 0.00"


def test_mean_and_spread_over_seeds_paired_by_seed(tmp_path):
    ppls = {("self", 1): [400, 100, 64, 50], ("self", 2): [400, 100, 64, 60]}
    ppls |= {("ki", 1): [400, 50, 45, 40], ("ki", 2): [400, 100, 60, 45]}
    runs = [
        read_run(write_run(tmp_path / f"{kind}{seed}", curve, seed=seed, inherits=kind == "ki"))
        for (kind, seed), curve in ppls.items()
    ]
    comparison = compare(runs)
    assert [pair.target_ppl for pair in comparison.savings[0]] == [50, 60]
    assert table_rows(comparison)[2][1] == "50.0% ± 23.6%"  # 2/3 and 1/3


def test_several_inheriting_arms_are_named_by_what_differs(tmp_path):
    alone = read_run(write_run(tmp_path / "self", [400, 50]))
    heirs = [
        read_run(write_run(tmp_path / name, [400, 45], inherits=True, config={"inherit": {"schedule": name}}))
        for name in ("linear", "heaviside")
    ]
    labels = [arm.label for arm in compare([alone, *heirs]).arms]
    assert labels[1:] == ["inheriting (inherit.schedule=linear)", "inheriting (inherit.schedule=heaviside)"]


def test_labels_name_arms_and_part_equal_configurations(tmp_path):
    folders = [write_run(tmp_path / name, [400, 45], inherits=True) for name in ("a", "b")]
    with pytest.raises(UserError, match="same configuration and seed 1"):
        compare([read_run(folder) for folder in folders])
    comparison = compare([read_run(f"teacher {folder.name}={folder}") for folder in folders])
    assert [arm.label for arm in comparison.arms] == ["teacher a", "teacher b"]


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("valid_masks", {"seed": 2, "variants": 1}),
        ("data", {"train_sha256": "a" * 64, "valid_sha256": "e" * 64, "tokenizer_sha256": "d" * 64}),
        ("student", {"num_parameters": 7, "dense_parameters": 7}),
        ("task", "mlm"),
    ],
)
def test_runs_that_say_nothing_about_each_other_are_refused(tmp_path, key, other):
    runs = [read_run(write_run(tmp_path / "self", [400, 50]))]
    runs.append(read_run(write_run(tmp_path / "ki", [400, 45], inherits=True, **{key: other})))
    with pytest.raises(UserError, match=rf"self and .*ki cannot be compared: {key}.* is .+ and ") as error:
        compare(runs)
    assert "\n" not in str(error.value)


def test_times_of_different_machines_are_not_compared(tmp_path):
    alone = read_run(write_run(tmp_path / "self", [400, 100, 50]))
    heir = read_run(write_run(tmp_path / "ki", [400, 50, 45], inherits=True, world_size=1))
    comparison = compare([alone, heir])
    assert table_rows(comparison)[2][4] == "other machine"
    assert any("their times are not compared" in note for note in comparison.notes)


def test_several_teachers_are_told_apart(tmp_path):
    """By their sizes and domains, but not by where they lie; each is named on the page."""
    facts = {"path": "t", "num_parameters": 250, "weights_sha256": "c" * 64, "valid_ppl": 21.5}
    runs = [write_run(tmp_path / "self", [400, 100, 50])]
    arms = {"one": (["wb"], ["cs"]), "other": (["cs"], ["wb"]), "moved": (["wb"], ["cs"])}
    for seed, (name, domains) in enumerate(arms.items()):
        teachers = [facts | {"num_parameters": 250 + i, "domains": d} for i, d in enumerate(domains)]
        entries = [{"path": f"{name}/{i}", "domains": d, "share": None} for i, d in enumerate(domains)]
        config = {"teachers": entries}
        runs.append(
            write_run(tmp_path / name, [400, 60, 45], inherits=True, seed=seed, teachers=teachers, config=config)
        )
    comparison = write_report(runs, tmp_path / "r.html")
    assert [[run.name for run in arm.runs] for arm in comparison.arms] == [["self"], ["one", "moved"], ["other"]]
    assert "teachers.0.domains=['wb']" in comparison.arms[1].label
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    for words in ("wb, cs", "250, 251", "21.50, 21.50"):
        assert words in page
    assert "the teacher</text>" not in page.replace("- ", "")  # no one perplexity to draw


# --- files ------------------------------------------------------------------------------------------------------


def test_writes_page_curves_and_csv(tmp_path):
    folders = [write_run(tmp_path / "self", [400, 100, 60, 50])]
    folders.append(write_run(tmp_path / "ki<&>", [400, 80, 50, 45], inherits=True))
    comparison = write_report(folders, tmp_path / "out" / "report.html")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "currentColor" in page
    assert "ki&lt;&amp;&gt;" in page
    assert "27.8% of the FLOPs saved with the teacher counted, 33.3% of the steps" in page
    for network in ('src="http', 'href="http', "@import", "<script", "url(http"):
        assert network not in page
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "report.csv").open(encoding="utf-8") as file:
        alone, heir = csv.DictReader(file)
    assert (alone["arm"], alone["steps"], alone["saved_steps"]) == ("self-learning", "300.0", "")
    assert float(heir["saved_flops_with_teacher"]) == pytest.approx(1 - 2 / 3 * 6500 / 6000)
    assert comparison.baseline is not None


def test_page_of_runs_without_a_baseline_or_with_an_unreached_target(tmp_path):
    alone = write_run(tmp_path / "self", [400, 100, 50])
    heir = write_run(tmp_path / "ki", [400, 120, 55], inherits=True)
    write_report([alone, heir], tmp_path / "a.html")
    assert "final perplexity was not reached" in (tmp_path / "a.html").read_text(encoding="utf-8")
    write_report([heir], tmp_path / "b.html")
    assert "No self-learning run was given" in (tmp_path / "b.html").read_text(encoding="utf-8")
    write_report([alone], tmp_path / "c.html")
    assert "saved" not in (tmp_path / "c.csv").read_text(encoding="utf-8").splitlines()[1]


def test_text_table_shows_every_cell(tmp_path):
    runs = [read_run(write_run(tmp_path / "self", [400, 100, 60, 50]))]
    heir = write_run(tmp_path / "ki", [400, 80, 50, 45], inherits=True)
    runs.append(read_run(f"teacher [bold]={heir}"))  # brackets are text, not markup
    comparison = compare(runs)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(text_table(comparison))
    text = console.export_text()
    for row in table_rows(comparison):
        for cell in row:
            assert cell.strip() in text


def test_command_prints_the_table_last_and_errors_in_one_line(tmp_path):
    folders = [str(write_run(tmp_path / "self", [400, 50]))]
    folders.append(str(write_run(tmp_path / "ki", [400, 45], inherits=True)))
    command = [sys.executable, str(ROOT / "tools" / "report.py")]
    done = subprocess.run(
        [*command, *folders, "--out", str(tmp_path / "r.html")], capture_output=True, text=True, check=True
    )
    assert done.stdout.index("wrote ") < done.stdout.index("saving")
    failed = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
