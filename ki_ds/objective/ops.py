"""The loss as one node of autograd each: from hidden states, and from logits.

Eagerly a node is an `autograd.Function`; while torch.compile traces, it is a custom operator with a fake, which
the compiled graph calls as it is (dispatching one costs 0.4 ms, which is why it is not used eagerly).

Both compute the student's gradients together with the loss and keep them until backward, which
only multiplies them by the incoming gradient (and takes `grad_scale` out). Arguments are flat because an
operator's schema knows tensors, numbers, strings and lists of them, but no dataclass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ki_ds.objective.linear import Gradients, Head, Problem, Wanted, linear_rows, row_functions
from ki_ds.objective.rows import LogitForm, RowTask, compute_dtype, grad_scale_for, mix_teachers, sum_rows, teacher_row

SCALE_ELEMENTS = 1 << 26  # elements scaled at once where a float32 copy of them is needed
NO_SECOND_BACKWARD = (
    "the gradient of this loss has already been handed out and its memory reused: "
    "compute the loss again instead of backward(retain_graph=True)"
)
NO_DOUBLE_BACKWARD = "second derivatives of the inheritance loss are not implemented; do not use create_graph=True"


def _task(
    alpha: float,
    alpha_tensor: Tensor | None,
    tau: float,
    ignore_index: int,
    num_classes: int,
    label_smoothing: float,
    semantics: str,
    logits: Tensor,
) -> RowTask:
    """The rows' task; a CPU tensor as alpha is read at once, a device tensor never."""
    value: float | Tensor = alpha
    if alpha_tensor is not None:
        value = alpha_tensor.detach() if alpha_tensor.is_cuda else float(alpha_tensor)
    return RowTask(
        num_classes=num_classes,
        alpha=value,
        tau=tau,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        semantics=semantics,
        grad_scale=grad_scale_for(logits.dtype),
    )


def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weights: Tensor | None,
    alpha_tensor: Tensor | None,
    topk_ids: Tensor | None,
    topk_probs: Tensor | None,
    head_tensors: Sequence[Tensor],
    shares: Sequence[float],
    forms: Sequence[float],
    alpha: float,
    tau: float,
    ignore_index: int,
    num_classes: int,
    label_smoothing: float,
    semantics: str,
    chunk_rows: int,
    backend: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss_sum, ce_sum, kl_sum, num_rows, teachers and the gradients of hidden, weight and bias.

    `head_tensors` holds hidden, weight, bias, rows of each teacher in turn; bias and rows may have no elements.
    `forms` holds scale and cap (0: none) of the student, then of each teacher; `wants` whose gradients are wanted.
    """
    form, *teacher_forms = [LogitForm.of_numbers(*pair) for pair in zip(forms[::2], forms[1::2], strict=True)]
    task = _task(alpha, alpha_tensor, tau, ignore_index, num_classes, label_smoothing, semantics, hidden)
    problem = Problem(
        hidden_ND=hidden,
        weight_VD=weight,
        bias_V=bias,
        form=form,
        labels_N=labels,
        row_weights_N=row_weights,
        heads=_heads(head_tensors, teacher_forms, routed=not shares),
        shares=list(shares),
        topk=None if topk_ids is None or topk_probs is None else (topk_ids, topk_probs),
        task=task,
        chunk_rows=chunk_rows,
        backend=backend,
    )
    sums, grads = linear_rows(problem, Wanted(*wants))
    return (*sums, *grads)


def _heads(tensors: Sequence[Tensor], forms: Sequence[LogitForm], *, routed: bool) -> list[Head]:
    heads = []
    for number, form in enumerate(forms):
        hidden, weight, bias, rows = tensors[4 * number : 4 * number + 4]
        heads.append(Head(hidden, weight, bias if bias.numel() else None, rows if routed else None, form))
    return heads


def _linear_fake(hidden, weight, bias, labels, row_weights, *args):
    dtype = compute_dtype(hidden)
    wants_hidden, wants_weight, wants_bias = args[-1]
    scalars = [hidden.new_empty((), dtype=dtype) for _ in range(3)]
    alpha_tensor, topk_ids, _, heads, shares, _, alpha = args[:7]
    return (
        *scalars,
        labels.new_empty((), dtype=torch.int64),
        hidden.new_empty(_num_told(alpha_tensor, alpha, topk_ids, len(heads) // 4, shares), 4, dtype=dtype),
        torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape if wants_weight else 0, dtype=dtype),
        weight.new_empty(weight.shape[0] if wants_bias else 0, dtype=dtype),
    )


def _num_told(
    alpha_tensor: Tensor | None, alpha: float, topk: Tensor | None, num_teachers: int, shares: Sequence[float]
) -> int:
    """Rows of `teachers`: one for each routed teacher, one for entries or an average."""
    if alpha_tensor is None and alpha == 0.0:
        return 0
    return min(num_teachers, 1) if shares else num_teachers if topk is None else 1


def _no_grads(inputs: Sequence[object]) -> list[object]:
    """What an operator's backward returns before gradients are put in: None, for a list of tensors one each."""
    return [
        [None] * len(value) if isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value) else None
        for value in inputs
    ]


