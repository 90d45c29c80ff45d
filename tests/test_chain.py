import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ki_ds import chain
from ki_ds.chain import LAUNCHER, RECIPES, Job
from ki_ds.errors import UserError
from tests.tiny import ROOT, environment

PYTHON = sys.executable
FINISHES = """
run_dir="$(sed -n '/^--run_dir$/{n;p}' "$HERE/arguments")"
mkdir -p "$run_dir" && echo '{"status": "finished"}' > "$run_dir/run.json"
"""
# Leaves a rank behind that would run on, as DeepSpeed's launcher does when it is killed.
ORPHANS = 'sleep 300 & echo $! > "$HERE/orphan"\n'


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """launcher(bash) makes `deepspeed` a script that notes its arguments and then does that."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(body: str) -> Path:
        path = folder / "deepspeed"
        note = 'HERE="$(dirname "$0")"; printf "%s\\n" "$@" > "$HERE/arguments"; echo x >> "$HERE/calls"\n'
        path.write_text("#!/usr/bin/env bash\n" + note + body)
        path.chmod(0o755)
        return folder

    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return make


def finished(run_dir, status="finished"):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps({"status": status}))
    return run_dir


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_recipes_come_first_and_single_fields_win():
    job = Job("student", Path("runs/s"), ("base.yaml", "over.yaml"), {"optim.lr": 3e-4, "teacher.path": Path("runs/t")})
    assert job.arguments() == [
        *("--config", str(RECIPES / "base.yaml")),
        *("--config", str(RECIPES / "over.yaml")),
        *("--run_dir", "runs/s"),
        *("--optim.lr", "0.0003"),
        *("--teacher.path", "runs/t"),
    ]


def test_a_run_is_finished_when_it_says_so(tmp_path):
    assert not chain.is_finished(tmp_path / "nothing")
    assert not chain.is_finished(finished(tmp_path / "run", "running"))
    assert chain.is_finished(finished(tmp_path / "run"))
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        chain.is_finished(tmp_path / "run")


def test_a_finished_run_is_not_started_again(tmp_path, launcher, capsys):
    folder = launcher("exit 1")
    chain.run_job(Job("teacher", finished(tmp_path / "run"), ()), num_ranks=2)
    assert not (folder / "calls").exists()
    assert f"teacher: finished before, in {tmp_path / 'run'}" in capsys.readouterr().out


def test_a_run_is_started_by_deepspeed_on_that_many_ranks(tmp_path, launcher):
    folder = launcher(FINISHES)
    job = Job("student", tmp_path / "run", ("demo_mlm.yaml",), {"seed": 7})
    chain.run_job(job, num_ranks=3)
    said = (folder / "arguments").read_text().splitlines()
    assert 0 < int(said.pop(3)) < 65536  # a port of its own
    assert said == ["--num_gpus", "3", "--master_port", str(LAUNCHER), *job.arguments()]
    chain.run_job(job, num_ranks=3)
    assert (folder / "calls").read_text() == "x\n"  # the second call repeated nothing


def test_the_interpreter_of_this_environment_is_found_first(tmp_path, launcher):
    folder = launcher(FINISHES + 'echo "$PATH" > "$HERE/path"')
    chain.run_job(Job("student", tmp_path / "run", ()), num_ranks=1)
    assert (folder / "path").read_text().startswith(f"{folder}:")


def test_a_job_that_fails_is_named_with_its_exit_code(tmp_path, launcher):
    launcher("exit 3")
    with pytest.raises(UserError, match="student stopped with exit code 3 before its last step; call it again"):
        chain.run_job(Job("student", tmp_path / "run", ()), num_ranks=2)


@pytest.mark.parametrize("status", [None, "running"])
def test_exit_code_0_without_a_finished_run_is_a_failure_too(tmp_path, launcher, status):
    launcher("exit 0")
    if status:
        finished(tmp_path / "run", status)
    with pytest.raises(UserError, match="student stopped with exit code 0 before its last step"):
        chain.run_job(Job("student", tmp_path / "run", ()), num_ranks=2)


def test_ranks_that_a_launcher_leaves_behind_are_ended(tmp_path, launcher):
    folder = launcher(ORPHANS + "exit 1")
    with pytest.raises(UserError, match="exit code 1"):
        chain.run_job(Job("student", tmp_path / "run", ()), num_ranks=2)
    assert not alive(int((folder / "orphan").read_text()))


def test_a_chain_that_is_terminated_takes_its_job_with_it(tmp_path, launcher):
    folder = launcher(ORPHANS + "wait")
    script = (
        "import sys; from pathlib import Path\n"
        "from ki_ds.chain import Job, run_job; from ki_ds.errors import ends_cleanly\n"
        "sys.executable = sys.argv[1]; job = Job('student', Path(sys.argv[2]), ())\n"
        "sys.exit(ends_cleanly(lambda: run_job(job, num_ranks=2))())"
    )
    command = [PYTHON, "-c", script, str(folder / "python"), str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT)
    until = time.monotonic() + 300
    while not (folder / "orphan").exists() or not (folder / "orphan").read_text():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert not alive(int((folder / "orphan").read_text()))
