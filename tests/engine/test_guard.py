"""Bad updates never reach a weight, at any ZeRO stage, and never a checkpoint."""

import json
import math
import random
import re

import pytest
import torch

from ki_ds import config as configuration
from ki_ds.engine.guard import FIRST, LONGEST_ROW, WINDOW, Guard
from ki_ds.engine.student import StudentEngine, start
from ki_ds.errors import UserError
from ki_ds.training.setup import prepare
from tests.tiny import ROOT, records, run, run_ranks, tiny_config, write_config

CPU = torch.device("cpu")


def judged(guard, *values, first=1):
    """Verdicts on updates with these (loss, gradient norm)."""
    return [bool(guard.judge(first + i, torch.tensor(a), torch.tensor(b))) for i, (a, b) in enumerate(values)]


def steady(num, seed=0):
    choose = random.Random(seed)
    return [(3.0 + choose.gauss(0, 0.1), 1.0 + choose.gauss(0, 0.2)) for _ in range(num)]


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf), (3.0, -1.0)])
def test_what_is_no_number_is_bad(bad):
    guard = Guard(CPU)
    assert judged(guard, (3.0, 1.0), bad, (3.0, 1e9)) == [False, True, False]
    found = guard.read()
    assert (found.num_bad, found.in_a_row, found.step) == (1, 0, 2)
    assert "at step 2" in str(found)


def test_stop_leaves_out_everything_after_the_first_and_remembers_it():
    guard = Guard(CPU, stop=True)
    assert judged(guard, (3.0, 1.0), (math.nan, 1.0), (3.0, 1.0), (math.inf, 1.0)) == [False, True, True, True]
    assert str(guard.read()) == "the loss is nan at step 2"
    assert guard.read().num_bad == 1


@pytest.mark.parametrize("place", [0, 1])
def test_a_spike_of_loss_or_gradient_is_found_once_there_is_a_past(place):
    spike = [(30.0, 1.0), (3.0, 30.0)][place]
    guard = Guard(CPU, spike_sigmas=8)
    assert judged(guard, *steady(FIRST - 1), spike)[-1] is False
    guard = Guard(CPU, spike_sigmas=8)
    values = steady(2 * WINDOW)
    values[FIRST::40] = [spike] * len(values[FIRST::40])
    assert [i for i, bad in enumerate(judged(guard, *values)) if bad] == list(range(FIRST, 2 * WINDOW, 40))
    assert "a spike at step" in str(guard.read())


def test_without_spikes_nothing_is_found():
    assert not any(judged(Guard(CPU, spike_sigmas=8), *steady(1000)))


def test_the_past_is_that_of_the_last_128_good_updates():
    guard = Guard(CPU, spike_sigmas=6)
    values = [(100.0 + v, n) for v, n in steady(WINDOW)] + [(v, n) for v, n in steady(WINDOW)]
    judged(guard, *values)
    assert judged(guard, (10.0, 1.0)) == [True]


def test_a_guard_that_goes_on_judges_alike():
    values = steady(200)
    values[100] = values[170] = (50.0, 1.0)
    whole = Guard(CPU, spike_sigmas=6)
    expected = judged(whole, *values)
    first = Guard(CPU, spike_sigmas=6)
    before = judged(first, *values[:120])
    second = Guard(CPU, spike_sigmas=6)
    second.load(json.loads(json.dumps(first.state())))
    assert before + judged(second, *values[120:], first=121) == expected
    assert second.state() == whole.state()
    assert second.read().num_bad == 2


def test_what_the_engine_leaves_out_itself_is_counted_unless_fp16_only_lowers_its_scale():
    guard = Guard(CPU)
    guard.left_out(1, torch.tensor(3.0), bad=False)
    assert guard.read().num_bad == 0
    guard.left_out(2, torch.tensor(3.0), bad=True)
    guard.left_out(3, torch.tensor(math.nan), bad=False)
    assert (guard.read().num_bad, guard.read().in_a_row, guard.read().step) == (2, 2, 3)


# --- in training ---


