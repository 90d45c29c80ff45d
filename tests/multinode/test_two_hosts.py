"""A job over pdsh and ssh on two hosts: the run of one host, and what becomes of it when a part of it fails."""

import hashlib
import json
import os
import signal
import time

import pytest

from ki_ds.distributed import free_port
from ki_ds.errors import EXIT_RESUMABLE
from tests.jobs import steps_done
from tests.multinode.hosts import ADDRESSES, INTERFACES, NAMES
from tests.tiny import ROOT, environment, records, tiny_config, train_ranks, write_config

pytestmark = pytest.mark.multinode
SCRIPT = "launchers/train_ki.sh"
LONG = {"num_steps": 100_000, "eval_every": 10**6, "save_every": 5}
TAUGHT = {"schedule": "linear", "steps": 4}


@pytest.fixture(scope="module")
def configure(base):
    """configure(name): the file and the run folder of a student of the base's teacher."""

    def write(name, **groups):
        teacher = {"path": str(base / "mlm_teacher"), **groups.pop("teacher", {})}
        groups.setdefault("inherit", TAUGHT)
        config = tiny_config(base / name, base / "corpus", teacher=teacher, **groups)
        return write_config(base / f"{name}.yaml", config), base / name

    return write


@pytest.fixture(autouse=True)
def no_job_of_the_test_before(hosts):
    assert hosts.wait_until_idle(seconds=60) == []


def command(folder, config, *options, slots=(1, 1)):
    """A `deepspeed` over both hosts."""
    hostfile = folder / f"hostfile_{'_'.join(map(str, slots))}"
    hostfile.write_text("".join(f"{name} slots={n}\n" for name, n in zip(NAMES, slots, strict=True)))
    port = ["--master_port", free_port()]
    return ["deepspeed", "--hostfile", str(hostfile), *port, *options, SCRIPT, "--config", str(config)]


def settings(folder):
    """The environment of a user whose home is the folder."""
    return environment(HOME=str(folder))


def weights(run_dir):
    newest = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    return hashlib.sha256((newest / "hf/model.safetensors").read_bytes()).hexdigest()


def figures(run_dir):
    return [(r["step"], r["loss"], r["ce"], r["kl"]) for r in records(run_dir, "train")]


def lines_of(text):
    return [line for line in text.splitlines() if "error:" in line]


def started(hosts, run_dir, job, step):
    """Wait until the run has come to a step."""
    until = time.monotonic() + 200
    while steps_done(run_dir) < step:
        assert job.poll() is None, job.communicate()[0][-3000:]
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("zero", "slots", "teacher"),
    [
        ("zero2", (1, 1), {}),
        ("zero1", (2, 1), {"placement": "ranks"}),
        pytest.param("zero3", (1, 2), {"placement": "ranks"}, marks=pytest.mark.slow),
    ],
)
def test_it_is_bitwise_the_run_of_one_host(hosts, configure, base, zero, slots, teacher):
    engine = {"ds_config": str(ROOT / f"ds_configs/{zero}.json")}
    name = f"hosts_{zero}_{slots[0]}_{slots[1]}"
    config, run_dir = configure(name, engine=engine, teacher=teacher)
    done = hosts.run(command(base, config, slots=slots), env=settings(base), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    one, one_dir = configure(f"{name}_one", engine=engine, teacher=teacher)
    assert {r.returncode for r in train_ranks(one, world=sum(slots))} == {0}
    assert figures(run_dir) == figures(one_dir)
    assert weights(run_dir) == weights(one_dir)
    manifest = json.loads((run_dir / "run.json").read_text())
    assert (manifest["status"], manifest["world_size"]) == ("finished", sum(slots) - len(teacher))
    assert hosts.wait_until_idle(seconds=20) == []
