"""Jobs on a real Slurm: the same run as with every other launcher, stopped, saved, queued again and gone on."""

import json
import os
import re
import shutil
import sys
import time

import pytest

from tests.commands import steps_done
from tests.tiny import ROOT, records, tiny_config, write_config
from tests.training.test_loop import weights_hash

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
SCRIPT = ROOT / "launchers" / "train_ki.sh"
LONG = {"num_steps": 400, "eval_every": 400, "save_every": 400, "log_every": 1}
TEMPLATES = re.findall(r"```bash\n(#!.*?)```", (ROOT / "docs" / "reliability.md").read_text(), re.DOTALL)
SBATCH = (ROOT / "launchers" / "slurm.sbatch").read_text()  # the template to copy
MEETING = "from ki_ds.config import EngineConfig as c; from ki_ds.engine.student import start; start(c()); "
MEETING += "import torch, os; "
MEETING += "print('rank', os.environ['RANK'], os.environ['WORLD_SIZE'], torch.get_num_threads(), flush=True); "
MEETING += "from ki_ds.ranks.world import leave; leave(0)"


@pytest.fixture
def job(tmp_path, corpus):
    """job(name, **train): the configuration file of a run and its folder; threads are left to the launcher."""

    def make(name="run", **train):
        config = tiny_config(tmp_path / name, corpus, train=train or {"num_steps": 4}, data={"num_workers": 1})
        config["engine"]["num_threads"] = 0
        return write_config(tmp_path / f"{name}.yaml", config), tmp_path / name

    return make


def finished(result, run_dir):
    """The weights of a run that two ranks have finished."""
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    manifest = json.loads((run_dir / "run.json").read_text())
    assert (manifest["status"], manifest["world_size"]) == ("finished", 2)
    return weights_hash(run_dir)


def batch(cluster, template, config, tmp_path):
    """A docs' batch script, on two tasks of a node, submitted; its number."""
    assert "launchers/train_ki.sh" in template
    text = template.replace("launchers/train_ki.sh", str(SCRIPT)).replace("RUN.yaml", str(config))
    arguments = ["--config", config] if '"$@"' in template else []  # what sbatch is given behind the script
    (tmp_path / "job.sh").write_text(text.replace("--num_gpus 8", "--num_gpus 2"))
    options = ["--parsable", "-N1", "-n2", "--ntasks-per-node=2", f"--output={tmp_path / 'job.log'}", "--job-name=tiny"]
    submitted = cluster.run(["sbatch", *options, tmp_path / "job.sh", *arguments], PYTHON=sys.executable)
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def until(done, log, *, seconds=300):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, log.read_text()[-3000:] if log.exists() else "no output"
        time.sleep(0.1)


def test_srun_gives_the_weights_of_every_other_launcher(cluster, job):
    found = {}
    for name, command in {
        "srun": ["srun", "-n2", "bash"],
        "two nodes": ["srun", "-N2", "-n2", "bash"],
        "deepspeed": ["deepspeed", "--num_gpus", "2"],
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    }.items():
        config, run_dir = job(name.replace(" ", "_"))
        extra = {"MASTER_ADDR": "127.0.0.1"} if name == "two nodes" else {}  # no name server knows these nodes
        found[name] = finished(cluster.run([*command, SCRIPT, "--config", config], **extra), run_dir)
    assert len(set(found.values())) == 1, found


def test_ranks_share_the_cores_and_two_steps_of_a_job_run_side_by_side(cluster):
    """Two steps of two ranks, at once, on one machine: each step knows its own ranks' cores."""
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    step = f'srun -n2 --overlap {sys.executable} -c "{MEETING}"'
    line = f"{step} & {step} & wait; OMP_NUM_THREADS=3 {step}"
    result = cluster.run(["salloc", "-n2", "bash", "-c", line], PYTHONPATH=ROOT)
    expected = [f"rank {rank} 2 {threads}" for rank in (0, 1) for threads in (share, share, 3)]
    assert sorted(re.findall(r"rank \d \d \d", result.stdout)) == sorted(expected), result.stdout + result.stderr


@pytest.mark.parametrize("shell", ["salloc", "interactive", "one task"])
def test_a_shell_in_an_allocation_starts_the_ranks_that_it_is_asked_for(cluster, job, shell, tmp_path):
    config, run_dir = job()
    line = tmp_path / "line.sh"
    line.write_text(
        f'#!/bin/bash\nexport KI_DS_ARGS="--num_gpus 2"\nbash {SCRIPT} --max_restarts 1 --config {config} </dev/null\n'
    )
    line.chmod(0o755)
    command = {
        "salloc": ["salloc", "-n2", line],
        "interactive": [shutil.which("script"), "-qec", f"env SHELL={line} salloc -n2", "/dev/null"],
        "one task": ["srun", "-n1", line],
    }[shell]
    finished(cluster.run(command, PYTHON=sys.executable), run_dir)


def test_one_rank_in_a_job_of_several_tasks_is_said(cluster, job):
    config, _ = job()
    result = cluster.run(["salloc", "-n2", "bash", SCRIPT, "--config", config])
    assert "warning: one rank trains in a Slurm job of 2 tasks" in result.stdout


def test_a_job_is_signalled_saves_is_queued_again_and_ends_as_if_never_stopped(cluster, job, tmp_path):
    whole, whole_dir = job("whole", **LONG)
    config, run_dir = job("stopped", **LONG)
    finished(cluster.run(["srun", "-n2", "bash", SCRIPT, "--config", whole]), whole_dir)
    log = tmp_path / "job.log"
    number = batch(cluster, SBATCH, config, tmp_path)
    until(lambda: steps_done(run_dir) > 5, log)
    assert cluster.run(["scancel", "--signal=USR1", number]).returncode == 0  # as --signal=USR1@300 does it
    until(lambda: "going on from" in log.read_text(), log)
    cluster.wait_until_idle()
    assert log.read_text().count("stopped by SIGUSR1") == 1
    assert [record["step"] for record in records(run_dir, "train")] == list(range(1, 401))
    assert weights_hash(run_dir) == weights_hash(whole_dir)


@pytest.mark.parametrize(
    ("template", "stop"),
    [(0, []), (1, []), (1, ["--batch", "--signal=USR1"])],  # the last as --signal=B:USR1@300 does it
    ids=["ranks, scancel", "supervisor, scancel", "supervisor, signal"],
)
def test_whatever_ends_a_job_it_is_saved(cluster, job, tmp_path, template, stop):
    config, run_dir = job(**LONG)
    log = tmp_path / "job.log"
    number = batch(cluster, TEMPLATES[template], config, tmp_path)
    until(lambda: steps_done(run_dir) > 5, log)
    assert cluster.run(["scancel", *stop, number]).returncode == 0
    cluster.wait_until_idle()
    steps = [record["step"] for record in records(run_dir, "train")]
    (saved,) = (run_dir / "checkpoints").glob("step_*")
    assert int(saved.name.removeprefix("step_")) == steps[-1] < 400, log.read_text()
