"""What the Triton kernels share: one pass over a row that gathers its statistics, and how a row is tiled.

A row is read in tiles [LANES, WIDTH]. Each lane keeps maximum and sums of its own, rescaled as its maximum
grows, so that no warp waits for another before the row's end. Exponentials are powers of 2 of logits times
log2(e) / tau. At tau = 2, e^z is the square of e^(z / 2), which saves one exponential in every pass.

Shape suffixes: T lanes, E neighbouring columns of a lane.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
LOWEST = tl.constexpr(-1.0e30)  # below every logit, and finite: differences of it are no NaN
_LOG2_E = tl.constexpr(LOG2_E)


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
