"""The rows of the loss against a label and K teacher entries, as one Triton kernel.

One program a row. The first pass gathers the student's sums, the second writes the gradient as if there were no
entries; then the K entries (and the label, which may be one of them) are computed in float32 and stored once.
For "tail" the entries' logits are taken out of the row before the first pass, so that the mass off the entries is
a sum of its own and not a difference: the kernel then needs the row for itself.
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


def topk_rows(
    student_NV: Tensor,
    labels_N: Tensor,
    topk_ids_NK: Tensor,
    topk_probs_NK: Tensor,
    task: RowTask,
    *,
    row_scale_N: Tensor | None = None,
    grad_NV: Tensor | None = None,
    tiling: Tiling | None = None,
) -> RowTerms:
    """Terms of every row, and their gradient in `grad_NV`: see `reference.topk_rows`, which computes the same."""
    num_entries, tail, logits_NV = topk_ids_NK.shape[1], task.semantics == "tail", student_NV
    if tail and grad_NV is not student_NV:  # the kernel overwrites what it reads
        logits_NV = student_NV.clone() if grad_NV is None else grad_NV.copy_(student_NV)
    stored = empty_terms(student_NV)
    if len(student_NV):
        _topk_kernel[(len(student_NV),)](
            logits_NV,
            topk_ids_NK.contiguous(),
            topk_probs_NK.contiguous(),
            student_stride=logits_NV.stride(0),
            num_entries=num_entries,
            num_columns=student_NV.shape[1],
            TAIL=tail,
            RENORMALISE=task.semantics == "renormalise",
            K=triton.next_power_of_2(num_entries),
            **launch_options(task, tiling or DEFAULT_TILING, stored, labels_N, row_scale_N, grad_NV),
        )
    return named_terms(stored, task, has_teacher=True, has_logits=False)


@triton.jit
def _rest_tile(
    x, scale, lse, square, plain_lse, ce_weight, pull, shift,
    TAU_IS_2: tl.constexpr, CAP: tl.constexpr, HAS_HOLES: tl.constexpr,
):  # fmt: skip
    """d loss / d z off the entries, z being the logits of what the row holds, x: `lse` is that of the columns the
    pass has seen, `pull` its weight."""
    z = capped(x, CAP, HAS_HOLES)
    p = tl.exp2(z * scale - lse)
    if TAU_IS_2:
        return p * (p * square + pull) - shift
    return ce_weight * tl.exp2(z * _LOG2_E - plain_lse) + p * pull - shift


@triton.jit
def _write_rest(
    row, grad_row, num_classes, num_columns, scale, lse, square, plain_lse, ce_weight, pull, shift,
    TAU_IS_2: tl.constexpr, CAP: tl.constexpr, HAS_HOLES: tl.constexpr,
    T: tl.constexpr, E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The second pass, last tile first, and zeros in the padding."""
    dtype: tl.constexpr = grad_row.dtype.element_ty
    cols = columns_of(T, E)
    full = num_classes // (T * E) * (T * E)
    inside = full + cols < num_classes
    x = load_tail(row, full + cols, num_columns)
    last = _rest_tile(x, scale, lse, square, plain_lse, ce_weight, pull, shift, TAU_IS_2, CAP, HAS_HOLES)
    last = through_cap(last, x, CAP)
    tl.store(grad_row + full + cols, tl.where(inside, last, 0.0).to(dtype), mask=full + cols < num_columns)
    for back in tl.range(T * E, full + T * E, T * E, num_stages=STAGES):
        start = full - back
        x = tl.load(row + start + cols, eviction_policy="evict_first")
        tile = _rest_tile(x, scale, lse, square, plain_lse, ce_weight, pull, shift, TAU_IS_2, CAP, HAS_HOLES)
        tile = through_cap(tile, x, CAP)
        tl.store(grad_row + start + cols, tile.to(dtype), eviction_policy="evict_first")
    clear_row(grad_row, full + T * E, num_columns, T, E)


@triton.jit
def _entry_sums(z, present, peak, scale, tau):
    """Sums over the entries of exp((z - peak) / tau) and exp(z - peak)."""
    soft = tl.sum(tl.where(present, tl.exp2((z - peak) * scale), 0.0), axis=0)
    plain = tl.sum(tl.where(present, tl.exp2((z - peak) * (scale * tau)), 0.0), axis=0)
    return soft, plain


