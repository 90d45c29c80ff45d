"""The ranks of a run: who starts them, sums over them, one voice for all, and how they leave.

Works with one process as well, where nothing is initialised and every reduction is the identity.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from ki_ds.errors import UserError
from ki_ds.ranks.environment import Rank, launched

Value = TypeVar("Value")
FOREVER = timedelta(days=365)
_DEEPSPEEDS_PORT = "29500"  # passed on where it was asked for none
_SET_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")


def repair_environment(env: MutableMapping[str, str]) -> None:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* from what the launcher said in words of its own.

    Slurm passes none of them and would silently start worlds of one rank. mpirun across hosts has no address
    of the first rank in its environment: where the user gave none, that case is left to the engine, which asks MPI.

    Raises:
        UserError: the launcher's environment makes no sense.
    """
    place = launched(env)
    if place is None:
        return
    if "RANK" in env:
        if place.world_size == "1":
            env["MASTER_ADDR"] = env.get("MASTER_ADDR") or "127.0.0.1"
            env["MASTER_PORT"] = env.get("MASTER_PORT") or free_port()
        _check_rank(env, place)
        if place.launcher == "deepspeed" and place.is_on_one_host and env.get("MASTER_PORT") == _DEEPSPEEDS_PORT:
            env["MASTER_PORT"] = _port_below_deepspeed()
        return
    if place.is_on_one_host:
        address, port = "127.0.0.1", port_of_job(_name_of_job(env))
    elif place.launcher == "srun":
        address, port = env.get("MASTER_ADDR") or _first_host(env), port_of_job(_name_of_job(env))
    elif env.get("MASTER_ADDR") and env.get("MASTER_PORT"):
        address, port = env["MASTER_ADDR"], env["MASTER_PORT"]
    else:
        return
    assert place.world_size is not None
    env.update(RANK=place.rank, WORLD_SIZE=place.world_size)
    for name, value in (("LOCAL_RANK", place.local_rank), ("LOCAL_WORLD_SIZE", place.local_world_size)):
        if value is not None:
            env[name] = value
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        env[name] = env.get(name) or value
    _check_rank(env, place)


def _check_rank(env: Mapping[str, str], place: Rank) -> None:
    """Refuse what no launcher sets, in a line of each host's first rank."""
    said = f"RANK={place.rank} WORLD_SIZE={place.world_size or ''} of {place.launcher}"
    fix = "a launcher sets both (deepspeed, torchrun, mpirun, srun); unset RANK where none has started this process"
    if not place.rank.isdecimal() or not (place.world_size or "").isdecimal():
        raise _by_each_host(env, f"{said}: no numbers; {fix}")
    if int(place.rank) >= int(place.world_size or 0):
        raise _by_each_host(env, f"{said}: a rank lies in 0 to WORLD_SIZE - 1; {fix}")
    for name, what in (("MASTER_ADDR", "the host of rank 0"), ("MASTER_PORT", "a free port of it, e.g. 29501")):
        if not env.get(name):
            raise _by_each_host(env, f"{said}, but no {name}; give {what}, or start the ranks with a launcher")
    if not env["MASTER_PORT"].isdecimal() or not 0 < int(env["MASTER_PORT"]) < 65536:
        raise _by_each_host(env, f"MASTER_PORT={env['MASTER_PORT']} is no port; give one of 1 to 65535, e.g. 29501")


def _first_host(env: Mapping[str, str]) -> str:
    """The host of a Slurm step's rank 0."""
    nodes = env.get("SLURM_STEP_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise _by_each_host(
            env, f"`scontrol show hostnames {nodes}` does not name the first host; export MASTER_ADDR before srun"
        ) from None


# --- the port where nobody asked for one --------------------------------------------------------------------------


def port_of_job(name: str) -> str:
    """A port that all ranks of one job derive alike and two jobs on a host hardly ever share.

    It lies below the ports that Linux gives to outgoing connections.
    """
    return str(10_000 + zlib.crc32(name.encode()) % 22_000)


def _name_of_job(env: Mapping[str, str]) -> str:
    """What the ranks of a job on this host, or of a Slurm step, have in common and no other job has."""
    if "SLURM_STEP_NUM_TASKS" in env and not any(name in env for name in _SET_BY_MPI):
        return f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}"
    return env.get("PMIX_NAMESPACE") or _name_of(_launcher_without(*_SET_BY_MPI))


def _name_of(process: psutil.Process | None) -> str:
    return f"{process.pid if process else ''} {os.readlink('/proc/self/ns/pid') if sys.platform == 'linux' else ''}"


