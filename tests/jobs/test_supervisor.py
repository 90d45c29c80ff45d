"""A job is started again until its run is done, and nothing of it is left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from ki_ds import cli as launcher
from ki_ds.errors import EXIT_RESUMABLE, EXIT_USER_ERROR, ResumableError, UserError
from ki_ds.jobs import supervisor
from ki_ds.jobs.supervisor import is_finished, run_group, saved_step, supervise
from ki_ds.ranks.world import free_port
from tests.commands import steps_done
from tests.tiny import ROOT, environment, records, tiny_config, write_config

# A launcher with one rank, which saves when it is asked to.
LAUNCHER = """
import os, subprocess, sys
rank = '''
import signal, sys, time
from pathlib import Path
def leave(*_):
    Path(sys.argv[1]).write_text('saved')
    sys.exit(75)
signal.signal(signal.SIGUSR1, leave)
signal.signal(signal.SIGTERM, leave)
Path(sys.argv[1]).write_text('ready')
time.sleep(300)
'''
job = subprocess.Popen([sys.executable, "-c", rank, sys.argv[1]], env={**os.environ, "RANK": "0"})
sys.exit(job.wait())
"""


def results(*codes):
    """A stand-in for starting a job: what each start ends with, and how often it was started."""
    calls = []

    def start():
        calls.append(1)
        return codes[len(calls) - 1]

    return start, calls


def test_a_job_is_started_again_until_it_is_done(capsys):
    start, calls = results((247, None), (0, None), (75, None), (0, None))
    supervise("run", start, lambda: len(calls) == 4, restarts=5)
    said = capsys.readouterr().out.splitlines()
    assert [line.split("; ")[1] for line in said] == [f"restart {n} of 5 from its last checkpoint" for n in (1, 2, 3)]
    assert "run stopped with exit code 0 before its last step" in said[1]  # as when DeepSpeed's launcher was killed


def test_too_many_failures_come_out():
    start, calls = results(*[(1, None)] * 9)
    with pytest.raises(ResumableError, match="exit code 1 before its last step after 2 restarts; call it again"):
        supervise("run", start, lambda: False, restarts=2)
    assert len(calls) == 3


def test_what_a_restart_would_not_mend_is_not_repeated():
    start, calls = results((EXIT_USER_ERROR, None))
    with pytest.raises(UserError, match="its own line says why"):
        supervise("run", start, lambda: False, restarts=9)
    start, calls = results((EXIT_RESUMABLE, "SIGTERM"))
    with pytest.raises(ResumableError, match="was stopped by SIGTERM"):
        supervise("run", start, lambda: False, restarts=9)
    assert len(calls) == 1


def test_how_far_a_run_is(tmp_path):
    assert (is_finished(tmp_path), saved_step(tmp_path)) == (False, 0)
    for step in (2, 10):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step_00000012.tmp").mkdir()
    assert saved_step(tmp_path) == 10
    for status in ("running", "finished"):
        (tmp_path / "run.json").write_text(json.dumps({"status": status}))
        assert is_finished(tmp_path) == (status == "finished")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_the_ranks_to_save_and_waits_for_them(tmp_path, number, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # as after a training in this process
    note = tmp_path / "note"
    thread = threading.Thread(target=signal_when, args=(lambda: note.exists() and note.read_text() == "ready", number))
    thread.start()
    assert run_group([sys.executable, "-c", LAUNCHER, str(note)], dict(os.environ)) == (75, number.name)
    thread.join()
    assert note.read_text() == "saved"


def signal_when(ready, number):
    while not ready():
        time.sleep(0.02)
    os.kill(os.getpid(), number)


def test_ranks_of_a_launcher_that_was_killed_may_save_before_they_are_ended(tmp_path):
    note = tmp_path / "note"
    killed = LAUNCHER.replace(
        "sys.exit(job.wait())", "import time\nwhile not os.path.exists(sys.argv[1]): time.sleep(.02)"
    )
    killed += "\ntime.sleep(0.2)\nos.kill(os.getpid(), 9)"
    assert run_group([sys.executable, "-c", killed, str(note)], dict(os.environ)) == (-signal.SIGKILL, None)
    assert note.read_text() == "saved"


def test_what_does_not_leave_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.5)
    stubborn = f"trap '' TERM; sleep 301 & echo $! > {tmp_path}/pid; exit 3"
    assert run_group(["bash", "-c", stubborn], dict(os.environ)) == (3, None)
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_option_is_taken_from_the_command_line_and_checked():
    assert launcher._take_max_restarts(["--seed", "3"]) == (None, ["--seed", "3"])
    assert launcher._take_max_restarts(["--max_restarts", "2", "--seed", "3"]) == (2, ["--seed", "3"])
    assert launcher._take_max_restarts(["--seed", "3", "--max_restarts=0"]) == (0, ["--seed", "3"])
    for bad in (["--max_restarts"], ["--max_restarts", "-1"], ["--max_restarts=x"]):
        with pytest.raises(UserError, match="is no number of restarts"):
            launcher._take_max_restarts(bad)


def test_a_rank_cannot_supervise_itself(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="was given to a rank"):
        launcher._run(["--max_restarts", "2"], 0.0)


def test_a_batch_script_and_a_shell_in_an_allocation_are_no_ranks(monkeypatch):
    asked = []
    monkeypatch.setattr(supervisor, "run_supervised", lambda argv, **options: asked.append((argv, options)))
    monkeypatch.delenv("RANK", raising=False)
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(name, value)
        launcher._run(["--max_restarts", "2", "--seed", "3"], 0.0)
    assert asked == [(["--seed", "3"], {"max_restarts": 2})] * 3


def test_deepspeed_is_called_with_what_the_user_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    env = {"MASTER_PORT": "31001", "MASTER_ADDR": "head", "KI_DS_ARGS": "--num_gpus 2 --comment 'a b'"}
    assert supervisor.deepspeed_command({}) == ["deepspeed"]
    assert supervisor.deepspeed_command(env) == (
        ["deepspeed", "--master_addr", "head", "--master_port", "31001", "--num_gpus", "2", "--comment", "a b"]
    )


# --- for real ---


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "launcher", "runner"])
def test_a_job_whose_processes_are_killed_comes_to_its_end(base, victim):
    name = f"supervised_{victim}"
    train = {"num_steps": 60, "save_every": 3, "eval_every": 100}
    run_dir = base / name
    config = write_config(base / f"{name}.yaml", tiny_config(run_dir, base / "corpus", train=train))
    command = ["bash", "launchers/train_ki.sh", "--max_restarts", "3", "--config", str(config)]
    options = f"--num_gpus 2 --master_port {free_port()}"
    job = subprocess.Popen(
        command, env=environment(KI_DS_ARGS=options, PYTHON=sys.executable), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        while steps_done(run_dir) < 5:
            assert job.poll() is None
            time.sleep(0.05)
        processes = psutil.Process(job.pid).children(recursive=True)
        marks = {"rank": "--local_rank=1", "launcher": "deepspeed.launcher.launch", "runner": "bin/deepspeed"}
        chosen = [p for p in processes if marks[victim] in " ".join(p.cmdline())]
        if victim == "rank":
            chosen = [p for p in chosen if "RANK" in p.environ()]
        chosen[0].kill()
        said, _ = job.communicate(timeout=240)
    finally:
        job.terminate()
    assert job.returncode == 0
    assert said.count("restart 1 of 3 from its last checkpoint") == 1
    assert "going on from" in said
    assert is_finished(run_dir)
    assert [r["step"] for r in records(run_dir, "train")] == list(range(1, 61))
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
