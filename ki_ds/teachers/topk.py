"""Of a running teacher's distribution its K largest entries alone (section 4.1, Fig. 1c).

Shape suffixes: N labelled rows, V padded vocabulary, K teacher entries of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ki_ds.data.batches import Batch
from ki_ds.objective.types import Head, Sparse
from ki_ds.teachers.teacher import Teacher

_ROWS_AT_ONCE = 1024  # whose logits exist together


class TopKTeacher(Teacher):
    """What another teacher says, cut to the K most probable tokens: what a cache of K entries would hold."""

    def __init__(self, teacher: Teacher, *, topk: int, tau: float, num_classes: int, semantics: str):
        self._teacher, self._topk, self._tau = teacher, topk, tau
        self._num_classes, self._semantics = num_classes, semantics

    def ask(self, batch: Batch) -> None:
        """As the other teacher's."""
        self._teacher.ask(batch)

    def signal(self, batch: Batch) -> Sparse:
        """The K entries of each labelled row."""
        signal = self._teacher.signal(batch)
        assert isinstance(signal, Head)
        ids, log_probs = largest_entries(signal, topk=self._topk, tau=self._tau, num_classes=self._num_classes)
        return Sparse(ids, log_probs.exp(), self._semantics)

    def figures(self) -> dict[str, float]:
        """As the other teacher's."""
        return self._teacher.figures()

    def free(self) -> None:
        """As the other teacher's."""
        self._teacher.free()


@torch.no_grad()
def largest_entries(signal: Head, *, topk: int, tau: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Ids (N, K) int64 and float32 log-probabilities (N, K) of softmax(logits / tau), the largest first.

    Args:
        num_classes: ids of the vocabulary; what pads the teacher's head beyond them has no probability.
    """
    found = []
    for hidden in signal.hidden_ND.split(_ROWS_AT_ONCE):  # one empty part where there are no rows
        logits_NV = signal.form.logits(hidden, signal.weight_VD, signal.bias_V)[:, :num_classes]
        found.append(torch.log_softmax(logits_NV / tau, dim=-1).topk(topk, dim=-1))
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])
