"""The rows of the loss against a label and a teacher's logits, as one Triton kernel.

One program a row. The first pass reads both rows of logits and gathers their softmaxes' sums, the second reads
them again from the last column to the first, so that what was read last is still in the L2 cache, and writes the
gradient, if wanted over the student's logits. From device memory each logit is thus read about once.
"""

import triton
import triton.language as tl
from torch import Tensor

from ki_ds.objective.rows import RowTask, RowTerms
from ki_ds.objective.triton_rows import (
    DEFAULT_TILING,
    LN_2,
    LOG2_E,
    Tiling,
    capped,
    clear_row,
    columns_of,
    empty_terms,
    gather_statistics,
    label_terms,
    launch_options,
    load_tail,
    named_terms,
    plain_weight,
    scale_and_alpha,
    store_terms,
    through_cap,
)

_LN_2 = tl.constexpr(LN_2)
_LOG2_E = tl.constexpr(LOG2_E)


def dense_rows(
    student_NV: Tensor,
    labels_N: Tensor,
    teacher_NV: Tensor | None,
    task: RowTask,
    *,
    row_scale_N: Tensor | None = None,
    grad_NV: Tensor | None = None,
    tiling: Tiling | None = None,
) -> RowTerms:
    """Terms of every row, and their gradient in `grad_NV`: see `reference.dense_rows`, which computes the same."""
    has_teacher = teacher_NV is not None and task.uses_teacher()
    teacher = teacher_NV if teacher_NV is not None and has_teacher else student_NV
    stored = empty_terms(student_NV)
    if len(student_NV):
        _dense_kernel[(len(student_NV),)](
            student_NV,
            teacher,
            student_stride=student_NV.stride(0),
            teacher_stride=teacher.stride(0),
            num_columns=student_NV.shape[1],
            teacher_columns=teacher.shape[1],
            HAS_TEACHER=has_teacher,
            TEACHER_CAP=task.teacher_cap or 0.0,
            **launch_options(task, tiling or DEFAULT_TILING, stored, labels_N, row_scale_N, grad_NV),
        )
    return named_terms(stored, task, has_teacher=has_teacher, has_logits=has_teacher)


@triton.jit
def _gradient_tile(
    x,
    y,
    scale,
    lse,
    t_lse,
    square,
    plain_lse,
    ce_weight,
    kl_weight,
    shift,
    HAS_TEACHER: tl.constexpr,
    TAU_IS_2: tl.constexpr,
    CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
):
    """d loss / d z without the label's own target, z being the logits of what the student's row holds, x, and y what
    the teacher's holds; `square` = (1 - alpha) w soft^2 / plain at tau 2."""
    z = capped(x, CAP)
    if not HAS_TEACHER:
        return ce_weight * tl.exp2(z * _LOG2_E - plain_lse) - shift
    p = tl.exp2(z * scale - lse)
    q = tl.exp2(capped(y, TEACHER_CAP) * scale - t_lse)
    if TAU_IS_2:
        return p * (p * square + kl_weight) - (q * kl_weight + shift)
    return ce_weight * tl.exp2(z * _LOG2_E - plain_lse) + kl_weight * (p - q) - shift


@triton.jit
def _load_pair(student_row, teacher_row, cols, HAS_TEACHER: tl.constexpr):
    """A whole tile of both rows; it is read for the last time."""
    x = tl.load(student_row + cols, eviction_policy="evict_first")
    y = x
    if HAS_TEACHER:
        y = tl.load(teacher_row + cols, eviction_policy="evict_first")
    return x, y


