"""Savings from curves with known answers; what may be compared; what the three files say."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ki_ds.errors import UserError
from ki_ds.report import (
    Costs,
    Point,
    compare,
    costs_to_reach,
    flops_saved_with_teacher,
    read_run,
    savings,
    steps_to_reach,
    table_rows,
    text_table,
    write_report,
)

ROOT = Path(__file__).resolve().parent.parent
STUDENT, TEACHER, TOKENS = 1000, 250, 64  # parameters, and tokens a step


def points(ppls, *, taught_steps=0, seconds=2.0):
    """A curve validated every 100 steps from step 0 on."""
    return [_point(100 * index, ppl, taught_steps, seconds) for index, ppl in enumerate(ppls)]


def _point(step, ppl, taught_steps, seconds):
    student = 6.0 * STUDENT * TOKENS * step
    teacher = 2.0 * TEACHER * TOKENS * min(step, taught_steps)
    return Point(Costs(step, student, student + teacher, seconds * step), ppl)


def write_run(folder, ppls, *, inherits=False, seed=1, changes=None, config=None, **manifest):
    """A run folder as training leaves it."""
    folder.mkdir()
    teacher = {"path": "t", "num_parameters": TEACHER, "weights_sha256": "c" * 64, "valid_ppl": 21.5}
    record = {
        "name": folder.name,
        "task": "causal",
        "status": "finished",
        "world_size": 2,
        "device": "x86_64 CPU",
        "student": {"num_parameters": STUDENT, "dense_parameters": STUDENT},
        "teacher": teacher if inherits else None,
        "data": {"train_sha256": "a" * 64, "valid_sha256": "b" * 64, "tokenizer_sha256": "d" * 64},
        "valid_masks": {"seed": 1, "variants": 1},
    }
    (folder / "run.json").write_text(json.dumps(record | manifest), encoding="utf-8")
    settings = {"run_dir": str(folder), "seed": seed, "optim": {"lr": 1e-3}, "inherit": {"schedule": "none"}}
    settings["inherit"] = {"schedule": "linear", "steps": 200} if inherits else {"schedule": "none", "steps": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})), encoding="utf-8")
    records = _records(points(ppls, taught_steps=200 if inherits else 0))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return folder


def _records(curve):
    for point in curve:
        costs = point.costs
        totals = {"step": costs.steps, "tokens": costs.steps * TOKENS, "seconds": costs.seconds}
        totals |= {
            "student_flops": costs.student_flops,
            "teacher_flops": costs.flops_with_teacher - costs.student_flops,
        }
        if costs.steps:
            yield {"kind": "train", **totals, "alpha": 0.5, "ce": 3.0, "kl": 0.1, "loss": 2.0}
        yield {"kind": "valid", **totals, "ce_sum": math.log(point.ppl) * 10, "num_rows": 10, "ppl": point.ppl}


# --- formulas ---------------------------------------------------------------------------------------------------


def test_paper_footnote_on_flops_with_the_teacher_counted():
    """LARGE has at 55k steps what BASE -> LARGE has at 40k: 27.3% of the steps, 18.7% with the teacher's forward."""
    step_saving = 1 - 40_000 / 55_000
    assert round(100 * step_saving, 1) == 27.3
    saved = flops_saved_with_teacher(step_saving, student_params=355e6, teacher_params=125e6)
    assert round(100 * saved, 1) == 18.7


def test_paper_footnote_from_two_curves():
    def curve(steps, ppls, teacher):
        flops = [(6 * 355e6 * s, (6 * 355e6 + 2 * teacher) * s) for s in steps]
        return [Point(Costs(s, own, both, s), p) for s, (own, both), p in zip(steps, flops, ppls, strict=True)]

    saved = savings(curve([0, 55_000], [50, 4.28], 0), curve([0, 40_000, 60_000], [50, 4.28, 4.0], 125e6)).saved
    assert [round(100 * part, 1) for part in (saved.steps, saved.student_flops, saved.flops_with_teacher)] == [
        27.3,
        27.3,
        18.7,
    ]


def test_interpolates_in_log_perplexity():
    assert steps_to_reach(points([100, 25]), 50) == pytest.approx(50)
    costs = costs_to_reach(points([100, 25], taught_steps=100), 50)
    assert costs.seconds == pytest.approx(100)
    assert costs.flops_with_teacher == pytest.approx(50 * TOKENS * (6 * STUDENT + 2 * TEACHER))


def test_first_crossing_counts():
    assert steps_to_reach(points([100, 40, 60, 30]), 40) == 100
    assert steps_to_reach(points([30, 40]), 35) == 0


def test_never_reached_is_none():
    assert steps_to_reach(points([100, 40]), 39.9) is None
    assert steps_to_reach([], 10) is None


def test_infinite_perplexity_is_not_interpolated():
    assert steps_to_reach(points([math.inf, 40]), 50) == 100


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=20), st.floats(1, 1e6))
def test_crossing_lies_between_the_validations_around_it(ppls, target):
    curve = points(ppls)
    steps = steps_to_reach(curve, target)
    if steps is None:
        assert min(ppls) > target
        return
    after = next(index for index, ppl in enumerate(ppls) if ppl <= target)
    assert max(after - 1, 0) * 100 <= steps + 1e-6
    assert steps <= after * 100 + 1e-6


def test_savings_charge_the_baseline_up_to_its_own_first_crossing():
    result = savings(points([100, 50, 50, 50]), points([100, 50]))
    assert result.baseline.steps == 100
    assert result.saved.steps == 0


def test_inheritance_that_costs_more_is_a_negative_saving():
    result = savings(points([100, 50]), points([100, 70.7106781, 50], taught_steps=200))
    assert result.saved.steps == pytest.approx(-1)
    assert result.saved.flops_with_teacher < result.saved.student_flops


# --- comparison -------------------------------------------------------------------------------------------------


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


# --- reading ----------------------------------------------------------------------------------------------------


def test_steps_done_again_after_a_resume_count_once(tmp_path):
    folder = write_run(tmp_path / "run", [400, 100, 80, 70])
    again = list(_records(points([400, 99, 79])))[1:]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in again))
    run = read_run(folder)
    assert [point.ppl for point in run.curve] == [400, 99, 79]  # 300 belongs to the part that was thrown away
    assert [record["step"] for record in run.training] == [100, 200]


def test_other_kinds_of_records_are_passed_over(tmp_path):
    folder = write_run(tmp_path / "run", [400, 100])
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "teacher_freed", "step": 40}) + "\n")
    assert len(read_run(folder).curve) == 2


def test_bad_run_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"run.json cannot be read"):
        read_run(tmp_path / "nowhere")
    folder = write_run(tmp_path / "running", [400, 100], status="running")
    with pytest.raises(UserError, match=r"is not finished.*--allow_unfinished"):
        read_run(folder)
    assert read_run(folder, allow_unfinished=True).manifest["status"] == "running"
    (folder / "config.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(UserError, match="is not YAML"):
        read_run(folder, allow_unfinished=True)
    (folder / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is not JSON"):
        read_run(folder)
    (folder / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="lacks task, status"):
        read_run(folder)


def test_broken_metrics_name_file_and_line(tmp_path):
    folder = write_run(tmp_path / "run", [400, 100])
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    (folder / "metrics.jsonl").write_text(text + '{"kind": "tr', encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 4 is not a record"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no validation yet"):
        read_run(folder)


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
