"""A teacher on ranks of its own: they run ahead of the students and send the hidden states of the labelled rows.

Batches are pure functions of the configuration and a step: a teacher rank makes those of its students itself and learns
from them only where to begin. It sends its output projection once, then for every micro-batch a header and N hidden
states of D numbers. It is at most `teacher.ahead` and two micro-batches ahead, for a tensor leaves it when the student
takes it.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch

from ki_ds import schedules
from ki_ds.bridge import Bridge
from ki_ds.config import RunConfig
from ki_ds.data.batches import Batch, TrainBatches
from ki_ds.data.datasets import open_datasets
from ki_ds.errors import UserError
from ki_ds.signals import HiddenSignal
from ki_ds.teachers.factory import TeacherFacts, make_teacher

_REMIND_SECONDS = 30.0


# --- the teacher's side -------------------------------------------------------------------------------------------


def teach(config: RunConfig, bridge: Bridge, device: torch.device) -> None:
    """Answer this rank's students until alpha is 0 or the run ends.

    Raises:
        UserError: the data or the teacher cannot be used, or a student is gone; the students say why, as they end.
    """
    try:
        _teach(config, bridge, device)
    except ConnectionError:
        error = UserError("a student rank is gone; start the job again to go on from its last checkpoint")
        error.said_by_main = True
        raise error from None


def _teach(config: RunConfig, bridge: Bridge, device: torch.device) -> None:
    try:
        data = open_datasets(config.data, config.task, other_index_dir=Path(config.run_dir) / "index")
        teacher, facts = make_teacher(
            dataclasses.replace(config.teacher, placement="online"),
            config.task,
            tokenizer_sha256=data.vocabulary.sha256,
            num_classes=data.vocabulary.size,
            seq_len=config.data.seq_len,
            packing=config.data.packing,
            device=device,
        )
    except UserError as error:
        bridge.put(f"facts_{bridge.rank}", {"error": str(error)})
        error.said_by_main = True
        raise
    bridge.put(f"facts_{bridge.rank}", {"facts": asdict(facts)})
    steps = _steps(config, bridge.get("start"))
    streams = [
        TrainBatches(
            data.train,
            seed=config.seed,
            micro_batch_size=config.train.micro_batch_size,
            global_batch_size=config.train.global_batch_size,
            rank=student,
            world_size=bridge.num_students,
            num_workers=config.data.num_workers,
            start_step=steps.start,
            num_steps=steps.stop,
            pin_memory=device.type == "cuda",
        )
        for student in bridge.students
    ]
    busy = idle = 0.0
    number = 0
    for step in zip(*streams, strict=True):
        for micro_batches in zip(*step, strict=True):
            for student, batch in zip(bridge.students, micro_batches, strict=True):
                began = time.perf_counter()
                signal = teacher.signal(batch.to(device, non_blocking=True))
                assert isinstance(signal, HiddenSignal)
                hidden_ND = signal.hidden_ND.cpu()
                busy, began = busy + time.perf_counter() - began, time.perf_counter()
                if number == 0:
                    bridge.send([signal.weight_VD, *([] if signal.bias_V is None else [signal.bias_V])], student)
                header = torch.tensor([number, batch.num_tokens, round(busy * 1e6), round(idle * 1e6)])
                bridge.send([header, hidden_ND], student)
                idle += time.perf_counter() - began
            number += 1


def _steps(config: RunConfig, start: int) -> range:
    """The steps from `start` on that are taught before the run ends or stops."""
    taught = schedules.taught_steps(config)
    first = max(start, taught.start)
    return range(first, max(min(taught.stop, config.train.stop_at_step or taught.stop), first))


# --- the student's side -------------------------------------------------------------------------------------------


def connect_teacher(
    config: RunConfig, bridge: Bridge, device: torch.device, *, step: int
) -> tuple[RanksTeacher, TeacherFacts]:
    """The teacher behind the bridge, told to begin at `step`, and its facts. Called by every student rank.

    Raises:
        UserError: what its ranks could not use, or that one of them did not come up within teacher.patience.
    """
    if bridge.rank == 0:
        bridge.put("start", step)
    try:
        note = bridge.get(f"facts_{bridge.teacher}", seconds=config.teacher.patience or math.inf)
    except TimeoutError:
        raise UserError(
            f"teacher rank {bridge.teacher} was not ready within teacher.patience={config.teacher.patience:g} s; look "
            "at its host, or raise it"
        ) from None
    if "error" in note:
        raise UserError(note["error"])
    accumulation = config.train.global_batch_size // (config.train.micro_batch_size * bridge.num_students)
    num_batches = len(_steps(config, step)) * accumulation
    teacher = RanksTeacher(
        bridge, device, num_batches=num_batches, ahead=config.teacher.ahead, patience=config.teacher.patience
    )
    return teacher, TeacherFacts(**note["facts"])


class RanksTeacher:
    """Receives in a thread of its own what a teacher rank sends, `ahead` micro-batches at most beforehand."""

    def __init__(self, bridge: Bridge, device: torch.device, *, num_batches: int, ahead: int, patience: float) -> None:
        self._bridge, self._device, self._patience = bridge, device, patience
        self._head: list[torch.Tensor] | None = None
        self._number = 0
        self._waited, self._busy, self._idle = 0.0, 0, 0
        self._received: queue.Queue[list[torch.Tensor] | ConnectionError] = queue.Queue(maxsize=ahead)
        threading.Thread(target=self._receive, args=(num_batches,), daemon=True).start()

    def _receive(self, num_batches: int) -> None:
        try:
            for _ in range(num_batches + (num_batches > 0)):  # the head comes first
                self._received.put(self._bridge.receive(self._bridge.teacher))
        except ConnectionError as error:
            self._received.put(error)

    def signal(self, batch: Batch) -> HiddenSignal:
        """The hidden states of the labelled rows (N, D), in the teacher's dtype, and its output projection."""
        if self._head is None:
            self._head = [tensor.to(self._device) for tensor in self._next()]
        header, hidden_ND = self._next()
        number, num_tokens, busy, idle = header.tolist()
        if (number, num_tokens, len(hidden_ND)) != (self._number, batch.num_tokens, batch.num_rows):
            raise UserError(
                f"{self._name} answers micro-batch {number} with {len(hidden_ND)} rows, the student asks for "
                f"{self._number} with {batch.num_rows}; give all ranks the same code, data and configuration"
            )
        self._number, self._busy, self._idle = number + 1, busy, idle
        weight_VD, bias_V = self._head[0], self._head[1] if len(self._head) > 1 else None
        return HiddenSignal(hidden_ND.to(self._device, non_blocking=True), weight_VD, bias_V)

    def figures(self) -> dict[str, float]:
        """Seconds, so far, that this student waited for its teacher, and that the teacher worked and waited."""
        return {
            "teacher_wait_seconds": self._waited,
            "teacher_busy_seconds": self._busy / 1e6,
            "teacher_idle_seconds": self._idle / 1e6,
        }

    def free(self) -> None:
        """Give the output projection's memory back; the teacher's rank has left by now."""
        self._head = None

    @property
    def _name(self) -> str:
        return f"teacher rank {self._bridge.teacher} ({self._bridge.get(f'teacher_{self._bridge.teacher}')})"

    def _next(self) -> list[torch.Tensor]:
        began = time.monotonic()
        while True:
            try:
                found = self._received.get(timeout=min(_REMIND_SECONDS, self._patience or math.inf))
                break
            except queue.Empty:
                self._remind(time.monotonic() - began)
        self._waited += time.monotonic() - began
        if isinstance(found, ConnectionError):
            raise UserError(f"{self._name} is gone; start the job again to go on from the last checkpoint") from None
        return found

    def _remind(self, waited: float) -> None:
        """Say that the teacher is slow; UserError when it is too slow."""
        if self._patience and waited >= self._patience:
            raise UserError(
                f"{self._name} has sent nothing for {waited:.0f} s (teacher.patience={self._patience:g}); look at its "
                "host, then start the job again to go on from the last checkpoint"
            )
        print(f"student rank {self._bridge.rank} has waited {waited:.0f} s for {self._name}", flush=True)
