"""Checkpoints in the background are those that would have been saved at once, and no step is lost by them."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import threading
import time
from collections import OrderedDict

import pytest
import torch

from ki_ds.checkpoints import checkpoint, saver
from ki_ds.checkpoints.saver import HostCopies, Saver
from ki_ds.config import schedules
from ki_ds.errors import EXIT_RESUMABLE, ResumableError, UserError
from ki_ds.training import loop as training
from tests.checkpoints.test_checkpoint import FakeEngine, export, names
from tests.commands import ended, start, wait_for_step
from tests.tiny import ROOT, records, run, run_ranks, tiny_config, train_ranks, write_config
from tests.training.test_loop import weights_hash

# --- copies ---


def file_of(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def nested_state():
    flat = torch.arange(12.0)
    state = {
        "views": OrderedDict(a=flat[:4].view(2, 2), b=flat[4:], c=flat[::2], empty=torch.empty(0)),
        "step": torch.tensor(3, dtype=torch.int64),
        "list": [torch.ones(2, dtype=torch.bfloat16), (torch.Size([2, 2]), "name", None)],
        "trained": torch.zeros(3).requires_grad_()[:2],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    state["step"].name_of_ours = "x"
    state["views"]._metadata = {"": {"version": 1}}
    return state, flat


def test_a_copy_is_saved_as_the_state_itself_and_training_does_not_reach_it():
    state, flat = nested_state()
    expected = file_of(state)
    copied = HostCopies()(state)
    assert file_of(copied) == expected
    flat.add_(1)
    state["list"].append("later")
    state["views"]["d"] = flat
    with torch.no_grad():
        state["parameter"].add_(1)
    assert file_of(copied) == expected
    assert file_of(state) != expected


def test_a_storage_is_copied_once_over_all_calls():
    state, flat = nested_state()
    copies = HostCopies()
    first, second = copies(state), copies({"hf": flat.detach()[:6]})
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*list(first["views"].values())[:3], second["hf"])}
    assert len(shared) == 1
    assert shared != {flat.untyped_storage().data_ptr()}


# --- the same checkpoint ---


@pytest.fixture
def late(monkeypatch):
    """late(steps): files of a save in the background are written when so many more steps have been trained."""
    done, train_step, write_part = [0], training.train_step, checkpoint.write_part

    def counted(run, *arguments, **options):
        assert not run.engine.model.lm.config.use_cache  # as it is in what is exported meanwhile
        found = train_step(run, *arguments, **options)
        done[0] = run.totals.step + 1
        return found

    def make_late(steps):
        def write(temporary, files):
            until = time.monotonic() + 60
            while in_background() and done[0] < int(temporary.stem[6:]) + steps:
                assert time.monotonic() < until
                time.sleep(0.005)
            return write_part(temporary, files)

        monkeypatch.setattr(checkpoint, "write_part", write)

    monkeypatch.setattr(training, "train_step", counted)
    return make_late


def in_background():
    return threading.current_thread() is not threading.main_thread()


def hashes(run_dir, step):
    """Of all files of a checkpoint but the one that has the seconds in it."""
    found = json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())["files"]
    found.pop("state.json")
    return found


def counting_from_zero(monkeypatch):
    """ZeRO-3 numbers all parameters of a process, and writes the numbers down."""
    from deepspeed.runtime.zero.partition_parameters import Init

    monkeypatch.setattr(Init, "param_id", 0)


SLOW = [pytest.param(zero, marks=pytest.mark.slow) for zero in ("zero0", "zero2")]


@pytest.mark.parametrize("zero", ["zero1", "zero3", *SLOW])
def test_a_step_is_saved_as_it_was_though_training_has_gone_on(base, tmp_path, zero, late, monkeypatch):
    """Written two steps later it is, byte for byte, what is saved at once; and a run goes on from it bit for bit."""
    groups = {
        "engine": {"ds_config": str(ROOT / f"ds_configs/{zero}.json")},
        "train": {"num_steps": 8, "save_every": 4, "eval_every": 8},
    }
    folders = [tmp_path / way / "run" for way in ("at_once", "in_background")]
    late(2)
    for folder in folders:
        folder.parent.mkdir()
        groups["train"]["save_in_background"] = folder == folders[1]
        counting_from_zero(monkeypatch)
        run(folder, base / "corpus", **groups)
    for step in (4, 8):
        assert hashes(folders[1], step) == hashes(folders[0], step)
    assert any(name.endswith("model_states.pt") for name in hashes(folders[0], 4))
    assert json.loads((folders[1] / "checkpoints" / "step_00000004" / "hf" / "config.json").read_text())["use_cache"]
    shutil.rmtree(folders[1] / "checkpoints" / "step_00000008")
    run(folders[1], base / "corpus", **groups)
    assert weights_hash(folders[1], 8) == weights_hash(folders[0], 8)


def test_two_ranks_save_and_go_on_as_they_do_at_once(base, tmp_path):
    files, folders = [], [tmp_path / way / "run" for way in ("at_once", "in_background")]
    for folder in folders:
        folder.parent.mkdir()
        train = {"keep_checkpoints": 3, "save_in_background": folder == folders[1]}
        config = tiny_config(folder, base / "corpus", train=train)
        files.append(str(write_config(folder.with_suffix(".yaml"), config)))
    results = run_ranks(["-m", "tests.workers.saving", "slow", *files], world=2)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    for step in (2, 4, 6):
        expected = hashes(folders[0], step)
        assert "engine/zero_pp_rank_1_mp_rank_00_optim_states.pt" in expected
        assert hashes(folders[1].with_name("as_saved"), step) == expected
    assert "going on from" in results[0].stdout
    assert weights_hash(folders[1]) == weights_hash(folders[0])


# --- waiting ---


def train_in_background(base, name, **groups):
    groups["train"] = {"save_in_background": True, "eval_every": 100, "keep_checkpoints": 9} | groups.get("train", {})
    return run(base / name, base / "corpus", **groups)


def slow_writer(monkeypatch, seconds):
    write_part = checkpoint.write_part

    def write(temporary, files):
        time.sleep(seconds)
        return write_part(temporary, files)

    monkeypatch.setattr(checkpoint, "write_part", write)


def test_training_goes_on_meanwhile_and_the_next_save_waits(base, tmp_path, monkeypatch):
    slow_writer(monkeypatch, 0.5)
    seen, begin, commit, train_step = [], checkpoint.begin, checkpoint.commit, training.train_step
    monkeypatch.setattr(checkpoint, "begin", lambda root, step: seen.append(f"begin {step}") or begin(root, step))
    monkeypatch.setattr(
        checkpoint, "commit", lambda t, *a, **k: seen.append(f"commit {int(t.stem[6:])}") or commit(t, *a, **k)
    )
    monkeypatch.setattr(training, "train_step", lambda *a, **k: seen.append("step") or train_step(*a, **k))
    run_dir = train_in_background(base, "waits_for_the_last")
    steps = ["step", "step"]
    expected = [*steps, "begin 2", *steps, "commit 2", "begin 4", *steps, "commit 4", "begin 6", "commit 6"]
    assert seen == expected
    assert names(run_dir / "checkpoints") == ["step_00000002", "step_00000004", "step_00000006"]


def test_a_signal_waits_for_what_is_being_saved_and_then_saves(base, monkeypatch):
    slow_writer(monkeypatch, 0.5)
    train_step = training.train_step

    def signalled(run, *arguments, **options):
        if run.totals.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, *arguments, **options)

    monkeypatch.setattr(training, "train_step", signalled)
    with pytest.raises(ResumableError, match="stopped by SIGTERM at step"):
        train_in_background(base, "signalled_saving", train={"num_steps": 1000, "save_every": 4})
    root = base / "signalled_saving" / "checkpoints"
    last = records(base / "signalled_saving", "train")[-1]["step"]
    assert names(root) == ["step_00000004", f"step_{last:08d}"]
    assert [checkpoint.damage(root / name) for name in names(root)] == [None, None]


def test_a_run_that_ends_with_an_error_saves_what_it_has_begun_to(base, monkeypatch):
    slow_writer(monkeypatch, 1.0)
    rate = schedules.learning_rate
    monkeypatch.setattr(schedules, "learning_rate", lambda t, **k: math.nan if t == 2 else rate(t, **k))
    with pytest.raises(UserError, match="the loss is nan at step 4"):
        train_in_background(base, "diverged_saving")
    assert names(base / "diverged_saving" / "checkpoints") == ["step_00000002"]


def leave_with(error, root):
    """Begin a save and leave its context with an error; the thread."""
    threads = []
    with contextlib.suppress(type(error)), Saver(root, keep=1, in_background=True) as saver:
        saver.save(2, FakeEngine(2), {}, lambda snapshot: export)
        threads.append(saver._save.thread)
        raise error
    return threads[0]


def test_only_lost_ranks_and_a_second_ctrl_c_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_part", lambda *_: time.sleep(0.5) or {})
    for error in (UserError("x"), RuntimeError("in one process"), KeyError("x")):
        assert not leave_with(error, tmp_path).is_alive()
    left = [leave_with(KeyboardInterrupt(), tmp_path / "interrupted")]
    with monkeypatch.context() as patch:
        patch.setattr(saver, "world_size", lambda: 2)
        left.append(leave_with(RuntimeError("Connection closed by peer"), tmp_path / "lost"))
    assert [thread.is_alive() for thread in left] == [True, True]
    for thread in left:
        thread.join()


# --- errors ---


def full_in_background(monkeypatch, step):
    write_part = checkpoint.write_part

    def write(temporary, files):
        if temporary.name == f".step_{step:08d}.tmp":
            raise OSError(28, "No space left on device")
        return write_part(temporary, files)

    monkeypatch.setattr(checkpoint, "write_part", write)


@pytest.mark.parametrize(("log_every", "save_every", "found_at"), [(1, 2, 5), (100, 2, 6), (100, 4, 8)])
def test_an_error_is_found_at_the_next_line_of_metrics_the_next_save_or_the_end(
    base, monkeypatch, log_every, save_every, found_at
):
    full_in_background(monkeypatch, 4)
    steps, train_step = [], training.train_step

    def after_the_thread(run, *arguments, **options):
        for thread in threading.enumerate():
            if thread.name.startswith("save_"):
                thread.join()
        steps.append(run.totals.step + 1)
        return train_step(run, *arguments, **options)

    monkeypatch.setattr(training, "train_step", after_the_thread)
    name = f"full_{log_every}_{save_every}"
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); the checkpoint before") as e:
        train_in_background(
            base, name, train={"num_steps": 8, "log_every": log_every, "save_every": save_every, "eval_every": 50}
        )
    assert e.value.said_by_main
    assert steps[-1] == found_at
    assert names(base / name / "checkpoints") == ["step_00000002"][: save_every == 2]


def test_another_error_comes_out_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_part", lambda *_: {}["a mistake"])
    with pytest.raises(KeyError, match="a mistake"), Saver(tmp_path, keep=1, in_background=True) as saver:
        saver.save(2, FakeEngine(2), {}, lambda snapshot: export)
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_error_leaves_is_said_besides(tmp_path, monkeypatch, capsys):
    full_in_background(monkeypatch, 2)
    leave_with(UserError("the data is gone"), tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written (No space left on device)" in said


def configured(base, name, **train):
    train = {"num_steps": 100_000, "save_every": 2, "eval_every": 10**6, "save_in_background": True} | train
    config = tiny_config(base / name, base / "corpus", train=train, engine={"watchdog_seconds": 12})
    return write_config(base / f"{name}.yaml", config), base / name


def test_a_disk_that_is_full_on_one_rank_ends_all_with_one_line(base):
    config, run_dir = configured(base, "full_on_one", num_steps=40)
    results = run_ranks(["-m", "tests.workers.saving", "full", "1", "4", str(config)], world=2)
    assert [r.returncode for r in results] == [2, 2], results[0].stderr[-2000:]
    (line,) = [line for r in results for line in r.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: run_dir={run_dir} cannot be written (No space left on device); the checkpoint")
    assert names(run_dir / "checkpoints") == ["step_00000002"]
    assert "Traceback" not in results[0].stderr + results[1].stderr


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_it_writes_leaves_the_one_before(base, victim):
    config, run_dir = configured(base, f"dies_{victim}")
    processes = start(config, 2, ["-m", "tests.workers.saving", "hang", str(victim), "4"])
    try:
        wait_for_step(run_dir, 5, processes)
        began = time.monotonic()
        processes[victim].kill()
        codes, _, errors = ended(processes)
    finally:
        for process in processes:
            process.kill()
    assert codes[1 - victim] == EXIT_RESUMABLE, errors
    assert time.monotonic() - began < 60
    assert names(run_dir / "checkpoints") == ["step_00000002"]
    again = train_ranks(config, "--train.stop_at_step", "6", world=2)
    assert [r.returncode for r in again] == [0, 0], again[0].stderr[-2000:]
    assert "going on from" in again[0].stdout
    assert not [p for p in (run_dir / "checkpoints").iterdir() if p.name.endswith(".tmp")]
