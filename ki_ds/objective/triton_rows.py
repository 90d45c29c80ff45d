"""What the Triton kernels share: a pass that gathers a row's statistics, its terms and their weights in the gradient.

A row is read in tiles [LANES, WIDTH]. Each lane keeps maximum and sums of its own, rescaled as its maximum
grows, so that no warp waits for another before the row's end. Exponentials are powers of 2 of logits times
log2(e) / tau. At tau = 2, e^z is the square of e^(z / 2), which saves one exponential in every pass.

Shape suffixes: T lanes, E neighbouring columns of a lane.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ki_ds.objective.rows import RowTask, RowTerms

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
LOWEST = tl.constexpr(-1.0e30)  # below every logit, and finite: differences of it are no NaN
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(LN_2)


@dataclass(frozen=True)
class Tiling:
    """How one program, which works off one row, is laid out."""

    num_warps: int = 16
    lanes_per_thread: int = 1
    width: int = 8  # 16 bytes of half-precision logits
    num_stages: int = 1

    @property
    def lanes(self) -> int:
        return 32 * self.num_warps * self.lanes_per_thread


DEFAULT_TILING = Tiling()


def empty_terms(rows_NV: Tensor) -> Tensor:
    """Where a kernel stores its rows' terms, float32 [len(RowTerms), N], each term's beginning aligned to 16 bytes."""
    num_rows = rows_NV.shape[0]
    aligned = triton.cdiv(num_rows, 4) * 4
    return rows_NV.new_empty(len(RowTerms._fields), aligned, dtype=torch.float32)[:, :num_rows]


def named_terms(stored: Tensor, task: RowTask, *, has_teacher: bool, has_logits: bool) -> RowTerms:
    """What a kernel stored, without the terms that the rows do not have."""
    ce_N, smooth_ce_N, kl_N, teacher_ce_N, added_N = stored.unbind()
    return RowTerms(
        ce_N,
        smooth_ce_N if task.label_smoothing else ce_N,
        kl_N if has_teacher else None,
        teacher_ce_N if has_logits else None,
        added_N if any(task.added) else None,
    )


def launch_options(
    task: RowTask, tiling: Tiling, stored: Tensor, labels_N: Tensor, row_scale_N: Tensor | None, grad_NV: Tensor | None
) -> dict[str, Any]:
    """The arguments that both kernels have; what a row lacks is never read, so that `stored` may stand for it."""
    alpha = task.alpha
    return {
        "labels_ptr": labels_N,
        "row_scale_ptr": stored if row_scale_N is None else row_scale_N,
        "alpha_ptr": alpha if isinstance(alpha, Tensor) else stored,
        "grad_ptr": stored if grad_NV is None else grad_NV,
        "terms_ptr": stored,
        "grad_stride": 0 if grad_NV is None else grad_NV.stride(0),
        "terms_stride": stored.stride(0),
        "num_classes": task.num_classes,
        "alpha_value": 0.0 if isinstance(alpha, Tensor) else float(alpha),
        "tau": task.tau,
        "smoothing": task.label_smoothing,
        "grad_scale": task.grad_scale,
        "ignore_index": task.ignore_index,
        "ALPHA_IS_TENSOR": isinstance(alpha, Tensor),
        "HAS_ROW_SCALE": row_scale_N is not None,
        "SMOOTHING": task.label_smoothing > 0,
        "ADDED": tuple(task.added),
        "WRITE_GRAD": grad_NV is not None,
        "TAU_IS_2": task.tau == 2.0,
        "CAP": task.cap or 0.0,
        "T": tiling.lanes,
        "E": tiling.width,
        "STAGES": tiling.num_stages,
        "num_warps": tiling.num_warps,
    }


@triton.jit
def scale_and_alpha(
    row_scale_ptr, alpha_ptr, row, alpha_value, grad_scale, ALPHA_IS_TENSOR: tl.constexpr, HAS_ROW_SCALE: tl.constexpr
):
    """What a row's gradient is multiplied by, and alpha."""
    row_scale = grad_scale * 1.0
    if HAS_ROW_SCALE:
        row_scale = tl.load(row_scale_ptr + row).to(tl.float32) * grad_scale
    alpha = alpha_value * 1.0
    if ALPHA_IS_TENSOR:
        alpha = tl.load(alpha_ptr).to(tl.float32)
    return row_scale, alpha


