"""The schedule auto: alpha from the gap to the teacher, and the end of teaching."""

import json
import math
from itertools import pairwise

import pytest
import torch

from ki_ds.config import InheritConfig, RunConfig
from ki_ds.errors import UserError
from ki_ds.files import read_json
from ki_ds.training.handover import DECAY, FLOOR, PATIENCE, HandOver
from tests.teachers.cache_cases import cache_of, config_of
from tests.tiny import records, run, tiny_config, train_ranks, write_config

CPU = torch.device("cpu")


def told(gap, rows=10.0, teacher_ce=4.0):
    """What the loss says of a teacher with a student `gap` nats a row behind it."""
    return torch.tensor([[0.3 * rows, teacher_ce * rows, rows, (teacher_ce + gap) * rows]])


def after(handover, gaps, rows=10.0):
    alphas = []
    for gap in gaps:
        handover.add(told(gap, rows))
        handover.settle()
        alphas.append(float(handover.alpha))
    return alphas


def test_alpha_is_what_the_fourth_power_of_the_perplexities_ratio_lacks_to_1():
    handover = HandOver(CPU)
    assert float(handover.alpha) == 1.0
    (alpha,) = after(handover, [0.2])
    assert alpha == pytest.approx(1 - (math.exp(4.0) / math.exp(4.2)) ** 4, rel=1e-6)


def test_the_gap_is_a_moving_average_weighted_by_rows():
    handover = HandOver(CPU)
    handover.add(told(0.8, rows=30))
    handover.add(told(0.4, rows=10))  # another micro-batch of the same step
    handover.settle()
    assert float(handover.alpha) == pytest.approx(1 - math.exp(-4 * 0.7), rel=1e-6)
    (alpha,) = after(handover, [0.2], rows=20)
    mean = (DECAY * 28 + 4) / (DECAY * 40 + 20)
    assert alpha == pytest.approx(1 - math.exp(-4 * mean), rel=1e-6)


def test_alpha_never_rises_and_stays_above_0_until_it_is_sure():
    alphas = after(HandOver(CPU), [1.0] * 5 + [0.1] * 60 + [1.0] * 20 + [0.0] * 200)
    assert all(later <= earlier for earlier, later in pairwise(alphas))
    assert alphas[-1] == pytest.approx(FLOOR)


def test_a_student_that_is_ahead_for_long_enough_is_left_to_itself_for_good():
    handover = HandOver(CPU)
    alphas = after(handover, [0.2] + [-0.5] * 40)
    ahead = next(i for i in range(41) if 0.2 * DECAY**i - 0.5 * sum(DECAY**k for k in range(i)) < 0)
    assert alphas.index(0.0) == ahead + PATIENCE - 1
    assert handover.taught_steps() == ahead + PATIENCE
    assert set(after(handover, [3.0] * 30)) == {0.0}
    assert handover.taught_steps() == ahead + PATIENCE


def test_one_step_behind_begins_the_wait_anew():
    handover = HandOver(CPU)
    after(handover, [-0.1] * (PATIENCE - 1) + [5.0])
    assert handover.taught_steps() is None
    assert float(handover.alpha) == pytest.approx(FLOOR)


def test_a_step_without_taught_rows_changes_nothing_but_the_count():
    handover = HandOver(CPU)
    after(handover, [0.7])
    before = handover.state()
    handover.add(torch.zeros(2, 4))
    handover.settle()
    assert handover.state() == [*before[:4], 2.0]
    handover = HandOver(CPU)
    handover.add(torch.empty(0, 4))
    handover.settle()
    assert float(handover.alpha) == 1.0


def test_a_loss_that_is_no_number_changes_nothing_but_the_count():
    handover = HandOver(CPU)
    after(handover, [0.7])
    before = handover.state()
    after(handover, [math.nan])
    assert handover.state() == [*before[:4], 2.0]


def test_several_teachers_count_by_their_rows():
    handover = HandOver(CPU)
    handover.add(torch.cat([told(1.0, rows=30), told(-1.0, rows=10)]))
    handover.settle()
    assert float(handover.alpha) == pytest.approx(1 - math.exp(-4 * 0.5), rel=1e-6)


def test_a_restored_state_goes_on_bit_for_bit():
    gaps = [0.9 - 0.02 * i for i in range(90)]
    whole, first = HandOver(CPU), HandOver(CPU)
    expected = after(whole, gaps)
    found = after(first, gaps[:33])
    second = resumed(json.loads(json.dumps(first.saved())))
    assert found + after(second, gaps[33:]) == expected
    assert second.taught_steps() == whole.taught_steps() is not None


def resumed(saved, *, step=30, start_step=0, teachers=("a",)):
    config = RunConfig(inherit=InheritConfig(schedule="auto", start_step=start_step))
    return HandOver.of_run(config, {"step": step, "handover": saved}, list(teachers), CPU)


def test_a_checkpoints_state_is_of_one_period_and_its_teachers():
    taught = resumed(None, step=0)
    after(taught, [0.5] * 3)
    saved = json.loads(json.dumps(taught.saved()))
    assert resumed(saved).state() == taught.state()
    for other in (resumed(saved, teachers=("b",)), resumed(saved, teachers=("a", "b")), resumed(saved, start_step=30)):
        assert float(other.alpha) == 1.0
        assert other.taught_steps() is None
        assert other.first_step == 30
    assert resumed(saved).first_step == 0
    older = {"start_step": 0, "state": saved["state"]}
    assert resumed(older).state() == taught.state()
    assert resumed(resumed(saved, teachers=("b",)).saved(), step=40, teachers=("b",)).first_step == 30


