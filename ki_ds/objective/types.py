"""What the loss is told and what it answers: a student, what a teacher says of its rows, and the sums.

`Teacher.signal(batch)` returns a `Signal`, which is the loss's own argument: where a teacher runs (in the process,
on ranks of its own, from a cache) is the teacher's business alone.

Shape suffixes: N labelled rows in order, M those of one teacher, D hidden size, V padded vocabulary, K teacher
entries of a row, T teachers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ki_ds.objective.rows import capped, compute_dtype, project


class LogitForm(NamedTuple):
    """What a model makes of its output projection: z = cap tanh((scale h W^T + b) / cap); cap None: no tanh.

    The scale belongs to the projection's product, where it costs nothing; the cap to whoever reads the product.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of_numbers(cls, scale: float, cap: float) -> LogitForm:
        """The form of which these are the `numbers`."""
        return cls(scale, cap or None)

    @property
    def numbers(self) -> tuple[float, float]:
        """Scale and cap where only numbers can go, 0 for no cap."""
        return float(self.scale), float(self.cap or 0.0)

    def logits(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        """The model's logits [N, V] in the compute dtype, their product rounded to the head's own, as in the loss."""
        product_NV = project(hidden_ND, weight_VD, bias_V, self.scale)
        return capped(product_NV.to(compute_dtype(product_NV)), self.cap)


PLAIN = LogitForm()


@dataclass(frozen=True)
class Logits:
    """Rows of logits as the model makes them."""

    logits_NV: Tensor

    @property
    def tensors(self) -> tuple[Tensor]:
        """What can have a gradient."""
        return (self.logits_NV,)


@dataclass(frozen=True)
class Head:
    """Hidden states of rows with the output projection and the form of the logits, which only the loss forms."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    form: LogitForm = PLAIN

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What can have a gradient."""
        return self.hidden_ND, self.weight_VD, self.bias_V


@dataclass(frozen=True)
class Sparse:
    """K entries a row: class numbers, distinct in a row, and the teacher's softmax at tau there.

    An entry with probability 0 or an id outside the classes is absent. The student's softmax is full. `semantics`:

    - "renormalise" (paper, Fig. 1c): q is the K probabilities divided by their sum.
    - "tail": what the K leave over is one more class, compared with the student's mass off the K.
    - "sampled" (arXiv 2503.16870): ids were drawn at random and the probabilities are their importance weights, whose
      expectation is q; the gradient is then unbiased, and `kl_sum` is that of the weights as they are.
    """

    ids_NK: Tensor  # int64
    probs_NK: Tensor  # float
    semantics: str


@dataclass(frozen=True)
class Average:
    """Several teachers for every row: the average of their softmaxes at tau, weighted by `shares` over their sum."""

    parts: tuple[Head | Logits, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Part:
    """What one of several teachers says about its rows: the labelled rows `rows_M` of the batch, in their order."""

    teacher: int  # its number among the run's teachers
    signal: Head | Logits | Sparse
    rows_M: Tensor  # int64; no row is in two parts
    num_tokens: int = 0  # that its forward saw


@dataclass(frozen=True)
class Routed:
    """Each row's own teacher; rows of no part have none. A teacher without rows in the batch has no part."""

    parts: tuple[Part, ...]
    num_teachers: int


Student = Logits | Head
Signal = Head | Logits | Sparse | Average | Routed


class LossOutput(NamedTuple):
    """Sums over the rows that have a label. A tuple, so that DeepSpeed finds the tensors in it.

    `loss_sum` (float32, 0-d) alone carries gradient. `ce_sum` and `kl_sum` (float32, 0-d) are the sums of CE_r and
    KL_r as they are: without alpha, tau^2, row weights or label smoothing; `kl_sum` is 0 where alpha is 0.0.
    `num_rows` (int64, 0-d) stays on the device.

    The others (float32, [T]) say the same of each teacher, in order, over the rows that it taught; `teacher_ce_T` is
    its own cross-entropy against the labels (its softmax at 1; the first pass over its logits has it). T is 1 for one
    teacher, for entries and for an average, 0 where none was asked. Of K entries the teacher's cross-entropy is not
    known: NaN. Where alpha, given as a tensor, is 0, no teacher is read, and it is the student's.
    """

    loss_sum: Tensor
    ce_sum: Tensor
    kl_sum: Tensor
    num_rows: Tensor
    teacher_kl_T: Tensor
    teacher_ce_T: Tensor
    teacher_rows_T: Tensor
    student_ce_T: Tensor

    @property
    def teachers(self) -> Tensor:
        """[T, 4]: each teacher's KL, own cross-entropy, rows, and the student's cross-entropy on them."""
        return torch.stack(self[4:], dim=1)