@triton.jit
def label_terms(
    z_label, peak, plain, plain_lse, logits, num_classes, smoothing, SMOOTHING: tl.constexpr, ADDED: tl.constexpr
):
    """CE, smoothed CE, the smoothed label's mass on each other class, and the sum of the terms of ADDED
    (`Objective.added`); `logits` is the sum of the row's."""
    ce = (peak - z_label) + tl.log2(plain) * _LN_2
    on_others = 0.0
    smooth_ce = ce
    if SMOOTHING:
        on_others = smoothing / (num_classes - 1)
        others = (num_classes - 1) * (plain_lse * _LN_2) - (logits - z_label)
        smooth_ce = (1.0 - smoothing) * ce + on_others * others
    added = 0.0
    Z_WEIGHT: tl.constexpr = ADDED[0]
    if Z_WEIGHT > 0.0:  # else nothing of it may take a register
        added += Z_WEIGHT * (plain_lse * _LN_2) * (plain_lse * _LN_2)
    return ce, smooth_ce, on_others, added


@triton.jit
def plain_weight(ce_weight, row_scale, plain_lse, ADDED: tl.constexpr):
    """What the softmax at 1 is multiplied by in the gradient: for the cross-entropy and the terms of ADDED."""
    Z_WEIGHT: tl.constexpr = ADDED[0]
    if Z_WEIGHT > 0.0:
        ce_weight += 2.0 * Z_WEIGHT * row_scale * (plain_lse * _LN_2)
    return ce_weight


@triton.jit
def store_terms(terms_ptr, row, stride, ce, smooth_ce, kl, teacher_ce, added):
    """A row's terms, in the order of `RowTerms`."""
    tl.store(terms_ptr + row, ce)
    tl.store(terms_ptr + stride + row, smooth_ce)
    tl.store(terms_ptr + 2 * stride + row, kl)
    tl.store(terms_ptr + 3 * stride + row, teacher_ce)
    tl.store(terms_ptr + 4 * stride + row, added)


@triton.jit
def columns_of(T: tl.constexpr, E: tl.constexpr):
    """Column numbers [T, E] of a tile that starts at 0."""
    return tl.arange(0, T)[:, None] * E + tl.arange(0, E)[None, :]


@triton.jit
def load_tail(row, cols, num_columns):
    """A row's last tile, padding columns and all: their number, unlike that of the classes, is even enough for
    wide loads. Whoever reads it masks the padding."""
    return tl.load(row + cols, mask=cols < num_columns, other=0.0)


@triton.jit
def _short_of_1(product, CAP: tl.constexpr):
    """1 - tanh |product / CAP|, with all its digits where that is next to 0."""
    power = tl.exp2(tl.abs(product.to(tl.float32)) * (-2.0 * _LOG2_E / CAP))
    return (power + power) / (power + 1.0)


@triton.jit
def capped(product, CAP: tl.constexpr, HAS_HOLES: tl.constexpr = False):
    """Logits in float32 of what a row holds: CAP tanh(product / CAP); CAP 0: the product. With HAS_HOLES -inf, what
    was taken out of the row, stays so. The tanh errs by 1e-7, which next to 0 only float32 rows are too exact for."""
    z = product.to(tl.float32)
    if CAP > 0.0:
        tanh = CAP - CAP * _short_of_1(product, CAP)
        tanh = tl.where(z < 0.0, -tanh, tanh)
        if product.dtype == tl.float32:  # its series
            square = (z * (1.0 / CAP)) * (z * (1.0 / CAP))
            series = 2.1869489e-2 - 8.8632355e-3 * square  # 62 / 2835, 1382 / 155925
            series = 1.3333333e-1 + square * (square * series - 5.3968254e-2)  # 2 / 15, 17 / 315
            tanh = tl.where(square < 0.16, z + z * square * (square * series - 3.3333333e-1), tanh)
        z = tl.where(z == float("-inf"), z, tanh) if HAS_HOLES else tanh
    return z


@triton.jit
def through_cap(gradient, product, CAP: tl.constexpr):
    """The gradient of what a row holds, from that of its logit."""
    if CAP > 0.0:
        rest = _short_of_1(product, CAP)
        gradient = gradient * (rest * (2.0 - rest))  # 1 - tanh^2
    return gradient