# ---------------------------------------------------------------------------------- in a run

AUTO = {"schedule": "auto", "steps": None}
STEPS = {"num_steps": 60, "eval_every": 30, "save_every": 7, "log_every": 5}


def auto(base, name, task="mlm", **groups):
    train = STEPS | groups.pop("train", {})
    teacher = {"path": str(base / f"{task}_teacher"), **groups.pop("teacher", {})}
    run(base / name, base / "corpus", task=task, teacher=teacher, inherit=AUTO, train=train, **groups)
    return base / name


@pytest.fixture(scope="module")
def whole(base):
    """A run whose student passes its teacher, which had 8 steps."""
    return auto(base, "auto_whole")


def weights(folder):
    return json.loads((folder / "best" / "lineage.json").read_text())["weights_sha256"]


def test_a_run_hands_over_frees_its_teacher_and_says_when(whole):
    lines = records(whole, "train")
    alphas = [line["alpha"] for line in lines]
    manifest = read_json(whole / "run.json")
    steps = manifest["inherit"]["steps"]
    assert 0.1 < alphas[0] < 1
    taught = [line for line in lines if line["alpha"] > 0]
    assert taught[0]["ce"] > taught[0]["teacher_ce"] > 0
    assert taught[-1]["ce"] < taught[-1]["teacher_ce"]
    assert alphas == sorted(alphas, reverse=True)
    assert PATIENCE < steps < 60
    assert [line["alpha"] > 0 for line in lines] == [line["step"] <= steps for line in lines]
    (freed,) = records(whole, "teacher_freed")
    assert steps <= freed["step"] < steps + STEPS["log_every"]
    assert manifest["inheriting_steps"] == steps
    assert lines[-1]["teacher_flops"] == next(r["teacher_flops"] for r in lines if r["step"] == freed["step"])
    lineage = json.loads((whole / "best" / "lineage.json").read_text())
    assert lineage["inherit"] == {"schedule": "auto", "steps": steps, "tau": 2.0}


@pytest.mark.parametrize("stop", [10, 50])
def test_a_resume_before_or_after_is_bitwise_the_same_run(base, whole, stop):
    name = f"auto_stopped_{stop}"
    auto(base, name, train={"stop_at_step": stop})
    auto(base, name)
    assert weights(base / name) == weights(whole)
    kept = ("step", "alpha", "loss", "ce", "kl")
    found, expected = ([[r[k] for k in kept] for r in records(f, "train")] for f in (base / name, whole))
    assert found == expected


@pytest.fixture(scope="module")
def other_teacher(base):
    """As good as the first, with other weights."""
    return run(base / "auto_other_teacher", base / "corpus", model={"hidden_size": 16}, train={"num_steps": 8}, seed=2)


@pytest.mark.parametrize("stop", [10, 50], ids=["before", "after"])
def test_another_teacher_is_refused_or_begins_anew_before_the_hand_over_and_after(base, other_teacher, stop, capsys):
    name, other = f"auto_changed_{stop}", {"path": str(other_teacher)}
    auto(base, name, train={"stop_at_step": stop})
    with pytest.raises(
        UserError, match=rf"inherited from .*mlm_teacher, teacher.path={other_teacher} has other weights"
    ):
        auto(base, name, teacher=other)
    with pytest.raises(UserError, match=r"teacher.path=.*nobody cannot be read as a model"):
        auto(base, name, teacher={"path": str(base / "nobody")})
    capsys.readouterr()
    last = {"stop_at_step": stop + 1}
    auto(base, name, train=last)
    assert ("is not asked: alpha is 0 from step 51 on" in capsys.readouterr().out) == (stop == 50)
    auto(base, name, teacher=other, train={"changed_config": "allow", "stop_at_step": stop + 2})
    lines = records(base / name, "train")
    assert lines[-2]["alpha"] < 0.5
    assert lines[-1]["alpha"] == 1.0
    auto(base, name, teacher=other, train={"changed_config": "allow", "stop_at_step": stop + 4})
    assert records(base / name, "train")[-1]["alpha"] < 1.0
    manifest = read_json(base / name / "run.json")
    assert [teacher["path"] for teacher in manifest["teachers"]] == [str(other_teacher)]
    assert [teacher["path"] for teacher in manifest["former_teachers"]] == [str(base / "mlm_teacher")]


def test_how_often_metrics_are_written_changes_no_weight(base, whole):
    assert weights(auto(base, "auto_rarely", train={"log_every": 20})) == weights(whole)


def test_teacher_ranks_leave_when_their_students_are_left_alone(base):
    for name, teacher in (("auto_apart", {"placement": "ranks", "ahead": 3}), ("auto_together", {})):
        teacher["path"] = str(base / "mlm_teacher")
        config = tiny_config(base / name, base / "corpus", teacher=teacher, inherit=AUTO, train=STEPS)
        results = train_ranks(write_config(base / f"{name}.yaml", config), world=1 + ("placement" in teacher))
        assert not any(r.returncode for r in results), [r.stderr[-500:] for r in results]
    assert weights(base / "auto_apart") == weights(base / "auto_together")
    assert read_json(base / "auto_apart" / "run.json")["inherit"]["steps"] < 60


def test_entries_of_a_cache_say_too_little(base, tmp_path):
    cache_of(config_of(base, inherit={"schedule": "linear", "steps": 60}), tmp_path / "cache", topk=4)
    teacher = {"placement": "cache", "path": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=r"auto compares the student with the whole teacher, .* holds K entries a row"):
        auto(base, "auto_topk", teacher=teacher, train={"num_steps": 6})
