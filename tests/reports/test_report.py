"""The three files and the command, on runs of known curves and on a chain that was really trained."""

import csv
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from ki_ds.errors import UserError
from ki_ds.reports import report
from ki_ds.reports.results import read_run
from ki_ds.reports.savings import compare
from ki_ds.reports.tables import comparison_table
from tests import forked
from tests.fake_runs import write_run
from tests.tiny import inherit, run

ROOT = Path(__file__).resolve().parents[2]


def test_writes_page_curves_and_csv(tmp_path):
    folders = [write_run(tmp_path / "self", [400, 100, 60, 50])]
    folders.append(write_run(tmp_path / "ki<&>", [400, 80, 50, 45], inherits=True))
    (section,) = report.write_report(folders, tmp_path / "out" / "report.html", title="<My> runs")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert "ki&lt;&amp;&gt;" in page
    assert "<h1>&lt;My&gt; runs</h1>" in page
    assert "27.8% of the FLOPs saved with the teacher counted, 33.3% of the steps" in page
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "report.csv").open(encoding="utf-8") as file:
        alone, heir = csv.DictReader(file)
    assert (alone["arm"], alone["steps"], alone["saved_steps"]) == ("self-learning", "300.0", "")
    assert float(heir["saved_flops_with_teacher"]) == pytest.approx(1 - 2 / 3 * 6500 / 6000)
    assert section.baseline is not None


def test_page_of_runs_without_a_baseline_or_with_an_unreached_target(tmp_path):
    alone = write_run(tmp_path / "self", [400, 100, 50])
    heir = write_run(tmp_path / "ki", [400, 120, 55], inherits=True)
    report.write_report([alone, heir], tmp_path / "a.html")
    assert "final perplexity was not reached" in (tmp_path / "a.html").read_text(encoding="utf-8")
    report.write_report([heir], tmp_path / "b.html")
    assert "No self-learning run was given" in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_nothing_is_written_when_a_run_is_refused(tmp_path):
    folders = [write_run(tmp_path / "self", [400, 50]), write_run(tmp_path / "ki", [400, 45], valid_masks={"seed": 2})]
    with pytest.raises(UserError, match=r"valid_masks\.seed is 1 and 2"):
        report.write_report(folders, tmp_path / "r.html")
    running = write_run(tmp_path / "running", [400, 50], status="running")
    with pytest.raises(UserError, match="not finished"):
        report.write_report([running], tmp_path / "r.html")
    assert not list(tmp_path.glob("r.*"))
    report.write_report([running], tmp_path / "r.html", allow_unfinished=True)
    assert len(list(tmp_path.glob("r.*"))) == 3
    with pytest.raises(UserError, match="cannot be written"):
        report.write_report([folders[0]], tmp_path / "self" / "run.json" / "r.html")


def test_text_table_shows_every_cell(tmp_path):
    runs = [read_run(write_run(tmp_path / "self", [400, 100, 60, 50]))]
    heir = write_run(tmp_path / "ki", [400, 80, 50, 45], inherits=True)
    runs.append(read_run(f"teacher [bold]={heir}"))  # brackets are text, not markup
    sections = compare(runs)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.text_table(sections))
    text = console.export_text()
    for row in comparison_table(sections[0]).rows:
        for cell in row:
            assert cell.strip() in text


def test_command_prints_the_table_and_errors_in_one_line(tmp_path):
    folders = [str(write_run(tmp_path / "self", [400, 50]))]
    folders.append(str(write_run(tmp_path / "ki", [400, 45], inherits=True)))
    command = [sys.executable, str(ROOT / "tools" / "report.py")]
    arguments = [*folders, "--out", str(tmp_path / "r.html"), "--title", "A title"]
    done = forked.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.index("wrote ") < done.stdout.index("saving") < done.stdout.index("The target is")
    assert "<title>A title</title>" in (tmp_path / "r.html").read_text(encoding="utf-8")
    failed = forked.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1


def test_a_chain_that_was_trained(base):
    """Teacher, student alone and inheriting: two sections, ancestors counted, a gap, and a tree of two generations."""
    alone = run(base / "report_alone", base / "corpus")
    heir = inherit(base, "report_heir")
    sections = report.write_report([heir, alone, base / "mlm_teacher"], base / "report.html")
    assert [[run.name for run in section.runs] for section in sections] == [
        ["mlm_teacher"],
        ["report_heir", "report_alone"],
    ]
    (teacher,), (inheriting, _) = (section.runs for section in sections)
    end = inheriting.curve[-1].costs
    own_teacher = teacher.lineage["student_flops"]
    assert end.flops_with_ancestors - end.flops_with_teacher == pytest.approx(own_teacher)
    assert inheriting.teacher_ppl == teacher.lineage["valid_ppl"]
    assert len(inheriting.teacher_gaps) == len(inheriting.curve)
    root = ElementTree.fromstring((base / "report.html").read_text(encoding="utf-8").removeprefix("<!doctype html>"))
    (tree,) = (div for div in root.iter("div") if div.get("class") == "lineage" and div.find("p").text == "report_heir")
    assert tree.find("./ul/li/ul/li/b").text.startswith("taught by mlm_teacher")
