"""The loss of a problem as one node of autograd.

Eagerly it is an `autograd.Function`; while torch.compile traces, it is a custom operator with a fake, which the
compiled graph calls as it is (dispatching one costs 0.4 ms, which is why it is not used eagerly). The student's
gradients are computed together with the loss and kept until backward, which only multiplies them by the incoming
gradient (and takes `grad_scale` out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ki_ds.objective.chunks import Gradients, Problem, Sums, compute
from ki_ds.objective.rows import Objective, compute_dtype, grad_scale_for
from ki_ds.objective.types import Average, Head, LogitForm, Logits, Part, Routed, Sparse

SCALE_ELEMENTS = 1 << 26  # elements scaled at once where a float32 copy of them is needed
NO_SECOND_BACKWARD = (
    "the gradient of this loss has already been handed out and its memory reused: "
    "compute the loss again instead of backward(retain_graph=True)"
)
NO_DOUBLE_BACKWARD = "second derivatives of the inheritance loss are not implemented; do not use create_graph=True"


class Loss(torch.autograd.Function):
    """`Loss.apply(problem, *problem.student.tensors)` gives `Sums`, of which the first, loss, is differentiable."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *leaves: Tensor | None) -> tuple[Tensor, ...]:
        with torch.profiler.record_function("ki_ds.loss"):
            sums, gradients = compute(problem)
        ctx.mark_non_differentiable(*sums[1:])
        _keep(ctx, problem, leaves, gradients)
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return None, *_scaled(ctx, grad_loss)


def _keep(ctx: Any, problem: Problem, leaves: Sequence[Tensor | None], gradients: Gradients) -> None:
    ctx.set_materialize_grads(False)
    ctx.wanted, ctx.backend, ctx.spent = problem.wanted, problem.backend, False
    ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
    ctx.grad_scale = grad_scale_for(problem.student.tensors[0].dtype)
    ctx.save_for_backward(*gradients)


def _scaled(ctx: Any, grad_loss: Tensor | None) -> list[Tensor | None]:
    """The gradients of the leaves."""
    if torch.is_grad_enabled():
        raise RuntimeError(NO_DOUBLE_BACKWARD)
    if ctx.spent:
        raise RuntimeError(NO_SECOND_BACKWARD)
    if grad_loss is None:
        return [None] * len(ctx.wanted)
    factor, kept = grad_loss / ctx.grad_scale, zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    return [_times(ctx, grad, factor, dtype) if wanted else None for grad, dtype, wanted in kept]


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


# --- the same as an operator, whose schema knows tensors, numbers and strings, but no dataclass ---------------------

_TYPES = {t.__name__: t for t in (Problem, Objective, Logits, Head, LogitForm, Sparse, Average, Part, Routed)}


class Packed:
    """A problem as lists of what an operator takes, and the Python expression that puts it together again."""

    def __init__(self, problem: Problem) -> None:
        self.tensors: list[Tensor] = []  # the student's are the first
        self.floats: list[float] = []
        self.ints: list[int] = []
        self.expression = self._expression(problem)

    def _expression(self, value: Any) -> str:
        if value is None or isinstance(value, bool):
            return f"{value}"
        if isinstance(value, str):
            return f"'{value}'"
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return "tensor()"
        if isinstance(value, float):
            self.floats.append(value)
            return "float()"
        if isinstance(value, int):
            self.ints.append(value)
            return "int()"
        inner = value if isinstance(value, tuple) else [getattr(value, field.name) for field in fields(value)]
        name = "" if type(value) is tuple else type(value).__name__
        return f"{name}({''.join([self._expression(part) + ', ' for part in inner])})"


def _unpacked(tensors: Sequence[Tensor], floats: Sequence[float], ints: Sequence[int], expression: str) -> Problem:
    lists = {"tensor": iter(tensors).__next__, "float": iter(floats).__next__, "int": iter(ints).__next__}
    problem: Problem = eval(expression, {"__builtins__": {}, **_TYPES, **lists})
    return problem


def _loss(tensors: Sequence[Tensor], floats: Sequence[float], ints: Sequence[int], expression: str) -> list[Tensor]:
    """`Sums` of a `Packed` problem, then its gradients."""
    sums, gradients = compute(_unpacked(tensors, floats, ints, expression))
    return [*sums, *gradients]


def _fake(tensors: Sequence[Tensor], floats: Sequence[float], ints: Sequence[int], expression: str) -> list[Tensor]:
    problem = _unpacked(tensors, floats, ints, expression)
    leaf, *weights = problem.student.tensors
    dtype = compute_dtype(leaf)
    sums = [leaf.new_empty((), dtype=dtype) for _ in range(3)]
    told = leaf.new_empty(problem.num_teachers, 4, dtype=dtype)
    kinds = [(leaf, leaf.dtype), *((weight, dtype) for weight in weights)]
    gradients = [
        leaf.new_empty(0, dtype=kind) if given is None or not wanted else torch.empty_like(given, dtype=kind)
        for (given, kind), wanted in zip(kinds, problem.wanted, strict=True)
    ]
    return [*sums, leaf.new_empty((), dtype=torch.int64), told, *gradients]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.num_tensors, num_sums = len(inputs[0]), len(Sums._fields)
    problem = _unpacked(*inputs)
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, problem, problem.student.tensors, tuple(output[num_sums:]))


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    leaves = [grad for grad, dtype in zip(_scaled(ctx, grads[0]), ctx.dtypes, strict=True) if dtype is not None]
    return leaves + [None] * (ctx.num_tensors - len(leaves)), None, None, None


loss_op = torch.library.custom_op("ki_ds::loss", _loss, mutates_args=())
loss_op.register_fake(_fake)
loss_op.register_autograd(_backward, setup_context=_setup)


def traced(problem: Problem) -> list[Tensor]:
    """As `Loss.apply`, while torch.compile traces."""
    packed = Packed(problem)
    return loss_op(packed.tensors, packed.floats, packed.ints, packed.expression)