@triton.jit
def _add_five(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _visit(z, peak, soft, plain, scale, tau, TAU_IS_2: tl.constexpr):
    """Take a tile [T, E] of logits into a lane's maximum and its sums at tau and at 1; powers, shrinkage."""
    grown = tl.maximum(peak, tl.max(z, axis=1))
    shrink = tl.exp2((peak - grown) * scale)
    power = tl.exp2(z * scale - (grown * scale)[:, None])
    soft = soft * shrink + tl.sum(power, axis=1)
    if TAU_IS_2:
        plain = plain * (shrink * shrink) + tl.sum(power * power, axis=1)
    else:
        steep = scale * tau
        plain = plain * tl.exp2((peak - grown) * steep)
        plain += tl.sum(tl.exp2(z * steep - (grown * steep)[:, None]), axis=1)
    return grown, soft, plain, power, shrink


@triton.jit
def _visit_teacher(t, z, peak, total, plain, cross, scale, tau, TAU_IS_2: tl.constexpr):
    """Take a tile of teacher logits into a lane's maximum, its sums at tau and at 1, and that of power * (t - z)."""
    before = peak
    peak, total, plain, power, shrink = _visit(t, before, total, plain, scale, tau, TAU_IS_2)
    cross = cross * shrink + tl.sum(power * (t - z), axis=1)
    return peak, total, plain, cross


@triton.jit
def gather_statistics(
    student_row,
    teacher_row,
    num_classes,
    num_columns,
    teacher_columns,
    scale,
    tau,
    HAS_TEACHER: tl.constexpr,
    SUM_LOGITS: tl.constexpr,
    TAU_IS_2: tl.constexpr,
    CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    HAS_HOLES: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """peak, soft, plain of the student; the same of the teacher, and cross; the sum of the student's logits.

    peak is the row's maximum; soft and plain are sums of exp((z - peak) / tau) and exp(z - peak).
    """
    cols = columns_of(T, E)
    peak = tl.full([T], LOWEST, tl.float32)
    soft = tl.zeros([T], tl.float32)
    plain = tl.zeros([T], tl.float32)
    t_peak = tl.full([T], LOWEST, tl.float32)
    t_soft = tl.zeros([T], tl.float32)
    t_plain = tl.zeros([T], tl.float32)
    cross = tl.zeros([T], tl.float32)
    logits = tl.zeros([T], tl.float32)
    full = num_classes // (T * E) * (T * E)
    for start in tl.range(0, full, T * E, num_stages=STAGES):
        z = capped(tl.load(student_row + start + cols, eviction_policy="evict_last"), CAP, HAS_HOLES)
        if HAS_TEACHER:
            t = capped(tl.load(teacher_row + start + cols, eviction_policy="evict_last"), TEACHER_CAP)
            t_peak, t_soft, t_plain, cross = _visit_teacher(t, z, t_peak, t_soft, t_plain, cross, scale, tau, TAU_IS_2)
        peak, soft, plain, _0, _1 = _visit(z, peak, soft, plain, scale, tau, TAU_IS_2)
        if SUM_LOGITS:
            logits += tl.sum(tl.where(z > LOWEST, z, 0.0), axis=1)  # an entry that was taken out is -inf
    inside = full + cols < num_classes
    z = tl.where(inside, capped(load_tail(student_row, full + cols, num_columns), CAP, HAS_HOLES), LOWEST)
    if SUM_LOGITS:
        logits += tl.sum(tl.where(z > LOWEST, z, 0.0), axis=1)
    if HAS_TEACHER:
        t = tl.where(inside, capped(load_tail(teacher_row, full + cols, teacher_columns), TEACHER_CAP), LOWEST)
        t_peak, t_soft, t_plain, cross = _visit_teacher(t, z, t_peak, t_soft, t_plain, cross, scale, tau, TAU_IS_2)
    peak, soft, plain, _0, _1 = _visit(z, peak, soft, plain, scale, tau, TAU_IS_2)
    # lanes to row
    row_peak = tl.max(peak, axis=0)
    soft *= tl.exp2((peak - row_peak) * scale)
    plain *= tl.exp2((peak - row_peak) * (scale * tau))
    if HAS_TEACHER:
        row_t_peak = tl.max(t_peak, axis=0)
        shrink = tl.exp2((t_peak - row_t_peak) * scale)
        t_plain *= tl.exp2((t_peak - row_t_peak) * (scale * tau))
        soft, plain, t_soft, t_plain, cross = tl.reduce(
            (soft, plain, t_soft * shrink, t_plain, cross * shrink), 0, _add_five
        )
    else:
        soft, plain = tl.reduce((soft, plain), 0, _add_two)
        row_t_peak, t_soft, t_plain, cross = row_peak, soft, plain, soft
    row_logits = tl.sum(logits, axis=0)
    return row_peak, soft, plain, row_t_peak, t_soft, t_plain, cross, row_logits


@triton.jit
def clear_row(row, start, num_columns, T: tl.constexpr, E: tl.constexpr):
    """Write zeros into columns start to num_columns of a row."""
    cols = columns_of(T, E)
    for first in range(start, num_columns, T * E):
        inside = first + cols < num_columns
        tl.store(row + first + cols, tl.zeros([T, E], tl.float32).to(row.dtype.element_ty), mask=inside)
