"""launchers/train_ki.sh: read by bash and by Python, started in every way that the README names."""

import gc
import json
import os
import py_compile
import runpy
import shutil
import subprocess
import sys

import pytest

from ki_ds import cli as launcher
from ki_ds.config import parse
from ki_ds.errors import UserError
from ki_ds.ranks.world import free_port
from tests import forked
from tests.tiny import ROOT, environment, tiny_config, tiny_corpus, write_config

SCRIPT = "launchers/train_ki.sh"
RANKS = {"RANK": "0", "WORLD_SIZE": "2"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}


# --- bash's half, with stand-ins for deepspeed and Python ---


@pytest.fixture
def stand_ins(tmp_path):
    """An environment in which `deepspeed` and `python3` only say how they were called."""
    for name in ("deepspeed", "python3", "mypython"):
        path = tmp_path / name
        path.write_text(f'#!/usr/bin/env bash\necho {name} "$@"\n')
        path.chmod(0o755)
    others = ("OMPI_", "SLURM_", "PMI_", "KI_DS_", "PYTHON")
    kept = {k: v for k, v in environment().items() if not k.startswith(others)}
    return {**kept, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def started(arguments, env):
    result = subprocess.run(
        ["bash", SCRIPT, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
    )
    return result.stdout.split()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, ["deepspeed"]),
        ({"KI_DS_ARGS": "--num_gpus 2 --bind_cores_to_rank"}, ["deepspeed", "--num_gpus", "2", "--bind_cores_to_rank"]),
        ({"RANK": "0"}, ["deepspeed"]),  # a variable that others set as well does not make a rank
        ({"SLURM_PROCID": "0"}, ["deepspeed"]),  # a batch job outside srun
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, ["deepspeed"]),  # a shell in an allocation
        ({"MASTER_PORT": "7", "KI_DS_ARGS": "--num_gpus 2"}, ["deepspeed", "--master_port", "7", "--num_gpus", "2"]),
        ({"MASTER_ADDR": "h"}, ["deepspeed", "--master_addr", "h"]),
        (RANKS, ["python3", "-u"]),
        (MPIRUN, ["python3", "-u"]),
        (SRUN, ["python3", "-u"]),
        (HYDRA, ["python3", "-u"]),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, ["deepspeed"]),  # srun --mpi=pmi2 gives them to a shell as well
        (RANKS | {"PYTHON": "mypython"}, ["mypython", "-u"]),
    ],
)
def test_bash_launches_unless_a_launcher_has_started_this_rank(said, expected, stand_ins):
    arguments = ["--config", "a.yaml", "--optim.lr", "3e-4"]
    assert started(arguments, stand_ins | said) == [*expected, SCRIPT, *arguments]


@pytest.mark.parametrize(("said", "launcher_"), [(RANKS, "a launcher"), (MPIRUN, "mpirun"), (SRUN, "srun")])
def test_options_for_deepspeed_are_refused_where_another_launcher_has_started_the_ranks(said, launcher_, monkeypatch):
    for name in RANKS:  # of a run in this process
        monkeypatch.delenv(name, raising=False)
    for name, value in {**said, "KI_DS_ARGS": "--num_gpus 2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"KI_DS_ARGS=--num_gpus 2 is for the deepspeed .* but {launcher_} has started"):
        launcher._run(["--run_dir", "runs/x"], 0.0)


def test_deepspeeds_ranks_are_not_given_its_options(stand_ins, tmp_path):
    (tmp_path / "deepspeed").write_text('#!/usr/bin/env bash\necho "$1 <${KI_DS_ARGS-unset}>"\n')
    assert started([], stand_ins | {"KI_DS_ARGS": "--no_ssh"}) == ["--no_ssh", "<unset>"]


@pytest.mark.parametrize("question", ["--help", "-h", "--print_config"])
def test_a_question_needs_no_ranks(question, stand_ins):
    assert started(["--config", "a.yaml", question], stand_ins)[0] == "python3"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"),
        ({"PDSH_SSH_ARGS_APPEND": "-p 2222"}, "-p 2222"),
        ({"PDSH_SSH_ARGS_APPEND": ""}, ""),
    ],
)
def test_ssh_notices_a_host_that_is_gone_unless_the_user_has_said_how(said, expected, stand_ins, tmp_path):
    (tmp_path / "deepspeed").write_text('#!/usr/bin/env bash\necho "<$PDSH_SSH_ARGS_APPEND>"\n')
    env = {name: value for name, value in stand_ins.items() if name != "PDSH_SSH_ARGS_APPEND"}
    assert " ".join(started([], env | said)) == f"<{expected}>"


