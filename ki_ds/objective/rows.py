"""The objective of a row, and what every implementation of it agrees on.

Shape suffixes: N rows, V logits of a row, C <= V real classes, K teacher entries of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ki_ds.config import LossConfig
from ki_ds.errors import UserError

TOPK_SEMANTICS = ("renormalise", "tail", "sampled")


class Added(NamedTuple):
    """Weights of the terms that are added to each row's loss as they are, whatever alpha is; 0 for none."""

    z_weight: float


@dataclass(frozen=True)
class Objective:
    """The numbers of what is minimised; `ki_ds.objective.loss` has the formula.

    Attributes:
        num_classes: the real vocabulary size; columns from there on are padding, which takes no probability and gets a
            gradient of exactly 0. None: the one width that the student and its teachers have.
        alpha: weight of the teacher in [0, 1], a float or a 0-d tensor (a device tensor costs no host sync).
        tau: temperature of both softmaxes in the KL.
        label_smoothing: e in [0, 1): the label gets 1 - e, the other classes share e (paper, Table 10).
        z_weight: of logsumexp(z_s)^2 in each row (z-loss, as in PaLM and OLMo), whatever alpha is; at least 0. Its
            gradient is 2 z_weight logsumexp(z_s) softmax(z_s).
        ignore_index: the label of rows that count nowhere.
    """

    num_classes: int | None = None
    alpha: float | Tensor = 0.0
    tau: float = 2.0
    label_smoothing: float = 0.0
    z_weight: float = 0.0
    ignore_index: int = -100

    def uses_teacher(self) -> bool:
        """False if alpha is known to be 0, so that no teacher's number may be touched."""
        return isinstance(self.alpha, Tensor) or self.alpha != 0.0

    @property
    def added(self) -> Added:
        """The weights of the added terms."""
        return Added(self.z_weight)

    def check(self, rows: Tensor) -> None:
        """Return silently, or raise UserError for a number out of its range; `rows` are the student's."""
        alpha = self.alpha
        if isinstance(alpha, Tensor):
            if alpha.dim() != 0:
                raise UserError(f"alpha has shape {tuple(alpha.shape)}; give a float or a 0-d tensor")
            if alpha.is_cuda and not rows.is_cuda:
                raise UserError(f"alpha is on {alpha.device}, the student's rows on {rows.device}; move alpha there")
        elif not 0.0 <= alpha <= 1.0:
            raise UserError(f"alpha={alpha} is outside [0, 1]; it is the teacher's share of the loss")
        if not self.tau > 0.0:
            raise UserError(f"tau={self.tau} is not positive; the paper's temperature is 2.0")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"label_smoothing={self.label_smoothing} is outside [0, 1)")
        for name, weight in self.added._asdict().items():
            if not 0.0 <= weight < math.inf:
                raise UserError(f"{name}={weight} must be a finite number that is not negative")

    @classmethod
    def configured(
        cls, config: LossConfig, *, training: bool, alpha: float | Tensor, tau: float, num_classes: int
    ) -> Objective:
        """The objective of a run's configuration; an evaluation has nothing that only helps training."""
        objective = cls(num_classes=num_classes, alpha=alpha, tau=tau)
        if not training:
            return objective
        return replace(objective, label_smoothing=config.label_smoothing, z_weight=config.z_weight)


class ObjectiveOptions(TypedDict, total=False):
    """The fields of `Objective` as keywords."""

    num_classes: int | None
    alpha: float | Tensor
    tau: float
    label_smoothing: float
    z_weight: float
    ignore_index: int


@dataclass(frozen=True)
class RowTask(Objective):
    """The objective of a set of rows that one teacher, or none, speaks for.

    `grad_scale` multiplies the written gradient alone (float16 gradients are kept away from subnormal numbers by it)
    and is taken out again by whoever reads the gradient. With `cap` (`teacher_cap`) the student's (teacher's) rows
    hold what is capped as it is read, z = cap tanh(row / cap); the gradient is then that of the rows as they are.
    """

    num_classes: int = 0
    semantics: str = "renormalise"
    grad_scale: float = 1.0
    cap: float | None = None
    teacher_cap: float | None = None


