"""Savings from curves with known answers; what reading a run folder takes and refuses."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_ds.errors import UserError
from ki_ds.savings import (
    Costs,
    Point,
    costs_to_reach,
    flops_saved_with_teacher,
    read_run,
    savings,
    steps_to_reach,
)
from tests.fake_runs import STUDENT, TEACHER, TOKENS, metric_records, points, write_run


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


# --- reading ----------------------------------------------------------------------------------------------------


def test_steps_done_again_after_a_resume_count_once(tmp_path):
    folder = write_run(tmp_path / "run", [400, 100, 80, 70])
    again = list(metric_records(points([400, 99, 79])))[1:]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in again))
    run = read_run(folder)
    assert [point.ppl for point in run.curve] == [400, 99, 79]  # 300 belongs to the part that was thrown away
    assert [record["step"] for record in run.training] == [100, 200]


def test_other_kinds_ofmetric_records_are_passed_over(tmp_path):
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
