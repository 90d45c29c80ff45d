"""The rank that is slower than the others is named, and none where all are alike."""

import random
from types import SimpleNamespace

import pytest
import torch

from ki_ds.ranks import stragglers
from ki_ds.ranks.stragglers import WINDOW, Pace, lower_quartile
from tests.commands import ended, start, steps_done, wait_for_step
from tests.tiny import records, tiny_config, write_config

CPU = torch.device("cpu")


def test_a_rank_that_is_slow_is_named_once_and_again_when_it_keeps_up():
    pace = Pace(CPU)
    assert pace.compare([0.10, 0.11, 0.09], 20, 0.5) is None
    line = pace.compare([0.10, 0.22, 0.09], 30, 0.5)
    assert line.startswith("warning: rank 1 is slow: at step 30 its data and forward take 220 ms, those of the other")
    assert "ranks 95 ms (lower quartiles of 12 steps)" in line
    assert pace.compare([0.10, 0.22, 0.09], 40, 0.5) is None
    assert pace.compare([0.10, 0.12, 0.09], 50, 0.5) == "rank 1 keeps up again at step 50"
    assert pace.compare([0.10, 0.12, 0.09], 60, 0.5) is None


def test_a_little_time_is_no_matter_however_many_times_it_is():
    assert Pace(CPU).compare([0.001, 0.003], 20, 0.5) is None


def test_data_and_computation_are_timed_and_waiting_is_not(monkeypatch):
    seen, clock = [], SimpleNamespace(now=100.0)
    monkeypatch.setattr(stragglers, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(stragglers, "world_size", lambda: 2)
    monkeypatch.setattr(stragglers, "all_sum", lambda medians: seen.append(medians.tolist()) or medians)

    def takes(seconds):
        clock.now += seconds

    def batches():
        for number in range(WINDOW):
            takes(0.25)
            yield number

    pace = Pace(CPU)
    for number, batch in enumerate(pace.loading(batches())):
        assert batch == number
        if 0 < number < WINDOW - 1:
            assert pace.report(number) is None  # too few steps
        for seconds, alone in ((0.5, True), (1.0, True), (4.0, False)):
            with pace.computing(alone=alone):
                takes(seconds)
    pace.report(WINDOW)
    assert seen == [[0, 0]] * (WINDOW - 2) + [[1.75, 0]]


def test_a_rank_slowed_twofold_is_named_within_20_steps_and_no_other_in_2000():
    """With a noise of 10%, and one step in 5 three times as long."""
    choose = random.Random(0)
    num_steps, slow_from, log_every = 2000, 1803, 10
    times = [
        [choose.gauss(0.1, 0.01) * (3 if choose.random() < 0.2 else 1) for _ in range(num_steps)] for _ in range(4)
    ]
    times[2][slow_from:] = [2 * t for t in times[2][slow_from:]]
    pace, said = Pace(CPU), []
    for step in range(WINDOW, num_steps, log_every):
        quartiles = [lower_quartile(of_rank[step - WINDOW : step]) for of_rank in times]
        if line := pace.compare(quartiles, step, 0.3):
            said.append((step, line))
    ((step, line),) = said
    assert slow_from < step <= slow_from + 20
    assert "rank 2 is slow" in line


def test_one_rank_alone_is_no_straggler():
    assert Pace(CPU).report(20) is None


@pytest.mark.slow
@pytest.mark.parametrize("victim", [None, 0, 1])
def test_for_real(base, victim, record_property):
    """One of two ranks takes twice as long from step 200 on; 200 steps before are clean."""
    name = f"slow_{victim}"
    train = {"num_steps": 260, "eval_every": 1000, "save_every": 1000, "log_every": 5}
    config = write_config(base / f"{name}.yaml", tiny_config(base / name, base / "corpus", train=train))
    program = ["-m", "tests.workers.hanging", str(-1 if victim is None else victim), "200", "slow"]
    processes = start(config, 2, program)
    try:
        wait_for_step(base / name, 1, processes)
        codes, _, errors = ended(processes)
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], errors
    assert steps_done(base / name) == 52
    found = [(r["step"], r["line"]) for r in records(base / name, "straggler")]
    record_property("figure", f"rank {victim} slowed from step 200 on: named at {[step for step, _ in found]}")
    named = [(step, line) for step, line in found if "is slow" in line]
    assert not [step for step, _ in named if step < 200]
    if victim is not None:
        assert named[0][0] <= 220
        assert f"rank {victim} is slow" in named[0][1]
