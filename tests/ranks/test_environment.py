"""Who has started this process, as told from environments that launchers really make."""

import pytest

from ki_ds.ranks.environment import Rank, launched, own_rank, tasks_left_idle, tasks_of_nodes

SALLOC = {"SLURM_JOB_ID": "2", "SLURM_JOB_NODELIST": "alpha", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2"}
SBATCH = SALLOC | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "16336"}
STEP = SBATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "alpha,beta",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}
# the shell of salloc where LaunchParameters=use_interactive_step, and of srun --pty bash
SHELL = STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PALS = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
PMI2 = {"PMI_FD": "11", "PMI_JOBID": "9.0", "PMI_RANK": "0", "PMI_SIZE": "1"}  # srun --mpi=pmi2, beside its own


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, None),  # variables that others set as well
        (SALLOC, None),
        (SBATCH, None),
        (SHELL, None),
        (SHELL | PMI2, None),
        (STEP, Rank("srun", "0", "3", "0", "2")),
        (STEP | {"SLURM_PROCID": "2", "SLURM_NODEID": "1"}, Rank("srun", "2", "3", "0", "1")),
        (STEP | PMI2, Rank("srun", "0", "3", "0", "2")),
        (OPEN_MPI, Rank("mpirun", "3", "4", "1", "2")),
        ({k.replace("OMPI", "MV2"): v for k, v in OPEN_MPI.items()}, Rank("mpirun", "3", "4", "1", "2")),
        (HYDRA, Rank("mpiexec", "3", "4", "1", "2")),
        (PALS, Rank("mpiexec", "3", "4", "1", "2")),
        # mpirun starts a daemon on each host through srun, whose numbers the ranks inherit
        (STEP | OPEN_MPI, Rank("mpirun", "3", "4", "1", "2")),
        (STEP | HYDRA, Rank("mpiexec", "3", "4", "1", "2")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Rank("a launcher", "1", "2")),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "0", **STEP},
            Rank("deepspeed", "1", "2", "1", "2"),
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"},
            Rank("torchrun", "1", "2", "1", "2"),
        ),
    ],
)
def test_a_rank_is_told_from_a_place_to_start_ranks(env, expected):
    assert launched(env) == expected
    assert own_rank(env) == (expected.rank if expected else "0")


def test_ranks_are_on_one_host_where_the_launcher_says_so():
    assert not launched(OPEN_MPI).is_on_one_host
    assert launched(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).is_on_one_host
    assert launched(STEP | {"SLURM_STEP_TASKS_PER_NODE": "3"}).is_on_one_host
    assert not launched({"RANK": "0", "WORLD_SIZE": "1"}).is_on_one_host  # nobody has said so


@pytest.mark.parametrize(
    ("text", "expected"), [("", []), ("3", ["3"]), ("2(x3),1", ["2", "2", "2", "1"]), ("1,4(x2)", ["1", "4", "4"])]
)
def test_tasks_of_nodes(text, expected):
    assert tasks_of_nodes(text) == expected


def test_tasks_that_no_rank_uses():
    assert tasks_left_idle(SBATCH, 1) == "2"
    assert tasks_left_idle(SBATCH, 2) is None
    assert tasks_left_idle({"SLURM_NTASKS": "1"}, 1) is None
    assert tasks_left_idle({}, 1) is None