def _keep_linear_grads(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    hidden, weight, bias = inputs[:3]
    ctx.no_grads = _no_grads(inputs)
    ctx.wanted = inputs[-1]
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.grad_scale = grad_scale_for(hidden.dtype)
    ctx.backend = inputs[-2]
    ctx.spent = False
    ctx.save_for_backward(*output[5:])


def _linear_backward(ctx, grad_loss, *_):
    _check_first_order(ctx)
    grads = list(ctx.no_grads)
    if grad_loss is not None:
        factor = grad_loss / ctx.grad_scale
        saved = Gradients(*ctx.saved_tensors)
        for i, (grad, dtype, wanted) in enumerate(zip(saved, ctx.dtypes, ctx.wanted, strict=True)):
            grads[i] = _times(ctx, grad, factor, dtype) if wanted else None
    return tuple(grads)


def _check_first_order(ctx: Any) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(NO_DOUBLE_BACKWARD)
    if ctx.spent:
        raise RuntimeError(NO_SECOND_BACKWARD)


def _times(ctx: Any, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in `dtype`, in the gradient's own memory where that fits."""
    # float64 is for checks such as gradcheck, which walk a graph twice; a traced graph may not mutate
    if grad.dtype == torch.float64 or type(grad) is not Tensor:
        return (grad.to(factor.dtype) * factor).to(dtype)
    ctx.spent = True
    if grad.dtype == dtype:
        scale_(grad, factor, ctx.backend)
        return grad
    assert grad.dtype == factor.dtype  # else the factor would be rounded to the gradient's dtype first
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))


linear_loss_op = torch.library.custom_op("ki_ds::linear_loss", _linear_loss, mutates_args=())
linear_loss_op.register_fake(_linear_fake)
linear_loss_op.register_autograd(_linear_backward, setup_context=_keep_linear_grads)


class LinearLoss(torch.autograd.Function):
    """`linear_loss_op` without the dispatcher."""

    backward = staticmethod(_linear_backward)

    @staticmethod
    def forward(ctx, *inputs):
        output = _linear_loss(*inputs)
        _keep_linear_grads(ctx, inputs, output)
        ctx.no_grads = [None] * len(inputs)
        return output


def linear_loss(*arguments: Any) -> tuple[Tensor, ...]:
    """The outputs of `_linear_loss`, of which the first, loss_sum, is differentiable."""
    return linear_loss_op(*arguments) if torch.compiler.is_compiling() else LinearLoss.apply(*arguments)


