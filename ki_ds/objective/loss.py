"""The inheritance loss: what a student learns from its labels and from a teacher.

Paper, eq. 2. With student logits z_s, teacher logits z_t, a label y and a temperature tau, for each row r

    CE_r = logsumexp(z_s) - z_s[y]
    KL_r = sum_v q_v (log q_v - log p_v),    q = softmax(z_t / tau),    p = softmax(z_s / tau)
    loss_sum = sum_r w_r [(1 - alpha) CE_r + alpha tau^2 KL_r]

and the gradient of it with respect to z_s is w_r [(1 - alpha) (softmax(z_s) - onehot(y)) + alpha tau (p - q)].
Rows whose label is `ignore_index` count nowhere. Sums are returned, never means: divide once, by the rows of
the global batch. All of it is computed in float32 whatever the inputs' dtype (float64 stays float64), and
gradients come back in the inputs' dtype, for the student alone.

| the teacher is given as | from the student's logits | from the student's hidden states and head |
|---|---|---|
| logits, or hidden states and head | `inheritance_loss` | `linear_inheritance_loss` |
| K entries a row | `topk_inheritance_loss` | `linear_topk_inheritance_loss` |
| several teachers | `multi_teacher_loss` | `linear_multi_teacher_loss` |
| nothing (evaluation) | | `linear_cross_entropy` |

The `linear_` functions never hold the logits of more than one chunk of rows. Call them inside the forward of
the module that owns the weight: backward does not read it again, so ZeRO may free it.

Label smoothing (paper, Table 10) gives the label 1 - e and shares e among the other classes.
Shape suffixes: N rows (any leading shape), V logits a row, D hidden of the student, E hidden of the teacher,
K teacher entries of a row, M rows of one teacher.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ki_ds.errors import UserError
from ki_ds.objective.arguments import (
    Call,
    HeadArguments,
    check_device,
    check_float,
    check_num_classes,
    check_rows,
    flat,
)
from ki_ds.objective.backend import resolve_backend
from ki_ds.objective.types import PLAIN, LogitForm, LossOutput

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


def inheritance_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    teacher_logits: Tensor | None = None,
    alpha: float | Tensor = 0.0,
    tau: float = 2.0,
    ignore_index: int = -100,
    num_classes: int | None = None,
    row_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> LossOutput:
    """The loss of student logits [..., V] against labels [...] and, where alpha is not 0, a teacher's logits.

    Args:
        student_logits: [..., V] in float32, bfloat16 or float16; left as they are.
        labels: [...] class numbers; rows with `ignore_index` are skipped.
        teacher_logits: [..., V'] in any of these dtypes; never differentiated, not touched if alpha is 0.0.
        alpha: weight of the teacher in [0, 1], a float or a 0-d tensor (a device tensor costs no host sync). Where
            no teacher is given the labels count alone; a float other than 0.0 is then an error.
        tau: temperature of both softmaxes in the KL.
        num_classes: the real vocabulary size; columns from there on are padding, which takes no probability
            and gets a gradient of exactly 0. None: V, which the teacher must then share.
        row_weights: [...] float weights w_r of the rows in `loss_sum`.
        label_smoothing: e in [0, 1).
        backend: "auto", "triton" or "torch"; `resolve_backend` says what "auto" means.

    Raises:
        UserError: shapes, dtypes or values that do not fit together.
    """
    call = Call.check(
        student_logits,
        labels,
        alpha=alpha,
        tau=tau,
        ignore_index=ignore_index,
        row_weights=row_weights,
        label_smoothing=label_smoothing,
        backend=backend,
    )
    widths, teachers = {"student_logits": student_logits.shape[-1]}, []
    if teacher_logits is None:
        call = call.without_teacher("teacher_logits")
    elif call.uses_teacher:
        _check_teacher_logits("teacher_logits", teacher_logits, student_logits)
        check_rows("teacher_logits", teacher_logits.shape[:-1], student_logits)
        teachers = [flat(teacher_logits).detach()]
        widths["teacher_logits"] = teacher_logits.shape[-1]
    classes = check_num_classes(num_classes, widths)
    return LossOutput(*call.from_logits(flat(student_logits), classes, teachers=teachers))


def topk_inheritance_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    topk_ids: Tensor,
    topk_probs: Tensor,
    semantics: str = "renormalise",
    alpha: float | Tensor = 0.0,
    tau: float = 2.0,
    ignore_index: int = -100,
    num_classes: int | None = None,
    row_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> LossOutput:
    """The loss of student logits [..., V] against labels and K teacher entries a row.

    `topk_ids` [..., K] are class numbers, distinct in a row; `topk_probs` [..., K] the teacher's softmax at `tau`
    there. An entry with probability 0 or an id outside the classes is absent. The student's softmax is full.
    `semantics`:

    - "renormalise" (paper, Fig. 1c): q is the K probabilities divided by their sum.
    - "tail": what the K leave over is one more class, compared with the student's mass off the K.
    - "sampled" (arXiv 2503.16870): ids were drawn at random and `topk_probs` are their importance weights, whose
      expectation is q; the gradient is then unbiased, and `kl_sum` is that of the weights as they are.

    Other arguments and errors as in `inheritance_loss`.
    """
    call = Call.check(
        student_logits,
        labels,
        alpha=alpha,
        tau=tau,
        ignore_index=ignore_index,
        row_weights=row_weights,
        label_smoothing=label_smoothing,
        backend=backend,
    )
    classes = check_num_classes(num_classes, {"student_logits": student_logits.shape[-1]})
    topk = call.check_topk(topk_ids, topk_probs, semantics, student_logits)
    return LossOutput(*call.from_logits(flat(student_logits), classes, topk=topk, semantics=semantics))


def multi_teacher_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    teachers: Sequence[TeacherLogits],
    shares: Sequence[float] | None = None,
    alpha: float | Tensor = 0.0,
    tau: float = 2.0,
    ignore_index: int = -100,
    num_classes: int | None = None,
    row_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> LossOutput:
    """The loss of student logits [..., V] against labels and several teachers.

    With `shares` every teacher speaks for all rows, in order, and q is the average of their softmaxes at `tau`
    weighted by `shares` (divided by their sum). Without, each teacher has its own `rows` (numbers into the
    flattened rows; no row twice), and a row that no teacher has learns from its label alone.
    Other arguments and errors as in `inheritance_loss`.
    """
    call = Call.check(
        student_logits,
        labels,
        alpha=alpha,
        tau=tau,
        ignore_index=ignore_index,
        row_weights=row_weights,
        label_smoothing=label_smoothing,
        backend=backend,
    )
    given = list(teachers) if call.uses_teacher else []
    widths = {"student_logits": student_logits.shape[-1]}
    for number, teacher in enumerate(given):
        _check_teacher_logits(f"teachers[{number}].logits", teacher.logits, student_logits)
        widths[f"teachers[{number}].logits"] = teacher.logits.shape[-1]
    classes = check_num_classes(num_classes, widths)
    logits_NV, given_MV = flat(student_logits), [flat(teacher.logits).detach() for teacher in given]
    call.check_teachers([(t.shape[0], teacher.rows) for t, teacher in zip(given_MV, given, strict=True)], shares)
    if shares is not None or not given:
        return LossOutput(*call.from_logits(logits_NV, classes, teachers=given_MV, shares=shares or ()))
    routes = [teacher.rows for teacher in given if teacher.rows is not None]
    parts = [
        call.only(rows).from_logits(logits_NV[rows], classes, teachers=[logits])
        for rows, logits in zip(routes, given_MV, strict=True)
    ]
    untaught = call.untaught(routes)
    if untaught.shape[0]:
        parts.append(call.only(untaught, label_only=True).from_logits(logits_NV[untaught], classes))
    *sums, told = zip(*parts, strict=True)
    loss, ce, kl, num_rows = (sum(column[1:], start=column[0]) for column in sums)
    return LossOutput(loss, ce, kl, num_rows, torch.cat(told[: len(given)]))


def _check_teacher_logits(name: str, logits: Tensor, student_logits: Tensor) -> None:
    check_float(name, logits)
    check_device(name, logits, student_logits)


def linear_inheritance_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    student_form: LogitForm = PLAIN,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_form: LogitForm = PLAIN,
    alpha: float | Tensor = 0.0,
    tau: float = 2.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    num_classes: int | None = None,
    row_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> LossOutput:
    """The loss of a student's hidden states [..., D] and head [V, D], without the logits of either model.

    The same numbers as `inheritance_loss` on the logits that `student_form` makes of the three (and likewise for the
    teacher), computed `chunk_rows` rows at a time (None: by the sizes). Gradients of hidden states, weight
    and bias are made in the forward, each only if it is required; the weight's is summed in float32.

    Args:
        student_hidden: [..., D]; under autocast it is cast to autocast's dtype, as a linear layer would.
        student_weight: [V, D], with `student_bias` [V]; same dtype as the hidden states.
        teacher_hidden: [..., E] with `teacher_weight` [V', E] and `teacher_bias` [V']; E and V' need not be the
            student's D and V; their dtype is the teacher's own.
        student_form: the scale and the cap of an architecture whose logits are not plainly the projection's,
            z = cap tanh((scale h W^T + b) / cap); `teacher_form` is the teacher's.

    Other arguments and errors as in `inheritance_loss`.
    """
    call = Call.check(
        student_hidden,
        labels,
        alpha=alpha,
        tau=tau,
        ignore_index=ignore_index,
        row_weights=row_weights,
        label_smoothing=label_smoothing,
        backend=backend,
    )
    heads = []
    if (teacher_hidden is None) != (teacher_weight is None):
        raise UserError("teacher_hidden and teacher_weight belong together; give both or neither")
    if teacher_hidden is None or teacher_weight is None:
        call = call.without_teacher("teacher_hidden and teacher_weight")
    elif call.uses_teacher:
        check_rows("teacher_hidden", teacher_hidden.shape[:-1], student_hidden)
        heads = [HeadArguments(teacher_hidden, teacher_weight, teacher_bias, None, teacher_form)]
    return LossOutput(
        *call.from_hidden(
            student_hidden,
            student_weight,
            student_bias,
            form=student_form,
            num_classes=num_classes,
            chunk_rows=chunk_rows,
            heads=heads,
            shares=(1.0,),
        )
    )


def linear_topk_inheritance_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    topk_ids: Tensor,
    topk_probs: Tensor,
    semantics: str = "renormalise",
    student_bias: Tensor | None = None,
    student_form: LogitForm = PLAIN,
    alpha: float | Tensor = 0.0,
    tau: float = 2.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    num_classes: int | None = None,
    row_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> LossOutput:
    """The loss of a student's hidden states and head against K teacher entries a row, without logits.

    The teacher's arguments as in `topk_inheritance_loss`, the others as in `linear_inheritance_loss`.
    """
    call = Call.check(
        student_hidden,
        labels,
        alpha=alpha,
        tau=tau,
        ignore_index=ignore_index,
        row_weights=row_weights,
        label_smoothing=label_smoothing,
        backend=backend,
    )
    topk = call.check_topk(topk_ids, topk_probs, semantics, student_hidden)
    return LossOutput(
        *call.from_hidden(
            student_hidden,
            student_weight,
            student_bias,
            form=student_form,
            num_classes=num_classes,
            chunk_rows=chunk_rows,
            topk=topk,
            semantics=semantics,
        )
    )


def linear_multi_teacher_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    *,
    teachers: Sequence[TeacherHead],
    shares: Sequence[float] | None = None,
    student_bias: Tensor | None = None,
    student_form: LogitForm = PLAIN,
    alpha: float | Tensor = 0.0,
    tau: float = 2.0,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    num_classes: int | None = None,
    row_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> LossOutput:
    """The loss of a student's hidden states and head against several teachers, without logits.

    `teachers` and `shares` as in `multi_teacher_loss`, the other arguments as in `linear_inheritance_loss`.
    """
    call = Call.check(
        student_hidden,
        labels,
        alpha=alpha,
        tau=tau,
        ignore_index=ignore_index,
        row_weights=row_weights,
        label_smoothing=label_smoothing,
        backend=backend,
    )
    heads = [HeadArguments(*head) for head in teachers] if call.uses_teacher else []
    call.check_teachers([(flat(head.hidden).shape[0], head.rows) for head in heads], shares)
    return LossOutput(
        *call.from_hidden(
            student_hidden,
            student_weight,
            student_bias,
            form=student_form,
            num_classes=num_classes,
            chunk_rows=chunk_rows,
            heads=heads,
            shares=shares or (),
        )
    )


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
    """The plain cross-entropy sums of hidden states and a head, for evaluation: no gradient, no logits kept.

    Arguments (`form` as its `student_form`) and errors as in `linear_inheritance_loss`.
    """
    return linear_inheritance_loss(
        student_hidden,
        student_weight,
        labels,
        student_bias=student_bias,
        student_form=form,
        ignore_index=ignore_index,
        chunk_rows=chunk_rows,
        num_classes=num_classes,
        backend=backend,
    )
