"""What the loss is told and what it answers: a teacher's signal about rows, the form of logits, the sums.

`Teacher.signal(batch)` returns a `Signal`, which is the loss's own argument: where a teacher runs (in the process,
on ranks of its own, from a cache) is the teacher's business alone.

Shape suffixes: N labelled rows in order, M those of one teacher, D hidden size, V padded vocabulary, K teacher
entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ki_ds.objective.rows import PLAIN, LogitForm

__all__ = ["PLAIN", "Average", "Head", "LogitForm", "LossOutput", "Part", "Routed", "Signal", "Sparse"]


@dataclass(frozen=True)
class Head:
    """Hidden states of rows with the output projection and the form of the logits, which only the loss forms."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    form: LogitForm = PLAIN


@dataclass(frozen=True)
class Sparse:
    """K entries a row: ids (int64) and the teacher's softmax at tau there (float), read by `semantics`.

    What the three semantics mean is in `ki_ds.objective.loss.topk_inheritance_loss`.
    """

    ids_NK: Tensor
    probs_NK: Tensor
    semantics: str


@dataclass(frozen=True)
class Part:
    """What one of several teachers says about its rows: the labelled rows `rows_M` of the batch, in their order."""

    teacher: int  # its number among the run's teachers
    signal: Head | Sparse
    rows_M: Tensor  # int64
    num_tokens: int  # that its forward saw


@dataclass(frozen=True)
class Routed:
    """Each row's own teacher; rows of no part have none. A teacher without rows in the batch has no part."""

    parts: tuple[Part, ...]
    num_teachers: int


@dataclass(frozen=True)
class Average:
    """Several teachers for every row: the average of their softmaxes at tau, weighted by `shares` over their sum."""

    parts: tuple[Head, ...]
    shares: tuple[float, ...]


Signal = Head | Sparse | Routed | Average


class LossOutput(NamedTuple):
    """Sums over the rows that have a label. A tuple, so that DeepSpeed finds the tensors in it.

    `loss_sum` (float32, 0-d) alone carries gradient. `ce_sum` and `kl_sum` (float32, 0-d) are the sums of CE_r and
    KL_r as they are: without alpha, tau^2, row weights or label smoothing; `kl_sum` is 0 where alpha is 0.0.
    `num_rows` (int64, 0-d) stays on the device.

    `teachers` (float32, [T, 4]) says for each teacher, in order, over the rows that it taught: the sum of KL_r, the
    sum of the teacher's own cross-entropy against the labels (its softmax at 1; the first pass over its logits has
    it), the number of rows, and the sum of CE_r. T is 1 for one teacher, for entries and for an average, 0 where none
    was asked. Of K entries the teacher's cross-entropy is not known: NaN. Where alpha, given as a tensor, is 0, no
    teacher is read, and it is the student's.
    """

    loss_sum: Tensor
    ce_sum: Tensor
    kl_sum: Tensor
    num_rows: Tensor
    teachers: Tensor
