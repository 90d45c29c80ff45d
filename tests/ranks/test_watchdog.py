"""A rank that dies, stops or hangs is named, and no process of the job is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from ki_ds.errors import EXIT_RESUMABLE
from ki_ds.ranks.preemption import Preemption
from ki_ds.ranks.watchdog import Launcher, Rank, Watchdog, is_alive, own_machine, verdict, whereabouts
from tests.commands import ended, start, wait_for_step
from tests.tiny import tiny_config, write_config

HERE = psutil.Process()


def beat(**fields):
    """A heartbeat of a student in its training, from this very process."""
    common = {"number": 1, "progress": 1, "step": 7, "phase": "training", "watched": True, "broken": False}
    common |= {"left": False, "waits": True, "where": "all_reduce", "signal": None, "teaches": False}
    return common | {"host": "here", "machine": "here", "pid": HERE.pid, "born": HERE.create_time()} | fields


def judged(*beats, heard=0.0, moved=0.0, now=0.0, timeout=30.0):
    """The verdict on ranks that were all heard and moved at the same times."""
    ranks = {number: Rank(each, heard, moved) for number, each in enumerate(beats)}
    return verdict(ranks, now, timeout=timeout, machine="here")


def test_all_is_well():
    assert judged(beat(), beat(), now=29) is None
    assert judged(beat(), beat(), heard=100, moved=80, now=105) is None
    assert judged(beat(watched=False), beat(watched=False), heard=100, now=105) is None  # a long save


def test_a_process_that_is_gone_is_seen_at_once():
    line, blamed = judged(beat(), beat(pid=2**22 - 1))
    assert blamed == [1]
    assert line.startswith(f"rank 1 (host here, pid {2**22 - 1}), last seen at step 7 in training, is gone; start it")
    assert judged(beat(), beat(born=1.0))[1] == [1]  # its number belongs to another process by now
    assert judged(beat(), beat(machine="there", pid=2**22 - 1)) is None  # another host's numbers say nothing


def test_a_silent_rank_is_named_after_the_time_or_earlier_once_a_connection_broke():
    ranks = {0: Rank(beat(), 100.0, 90.0), 1: Rank(beat(machine="there", pid=5), 70.0, 90.0)}
    assert verdict(ranks, 100.0, timeout=40, machine="here") is None
    line, blamed = verdict(ranks, 100.0, timeout=29, machine="here")
    assert blamed == [1]
    assert "rank 1 (host here, pid 5), last seen at step 7 in training, has given no sign of life for 30 s" in line
    ranks[0].beat["broken"] = True
    assert verdict(ranks, 100.0, timeout=600, machine="here")[1] == [1]


def test_hosts_of_one_name_are_not_mixed_up():
    """A rank of another machine is not gone because this one has no such process."""
    assert judged(beat(), beat(pid=2**22 - 1))[1] == [1]
    assert judged(beat(), beat(pid=2**22 - 1, machine="there")) is None
    assert own_machine() == own_machine()
    assert os.readlink("/proc/self/ns/pid") in own_machine()


def test_who_makes_the_others_wait_is_named():
    busy = {"waits": False, "where": "read (disk.py:12)"}
    line, blamed = judged(beat(), beat(**busy), beat(), heard=100, now=100)
    assert blamed == [1]
    assert "no progress for 100 s since step 7: rank 1 (host here" in line
    assert "in training, read (disk.py:12); the others wait in all_reduce; start it again" in line
    assert judged(beat(step=8), beat(), beat(step=8), heard=100, now=100)[1] == [1]  # furthest behind
    assert judged(beat(), beat(), heard=100, now=100)[1] == [0, 1]  # nobody knows
    line, blamed = judged(beat(where="receive"), beat(**busy, teaches=True), heard=100, now=100)
    assert blamed == [1]
    assert "teacher rank 1" in line


def test_a_rank_that_never_leaves_a_heartbeat_is_named_after_the_time():
    store = torch.distributed.HashStore()
    with Watchdog(0, 1, Preemption(), 5.0) as watchdog:
        watchdog.num_ranks = 3
        for number in (0, 2):
            store.set(f"beat_{number}", json.dumps(beat()))
        assert watchdog._judged(store)["line"] is None
        watchdog._began -= 6
        assert watchdog._judged(store)["line"].startswith("rank 1 has given no sign of life since it came; start it")


def test_who_has_left_is_not_missed():
    assert judged(beat(), beat(left=True, pid=2**22 - 1), heard=0, now=20) is None
    assert judged(beat(left=True), now=100) is None


def test_a_rank_is_heard_when_its_number_changes_and_has_moved_when_its_progress_does():
    rank = Rank(beat(), 0.0, 0.0)
    rank.hear(beat(), 1.0)
    assert (rank.heard, rank.moved) == (0.0, 0.0)
    rank.hear(beat(number=2), 2.0)
    assert (rank.heard, rank.moved) == (2.0, 0.0)
    rank.hear(beat(number=3, progress=2), 3.0)
    assert (rank.heard, rank.moved) == (3.0, 3.0)


def test_whereabouts_of_a_thread():
    started, leave = threading.Event(), threading.Event()

    def somewhere():
        started.set()
        leave.wait()

    thread = threading.Thread(target=somewhere)
    thread.start()
    started.wait()
    where, waits = whereabouts(thread.ident)
    leave.set()
    thread.join()
    assert where.startswith("wait (threading.py:")
    assert not waits
    assert whereabouts(thread.ident) == ("an unknown place", False)


def test_only_a_launcher_is_missed(monkeypatch):
    """Pytest has not started this as a rank; a program whose command line says so has."""
    assert not Launcher()._chain
    script = (
        "import subprocess, sys, time\n"
        "code = 'from ki_ds.ranks.watchdog import Launcher; import time; l = Launcher(); print(1, flush=True)\\n'\n"
        "code += 'while not l.is_gone(): time.sleep(0.1)\\n'\n"
        "child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(600)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script, "torchrun"], stdout=subprocess.PIPE, text=True)
    try:
        rank = psutil.Process(int(launcher.stdout.readline()))
        assert is_alive(rank)
    finally:
        launcher.kill()
        launcher.wait()
    rank.wait(timeout=20)


# --- for real ---


@pytest.fixture(scope="module")
def configure(base):
    def make(name, **groups):
        train = {"num_steps": 100_000, "eval_every": 10**6, "save_every": 3, **groups.pop("train", {})}
        config = tiny_config(base / name, base / "corpus", train=train, **groups)
        return write_config(base / f"{name}.yaml", config), base / name

    return make


def faulty(configure, name, fault, victim, *, world=2, program=None, **groups):
    """What a job says, its exit codes, and the seconds from the fault to the end of its last process."""
    config, run_dir = configure(name, engine={"watchdog_seconds": 12}, **groups)
    processes = start(config, world, *([program] if program else []))
    try:
        wait_for_step(run_dir, 4, processes)
        began = time.monotonic()
        if fault:
            os.kill(processes[victim].pid, fault)
        codes, _, errors = ended(processes)
        return codes, errors, time.monotonic() - began, processes
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("fault", "victim"),
    [
        (signal.SIGSTOP, 1),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_stops_or_dies(configure, fault, victim, record_property):
    codes, errors, seconds, processes = faulty(configure, f"{fault.name}_{victim}", fault, victim)
    record_property("figure", f"{fault.name} of rank {victim}: ended after {seconds:.1f} s (watchdog_seconds 12)")
    assert codes[1 - victim] == EXIT_RESUMABLE, errors
    assert codes[victim] == -signal.SIGKILL
    assert seconds < 60
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert f"rank {victim} (host {socket.gethostname()}, pid {processes[victim].pid})" in line
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs(configure, victim, record_property):
    program = ["-m", "tests.workers.hanging", str(victim), "6", "hang"]
    codes, errors, seconds, processes = faulty(configure, f"hang_{victim}", None, victim, program=program)
    record_property("figure", f"hang of rank {victim}: ended after {seconds:.1f} s (watchdog_seconds 12)")
    assert all(code in (EXIT_RESUMABLE, -signal.SIGKILL) for code in codes), errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert f"since step 6: rank {victim} (host {socket.gethostname()}, pid {processes[victim].pid}) in training" in line
    assert "disturbed (hanging.py:" in line
    assert "the others wait in all_reduce" in line


@pytest.mark.slow
def test_a_teacher_rank_is_signalled_and_its_students_save(configure, base):
    groups = {"teacher": {"path": str(base / "mlm_teacher"), "placement": "ranks"}, "inherit": {"schedule": "constant"}}
    codes, errors, _, _ = faulty(configure, "teacher_signalled", signal.SIGTERM, 1, **groups)
    assert codes == [EXIT_RESUMABLE] * 2, errors
    assert "stopped by SIGTERM at step" in errors
