"""The ranks of a run: who starts them, sums over them, one voice for all, and how they leave.

Works with one process as well, where nothing is initialised and every reduction is the identity.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, MutableMapping
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from ki_ds.errors import UserError

Value = TypeVar("Value")


def repair_environment(env: MutableMapping[str, str]) -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* from what mpirun or srun set, where no launcher has.

    Slurm passes none of them and would silently start worlds of one rank. mpirun across hosts has no address
    of the first rank in its environment: that case is left to the engine, which asks MPI for it.
    """
    if "RANK" in env:
        return
    if "OMPI_COMM_WORLD_RANK" in env and env["OMPI_COMM_WORLD_SIZE"] == env["OMPI_COMM_WORLD_LOCAL_SIZE"]:
        env["RANK"], env["WORLD_SIZE"] = env["OMPI_COMM_WORLD_RANK"], env["OMPI_COMM_WORLD_SIZE"]
        env["LOCAL_RANK"] = env["OMPI_COMM_WORLD_LOCAL_RANK"]
        env.setdefault("LOCAL_WORLD_SIZE", env["OMPI_COMM_WORLD_LOCAL_SIZE"])
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", _port_of_job(env.get("PMIX_NAMESPACE", "ki_ds")))
    elif "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        command = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", head)
        env.setdefault("MASTER_PORT", _port_of_job(env["SLURM_JOB_ID"]))


def _port_of_job(name: str) -> str:
    """A port that all ranks of one job derive alike and two jobs on a host hardly ever share."""
    return str(20_000 + sum(byte * 31**i for i, byte in enumerate(name.encode())) % 20_000)


def pick_gloo_interface(env: MutableMapping[str, str]) -> None:
    """Name the network interface that routes to the master, where the user named none.

    Gloo otherwise takes the address of the host's name, which is loopback on many machines: ranks of other
    hosts then wait for ever.
    """
    if env.get("GLOO_SOCKET_IFNAME") or "MASTER_ADDR" not in env:
        return
    try:
        family, _, _, _, address = socket.getaddrinfo(env["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # a UDP connect sends nothing
            mine = probe.getsockname()[0]
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"MASTER_ADDR={env['MASTER_ADDR']} cannot be reached ({error}); give a reachable host"
        ) from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.split("%")[0] == mine for a in addresses):
            env["GLOO_SOCKET_IFNAME"] = name
            return


def free_port() -> str:
    """A TCP port of this host that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def rank() -> int:
    """This process's rank; 0 outside a distributed run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """The number of ranks on this host, as the launcher says; 1 where it says nothing."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def is_main() -> bool:
    """Whether this is rank 0, the one that talks and writes."""
    return rank() == 0


def say(text: str) -> None:
    """Print one line, on rank 0 only."""
    if is_main():
        print(text, flush=True)


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor summed over all ranks, in place. Stays on its device: no host sync."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Return once every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def from_main(value: Value) -> Value:
    """What rank 0 passed, on every rank. `value` must be picklable; other ranks' values are dropped."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def together(error: UserError | None) -> None:
    """Raise on every rank if any rank has an error, so that none waits for ever for another.

    All raise the message of the first rank that failed; rank 0 prints it.
    """
    if world_size() > 1:
        messages: list[str | None] = [None] * world_size()
        dist.all_gather_object(messages, None if error is None else str(error))
        if first := next((message for message in messages if message is not None), None):
            error = UserError(first)
            error.said_by_main = True
    if error is not None:
        raise error


def on_main(check: Callable[[], object]) -> None:
    """Run a check on rank 0 alone; its UserError is raised on every rank."""
    error = None
    if is_main():
        try:
            check()
        except UserError as found:
            error = found
    together(error)


def leave(code: int) -> None:
    """End this process with `code`. Never returns.

    gloo sometimes aborts in its destructors at interpreter exit, which would turn a finished run into a
    failed one: the group is taken down in order and the interpreter's teardown skipped.
    """
    if dist.is_initialized():
        if code == 0:
            dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