class RowTerms(NamedTuple):
    """Per-row terms in the compute dtype; an ignored row's are 0."""

    ce_N: Tensor
    smooth_ce_N: Tensor  # the same tensor as ce_N without label smoothing
    kl_N: Tensor | None = None  # None: no teacher was asked
    teacher_ce_N: Tensor | None = None  # of the teacher's softmax at 1; None: it gave entries only
    added_N: Tensor | None = None  # the sum of the terms of `Objective.added`; None: there are none


class RowSums(NamedTuple):
    """Sums over rows in the compute dtype, 0-d."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    teacher_ce: Tensor  # NaN: it gave entries only


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float32 for every training dtype; float64 stays float64 (meant for checks)."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def grad_scale_for(dtype: torch.dtype) -> float:
    """What a logit gradient of this dtype is multiplied by while it is stored.

    softmax of 50k classes is about 2e-5, below float16's smallest normal number 6e-5. At 128, probabilities
    above 5e-7 are normal numbers, and row weights up to 170 do not overflow.
    """
    return 128.0 if dtype == torch.float16 else 1.0


def sum_rows(terms: RowTerms, task: RowTask, row_weights_N: Tensor | None) -> RowSums:
    """The sums over rows; only `loss` sees alpha, tau^2, smoothing and the row weights."""
    loss_N = (1 - task.alpha) * terms.smooth_ce_N
    kl = teacher_ce = terms.ce_N.new_zeros(())
    if terms.kl_N is not None:
        loss_N = loss_N + task.alpha * task.tau**2 * terms.kl_N
        kl = terms.kl_N.sum()
        teacher_ce = terms.ce_N.new_full((), math.nan) if terms.teacher_ce_N is None else terms.teacher_ce_N.sum()
    if terms.added_N is not None:
        loss_N = loss_N + terms.added_N
    if row_weights_N is not None:
        loss_N = loss_N * row_weights_N
    return RowSums(loss_N.sum(), terms.ce_N.sum(), kl, teacher_ce)


def project(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float, *, out: Tensor | None = None
) -> Tensor:
    """scale h W^T + b [N, V], written into `out` if given. The GEMM itself scales."""
    if bias_V is None:
        return torch.addmm(hidden_ND.new_empty(()), hidden_ND, weight_VD.t(), beta=0.0, alpha=scale, out=out)
    return torch.addmm(bias_V, hidden_ND, weight_VD.t(), alpha=scale, out=out)


def capped(product: Tensor, cap: float | None) -> Tensor:
    """cap tanh(product / cap), or the product itself where there is no cap."""
    return product if cap is None else torch.tanh(product / cap) * cap


def cap_slope(product: Tensor, cap: float) -> Tensor:
    """d capped / d product = 1 - tanh^2, exact where the tanh rounds to 1 as well."""
    rest = torch.sigmoid(product.abs() * (-2.0 / cap))  # (1 - |tanh|) / 2
    return (1.0 - rest).mul_(rest).mul_(4.0)


def mix_teachers(
    rows: Sequence[Tensor], shares: Sequence[float], task: RowTask, caps: Sequence[float | None] | None = None
) -> Tensor:
    """Logits [N, C] whose softmax at `task.tau` is the teachers' average softmax at `task.tau`.

    `caps` are those that each teacher's rows still lack; None: of none.
    """
    dtype = compute_dtype(rows[0])
    total = sum(shares)
    mixed: Tensor | None = None
    for rows_NV, share, cap in zip(rows, shares, caps or [None] * len(rows), strict=True):
        scaled = capped(rows_NV[:, : task.num_classes].to(dtype), cap) / task.tau
        log_share = torch.log_softmax(scaled, dim=-1) + math.log(share / total)
        mixed = log_share if mixed is None else torch.logaddexp(mixed, log_share)
    assert mixed is not None
    return mixed * task.tau
