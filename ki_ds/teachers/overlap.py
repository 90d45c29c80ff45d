"""A teacher in the student's process that answers ahead: the next micro-batch's forward beside the student's work."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ki_ds.data.batches import Batch
from ki_ds.objective.types import Average, Head, Logits, Routed, Signal, Sparse
from ki_ds.teachers.teacher import Teacher


@dataclass(frozen=True)
class _Answer:
    signal: Signal
    ready: torch.cuda.Event | None  # on a GPU: when the teacher's stream has written it


class OverlappedTeacher(Teacher):
    """Runs another teacher in a thread of its own, on a GPU in a stream of its own; its answers are the same.

    `ask` begins a forward and returns at once. The trainer asks about the next micro-batch before it hands the student
    this one, so that both fill the device together, and the teacher works while gradients travel.
    """

    def __init__(self, teacher: Teacher, device: torch.device):
        self._teacher, self._device = teacher, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self._asked: tuple[Batch, Future[_Answer]] | None = None

    def ask(self, batch: Batch) -> None:
        """Begin to answer about a batch in the host's memory, the next one that `signal` will be called with."""
        self._asked = batch, self._worker.submit(self._answer, batch)

    def signal(self, batch: Batch) -> Signal:
        """What the teacher says; it waits for what was asked before, and asks now where nothing was."""
        host = batch.host or batch
        if self._asked is None or self._asked[0] is not host:
            self.ask(host)
        assert self._asked is not None
        answer, self._asked = self._asked[1].result(), None
        if answer.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(answer.ready)
            for tensor in _tensors(answer.signal):
                tensor.record_stream(stream)
        return answer.signal

    def _answer(self, batch: Batch) -> _Answer:
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            signal = self._teacher.signal(batch.to(self._device, non_blocking=True))
            return _Answer(signal, None if self._stream is None else self._stream.record_event())

    def figures(self) -> dict[str, float]:
        """The other teacher's."""
        return self._teacher.figures()

    def free(self) -> None:
        """End the thread, and free the other teacher."""
        self._worker.shutdown(cancel_futures=True)
        self._asked = None
        self._teacher.free()


def _tensors(signal: Signal) -> list[Tensor]:
    """What the teacher's stream has made for this batch; a head stays where it is."""
    match signal:
        case Head(rows_ND) | Logits(rows_ND):
            return [rows_ND]
        case Sparse(ids_NK, probs_NK):
            return [ids_NK, probs_NK]
        case Routed(parts):
            return [tensor for part in parts for tensor in (part.rows_M, *_tensors(part.signal))]
        case Average(parts):
            return [tensor for one in parts for tensor in _tensors(one)]