@triton.jit
def _read_entries(
    row, ids_row, probs_row, num_entries, num_classes,
    TAIL: tl.constexpr, RENORMALISE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """ids, presence, target probabilities and what the row holds there [K]; for "tail" it leaves the row."""
    at = tl.arange(0, K)
    ids = tl.load(ids_row + at, mask=at < num_entries, other=-1).to(tl.int64)
    q = tl.load(probs_row + at, mask=at < num_entries, other=0.0).to(tl.float32)
    present = (q > 0.0) & (ids >= 0) & (ids < num_classes)
    q = tl.where(present, q, 0.0)
    if RENORMALISE:
        q = q / tl.maximum(tl.sum(q, axis=0), 1.0e-30)
    x = tl.load(row + ids, mask=present, other=0.0)
    if TAIL:
        tl.debug_barrier()  # the label's logit has been read by now
        tl.store(row + ids, (x.to(tl.float32) * 0.0 + float("-inf")).to(row.dtype.element_ty), mask=present)
        tl.debug_barrier()
    return ids, present, q, x


@triton.jit
def _topk_row(
    row, ids_row, probs_row, grad_row, label, row_scale, alpha, num_entries, num_classes, num_columns, tau, smoothing,
    TAIL: tl.constexpr, RENORMALISE: tl.constexpr, SMOOTHING: tl.constexpr, ADDED: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    TAU_IS_2: tl.constexpr, CAP: tl.constexpr, K: tl.constexpr, T: tl.constexpr, E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """CE, smoothed CE, KL and added terms of one row; with WRITE_GRAD also its gradient."""
    scale = _LOG2_E / tau
    is_class = (label >= 0) & (label < num_classes)
    x_label = tl.load(row + label, mask=is_class, other=float("nan"))
    z_label = capped(x_label, CAP)
    ids, present, q, x = _read_entries(row, ids_row, probs_row, num_entries, num_classes, TAIL, RENORMALISE, K)
    z = capped(x, CAP)
    rest_peak, rest_soft, rest_plain, _0, _1, _2, _3, logits = gather_statistics(
        row, row, num_classes, num_columns, num_columns, scale, tau,
        False, SMOOTHING, TAU_IS_2, CAP, 0.0, TAIL, T, E, STAGES,
    )  # fmt: skip
    peak = rest_peak
    soft = rest_soft
    plain = rest_plain
    if TAIL:
        peak = tl.maximum(rest_peak, tl.max(tl.where(present, z, -1.0e30), axis=0))
        logits += tl.sum(z, axis=0)
        k_soft, k_plain = _entry_sums(z, present, peak, scale, tau)
        soft = rest_soft * tl.exp2((rest_peak - peak) * scale) + k_soft
        plain = rest_plain * tl.exp2((rest_peak - peak) * _LOG2_E) + k_plain
    lse = peak * scale + tl.log2(soft)
    plain_lse = peak * _LOG2_E + tl.log2(plain)
    ce, smooth_ce, on_others, added = label_terms(
        z_label, peak, plain, plain_lse, logits, num_classes, smoothing, SMOOTHING, ADDED
    )

    log_p = (z * scale - lse) * _LN_2
    p = tl.exp2(z * scale - lse)
    mass = tl.sum(q, axis=0)
    kl = tl.sum(tl.where(present, q * (tl.log2(tl.where(present, q, 1.0)) * _LN_2 - log_p), 0.0), axis=0)
    rest_lse = lse
    pull = mass
    if TAIL:
        has_rest = rest_peak > -1.0e29
        rest_lse = tl.where(has_rest, rest_peak * scale + tl.log2(tl.where(has_rest, rest_soft, 1.0)), 0.0)
        log_rest = tl.where(has_rest, rest_lse - lse, 0.0)
        left = tl.where(has_rest, tl.maximum(1.0 - mass, 0.0), 0.0)
        kl += left * (tl.log2(tl.maximum(left, 1.0e-30)) - log_rest) * _LN_2
        mass += left
        pull = mass * tl.exp2(log_rest) - left
    if WRITE_GRAD:
        ce_weight = (1.0 - alpha) * row_scale
        kl_weight = alpha * tau * row_scale
        soft_weight = plain_weight(ce_weight, row_scale, plain_lse, ADDED)
        shift = ce_weight * on_others
        on_label = ce_weight * (1.0 - smoothing - on_others)
        square = soft_weight * tl.exp2(2.0 * rest_lse - plain_lse)
        tl.debug_barrier()  # everything above has been read
        _write_rest(
            row, grad_row, num_classes, num_columns, scale, rest_lse, square, plain_lse, soft_weight,
            kl_weight * pull, shift, TAU_IS_2, CAP, TAIL, T, E, STAGES,
        )  # fmt: skip
        tl.debug_barrier()  # the entries' columns have been written like any others; now for good
        dtype: tl.constexpr = grad_row.dtype.element_ty
        entries = soft_weight * tl.exp2(z * _LOG2_E - plain_lse) + kl_weight * (mass * p - q) - shift
        entries -= tl.where(ids == label, on_label, 0.0)
        tl.store(grad_row + ids, through_cap(entries, x, CAP).to(dtype), mask=present)
        label_is_entry = tl.max(tl.where(present & (ids == label), 1, 0), axis=0) > 0
        at_label = _rest_tile(
            x_label, scale, rest_lse, square, plain_lse, soft_weight, kl_weight * pull, shift, TAU_IS_2, CAP, TAIL
        )
        at_label = through_cap(at_label - on_label, x_label, CAP)
        tl.store(grad_row + label, at_label.to(dtype), mask=is_class & (label_is_entry == 0))
    return ce, smooth_ce, kl, added


@triton.jit
def _topk_kernel(
    student_ptr, ids_ptr, probs_ptr, labels_ptr, row_scale_ptr, alpha_ptr, grad_ptr, terms_ptr,
    student_stride, grad_stride, terms_stride, num_entries, num_classes, num_columns, alpha_value, tau, smoothing,
    grad_scale, ignore_index,
    TAIL: tl.constexpr, RENORMALISE: tl.constexpr, ALPHA_IS_TENSOR: tl.constexpr, HAS_ROW_SCALE: tl.constexpr,
    SMOOTHING: tl.constexpr, ADDED: tl.constexpr, WRITE_GRAD: tl.constexpr, TAU_IS_2: tl.constexpr,
    CAP: tl.constexpr, K: tl.constexpr, T: tl.constexpr, E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows times columns pass 2^31
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
        entries = tl.where(alpha == 0.0, 0, num_entries)  # at 0 the teacher is not read, whatever it holds
        ce, smooth_ce, kl, added = _topk_row(
            student_ptr + row * student_stride, ids_ptr + row * num_entries, probs_ptr + row * num_entries,
            grad_row, label, row_scale, alpha, entries, num_classes, num_columns, tau, smoothing,
            TAIL, RENORMALISE, SMOOTHING, ADDED, WRITE_GRAD, TAU_IS_2, CAP, K, T, E, STAGES,
        )  # fmt: skip
        store_terms(terms_ptr, row, terms_stride, ce, smooth_ce, kl, 0.0, added)
