"""Jobs that a test starts, disturbs and waits for."""

import contextlib
import subprocess
import sys
import time

import pytest

from ki_ds.ranks.world import free_port
from tests import forked
from tests.tiny import ROOT, environment, records


@contextlib.contextmanager
def dying(monkeypatch, owner, name, when=lambda *_: True):
    """A run in this process that dies where it calls `name`, once that is called with what `when` is true of."""
    function = getattr(owner, name)

    def dies(*arguments, **options):
        if when(*arguments):
            raise KeyboardInterrupt
        return function(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, dies)
        with pytest.raises(KeyboardInterrupt):
            yield


def start(config, world, program=("launchers/train_ki.sh", "--config"), **extra):
    """The ranks of a job in a process group of their own, not waited for."""
    port = free_port()
    processes = []
    for rank in range(world):
        env = environment(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), **extra
        )
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, *program, str(config)]
        group = processes[0].pid if processes else 0
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(forked.Popen(command, env=env, cwd=ROOT, process_group=group, **pipes))
    return processes


def steps_done(run_dir):
    return len(records(run_dir, "train")) if (run_dir / "metrics.jsonl").exists() else 0


def wait_for_step(run_dir, step, processes):
    until = time.monotonic() + 400
    while steps_done(run_dir) < step:
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.02)


def ended(processes):
    said = [process.communicate(timeout=300) for process in processes]
    return [p.returncode for p in processes], "".join(out for out, _ in said), "".join(err for _, err in said)