@triton.jit
def _write_gradient(
    student_row,
    teacher_row,
    grad_row,
    num_classes,
    num_columns,
    teacher_columns,
    scale,
    lse,
    t_lse,
    square,
    plain_lse,
    ce_weight,
    kl_weight,
    shift,
    HAS_TEACHER: tl.constexpr,
    TAU_IS_2: tl.constexpr,
    CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The second pass: the gradient of every column, last tile first, and zeros in the padding."""
    dtype: tl.constexpr = grad_row.dtype.element_ty
    cols = columns_of(T, E)
    full = num_classes // (T * E) * (T * E)
    inside = full + cols < num_classes
    x = load_tail(student_row, full + cols, num_columns)
    y = x
    if HAS_TEACHER:
        y = load_tail(teacher_row, full + cols, teacher_columns)
    last = _gradient_tile(
        x, y, scale, lse, t_lse, square, plain_lse, ce_weight, kl_weight, shift,
        HAS_TEACHER, TAU_IS_2, CAP, TEACHER_CAP,
    )  # fmt: skip
    last = through_cap(last, x, CAP)
    tl.store(grad_row + full + cols, tl.where(inside, last, 0.0).to(dtype), mask=full + cols < num_columns)
    for back in tl.range(T * E, full + T * E, T * E, num_stages=STAGES):
        start = full - back
        x, y = _load_pair(student_row + start, teacher_row + start, cols, HAS_TEACHER)
        tile = _gradient_tile(
            x, y, scale, lse, t_lse, square, plain_lse, ce_weight, kl_weight, shift,
            HAS_TEACHER, TAU_IS_2, CAP, TEACHER_CAP,
        )  # fmt: skip
        tile = through_cap(tile, x, CAP)
        tl.store(grad_row + start + cols, tile.to(dtype), eviction_policy="evict_first")
    clear_row(grad_row, full + T * E, num_columns, T, E)


@triton.jit
def _dense_row(
    student_row,
    teacher_row,
    grad_row,
    label,
    row_scale,
    alpha,
    num_classes,
    num_columns,
    teacher_columns,
    tau,
    smoothing,
    HAS_TEACHER: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ADDED: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    TAU_IS_2: tl.constexpr,
    CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """CE, smoothed CE, KL, the teacher's CE and added terms of one row; with WRITE_GRAD also its gradient."""
    scale = _LOG2_E / tau
    is_class = (label >= 0) & (label < num_classes)
    x_label = tl.load(student_row + label, mask=is_class, other=float("nan"))
    z_label = capped(x_label, CAP)
    y_label = x_label
    t_label = z_label
    if HAS_TEACHER:
        y_label = tl.load(teacher_row + label, mask=is_class, other=float("nan"))
        t_label = capped(y_label, TEACHER_CAP)
    peak, soft, plain, t_peak, t_soft, t_plain, cross, logits = gather_statistics(
        student_row, teacher_row, num_classes, num_columns, teacher_columns, scale, tau,
        HAS_TEACHER, SMOOTHING, TAU_IS_2, CAP, TEACHER_CAP, False, T, E, STAGES,
    )  # fmt: skip
    lse = peak * scale + tl.log2(soft)
    t_lse = t_peak * scale + tl.log2(t_soft)
    plain_lse = peak * _LOG2_E + tl.log2(plain)
    ce, smooth_ce, on_others, added = label_terms(
        z_label, peak, plain, plain_lse, logits, num_classes, smoothing, SMOOTHING, ADDED
    )
    teacher_ce = (t_peak - t_label) + tl.log2(t_plain) * _LN_2
    kl = cross / (t_soft * tau) - (t_lse - lse) * _LN_2
    if WRITE_GRAD:
        ce_weight = (1.0 - alpha) * row_scale
        kl_weight = alpha * tau * row_scale
        soft_weight = plain_weight(ce_weight, row_scale, plain_lse, ADDED)
        square = soft_weight * soft * soft / plain
        shift = ce_weight * on_others
        tl.debug_barrier()  # the label's logit, read above, may be overwritten now
        _write_gradient(
            student_row, teacher_row, grad_row, num_classes, num_columns, teacher_columns, scale, lse, t_lse, square,
            plain_lse, soft_weight, kl_weight, shift, HAS_TEACHER, TAU_IS_2, CAP, TEACHER_CAP, T, E, STAGES,
        )  # fmt: skip
        tl.debug_barrier()  # the label's column has been written like any other; now for good
        at_label = _gradient_tile(
            x_label, y_label, scale, lse, t_lse, square, plain_lse, soft_weight, kl_weight, shift,
            HAS_TEACHER, TAU_IS_2, CAP, TEACHER_CAP,
        )  # fmt: skip
        at_label = through_cap(at_label - ce_weight * (1.0 - smoothing - on_others), x_label, CAP)
        tl.store(grad_row + label, at_label.to(grad_row.dtype.element_ty), mask=is_class)
    return ce, smooth_ce, kl, teacher_ce, added


@triton.jit
def _dense_kernel(
    student_ptr, teacher_ptr, labels_ptr, row_scale_ptr, alpha_ptr, grad_ptr, terms_ptr,
    student_stride, teacher_stride, grad_stride, terms_stride, num_classes, num_columns, teacher_columns,
    alpha_value, tau, smoothing, grad_scale, ignore_index,
    HAS_TEACHER: tl.constexpr, ALPHA_IS_TENSOR: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, SMOOTHING: tl.constexpr,
    ADDED: tl.constexpr, WRITE_GRAD: tl.constexpr, TAU_IS_2: tl.constexpr, CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr, T: tl.constexpr, E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows times columns pass 2^31
    student_row = student_ptr + row * student_stride
    teacher_row = teacher_ptr + row * teacher_stride
    grad_row = grad_ptr + row * grad_stride
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        store_terms(terms_ptr, row, terms_stride, 0.0, 0.0, 0.0, 0.0, 0.0)
        if WRITE_GRAD:
            clear_row(grad_row, 0, num_columns, T, E)
    else:
        row_scale, alpha = scale_and_alpha(
            row_scale_ptr, alpha_ptr, row, alpha_value, grad_scale, ALPHA_IS_TENSOR, HAS_ROW_SCALE
        )
        if HAS_TEACHER and ALPHA_IS_TENSOR:
            if alpha == 0.0:  # the teacher is not read: whatever it holds, the loss is the label's
                ce, smooth_ce, kl, teacher_ce, added = _dense_row(
                    student_row, student_row, grad_row, label, row_scale, alpha, num_classes, num_columns,
                    teacher_columns, tau, smoothing, False, SMOOTHING, ADDED, WRITE_GRAD, TAU_IS_2,
                    CAP, TEACHER_CAP, T, E, STAGES,
                )  # fmt: skip
                kl = kl * 0.0
            else:
                ce, smooth_ce, kl, teacher_ce, added = _dense_row(
                    student_row, teacher_row, grad_row, label, row_scale, alpha, num_classes, num_columns,
                    teacher_columns, tau, smoothing, True, SMOOTHING, ADDED, WRITE_GRAD, TAU_IS_2,
                    CAP, TEACHER_CAP, T, E, STAGES,
                )  # fmt: skip
        else:
            ce, smooth_ce, kl, teacher_ce, added = _dense_row(
                student_row, teacher_row, grad_row, label, row_scale, alpha, num_classes, num_columns,
                teacher_columns, tau, smoothing, HAS_TEACHER, SMOOTHING, ADDED, WRITE_GRAD, TAU_IS_2,
                CAP, TEACHER_CAP, T, E, STAGES,
            )  # fmt: skip
        store_terms(terms_ptr, row, terms_stride, ce, smooth_ce, kl, teacher_ce, added)
