"""What a teacher says about a batch, and the protocol of everything that can say it.

The trainer hands a signal on to the loss without looking inside, so where the teacher runs (in the process, on
ranks of its own, from a cache) is the teacher's business alone.

Shape suffixes: N labelled rows of the batch in order, M those of one teacher, D hidden size, V padded vocabulary,
K teacher entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ki_ds.data.batches import Batch
from ki_ds.objective.loss import PLAIN, LogitForm


@dataclass(frozen=True)
class HiddenSignal:
    """The teacher's last hidden states of the labelled rows, its output projection, and the form of its logits.

    Logits are never formed outside the loss, which computes them a chunk of rows at a time.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    form: LogitForm = PLAIN


@dataclass(frozen=True)
class TopKSignal:
    """K entries a row: ids (int64) and the teacher's softmax at the run's tau there (float), read by `semantics`.

    What the three semantics mean is in `ki_ds.objective.loss.topk_inheritance_loss`.
    """

    ids_NK: Tensor
    probs_NK: Tensor
    semantics: str


@dataclass(frozen=True)
class Part:
    """What one of several teachers says about its rows: the labelled rows `rows_M` of the batch, in their order."""

    teacher: int  # its number among the run's teachers
    signal: HiddenSignal | TopKSignal
    rows_M: Tensor  # int64
    num_tokens: int  # that its forward saw


@dataclass(frozen=True)
class RoutedSignal:
    """Each row's own teacher; rows of no part have none. A teacher without rows in the batch has no part."""

    parts: tuple[Part, ...]
    num_teachers: int


@dataclass(frozen=True)
class AveragedSignal:
    """Several teachers for every row: the average of their softmaxes at tau, weighted by `shares` over their sum."""

    signals: tuple[HiddenSignal, ...]
    shares: tuple[float, ...]


Signal = HiddenSignal | TopKSignal | RoutedSignal | AveragedSignal


def teacher_tokens(signal: Signal | None, batch: Batch) -> list[int]:
    """Tokens of the batch that each of the run's teachers saw; nothing without a signal."""
    match signal:
        case None:
            return []
        case RoutedSignal(parts, num_teachers):
            tokens = [0] * num_teachers
            for part in parts:
                tokens[part.teacher] = part.num_tokens
            return tokens
        case AveragedSignal(signals, _):
            return [batch.num_tokens] * len(signals)
    return [batch.num_tokens]


class Teacher(Protocol):
    """A frozen teacher. It is never trained, and never consulted once alpha is 0."""

    def ask(self, batch: Batch) -> None:
        """Announce the next batch, in the host's memory: one that answers ahead begins now. The others do nothing."""
        return

    def signal(self, batch: Batch) -> Signal:
        """What the teacher says about the labelled rows of exactly this (masked) batch."""
        ...

    def figures(self) -> dict[str, float]:
        """What the metrics say of its work, by name; nothing where the student's own figures say it all."""
        return {}

    def free(self) -> None:
        """Give all of the teacher's memory back; `signal` must not be called again."""
        ...