def _launcher_without(*names: str) -> psutil.Process | None:
    """The nearest process above this one that was started without these variables: the one that has set them."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if not any(name in process.environ() for name in names):
                return process
    return None


def _port_below_deepspeed() -> str:
    """The port of a job on this host alone whose launcher passed DeepSpeed's usual one.

    `deepspeed` passes it whether or not it was asked for, and hides MASTER_PORT behind it: with the same port for
    all, a second job on a host would meet the first one's ranks.
    """
    launcher = _launcher_without("CROSS_RANK")  # of this host
    with contextlib.suppress(psutil.Error):
        runner = launcher.parent() if launcher else None
        if launcher is None or any(word.startswith("--master_p") for word in (runner.cmdline() if runner else [])):
            return _DEEPSPEEDS_PORT
        return launcher.environ().get("MASTER_PORT") or port_of_job(_name_of(launcher))
    return _DEEPSPEEDS_PORT


# --- threads --------------------------------------------------------------------------------------------------------


def threads_asked_for(env: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS, where the user has set it; torchrun sets it to 1 for those who have not.

    Raises:
        UserError: it is no number of threads.
    """
    said = env.get("OMP_NUM_THREADS", "").strip()
    if said == "1" and "TORCHELASTIC_RUN_ID" in env:
        with contextlib.suppress(psutil.Error):
            launcher = _launcher_without("TORCHELASTIC_RUN_ID")
            said = launcher.environ().get("OMP_NUM_THREADS", "") if launcher else said
    first = said.partition(",")[0].strip()  # OpenMP takes a list, one for each level of nesting
    if not said:
        return None
    if not first.isdecimal() or int(first) < 1:
        raise _by_each_host(env, f"OMP_NUM_THREADS={said} is no number of threads; give 1 or more, or unset it")
    return int(first)


def share_of_cores() -> int:
    """How many of this host's cores are this rank's, at least 1, once the ranks have met.

    A core that several ranks may run on is shared out among them, one that a launcher has bound to a rank is its own.
    """
    mine = os.sched_getaffinity(0)
    masks = [json.loads(mask) for mask in store_client("present").get(_machine()).decode().split(";")[:-1]]
    return max(1, int(sum(1 / sum(core in mask for mask in masks) for core in mine) + 1e-6))


def _machine() -> str:
    """This machine's name for itself, the same in all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


# --- the meeting ----------------------------------------------------------------------------------------------------


def pick_interface(env: MutableMapping[str, str]) -> None:
    """Name the network interface that routes to the master to gloo and NCCL, where the user named none.

    Gloo otherwise takes the address of the host's name, which is loopback on many machines: ranks of other
    hosts then wait for ever. NCCL is left alone where the master is this host's loopback.
    """
    if "MASTER_ADDR" not in env or (env.get("GLOO_SOCKET_IFNAME") and env.get("NCCL_SOCKET_IFNAME")):
        return
    try:
        name = interface_to(env["MASTER_ADDR"])
    except OSError as error:
        raise _by_each_host(
            env, f"MASTER_ADDR={env['MASTER_ADDR']} cannot be reached ({error}); give a reachable host"
        ) from None
    if name is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", name)
        if not name.startswith("lo"):
            env.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this very name, not all that begin with it


def interface_to(host: str) -> str | None:
    """The network interface through which this host reaches another; None where its address is on none.

    Raises:
        OSError: there is no such host, or no route.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    except UnicodeError as error:
        raise OSError(str(error)) from None
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # a UDP connect sends nothing
        mine = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.split("%")[0] == mine for a in addresses):
            return name
    return None


def _by_each_host(env: Mapping[str, str], line: str) -> UserError:
    """An error that the first rank of every host says: rank 0 may know nothing of it."""
    error = UserError(line)
    error.said_by_main = env.get("LOCAL_RANK", "0") != "0"
    return error


