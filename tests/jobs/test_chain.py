import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ki_ds.errors import ResumableError, UserError
from ki_ds.jobs import chain
from ki_ds.jobs.chain import RECIPES, Job, hostfile_places, local_places, run_jobs
from tests import forked
from tests.tiny import ROOT, environment

PYTHON = sys.executable
# Stands for `python launchers/train_ki.sh`: notes how it was started, then does what FAKE says.
LAUNCHER_TEXT = """
import json, os, pathlib, signal, subprocess, sys, time
words = sys.argv[1:]
run_dir = pathlib.Path(words[words.index("--run_dir") + 1])
here = pathlib.Path(__file__).parent
note = {"words": words, "deepspeed": os.environ["KI_DS_ARGS"], "path": os.environ["PATH"], "began": time.time()}
run_dir.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: ((run_dir / "asked").touch(), sys.exit(75)))
(run_dir / "notes.json").write_text(json.dumps(note))
print("a line of", run_dir.name, flush=True)
exec((here / "body.py").read_text())
"""
FINISHES = """
time.sleep(0.3)
(run_dir / "run.json").write_text('{"status": "finished"}')
(run_dir / "ended").write_text(str(time.time()))
"""


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """launcher(body) lets every job run that Python instead of a training."""
    folder = tmp_path / "launcher"
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(LAUNCHER_TEXT)
    monkeypatch.setattr(chain, "LAUNCHER", script)

    def make(body: str) -> Path:
        (folder / "body.py").write_text(body)
        return script

    return make


def job(tmp_path, name, *, after=(), **fields):
    return Job(name, tmp_path / name, fields=fields, after=tuple(str(tmp_path / each) for each in after))


def note(tmp_path, name):
    return json.loads((tmp_path / name / "notes.json").read_text())


def finished(run_dir, status="finished"):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps({"status": status}))
    return run_dir


# --- jobs ---------------------------------------------------------------------------------------------------------


def test_recipes_come_first_and_single_fields_win():
    one = Job("student", Path("runs/s"), ("base.yaml", "over.yaml"), {"optim.lr": 3e-4, "teacher.path": Path("runs/t")})
    assert one.arguments() == [
        *("--config", str(RECIPES / "base.yaml")),
        *("--config", str(RECIPES / "over.yaml")),
        *("--run_dir", "runs/s"),
        *("--optim.lr", "0.0003"),
        *("--teacher.path", "runs/t"),
    ]


def test_a_whole_configuration_is_a_recipe_beside_the_run():
    one = Job("student", Path("runs/s"), groups={"run_dir": "runs/s"})
    assert one.arguments() == ["--config", "runs/s.yaml"]


def test_a_run_is_finished_when_it_says_so(tmp_path):
    assert not chain.is_finished(tmp_path / "nothing")
    assert not chain.is_finished(finished(tmp_path / "run", "running"))
    assert chain.is_finished(finished(tmp_path / "run"))
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        chain.is_finished(tmp_path / "run")


# --- running ------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_started_again(tmp_path, launcher, capsys):
    launcher("sys.exit(1)")
    finished(tmp_path / "teacher")
    run_jobs([job(tmp_path, "teacher")], local_places(2))
    assert not (tmp_path / "teacher" / "notes.json").exists()
    assert f"teacher: finished before, in {tmp_path / 'teacher'}" in capsys.readouterr().out


def test_a_job_is_told_its_ranks_its_port_and_its_fields(tmp_path, launcher):
    launcher(FINISHES)
    one = job(tmp_path, "student", seed=7)
    run_jobs([one], local_places(3), max_restarts=2)
    found = note(tmp_path, "student")
    assert found["words"] == ["--max_restarts", "2", *one.arguments()]
    *words, port = found["deepspeed"].split()
    assert words == ["--num_gpus", "3", "--master_port"]
    assert 0 < int(port) < 65536
    assert found["path"].startswith(f"{Path(PYTHON).parent}:")  # this environment's deepspeed is found first


def test_a_configuration_is_written_before_its_job_starts(tmp_path, launcher):
    launcher("words = None; time.sleep(0)" + FINISHES)
    one = Job("s", tmp_path / "s", fields={"run_dir": tmp_path / "s"}, groups={"seed": 5})
    run_jobs([one], local_places())
    assert (tmp_path / "s.yaml").read_text() == "seed: 5\n"


def test_a_job_waits_for_those_that_it_needs_and_independent_ones_run_side_by_side(tmp_path, launcher):
    launcher(FINISHES)
    jobs = [job(tmp_path, "student", after=["teacher"]), job(tmp_path, "alone"), job(tmp_path, "teacher")]
    run_jobs(jobs, local_places(parallel=2))
    ended = float((tmp_path / "teacher" / "ended").read_text())
    assert note(tmp_path, "student")["began"] > ended
    assert note(tmp_path, "alone")["began"] < ended
    assert note(tmp_path, "teacher")["began"] < float((tmp_path / "alone" / "ended").read_text())


