"""Two worlds in one job: the ranks that train a student, and behind them the ranks that run its teacher.

The launcher starts W ranks. The first W - T of them become the student's world, which alone DeepSpeed sees; the last T
run the teacher. One TCP store on the launcher's port serves both worlds and the bridge between them: small notes go
through the store, tensors from a teacher rank to a student rank through a gloo group of all W.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ki_ds.errors import UserError, common_to_all_ranks
from ki_ds.ranks.world import FOREVER, attempt, join_world, meet

_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float64]


@dataclass(frozen=True)
class Bridge:
    """One rank's end. Ranks are counted through the job: students 0..S-1, teachers S..S+T-1.

    Notes and tensors raise ConnectionError when the other side is gone.
    """

    rank: int
    num_students: int
    num_teachers: int
    store: dist.Store
    group: Any  # dist.ProcessGroupGloo, whose send and recv the type checker does not know

    @property
    def is_teacher(self) -> bool:
        """Whether this rank runs the teacher."""
        return self.rank >= self.num_students

    @property
    def teacher(self) -> int:
        """The rank that answers this student: teachers take students in turn."""
        return self.num_students + self.rank % self.num_teachers

    @property
    def students(self) -> list[int]:
        """The students that this teacher answers."""
        mine = self.rank - self.num_students
        return list(range(mine, self.num_students, self.num_teachers))

    def put(self, name: str, value: Any) -> None:
        """Leave a note (JSON) for whoever gets it."""
        with _other_side():
            self.store.set(name, json.dumps(value))

    def has(self, name: str) -> bool:
        """Whether a note has been left."""
        with _other_side():
            return self.store.check([name])

    def get(self, name: str, *, seconds: float = math.inf) -> Any:
        """A note that another rank has left or will leave; TimeoutError after `seconds`."""
        until = time.monotonic() + seconds
        with _other_side():
            while not self.store.check([name]):
                if time.monotonic() > until:
                    raise TimeoutError(name)
                time.sleep(0.05)
            return json.loads(self.store.get(name))

    def send(self, tensors: list[Tensor], to: int) -> None:
        """Send tensors to a student; returns when they are there."""
        shapes = [[_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape] for tensor in tensors]
        flat = [number for shape in shapes for number in shape]
        self._send(torch.tensor([len(flat)]), to)
        self._send(torch.tensor(flat), to)
        for tensor in tensors:
            self._send(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8), to)

    def receive(self, source: int) -> list[Tensor]:
        """The next tensors from a teacher, on the CPU; waits for them."""
        flat = self._receive(int(self._receive(1, source)[0]), source).tolist()
        tensors = []
        while flat:
            dtype, shape = _DTYPES[flat[0]], flat[2 : 2 + flat[1]]
            tensor = torch.empty(shape, dtype=dtype)
            if tensor.numel():
                with _other_side():
                    self.group.recv([tensor.view(-1).view(torch.uint8)], source, 0).wait(FOREVER)
            tensors.append(tensor)
            flat = flat[2 + len(shape) :]
        return tensors

    def _send(self, tensor: Tensor, to: int) -> None:
        if tensor.numel():
            with _other_side():
                self.group.send([tensor], to, 0).wait(FOREVER)

    def _receive(self, count: int, source: int) -> Tensor:
        tensor = torch.empty(count, dtype=torch.int64)
        with _other_side():
            self.group.recv([tensor], source, 0).wait(FOREVER)
        return tensor


@contextlib.contextmanager
def _other_side() -> Iterator[None]:
    """gloo and the store say a lost connection by RuntimeErrors of their own."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error).splitlines()[0]) from None


def split_world(env: MutableMapping[str, str], num_teachers: int, *, seconds: float) -> Bridge:
    """Part the launcher's ranks into two worlds and connect the student's; RANK and WORLD_SIZE become this world's.

    Raises:
        UserError: no rank is left for the student, or the ranks have not met within `seconds`.
    """
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    students = world - num_teachers
    if students < 1:
        with common_to_all_ranks():
            raise UserError(
                f"teacher.num_ranks={num_teachers} of {world} ranks leave none for the student; start more ranks, e.g. "
                f"deepspeed --num_gpus {num_teachers + 1}"
            )
    store = meet(env, seconds=seconds)
    notes = dist.PrefixStore(f"ki_ds_{attempt(env)}_notes", store)
    group = dist.ProcessGroupGloo(dist.PrefixStore(f"ki_ds_{attempt(env)}_bridge", store), rank, world, FOREVER)
    bridge = Bridge(rank, students, num_teachers, notes, group)
    if bridge.is_teacher:
        bridge.put(f"teacher_{rank}", f"{socket.gethostname()} pid {os.getpid()}")
        return bridge
    env["WORLD_SIZE"] = str(students)
    join_world(store, rank, students)
    return bridge
