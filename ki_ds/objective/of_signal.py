"""The loss that fits what a teacher, or several, said: from a signal to a call of `ki_ds.objective.loss`.

Shape suffixes: N labelled rows of the batch, M those of one teacher, D hidden size, V padded vocabulary, T teachers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ki_ds.objective.loss import (
    TeacherHead,
    linear_inheritance_loss,
    linear_multi_teacher_loss,
    linear_topk_inheritance_loss,
)
from ki_ds.objective.types import Average, Head, LossOutput, Routed, Signal, Sparse


def loss_of(signal: Signal | None, alpha: float | Tensor) -> Callable[..., LossOutput]:
    """The loss of a signal, to be called with (hidden_ND, weight_VD, labels_N) and keywords of the student.

    Args:
        signal: None is self-learning, whatever alpha is. Of a `Routed` rows without a teacher learn from their
            labels alone, with their full weight, and `teachers` of the output has a row for each of the run's teachers.
        alpha: the inheritance rate, a number or a 0-d tensor.
    """
    match signal:
        case None:
            return linear_inheritance_loss
        case Head(hidden_ND, weight_VD, bias_V, form):
            head: dict[str, Any] = {"teacher_hidden": hidden_ND, "teacher_weight": weight_VD, "teacher_bias": bias_V}
            return partial(linear_inheritance_loss, alpha=alpha, teacher_form=form, **head)
        case Sparse(ids_NK, probs_NK, semantics):
            entries: dict[str, Any] = {"topk_ids": ids_NK, "topk_probs": probs_NK, "semantics": semantics}
            return partial(linear_topk_inheritance_loss, alpha=alpha, **entries)
        case Average(parts, shares):
            heads = [TeacherHead(each.hidden_ND, each.weight_VD, each.bias_V, None, each.form) for each in parts]
            return partial(linear_multi_teacher_loss, alpha=alpha, teachers=heads, shares=shares)
        case Routed():
            return partial(_routed_loss, signal=signal, alpha=alpha)
    raise AssertionError(signal)


def _routed_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    signal: Routed,
    alpha: float | Tensor,
    **student: Any,
) -> LossOutput:
    """Each part's loss and that of the rows without a teacher, summed; one call where all parts are hidden states."""
    parts = signal.parts
    heads = [
        TeacherHead(part.signal.hidden_ND, part.signal.weight_VD, part.signal.bias_V, part.rows_M, part.signal.form)
        for part in parts
        if isinstance(part.signal, Head)
    ]
    if not parts:
        outs = [linear_inheritance_loss(hidden_ND, weight_VD, labels_N, **student)]
    elif len(heads) == len(parts):
        outs = [linear_multi_teacher_loss(hidden_ND, weight_VD, labels_N, alpha=alpha, teachers=heads, **student)]
    else:
        outs = [
            loss_of(part.signal, alpha)(hidden_ND[part.rows_M], weight_VD, labels_N[part.rows_M], **student)
            for part in parts
        ]
        others = _others([part.rows_M for part in parts], hidden_ND)
        if len(others):
            outs.append(linear_inheritance_loss(hidden_ND[others], weight_VD, labels_N[others], **student))
    asked = torch.cat([out.teachers for out in outs])
    told = dict(zip((part.teacher for part in parts), asked, strict=False))  # nothing where alpha is 0
    teachers_T4 = torch.stack([told.get(number, asked.new_zeros(4)) for number in range(signal.num_teachers)])
    sums = {name: torch.stack([getattr(out, name) for out in outs]).sum() for name in LossOutput._fields[:-1]}
    return LossOutput(**sums, teachers=teachers_T4)


def _others(rows: list[Tensor], hidden_ND: Tensor) -> Tensor:
    """Numbers of the rows that are in none of `rows`. No wait: their count is known."""
    free_N = torch.ones(len(hidden_ND), dtype=torch.bool, device=hidden_ND.device)
    free_N[torch.cat(rows)] = False
    return torch.nonzero_static(free_N, size=len(hidden_ND) - sum(map(len, rows)))[:, 0]
