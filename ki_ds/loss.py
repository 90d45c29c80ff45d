"""The inheritance loss for one's own training loop: `from ki_ds.loss import inheritance_loss`.

| the teacher is given as | from the student's logits | from the student's hidden states and head |
|---|---|---|
| logits, or hidden states and head | `inheritance_loss` | `linear_inheritance_loss` |
| K entries a row | `topk_inheritance_loss` | `linear_topk_inheritance_loss` |
| several teachers | `multi_teacher_loss` | `linear_multi_teacher_loss` |
| nothing (evaluation) | | `linear_cross_entropy` |

All are faces of `ki_ds.objective.loss.loss`, which has the formula, and raise its `UserError`. The `linear_` functions
never hold the logits of more than one chunk of rows; call them inside the forward of the module that owns the weight.

Keywords of all of them: the fields of `Objective` (`alpha`, `tau`, ...), with its defaults; `row_weights` (None) and
`backend` ("auto") as in `loss`. Those of the linear ones besides: `student_bias` [V], `student_form`, what its
architecture makes of the projection, and `chunk_rows` (None).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from ki_ds.errors import UserError
from ki_ds.objective.backend import resolve_backend
from ki_ds.objective.loss import loss
from ki_ds.objective.rows import Objective, ObjectiveOptions
from ki_ds.objective.types import (
    PLAIN,
    Average,
    Head,
    LogitForm,
    Logits,
    LossOutput,
    Part,
    Routed,
    Signal,
    Sparse,
)

__all__ = [
    "PLAIN",
    "LogitForm",
    "LossOutput",
    "TeacherHead",
    "TeacherLogits",
    "inheritance_loss",
    "linear_cross_entropy",
    "linear_inheritance_loss",
    "linear_multi_teacher_loss",
    "linear_topk_inheritance_loss",
    "multi_teacher_loss",
    "resolve_backend",
    "topk_inheritance_loss",
]


class TeacherLogits(NamedTuple):
    """One of several teachers by its logits [M, V]; `rows` [M] says which student rows they are for."""

    logits: Tensor
    rows: Tensor | None = None


class TeacherHead(NamedTuple):
    """One of several teachers by its hidden states [M, E] and head [V, E]; `rows` as in `TeacherLogits`.

    `form` is what the teacher makes of its projection, as the student's `student_form`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    rows: Tensor | None = None
    form: LogitForm = PLAIN


class LogitsOptions(ObjectiveOptions, total=False):
    """Keywords of the functions that take the student's logits."""

    row_weights: Tensor | None
    backend: str


class LinearOptions(LogitsOptions, total=False):
    """Keywords of the functions that take the student's hidden states and head."""

    student_bias: Tensor | None
    student_form: LogitForm
    chunk_rows: int | None


def inheritance_loss(
    student_logits: Tensor, labels: Tensor, *, teacher_logits: Tensor | None = None, **options: Unpack[LogitsOptions]
) -> LossOutput:
    """The loss of student logits [..., V] against labels [...] and, where alpha is not 0, a teacher's logits [..., V'].

    The teacher is never differentiated, and not touched if alpha is 0.0.
    """
    teacher = None if teacher_logits is None else Logits(teacher_logits)
    return _from_logits(student_logits, labels, teacher, options)


def topk_inheritance_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    topk_ids: Tensor,
    topk_probs: Tensor,
    semantics: str = "renormalise",
    **options: Unpack[LogitsOptions],
) -> LossOutput:
    """The loss of student logits [..., V] against labels and K teacher entries a row [..., K], as in `Sparse`."""
    return _from_logits(student_logits, labels, Sparse(topk_ids, topk_probs, semantics), options)


def multi_teacher_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    teachers: Sequence[TeacherLogits],
    shares: Sequence[float] | None = None,
    **options: Unpack[LogitsOptions],
) -> LossOutput:
    """The loss of student logits [..., V] against labels and several teachers.

    With `shares` every teacher speaks for all rows, in order, and q is the average of their softmaxes at `tau`
    weighted by `shares` (divided by their sum). Without, each teacher has its own `rows` (numbers into the
    flattened rows; no row twice), and a row that no teacher has learns from its label alone.
    """
    parts = [(Logits(teacher.logits), teacher.rows) for teacher in teachers]
    return _from_logits(student_logits, labels, _several(parts, shares, options), options)