@pytest.fixture
def inject(monkeypatch):
    """inject(value, steps, inner): multiply the loss, or only its gradient, by a value at these steps (from 1)."""

    def make(value, steps, *, gradient_only=False):
        backward = StudentEngine.backward

        class Bad(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                return gradient * value

        def injected(self, loss_sum, rows, *aux):
            if self._engine.global_steps + 1 in steps:
                loss_sum = Bad.apply(loss_sum) if gradient_only else loss_sum * value
            backward(self, loss_sum, rows, *aux)

        monkeypatch.setattr(StudentEngine, "backward", injected)

    return make


def weights_by_step(monkeypatch):
    """A dict that fills with every update's change: {step: whether any weight, or any optimizer state, changed}."""
    changed, step = {}, StudentEngine.step

    def content(engine):
        states = [t for state in engine._optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        shards = [getattr(p, "ds_tensor", p) for p in engine.model.parameters()]
        return [t.detach().clone() for t in [*shards, *states]]

    def watched(self, lr):
        before, done = content(self), self._engine.global_steps
        step(self, lr)
        after = content(self)
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        if self._engine.global_steps > done:  # else it was the end of a micro-step
            changed[done + 1] = not same

    monkeypatch.setattr(StudentEngine, "step", watched)
    return changed


STAGES = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
BY_DEFAULT = [("zero0", 0.0), ("zero1", 1.0), ("zero3", 0.0), ("zero2_offload", 1.0)]


@pytest.mark.parametrize(
    ("zero", "clip"),
    [
        pytest.param(zero, clip, marks=[] if (zero, clip) in BY_DEFAULT else pytest.mark.slow)
        for zero in STAGES
        for clip in (0.0, 1.0)
    ],
)
def test_bad_steps_change_nothing_at_any_stage(base, inject, monkeypatch, zero, clip, record_property):
    """Ten injections, NaN and Inf in loss or gradient: no weight and no optimizer state moves, 10 of 10."""
    bad = {3, 5, 6, 8, 11, 12, 14, 17, 19, 20}
    value = math.nan if clip else math.inf
    inject(value, bad, gradient_only=zero in ("zero1", "zero3"))
    changed = weights_by_step(monkeypatch)
    name = f"bad_{zero}_{clip}"
    train = {"num_steps": 22, "bad_step": "skip", "eval_every": 100, "save_every": 11, "micro_batch_size": 4}
    engine = {"ds_config": str(ROOT / f"ds_configs/{zero}.json")}
    folder = run(base / name, base / "corpus", train=train, engine=engine, optim={"max_grad_norm": clip})
    assert {step for step, moved in changed.items() if not moved} == bad
    record_property("figure", f"{zero}, clipping {clip:g}: unchanged {len(bad)}/{len(bad)}")
    assert records(folder, "train")[-1]["bad_steps"] == 10
    assert all(math.isfinite(r["loss"]) for r in records(folder, "train") if r["step"] not in bad)


def test_half_precision_too(base):
    """In a process of its own: one engine configuration a process."""
    config = tiny_config(
        base / "bad_bf16",
        base / "corpus",
        train={"num_steps": 8, "bad_step": "skip", "save_every": 4},
        engine={"precision": "bf16"},
    )
    (result,) = run_ranks(["-m", "tests.workers.bad_steps", str(write_config(base / "bad_bf16.yaml", config))], world=1)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]) == [3, 6]


@pytest.mark.parametrize("zeros", [("zero1", "zero3"), pytest.param(("zero0", "zero2"), marks=pytest.mark.slow)])
def test_what_is_bad_on_one_rank_is_left_out_on_all(base, zeros):
    """Two ranks; the gradient is no number on the last rank only."""
    files = []
    for zero in zeros:
        config = tiny_config(
            base / f"bad_two_{zero}",
            base / "corpus",
            train={"num_steps": 8, "bad_step": "skip", "save_every": 8},
            engine={"ds_config": str(ROOT / f"ds_configs/{zero}.json")},
            optim={"max_grad_norm": 1.0},
        )
        files.append(str(write_config(base / f"bad_two_{zero}.yaml", config)))
    results = run_ranks(["-m", "tests.workers.bad_steps", *files], world=2)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    for result in results:
        found = [line for line in result.stdout.splitlines() if re.fullmatch(r"\[[\d, ]*\]", line)]
        assert found == ["[3, 6]"] * 2


def test_stop_names_the_step_and_saves_nothing_of_it(base, inject):
    inject(math.nan, {6})
    groups = {"num_steps": 12, "save_every": 5, "log_every": 10, "eval_every": 10}
    with pytest.raises(UserError, match=r"the loss is nan at step 6; the update was not made"):
        run(base / "stopped_bad", base / "corpus", train=groups)
    assert [p.name for p in (base / "stopped_bad" / "checkpoints").glob("step_*")] == ["step_00000005"]


def test_a_run_whose_every_step_is_bad_comes_to_an_end(base, inject):
    inject(math.nan, set(range(3, 100)))
    with pytest.raises(UserError, match="the last of 20 bad updates in a row"):
        run(base / "all_bad", base / "corpus", train={"num_steps": 60, "bad_step": "skip"})
    assert records(base / "all_bad", "train")[-1]["step"] == LONGEST_ROW + 2


def test_spikes_are_left_out_and_a_resumed_run_sees_the_same_ones(base, inject, monkeypatch):
    inject(1e4, {40, 50}, gradient_only=True)
    train = {"num_steps": 52, "bad_step": "skip", "spike_sigmas": 20.0, "save_every": 45, "eval_every": 100}
    changed = weights_by_step(monkeypatch)
    whole = run(base / "spikes", base / "corpus", train=train)
    assert {step for step, moved in changed.items() if not moved} == {40, 50}
    run(base / "spikes_part", base / "corpus", train={**train, "stop_at_step": 45})
    part = run(base / "spikes_part", base / "corpus", train=train)
    assert records(part, "train")[-1]["bad_steps"] == records(whole, "train")[-1]["bad_steps"] == 2


def test_weights_that_are_no_numbers_are_never_saved(base, monkeypatch):
    monkeypatch.setattr(StudentEngine, "weights_are_finite", lambda self: False)
    with pytest.raises(UserError, match="a weight is NaN or Inf at step 2, nothing was saved"):
        run(base / "bad_weights", base / "corpus")
    assert not (base / "bad_weights" / "checkpoints").exists()


def test_weights_are_looked_at(base):
    saved = str(base / "mlm_teacher" / "config.yaml")
    config = configuration.parse(["--config", saved, "--run_dir", str(base / "looked_at")])
    (base / "looked_at").mkdir()
    engine = prepare(config, start(config.engine)).engine
    assert engine.weights_are_finite()
    next(iter(engine.model.parameters())).data.view(-1)[3] = math.nan
    assert not engine.weights_are_finite()
    engine.close()