def test_bash_reads_the_file(tmp_path):
    subprocess.run(["bash", "-n", SCRIPT], cwd=ROOT, check=True)
    assert os.access(ROOT / SCRIPT, os.X_OK)


# --- Python's half, with a stand-in for the training ---


@pytest.fixture
def called(monkeypatch):
    """called(*arguments): what the program is asked to run, and LOCAL_RANK then; the exit code is the program's."""

    def call(*arguments):
        seen = {}

        def run(argv, _started):
            seen.update(argv=argv, local_rank=os.environ.get("LOCAL_RANK"))
            return 7

        monkeypatch.setattr(launcher, "_run", run)
        monkeypatch.setattr("ki_ds.ranks.world.leave", sys.exit)
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
        assert caught.value.code == 7
        return seen["argv"], seen["local_rank"]

    monkeypatch.setenv("LOCAL_RANK", "")  # put back at the end, whatever the file sets
    monkeypatch.delenv("LOCAL_RANK")
    return call


def test_python_reads_the_file(tmp_path):
    py_compile.compile(str(ROOT / SCRIPT), cfile=str(tmp_path / "out.pyc"), doraise=True)


@pytest.mark.parametrize("name", ["--local_rank", "--local-rank"])
def test_the_local_rank_is_no_field_of_ours(name, called):
    assert called(f"{name}=1", "--seed", "3") == (["--seed", "3"], "1")


def test_the_environment_knows_the_local_rank_better(called, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "4")
    assert called("--local_rank=1", "--seed", "3") == (["--seed", "3"], "4")


def test_without_arguments_it_is_the_demos_inheriting_run(called):
    assert called("--local_rank=0") == ([], "0")
    arguments = launcher.DEMO
    run = parse(arguments)
    assert (run.run_dir, run.task, run.inherit.schedule) == ("runs/demo_mlm/inherit", "mlm", "linear")
    assert all(os.path.isabs(path) for path in arguments[1::2])


def test_garbage_is_looked_for_again_once_everything_is_imported(tmp_path, monkeypatch):
    seen = {}

    def train(config, *, started):
        seen.update(enabled=gc.isenabled(), frozen=gc.get_freeze_count(), run_dir=config.run_dir, started=started)

    monkeypatch.setattr("ki_ds.training.loop.train", train)
    (tmp_path / "corpus").mkdir()
    try:
        launcher._run(["--run_dir", "runs/x", "--data.corpus", str(tmp_path / "corpus")], 1.5)
        assert seen.pop("frozen") > 1000
        assert seen == {"enabled": True, "run_dir": "runs/x", "started": 1.5}
    finally:
        gc.unfreeze()


# --- the whole, for real ---


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("launcher") / "corpus", num_documents=40)


@pytest.fixture
def two_steps(corpus, tmp_path):
    """A configuration file of two steps; its run folder lies beside it."""
    train = {"num_steps": 2, "eval_every": 2, "save_every": 2}
    return write_config(tmp_path / "tiny.yaml", tiny_config(tmp_path / "run", corpus, train=train))


