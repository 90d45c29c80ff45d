"""A teacher in the student's own process, asked with the student's batch or a micro-batch ahead.

Shape suffixes: N labelled rows, V padded vocabulary, K teacher entries of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ki_ds.data.batches import Batch
from ki_ds.engine.memory import give_freed_memory_back
from ki_ds.models.presets import RowLM
from ki_ds.models.probe import USUAL, Rows
from ki_ds.objective.types import Average, Head, Logits, Routed, Signal, Sparse
from ki_ds.teachers.teacher import Teacher

_ROWS_AT_ONCE = 1024  # whose logits exist together


class OnlineTeacher(Teacher):
    """Runs the teacher's forward on the student's batch, in eval mode, without gradient.

    It is a plain frozen module, whose pages the ranks of a host share, and never a submodule of the student, so no
    optimizer, checkpoint or ZeRO stage ever sees it.

    Args:
        rows: that it will be asked about.
        cut: makes of its hidden states the K entries a row that it says instead (Fig. 1c).
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        device: torch.device,
        rows: Rows = USUAL,
        cut: Callable[[Head], Sparse] | None = None,
    ):
        self._model: RowLM | None = RowLM(lm.eval().requires_grad_(False).to(device))
        self._model.eval().check(rows)
        self._cut = cut

    @torch.no_grad()
    def signal(self, batch: Batch) -> Signal:
        """The last hidden states of the labelled rows (N, D) and the output projection, in the teacher's dtype."""
        assert self._model is not None, "a freed teacher was asked"
        head = self._model.signal(batch)
        return head if self._cut is None else self._cut(head)

    def free(self) -> None:
        """Give the weights' memory back to the device, whoever else still holds the module."""
        assert self._model is not None
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        give_freed_memory_back()


@torch.no_grad()
def largest_entries(head: Head, *, topk: int, tau: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Ids (N, K) int64 and float32 log-probabilities (N, K) of softmax(logits / tau), the largest first.

    Args:
        num_classes: ids of the vocabulary; what pads the teacher's head beyond them has no probability.
    """
    parts = []
    for hidden in head.hidden_ND.split(_ROWS_AT_ONCE):  # one empty part where there are no rows
        logits_NV = head.form.logits(hidden, head.weight_VD, head.bias_V)[:, :num_classes]
        parts.append(torch.log_softmax(logits_NV / tau, dim=-1).topk(topk, dim=-1))
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


class OverlappedTeacher(Teacher):
    """Runs another teacher in a thread of its own, on a GPU in a stream of its own; its answers are the same.

    `ask` begins a forward and returns at once. The trainer asks about the next micro-batch before it hands the student
    this one, so that both fill the device together, and the teacher works while gradients travel.
    """

    def __init__(self, teacher: Teacher, device: torch.device):
        self._teacher, self._device = teacher, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self._asked: tuple[Batch, Future[tuple[Signal, torch.cuda.Event | None]]] | None = None

    def ask(self, batch: Batch) -> None:
        """Begin to answer about a batch in the host's memory, the next one that `signal` will be called with."""
        self._asked = batch, self._worker.submit(self._answer, batch)

    def signal(self, batch: Batch) -> Signal:
        """What the teacher says; it waits for what was asked before, and asks now where nothing was."""
        host = batch.host or batch
        if self._asked is None or self._asked[0] is not host:
            self.ask(host)
        assert self._asked is not None
        (signal, written), self._asked = self._asked[1].result(), None
        if written is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(written)
            for tensor in _tensors(signal):
                tensor.record_stream(stream)
        return signal

    def _answer(self, batch: Batch) -> tuple[Signal, torch.cuda.Event | None]:
        """(signal, on a GPU the event that the teacher's stream has written it)."""
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            signal = self._teacher.signal(batch.to(self._device, non_blocking=True))
            return signal, None if self._stream is None else self._stream.record_event()

    def figures(self) -> dict[str, float]:
        """The other teacher's."""
        return self._teacher.figures()

    def free(self) -> None:
        """End the thread, and free the other teacher."""
        self._worker.shutdown(cancel_futures=True)
        self._asked = None
        self._teacher.free()


def _tensors(signal: Signal) -> list[Tensor]:
    """What the teacher's stream has made for this batch; a head's weights stay where they are."""
    match signal:
        case Head(rows_ND) | Logits(rows_ND):
            return [rows_ND]
        case Sparse(ids_NK, probs_NK):
            return [ids_NK, probs_NK]
        case Routed(parts):
            return [tensor for part in parts for tensor in (part.rows_M, *_tensors(part.signal))]
        case Average(parts):
            return [tensor for part in parts for tensor in _tensors(part)]
