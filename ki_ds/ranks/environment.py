"""Which rank of a job this process is, as whatever has started it says in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """One rank of a job: numbers as the launcher wrote them, None where it says nothing.

    `local_world_size`: ranks on this rank's host. `launcher`: who says so, for people.
    """

    launcher: str
    rank: str
    world_size: str | None
    local_rank: str | None = None
    local_world_size: str | None = None

    @property
    def is_on_one_host(self) -> bool:
        """Whether the launcher says that all ranks are on this host."""
        return self.world_size is not None and self.world_size == self.local_world_size


def launched(env: Mapping[str, str]) -> Rank | None:
    """The rank that a launcher has started with this environment; None where none has.

    RANK (torchrun, deepspeed, or by hand) is believed before MPI's variables, and those before Slurm's: mpirun starts
    its daemons through srun. Slurm's job and its batch script, and a step of a single task, are places to start
    ranks from and no ranks: an interactive shell is such a step.
    """
    return _said(env) or _open_mpi(env) or _mpich(env) or _srun(env)


def own_rank(env: Mapping[str, str]) -> str:
    """This process's rank as whichever launcher has set it; "0" where none has."""
    place = launched(env)
    return place.rank if place else "0"


def _said(env: Mapping[str, str]) -> Rank | None:
    if not env.get("RANK"):
        return None
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "a launcher"
    local_world_size = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE")
    return Rank(launcher, env["RANK"], env.get("WORLD_SIZE") or None, env.get("LOCAL_RANK"), local_world_size)


def _open_mpi(env: Mapping[str, str]) -> Rank | None:
    for prefix in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD"):
        if size := env.get(f"{prefix}_SIZE"):
            local = (env.get(f"{prefix}_LOCAL_RANK"), env.get(f"{prefix}_LOCAL_SIZE"))
            return Rank("mpirun", env.get(f"{prefix}_RANK", "0"), size, *local)
    return None


def _mpich(env: Mapping[str, str]) -> Rank | None:
    """As MPICH and Intel MPI say it, or Cray's PALS. `srun --mpi=pmi2` says no local size, and all else itself."""
    local_size = env.get("MPI_LOCALNRANKS") or env.get("PMI_LOCAL_SIZE")
    if not (env.get("PMI_RANK") and env.get("PMI_SIZE")) or ("SLURM_STEP_ID" in env and local_size is None):
        return None
    local_rank = env.get("MPI_LOCALRANKID") or env.get("PMI_LOCAL_RANK")
    return Rank("mpiexec", env["PMI_RANK"], env["PMI_SIZE"], local_rank, local_size)


def _srun(env: Mapping[str, str]) -> Rank | None:
    size = env.get("SLURM_STEP_NUM_TASKS", "")
    if not env.get("SLURM_PROCID") or size in ("", "1"):
        return None
    tasks = tasks_of_nodes(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = env.get("SLURM_NODEID", "")
    here = tasks[int(node)] if node.isdecimal() and int(node) < len(tasks) else None
    return Rank("srun", env["SLURM_PROCID"], size, env.get("SLURM_LOCALID"), here)


def tasks_of_nodes(text: str) -> list[str]:
    """Slurm's counts by node, written out: "2(x3),1" is ["2", "2", "2", "1"]."""
    found: list[str] = []
    for part in filter(None, text.split(",")):
        tasks, _, times = part.partition("(x")
        found += [tasks] * int(times.rstrip(")") or 1)
    return found


def tasks_left_idle(env: Mapping[str, str], world_size: int) -> str | None:
    """How many tasks a Slurm job was given in which only one rank trains; None where that is as it should be."""
    tasks = env.get("SLURM_NTASKS", "")
    return tasks if world_size == 1 and tasks not in ("", "1") else None