def _logits_loss(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor | None,
    alpha_tensor: Tensor | None,
    topk_ids: Tensor | None,
    topk_probs: Tensor | None,
    teachers: Sequence[Tensor],
    shares: Sequence[float],
    alpha: float,
    tau: float,
    ignore_index: int,
    num_classes: int,
    label_smoothing: float,
    semantics: str,
    backend: str,
    wants_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss_sum, ce_sum, kl_sum, num_rows, teachers and the gradient of the logits (times its `grad_scale`).

    Several `teachers` are averaged by `shares`, in chunks of rows.
    """
    task = _task(alpha, alpha_tensor, tau, ignore_index, num_classes, label_smoothing, semantics, logits)
    num_rows = (labels != ignore_index).sum()
    grad = torch.empty_like(logits) if wants_grad else logits.new_empty(0)
    rows = row_functions(backend)
    options = {"row_scale_N": row_weights, "grad_NV": grad if wants_grad else None}
    if topk_ids is not None and topk_probs is not None and task.uses_teacher():
        terms = rows.topk(logits, labels, topk_ids, topk_probs, task, **options)
    else:
        teacher = None
        if teachers and task.uses_teacher():
            teacher = mix_teachers(list(teachers), list(shares), task) if len(teachers) > 1 else teachers[0]
        terms = rows.dense(logits, labels, teacher, task, **options)
    sums = sum_rows(terms, task, row_weights)
    told = sums.kl.new_empty(0, 4) if terms.kl_N is None else teacher_row(sums, num_rows)[None]
    return sums.loss, sums.ce, sums.kl, num_rows, told, grad


def _logits_fake(logits, labels, *args):
    dtype = compute_dtype(logits)
    scalars = [logits.new_empty((), dtype=dtype) for _ in range(3)]
    _, alpha_tensor, topk_ids, _, teachers, _, alpha = args[:7]
    told = 0 if alpha_tensor is None and alpha == 0.0 else int(bool(teachers) or topk_ids is not None)
    grad = torch.empty_like(logits) if args[-1] else logits.new_empty(0)
    return (*scalars, labels.new_empty((), dtype=torch.int64), logits.new_empty(told, 4, dtype=dtype), grad)


def scale_(tensor: Tensor, factor: Tensor, backend: str) -> None:
    """Multiply in place by a 0-d factor that may not fit the tensor's own dtype; 1 costs no pass."""
    if backend == "triton":
        from ki_ds.objective import triton_scale

        triton_scale.scale_(tensor, factor)
    elif tensor.is_cuda:
        for part in tensor.view(-1).split(SCALE_ELEMENTS):
            part.copy_(part.to(factor.dtype).mul_(factor))
    elif float(factor) != 1.0:
        tensor.mul_(float(factor))


def _keep_logits_grad(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.no_grads = _no_grads(inputs)
    ctx.grad_scale = grad_scale_for(inputs[0].dtype)
    ctx.backend = inputs[-2]
    ctx.spent = False
    ctx.save_for_backward(output[5])


def _logits_backward(ctx, grad_loss, *_):
    _check_first_order(ctx)
    grads = list(ctx.no_grads)
    if grad_loss is not None:
        (grad,) = ctx.saved_tensors
        grads[0] = _times(ctx, grad, grad_loss / ctx.grad_scale, grad.dtype)
    return tuple(grads)


logits_loss_op = torch.library.custom_op("ki_ds::logits_loss", _logits_loss, mutates_args=())
logits_loss_op.register_fake(_logits_fake)
logits_loss_op.register_autograd(_logits_backward, setup_context=_keep_logits_grad)


class LogitsLoss(torch.autograd.Function):
    """`logits_loss_op` without the dispatcher."""

    backward = staticmethod(_logits_backward)

    @staticmethod
    def forward(ctx, *inputs):
        output = _logits_loss(*inputs)
        _keep_logits_grad(ctx, inputs, output)
        ctx.no_grads = [None] * len(inputs)
        return output


def logits_loss(*arguments: Any) -> tuple[Tensor, ...]:
    """The outputs of `_logits_loss`, of which the first, loss_sum, is differentiable."""
    return logits_loss_op(*arguments) if torch.compiler.is_compiling() else LogitsLoss.apply(*arguments)