def launch(command, *, cwd=ROOT, timeout=240, **extra):
    return subprocess.run(
        [str(part) for part in command],
        env=environment(**extra),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def error_lines(result):
    return [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error:")]


def trained_on_two_ranks(result, config):
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    manifest = json.loads((config.parent / "run" / "run.json").read_text())
    assert (manifest["status"], manifest["world_size"]) == ("finished", 2)
    assert result.stdout.count("finished; best valid ppl") == 1


def deepspeed(*options):
    """The command, with a port of its own: its usual one may be taken by another run on this machine."""
    return ["deepspeed", "--master_port", free_port(), "--num_gpus", "2", *options, SCRIPT]


@pytest.mark.slow  # test_bash starts it too
def test_deepspeed(two_steps):
    trained_on_two_ranks(launch([*deepspeed(), "--config", two_steps]), two_steps)


def test_torchrun(two_steps):
    command = ["torchrun", "--master_port", free_port(), "--nproc_per_node", "2", SCRIPT, "--config", two_steps]
    trained_on_two_ranks(launch(command), two_steps)


def mpirun():
    """The command; the test is skipped by name where there is none."""
    if shutil.which("mpirun", path=environment()["PATH"]) is None:
        pytest.skip("mpirun is not installed (pip install ki_ds[mpi])")
    return ["mpirun", "-n", "2", "--oversubscribe"]


def test_mpirun(two_steps):
    trained_on_two_ranks(launch([*mpirun(), "bash", SCRIPT, "--config", two_steps], **AS_ROOT), two_steps)


SIDE_BY_SIDE = {
    "bash": ["bash", SCRIPT],
    "deepspeed": ["deepspeed", "--num_gpus", "2", SCRIPT],
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2", SCRIPT],
    "mpirun": ["mpirun", "-n", "2", "--oversubscribe", "bash", SCRIPT],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_two_jobs_side_by_side_on_one_machine_need_no_ports_given(name, corpus, tmp_path):
    if name == "mpirun":
        mpirun()
    extra = {**AS_ROOT, **({"KI_DS_ARGS": "--num_gpus 2"} if name == "bash" else {})}
    jobs = {}
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        train = {"num_steps": 2, "eval_every": 2, "save_every": 2}
        config = tiny_config(tmp_path / str(number) / "run", corpus, train=train)
        config = write_config(tmp_path / str(number) / "tiny.yaml", config)
        command = [*SIDE_BY_SIDE[name], "--config", str(config)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        jobs[config] = subprocess.Popen(command, env=environment(**extra), cwd=ROOT, **pipes)
    for config, process in jobs.items():
        said = process.communicate(timeout=300)
        trained_on_two_ranks(subprocess.CompletedProcess(process.args, process.returncode, *said), config)


SLURM = {
    "srun": """#!/usr/bin/env bash
while [ "${1:0:1}" = - ]; do
    case "$1" in -n) tasks=$2; shift 2 ;; --export=ALL*) shift ;; *) exit 9 ;; esac
done
export SLURM_JOB_ID=$$ SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_NODELIST=localhost
for ((i = 0; i < tasks; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & all+=($!); done
for one in ${all[@]}; do wait $one || failed=$?; done
exit ${failed:-0}
""",
    "scontrol": '#!/usr/bin/env bash\n[ "$1 $2" = "show hostnames" ] && echo "$3"\n',
    "sinfo": "#!/usr/bin/env bash\n",
}


@pytest.fixture
def slurm(tmp_path):
    """The PATH of a machine with stand-ins for Slurm's commands, which set what Slurm sets and nothing else."""
    (tmp_path / "slurm").mkdir()
    for name, script in SLURM.items():
        (tmp_path / "slurm" / name).write_text(script)
        (tmp_path / "slurm" / name).chmod(0o755)
    return {"PATH": f"{tmp_path / 'slurm'}:{environment()['PATH']}"}


@pytest.mark.slow
def test_deepspeed_through_slurm_is_one_world(two_steps, slurm, tmp_path):
    """DeepSpeed hands neither RANK nor WORLD_SIZE to srun: left alone, each rank would train a world of its own."""
    (tmp_path / "hostfile").write_text("one slots=1\ntwo slots=1\n")
    command = ["deepspeed", "--launcher", "slurm", "--hostfile", tmp_path / "hostfile", "--no_ssh_check"]
    command += ["--master_addr", "127.0.0.1", SCRIPT, "--config", two_steps]
    trained_on_two_ranks(launch(command, **slurm), two_steps)


@pytest.mark.slow
def test_srun(two_steps, slurm):
    trained_on_two_ranks(launch(["srun", "-n", "2", "bash", SCRIPT, "--config", two_steps], **slurm), two_steps)


def test_bash(two_steps):
    options = f"--num_gpus 2 --master_port {free_port()}"
    trained_on_two_ranks(launch(["bash", SCRIPT, "--config", two_steps], KI_DS_ARGS=options), two_steps)


@pytest.mark.slow
def test_the_file_itself(two_steps):
    options = f"--num_gpus 2 --master_port {free_port()}"
    trained_on_two_ranks(launch([f"./{SCRIPT}", "--config", two_steps], KI_DS_ARGS=options), two_steps)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--no_python"], ["--no_local_rank"], ["--no_python", "--no_local_rank"]])
def test_deepspeeds_other_ways_to_start_a_rank(options, two_steps):
    trained_on_two_ranks(launch([*deepspeed(*options), "--config", two_steps]), two_steps)


def test_a_typo_is_one_line_through_deepspeed(two_steps):
    result = launch([*deepspeed(), "--config", two_steps, "--optim.lrr", "1"])
    (line,) = error_lines(result)
    assert "optim.lrr" in line
    assert result.returncode == 2
    assert "Traceback" not in result.stdout + result.stderr
    assert not (two_steps.parent / "run").exists()


@pytest.mark.slow
def test_a_typo_is_one_line_even_if_rank_0_is_the_last_to_see_it(two_steps, tmp_path):
    """DeepSpeed ends all ranks with the first that fails: rank 0 must still come to say why."""
    late = tmp_path / "late.sh"
    late.write_text(f'#!/usr/bin/env bash\n[ "$RANK" = 0 ] && sleep 3\nexec {ROOT / SCRIPT} "$@"\n')
    late.chmod(0o755)
    command = [*deepspeed("--no_python")[:-1], late, "--config", two_steps, "--optim.lrr", "1"]
    result = launch(command)
    assert result.returncode == 2
    assert len(error_lines(result)) == 1


@pytest.mark.slow
def test_a_typo_is_one_line_through_mpirun(two_steps):
    result = launch([*mpirun(), "bash", SCRIPT, "--config", two_steps, "--optim.lrr", "1"], **AS_ROOT)
    assert result.returncode == 2
    assert len(error_lines(result)) == 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Two calls that train nothing, side by side: --help, and no argument at all where no demo was made."""
    commands = {
        "help": (["bash", SCRIPT, "--help"], ROOT),
        "no arguments": ([sys.executable, str(ROOT / SCRIPT)], tmp_path_factory.mktemp("no_demo")),
    }
    env = environment(KI_DS_ARGS="--no_such_option")  # deepspeed would fail on it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {name: forked.Popen(command, env=env, cwd=cwd, **pipes) for name, (command, cwd) in commands.items()}
    said = {name: process.communicate(timeout=120) for name, process in started.items()}
    return {name: subprocess.CompletedProcess(p.args, p.returncode, *said[name]) for name, p in started.items()}


def test_help_explains_every_field_without_a_launch(alone):
    result = alone["help"]
    assert result.returncode == 0, result.stderr[-2000:]
    text = " ".join(result.stdout.split())
    for words in (
        "deepspeed launchers/train_ki.sh",
        "--inherit.schedule",
        "T_inherit",
        "peak learning rate",
        "--run_dir",
    ):
        assert words in text


def test_without_arguments_and_without_the_demo_one_line_says_what_to_make(alone):
    result = alone["no arguments"]
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (line,) = error_lines(result)
    assert "runs/demo_mlm/corpus is not there; run `make demo` first" in line
