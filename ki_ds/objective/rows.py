"""What every implementation of the loss's rows agrees on.

Shape suffixes: N rows, V logits of a row, C <= V real classes, K teacher entries of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TOPK_SEMANTICS = ("renormalise", "tail", "sampled")


class LogitForm(NamedTuple):
    """What a model makes of its output projection: z = cap tanh((scale h W^T + b) / cap); cap None: no tanh.

    The scale belongs to the projection's product, where it costs nothing; the cap to whoever reads the product.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of_numbers(cls, scale: float, cap: float) -> "LogitForm":
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


@dataclass(frozen=True)
class RowTask:
    """The objective of a set of rows, without their tensors.

    `alpha` is a float, or a 0-d tensor on the rows' device, which is never read by the host.
    `grad_scale` multiplies the written gradient alone (float16 gradients are kept away from
    subnormal numbers by it) and is taken out again by whoever reads the gradient.
    With `cap` (`teacher_cap`) the student's (teacher's) rows hold what is capped as it is read: logits are
    cap tanh(row / cap). The gradient is then that of the rows as they are.
    """

    num_classes: int
    alpha: float | Tensor = 0.0
    tau: float = 2.0
    ignore_index: int = -100
    label_smoothing: float = 0.0
    semantics: str = "renormalise"
    grad_scale: float = 1.0
    cap: float | None = None
    teacher_cap: float | None = None

    def uses_teacher(self) -> bool:
        """False if alpha is known to be 0, so that no teacher's number may be touched."""
        return isinstance(self.alpha, Tensor) or self.alpha != 0.0


class RowTerms(NamedTuple):
    """Per-row terms in the compute dtype; an ignored row's are 0."""

    ce_N: Tensor
    smooth_ce_N: Tensor  # the same tensor as ce_N without label smoothing
    kl_N: Tensor | None = None  # None: no teacher was asked
    teacher_ce_N: Tensor | None = None  # of the teacher's softmax at 1; None: it gave entries only


class LossSums(NamedTuple):
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


def sum_rows(terms: RowTerms, task: RowTask, row_weights_N: Tensor | None) -> LossSums:
    """The sums over rows; only `loss` sees alpha, tau^2, smoothing and the row weights."""
    loss_N = (1 - task.alpha) * terms.smooth_ce_N
    kl = teacher_ce = terms.ce_N.new_zeros(())
    if terms.kl_N is not None:
        loss_N = loss_N + task.alpha * task.tau**2 * terms.kl_N
        kl = terms.kl_N.sum()
        teacher_ce = terms.ce_N.new_full((), math.nan) if terms.teacher_ce_N is None else terms.teacher_ce_N.sum()
    if row_weights_N is not None:
        loss_N = loss_N * row_weights_N
    return LossSums(loss_N.sum(), terms.ce_N.sum(), kl, teacher_ce)


def teacher_row(sums: LossSums, num_rows: Tensor) -> Tensor:
    """What the loss says of one teacher [4]: KL, the teacher's own CE, the number of rows, the student's CE there."""
    return torch.stack([sums.kl, sums.teacher_ce, num_rows.to(sums.kl.dtype), sums.ce])


def mix_teachers(
    rows: list[Tensor], shares: list[float], task: RowTask, caps: Sequence[float | None] | None = None
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
