"""A signal to any rank, at any moment: all ranks save at the same step and leave with the resumable exit code."""

import hashlib
import os
import random
import signal
import threading
import time

import pytest
import torch

from ki_ds import config as configuration
from ki_ds.errors import EXIT_RESUMABLE, ResumableError
from ki_ds.ranks.preemption import Preemption
from ki_ds.training.loop import train
from tests.commands import ended, start, steps_done, wait_for_step
from tests.tiny import ROOT, records, tiny_config, write_config

CPU = torch.device("cpu")


def test_rows_are_counted_whether_somebody_wants_to_stop_or_not():
    preemption = Preemption()
    for reason, rows, expected in ((None, 0, 1.0), (None, 7, 7.0), ("SIGTERM", 7, 7.0)):
        preemption.reason = reason
        found = preemption.global_rows(rows, CPU)
        assert (found.item(), found.dtype, found.shape) == (expected, torch.float32, ())
        assert preemption.agreed() == (reason is not None)


def test_a_request_counts_from_the_next_step_on():
    preemption = Preemption()
    preemption.global_rows(1, CPU)
    preemption.request("SIGTERM")
    assert not preemption.agreed()  # another rank has not seen it in this step
    preemption.global_rows(1, CPU)
    assert preemption.agreed()
    preemption.request("SIGUSR1")
    assert preemption.reasons() == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_requests_while_handled(number):
    preemption = Preemption()
    before = signal.getsignal(number)
    with preemption.handled():
        signal.raise_signal(number)
        assert preemption.reason == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once():
    with Preemption().handled():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# --- for real ---


@pytest.fixture(scope="module")
def configure(base):
    """configure(name): a configuration file and its run folder. No fixed end: each job is stopped by a signal."""

    def make(name, **groups):
        train = {"num_steps": 100_000, "eval_every": 10**6, "save_every": 10**6, **groups.pop("train", {})}
        config = tiny_config(base / name, base / "corpus", train=train, **groups)
        return write_config(base / f"{name}.yaml", config), base / name

    return make


def newest_step(run_dir):
    return int((run_dir / "checkpoints" / "latest").read_text().strip()[len("step_") :])


def weights(run_dir):
    file = run_dir / "checkpoints" / f"step_{newest_step(run_dir):08d}" / "hf" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def signalled(processes, number, target):
    if target == "group":
        os.killpg(processes[0].pid, number)
    else:
        processes[target].send_signal(number)


@pytest.mark.parametrize(
    ("number", "target"),
    [
        (signal.SIGTERM, "group"),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.slow),
    ],
)
def test_one_rank_or_all_are_signalled(configure, number, target):
    name = f"signalled_{number.name}_{target}"
    config, run_dir = configure(name, data={"num_workers": 1} if target == "group" else {})
    processes = start(config, 2)
    try:
        wait_for_step(run_dir, 3, processes)
        before = steps_done(run_dir)
        signalled(processes, number, target)
        codes, _, errors = ended(processes)
    finally:
        for process in processes:
            process.kill()
    assert codes == [EXIT_RESUMABLE] * 2, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    step = newest_step(run_dir)
    assert line.startswith(f"error: stopped by {number.name} at step {step} of 100000, saved in {run_dir}")
    assert step >= before
    assert records(run_dir, "train")[-1]["step"] == step  # every step that was done is in the checkpoint


@pytest.mark.parametrize(
    ("zero", "stops"),
    [("zero1", 4), *(pytest.param(zero, 20, marks=pytest.mark.slow) for zero in ("zero0", "zero1", "zero2", "zero3"))],
)
def test_stopped_at_random_moments_no_step_is_lost_or_done_twice(configure, zero, stops, record_property):
    """In one process, which a thread signals: at the first step, in a save, in a validation, wherever it falls."""
    choose = random.Random(0)
    num_steps = 12 * stops
    groups = {
        "train": {"num_steps": num_steps, "eval_every": 17, "save_every": 5},
        "data": {"max_valid_samples": 16},
        "engine": {"ds_config": str(ROOT / f"ds_configs/{zero}.json")},
        "model": {"num_layers": 1},
    }
    config, run_dir = configure(f"moments_{zero}_{stops}", **groups)
    saved = [0]
    for _ in range(stops):
        number = choose.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        pauses = choose.random() * 0.05
        sender = threading.Thread(target=signal_after_a_step, args=(run_dir, saved[-1], pauses, number))
        sender.start()
        with pytest.raises(ResumableError, match=f"stopped by {number.name} at step"):
            train(configuration.load(config))
        sender.join()
        assert newest_step(run_dir) == records(run_dir, "train")[-1]["step"]
        saved.append(newest_step(run_dir))
    assert saved == sorted(set(saved))
    train(configuration.load(config))
    assert [r["step"] for r in records(run_dir, "train")] == list(range(1, num_steps + 1))
    whole_config, whole = configure(f"whole_{zero}_{stops}", **groups)
    train(configuration.load(whole_config))
    assert weights(run_dir) == weights(whole)
    record_property("figure", f"{zero}: {stops}/{stops} stops resumed, weights as never stopped")


def signal_after_a_step(run_dir, step, pause, number):
    while steps_done(run_dir) <= step:
        time.sleep(0.005)
    time.sleep(pause)
    os.kill(os.getpid(), number)