def linear_inheritance_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_form: LogitForm = PLAIN,
    **options: Unpack[LinearOptions],
) -> LossOutput:
    """The loss of a student's hidden states [..., D] and head [V, D], without the logits of either model.

    The same numbers as `inheritance_loss` on the logits that `student_form` makes of hidden states, weight and bias,
    and `teacher_form` of the teacher's [..., E], [V', E] and [V'], whose dtype is its own. Gradients are made in the
    forward, each only if it is required; the weight's is summed in float32.
    """
    if (teacher_hidden is None) != (teacher_weight is None):
        raise UserError("teacher_hidden and teacher_weight belong together; give both or neither")
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_form)
    return _from_hidden(student_hidden, student_weight, labels, teacher, options)


def linear_topk_inheritance_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    topk_ids: Tensor,
    topk_probs: Tensor,
    semantics: str = "renormalise",
    **options: Unpack[LinearOptions],
) -> LossOutput:
    """The loss of a student's hidden states and head against K teacher entries a row, without logits."""
    return _from_hidden(student_hidden, student_weight, labels, Sparse(topk_ids, topk_probs, semantics), options)


def linear_multi_teacher_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    teachers: Sequence[TeacherHead],
    shares: Sequence[float] | None = None,
    **options: Unpack[LinearOptions],
) -> LossOutput:
    """The loss of a student's hidden states and head against several teachers, as in `multi_teacher_loss`."""
    parts = [(Head(each.hidden, each.weight, each.bias, each.form), each.rows) for each in teachers]
    return _from_hidden(student_hidden, student_weight, labels, _several(parts, shares, options), options)


@torch.no_grad()
def linear_cross_entropy(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    form: LogitForm = PLAIN,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    num_classes: int | None = None,
    backend: str = "auto",
) -> LossOutput:
    """The plain cross-entropy sums of hidden states and a head, for evaluation: no gradient, no logits kept."""
    objective = Objective(num_classes=num_classes, ignore_index=ignore_index)
    student = Head(student_hidden, student_weight, student_bias, form)
    return loss(student, labels, None, objective, backend=backend, chunk_rows=chunk_rows)


def _from_logits(logits: Tensor, labels: Tensor, teacher: Signal | None, options: LogitsOptions) -> LossOutput:
    numbers: dict[str, Any] = dict(options)
    call = {name: numbers.pop(name) for name in ("row_weights", "backend") if name in numbers}
    return loss(Logits(logits), labels, teacher, Objective(**numbers), **call)


def _from_hidden(
    hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Signal | None, options: LinearOptions
) -> LossOutput:
    numbers: dict[str, Any] = dict(options)
    student = Head(hidden, weight, numbers.pop("student_bias", None), numbers.pop("student_form", PLAIN))
    call = {name: numbers.pop(name) for name in ("row_weights", "backend", "chunk_rows") if name in numbers}
    return loss(student, labels, teacher, Objective(**numbers), **call)


def _several(
    parts: Sequence[tuple[Head | Logits, Tensor | None]], shares: Sequence[float] | None, options: ObjectiveOptions
) -> Average | Routed | None:
    """Several teachers as one signal; None where alpha is 0.0 and none is looked at."""
    if not Objective(alpha=options.get("alpha", 0.0)).uses_teacher():
        return None
    if not parts:
        raise UserError("teachers is empty; give at least one, or alpha=0.0")
    for number, (model, rows) in enumerate(parts):
        if shares is not None and rows is not None:
            raise UserError(f"teachers[{number}] is averaged by shares, so it needs all rows and rows=None")
        if shares is None and rows is None:
            count = model.tensors[0].shape[:-1].numel()
            raise UserError(f"teachers[{number}] has {count} rows; say which with rows=[{count}], or give shares")
    if shares is not None:
        return Average(tuple(model for model, _ in parts), tuple(shares))
    routed = (Part(number, model, rows) for number, (model, rows) in enumerate(parts) if rows is not None)
    return Routed(tuple(routed), len(parts))