def meet(env: MutableMapping[str, str], *, seconds: float) -> dist.Store:
    """The store on the launcher's port, once every rank of the job has come to it.

    Raises:
        UserError: the port cannot be used, a rank has come twice, or some have not come within `seconds`.
    """
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    where = f"MASTER_ADDR={env['MASTER_ADDR']} MASTER_PORT={env['MASTER_PORT']}"
    # torchrun holds a store of its own on this port
    hosts = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    until = time.monotonic() + seconds
    try:
        patience = timedelta(seconds=max(seconds, 1.0))
        store = dist.TCPStore(
            env["MASTER_ADDR"], int(env["MASTER_PORT"]), world, hosts, patience, wait_for_workers=False
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _by_each_host(
            env,
            f"{where} cannot be used by rank {rank} on {socket.gethostname()} ({str(error).splitlines()[0]}); give a "
            "free port of a host that all reach: --master_port 29501 (deepspeed, torchrun), else MASTER_PORT=29501",
        ) from None
    present = dist.PrefixStore(f"ki_ds_{attempt(env)}_present", store)
    if present.add(str(rank), 1) > 1:
        raise UserError(
            f"two processes call themselves rank {rank} of the job at {where}; give each host its own --node_rank, and "
            "each job its own port"
        )
    cores = f"{sorted(os.sched_getaffinity(0))};"
    present.append(_machine(), cores)  # type: ignore[attr-defined]  # torch's stubs leave it out
    present.add("all", 1)
    try:
        while present.add("all", 0) < world:
            if time.monotonic() > until:
                missing = [str(other) for other in range(world) if not present.check([str(other)])]
                raise _of_all(
                    f"{where}: rank {', '.join(missing)} of {world} has not come within {seconds:g} s; see "
                    "what the launcher of its host says, or give it longer with engine.connect_seconds"
                )
            time.sleep(0.05)
    except (dist.DistNetworkError, dist.DistStoreError):
        raise _of_all("rank 0 has left") from None  # with a line of its own
    return store


def _of_all(line: str) -> UserError:
    """An error that every rank comes to, or that rank 0 has said before."""
    error = UserError(line)
    error.said_by_main = True
    return error


def attempt(env: Mapping[str, str]) -> str:
    """Which start of a job this is: torchrun's store outlives a job that it starts again."""
    return env.get("TORCHELASTIC_RESTART_COUNT", "0")


def join_world(store: dist.Store, rank: int, world: int) -> None:
    """Connect the ranks of a world through a store. Nothing in it times out: a watchdog ends a job that hangs."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    named = dist.PrefixStore(f"ki_ds_{attempt(os.environ)}_students", store)
    dist.init_process_group(backend, store=named, rank=rank, world_size=world, timeout=FOREVER)


def store_client(name: str) -> dist.Store:
    """A client of its own to the store on the launcher's port, for a thread; keys are this job's under `name`.

    Whoever waits on a client of the store holds up all who share it.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    plain = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
    return dist.PrefixStore(f"ki_ds_{attempt(os.environ)}_{name}", plain)


class Notes:
    """What all ranks tell rank 0, and its answer to all, from threads beside training.

    Through the store on the launcher's port: collectives of a thread would be taken for training's, and a rank whose
    disk is full could leave no file.
    """

    def __init__(self, name: str):
        self._store = store_client(name) if world_size() > 1 else dist.PrefixStore(name, dist.HashStore())

    def to_main(self, note: Any) -> list[Any]:
        """The notes (JSON) of all ranks, in their order, on rank 0, which waits for them; nothing on the others."""
        self._store.set(f"note_{rank()}", json.dumps(note))
        if not is_main():
            return []
        keys = [f"note_{number}" for number in range(world_size())]
        self._wait_for(keys)
        return [json.loads(found) for found in self._store.multi_get(keys)]

    def from_main(self, answer: Any) -> Any:
        """What rank 0 answers, on every rank. Rank 0 returns last: the store may end with it."""
        if is_main():
            self._store.set("answer", json.dumps(answer))
        self._wait_for(["answer"])
        found = json.loads(self._store.get("answer"))
        self._store.set(f"heard_{rank()}", "")
        if is_main():
            heard = [f"heard_{number}" for number in range(world_size())]
            self._wait_for(heard)
            for key in ["answer", *heard, *(f"note_{number}" for number in range(world_size()))]:
                self._store.delete_key(key)
        return found

    def _wait_for(self, keys: list[str]) -> None:
        while not self._store.check(keys):
            time.sleep(0.02)


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


def on_main(work: Callable[[], Value]) -> Value | None:
    """What `work` gives on rank 0, which alone does it; None on the others. Its UserError is raised on every rank."""
    error = value = None
    if is_main():
        try:
            value = work()
        except UserError as refused:
            error = refused
    together(error)
    return value


def leave(code: int) -> None:
    """End this process with `code`. Never returns.

    gloo sometimes aborts in its destructors at interpreter exit, which would turn a finished run into a
    failed one: the group is taken down in order and the interpreter's teardown skipped.
    """
    if dist.is_initialized():
        if code == 0:
            dist.barrier()
        dist.destroy_process_group()
        if code == 0 and "mpi4py.MPI" in sys.modules:  # mpirun takes a rank that ends without it for a failed one
            sys.modules["mpi4py.MPI"].Finalize()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