def test_side_by_side_each_job_has_a_log(tmp_path, launcher, capfd):
    launcher(FINISHES)
    run_jobs([job(tmp_path, "a"), job(tmp_path, "b")], local_places(parallel=2))
    assert (tmp_path / "a.log").read_text() == "a line of a\n"
    assert "a line of" not in capfd.readouterr().out
    launcher(FINISHES)
    run_jobs([job(tmp_path, "c")], local_places())
    assert "a line of c" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("code", "kind"), [(2, UserError), (75, ResumableError), (1, ResumableError), (0, ResumableError)]
)
def test_the_first_failure_is_named_and_the_others_are_asked_to_save(tmp_path, launcher, code, kind):
    launcher(f"(time.sleep(1), sys.exit({code})) if run_dir.name == 'bad' else time.sleep(60)")
    jobs = [job(tmp_path, "bad"), job(tmp_path, "good"), job(tmp_path, "later", after=["bad"])]
    with pytest.raises(kind, match=f"bad ended with exit code {code} before its last step; .*bad.log says why"):
        run_jobs(jobs, local_places(parallel=2))
    assert (tmp_path / "good" / "asked").exists()
    assert not (tmp_path / "later").exists()


def chain_in_a_process(tmp_path, script):
    """A chain of one endless job, in a process of its own, once the job runs."""
    text = (
        "import sys; from pathlib import Path; from ki_ds.jobs import chain\n"
        "from ki_ds.cli import ends_cleanly\n"
        "chain.LAUNCHER = Path(sys.argv[1]); job = chain.Job('student', Path(sys.argv[2]))\n"
        "sys.exit(ends_cleanly(lambda: chain.run_jobs([job], chain.local_places()))())"
    )
    process = forked.Popen([PYTHON, "-c", text, str(script), str(tmp_path / "run")], env=environment(), cwd=ROOT)
    until = time.monotonic() + 300
    while not (tmp_path / "run" / "pid").exists() or not (tmp_path / "run" / "pid").read_text():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    return process, int((tmp_path / "run" / "pid").read_text())


ENDLESS = "(run_dir / 'pid').write_text(str(os.getpid())); time.sleep(300)"


SAVES_FOR_A_WHILE = """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
(run_dir / "pid").write_text(str(os.getpid()))
while not asked:
    time.sleep(0.05)
time.sleep(2)
(run_dir / "times").write_text(str(len(asked)))
sys.exit(75)
"""


def test_a_job_that_takes_its_time_to_save_is_asked_once(tmp_path, launcher):
    """Being asked twice would end it at once."""
    process, _ = chain_in_a_process(tmp_path, launcher(SAVES_FOR_A_WHILE))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "run" / "times").read_text() == "1"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_chain_that_is_stopped_or_killed_has_its_job_save_and_leave(tmp_path, launcher, signum):
    process, pid = chain_in_a_process(tmp_path, launcher(ENDLESS))
    process.send_signal(signum)
    assert process.wait(timeout=60) == (-signal.SIGKILL if signum == signal.SIGKILL else 75)
    until = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert (tmp_path / "run" / "asked").exists()


def test_a_run_that_somebody_else_trains_is_waited_for(tmp_path, launcher, capsys):
    launcher(FINISHES)
    other = (
        "import fcntl, sys, time; from pathlib import Path; run = Path(sys.argv[1]); run.mkdir()\n"
        "lock = (run / '.lock').open('w'); fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1)\n"
        "(run / 'run.json').write_text('{\"status\": \"finished\"}')"
    )
    process = forked.Popen([PYTHON, "-c", other, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    run_jobs([job(tmp_path, "run")], local_places())
    assert process.wait() == 0
    assert not (tmp_path / "run" / "notes.json").exists()
    assert "run: finished before" in capsys.readouterr().out


# --- places -------------------------------------------------------------------------------------------------------


def test_a_host_without_gpus_has_as_many_places_as_asked_for():
    assert [place.arguments for place in local_places(2, 3)] == [("--num_gpus", "2")] * 3
    assert [(place.num_ranks, place.num_threads) for place in local_places()] == [(1, 0)]


def test_jobs_side_by_side_share_the_cores(tmp_path, launcher, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert [place.num_threads for place in local_places(2, 3)] == [2, 2, 2]
    assert [place.num_threads for place in local_places(1, 24)] == [1] * 24
    launcher(FINISHES)
    run_jobs([job(tmp_path, "a"), job(tmp_path, "b")], local_places(3, 2))
    assert note(tmp_path, "a")["words"][-2:] == ["--engine.num_threads", "2"]


def test_gpus_are_parted_equally(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [(p.arguments[1], p.num_ranks) for p in local_places(parallel=2)] == [
        ("localhost:0,1,2,3", 4),
        ("localhost:4,5,6,7", 4),
    ]
    assert [place.arguments[1] for place in local_places(1, 2)] == ["localhost:0", "localhost:1"]
    with pytest.raises(UserError, match="3 jobs of 4 GPUs were asked for, this host has 8; lower"):
        local_places(4, 3)


def test_hosts_are_parted_equally(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# nodes\nw1 slots=2\nw2 slots=2\n\nw3 slots=2\nw4 slots=1\n")
    places = hostfile_places(path, parallel=2)
    assert [(p.arguments, p.num_ranks) for p in places] == [
        (("--hostfile", str(path), "--include", "w1:0,1@w2:0,1"), 4),
        (("--hostfile", str(path), "--include", "w3:0,1@w4:0"), 3),
    ]
    with pytest.raises(UserError, match="4 hosts, not a multiple of --parallel 3"):
        hostfile_places(path, parallel=3)
    with pytest.raises(UserError, match="w4 has 1 slots, --num_gpus asks for 2"):
        hostfile_places(path, 2)


def test_a_malformed_hostfile_is_refused_in_a_line(tmp_path):
    """As preflight does, whose tests have the rest."""
    path = tmp_path / "hosts"
    path.write_text("w1 slots=x")
    for bad in (path, tmp_path / "none"):
        with pytest.raises(UserError, match=str(bad)):
            hostfile_places(bad)
