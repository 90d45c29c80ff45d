"""Checks of a call of the loss, on its way to the rows.

Everything that can be checked without waiting for a device is checked here, in one line for the user.
Labels and entries on a GPU cannot: a label that is no class makes its row's loss NaN there.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ki_ds.errors import UserError
from ki_ds.objective.backend import resolve_backend
from ki_ds.objective.chunks import Problem
from ki_ds.objective.rows import TOPK_SEMANTICS, Objective
from ki_ds.objective.types import Average, Head, LogitForm, Logits, Part, Routed, Signal, Sparse, Student

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Widths = dict[str, int]  # of models' logits, by the names that a user knows


def checked(
    student: Student,
    labels: Tensor,
    teacher: Signal | None,
    objective: Objective,
    *,
    row_weights: Tensor | None,
    backend: str,
    chunk_rows: int | None,
) -> Problem:
    """The call with its tensors flat and cast, once they are known to fit together; else UserError."""
    rows = student.logits_NV if isinstance(student, Logits) else student.hidden_ND
    _check_float("the student's rows", rows)
    if rows.dim() == 0 or rows.shape[-1] == 0:
        raise UserError(f"the student's rows have shape {tuple(rows.shape)}; give [..., width > 0]")
    _check_rows("labels", labels, rows)
    if labels.dtype not in (torch.int64, torch.int32):
        raise UserError(f"labels have dtype {labels.dtype}; give int64 class numbers")
    if row_weights is not None:
        _check_rows("row_weights", row_weights, rows)
        row_weights = row_weights.detach().reshape(-1).float()
    objective.check(rows)
    if rows.dtype == torch.float64 and backend == "triton":
        raise UserError('backend="triton" computes in float32, the inputs are float64; take backend="torch"')
    if chunk_rows is not None and chunk_rows < 1:
        raise UserError(f"chunk_rows={chunk_rows} must be at least 1, or None for a choice by the sizes")
    if teacher is None and not isinstance(objective.alpha, Tensor) and objective.alpha != 0.0:
        missing = "teacher_logits" if isinstance(student, Logits) else "teacher_hidden and teacher_weight"
        raise UserError(f"alpha={objective.alpha} needs a teacher; give {missing}, or alpha=0.0")
    if isinstance(teacher, Sparse) and teacher.semantics not in TOPK_SEMANTICS:
        raise UserError(f"semantics={teacher.semantics!r} is not one of {', '.join(TOPK_SEMANTICS)}")
    widths: Widths = {}
    student = _student(student, widths)
    teacher = _signal(teacher, rows, widths) if teacher is not None and objective.uses_teacher() else None
    labels_N, num_classes = labels.reshape(-1), _num_classes(objective.num_classes, widths)
    _check_labels(labels_N, num_classes, objective.ignore_index)
    return Problem(
        student,
        labels_N,
        row_weights,
        teacher,
        replace(objective, num_classes=num_classes),
        chunk_rows=chunk_rows,
        backend=resolve_backend("torch" if rows.dtype == torch.float64 else backend, rows.device),
        wanted=tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in student.tensors),
    )


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _autocast(tensor: Tensor) -> Tensor:
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


# --- the models -----------------------------------------------------------------------------------------------------


def _student(student: Student, widths: Widths) -> Student:
    if isinstance(student, Logits):
        widths["student_logits"] = student.logits_NV.shape[-1]
        return Logits(_flat(student.logits_NV).contiguous())
    head = _head("student", student)
    _check_form("student_form", head.form)
    widths["student_weight"] = head.weight_VD.shape[0]
    return replace(head, hidden_ND=head.hidden_ND.contiguous())


def _signal(teacher: Signal, rows: Tensor, widths: Widths) -> Signal:
    """A teacher's signal, flat; `rows` are the student's."""
    num_rows = rows.shape[:-1].numel()
    match teacher:
        case Average(parts, shares):
            if len(shares) != len(parts) or min(shares) <= 0:
                raise UserError(f"shares={tuple(shares)} for {len(parts)} teachers; give one positive number each")
            models = tuple(_model(part, widths, number) for number, part in enumerate(parts))
            for number, part in enumerate(models):
                if _num_rows(part) != num_rows:
                    raise UserError(f"teachers[{number}] is averaged by shares, so it needs all rows and rows=None")
            return Average(models, tuple(map(float, shares))) if len(models) > 1 else models[0]
        case Routed(parts, num_teachers):
            routed = tuple(_part(part, widths) for part in parts)
            _check_routes(routed, num_rows)
            return Routed(routed, num_teachers)
        case Sparse():
            entries = _entries(teacher)
            _check_rows("topk_ids", teacher.ids_NK, rows, inner=1)
            _check_device("topk_probs", teacher.probs_NK, rows)
            return entries
        case Logits(logits_NV):
            _check_rows("teacher_logits", logits_NV, rows, inner=1)
        case Head(hidden_ND):
            _check_rows("teacher_hidden", hidden_ND, rows, inner=1)
        case _:
            raise AssertionError(teacher)
    return _model(teacher, widths)


def _part(part: Part, widths: Widths) -> Part:
    count = _num_rows(part.signal)
    if part.rows_M.shape != (count,):
        raise UserError(f"teachers[{part.teacher}] has {count} rows; say which with rows=[{count}], or give shares")
    if isinstance(part.signal, Sparse):
        return replace(part, signal=_entries(part.signal))
    return replace(part, signal=_model(part.signal, widths, part.teacher))


def _model(model: Head | Logits, widths: Widths, number: int | None = None) -> Head | Logits:
    """A teacher's logits or head, flat; `number` is that of one of several."""
    if isinstance(model, Logits):
        name = "teacher_logits" if number is None else f"teachers[{number}].logits"
        _check_float(name, model.logits_NV)
        widths[name] = model.logits_NV.shape[-1]
        logits_NV = _flat(model.logits_NV).detach()
        return Logits(logits_NV if logits_NV.stride(-1) == 1 else logits_NV.contiguous())
    bias_V = None if model.bias_V is None else model.bias_V.detach()
    head = _head("teacher", Head(model.hidden_ND.detach(), model.weight_VD.detach(), bias_V, model.form))
    _check_form("a teacher's form", head.form)
    widths[f"teacher {number or 0}'s weight"] = head.weight_VD.shape[0]
    return head


def _head(who: str, head: Head) -> Head:
    """The head, flat: its weight [V, width of the hidden states], its bias [V], all of one dtype and device."""
    hidden_ND, weight_VD = _autocast(_flat(head.hidden_ND)), _autocast(head.weight_VD)
    bias_V = None if head.bias_V is None else _autocast(head.bias_V)
    if weight_VD.dim() != 2 or weight_VD.shape[1] != hidden_ND.shape[1]:
        raise UserError(f"{who}_weight {tuple(weight_VD.shape)} does not fit {who}_hidden [..., {hidden_ND.shape[1]}]")
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise UserError(
            f"{who}_bias {tuple(bias_V.shape)} does not fit {who}_weight {tuple(weight_VD.shape)}; give [V]"
        )
    for name, tensor in (("weight", weight_VD), ("bias", bias_V)):
        if tensor is not None and tensor.dtype != hidden_ND.dtype:
            raise UserError(f"{who}_{name} is {tensor.dtype}, {who}_hidden {hidden_ND.dtype}; cast one of them")
        if tensor is not None:
            _check_device(f"{who}_{name}", tensor, hidden_ND)
    return Head(hidden_ND, weight_VD, bias_V, head.form)


def _check_form(name: str, form: LogitForm) -> None:
    scale, cap = form
    if not 0.0 < abs(scale) < math.inf:
        raise UserError(f"{name} has scale={scale}; give a finite number other than 0")
    if cap is not None and not 0.0 < cap < math.inf:
        raise UserError(f"{name} has cap={cap}; give a positive finite number, or None for logits without a cap")


def _entries(signal: Sparse) -> Sparse:
    """Teacher entries as [N, K] ids and float probabilities."""
    ids, probs = signal.ids_NK, signal.probs_NK
    if ids.shape != probs.shape:
        raise UserError(f"topk_ids {tuple(ids.shape)} and topk_probs {tuple(probs.shape)} differ; give both [..., K]")
    if ids.is_floating_point() or not probs.is_floating_point():
        raise UserError(f"topk_ids are {ids.dtype}, topk_probs {probs.dtype}; give integers and floats")
    return Sparse(_flat(ids), _flat(probs).detach(), signal.semantics)


# --- shapes and dtypes ----------------------------------------------------------------------------------------------


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise UserError(f"{name} have dtype {tensor.dtype}; give float32, bfloat16 or float16")


def _check_rows(name: str, tensor: Tensor, rows: Tensor, *, inner: int = 0) -> None:
    """The leading shape, without `inner` dimensions, must be that of the student's rows; the device theirs."""
    shape = tensor.shape[: tensor.dim() - inner]
    if shape != rows.shape[:-1]:
        raise UserError(
            f"{name} has rows {tuple(shape)}, the student {tuple(rows.shape[:-1])}; give one per student row"
        )
    _check_device(name, tensor, rows)


def _check_device(name: str, tensor: Tensor, rows: Tensor) -> None:
    if tensor.device != rows.device:
        raise UserError(f"{name} is on {tensor.device}, the student's rows on {rows.device}; move it there")


def _num_rows(signal: Head | Logits | Sparse) -> int:
    match signal:
        case Head(first) | Logits(first) | Sparse(first):
            return first.shape[:-1].numel()
    raise AssertionError(signal)


def _check_routes(parts: tuple[Part, ...], num_rows: int) -> None:
    """Rows on a CPU must be rows of the student, each once."""
    if not parts or parts[0].rows_M.is_cuda:
        return
    every = torch.cat([part.rows_M for part in parts])
    if every.numel() and (int(every.min()) < 0 or int(every.max()) >= num_rows):
        raise UserError(f"teachers' rows reach from {int(every.min())} to {int(every.max())}; there are {num_rows}")
    if every.unique().numel() != every.numel():
        raise UserError("teachers' rows name a row twice; give every row to one teacher, or average by shares")


def _num_classes(num_classes: int | None, widths: Widths) -> int:
    """The real vocabulary size: as given, or the one width that everything has."""
    listed = ", ".join(f"{name} {width}" for name, width in widths.items())
    if num_classes is None:
        if len(set(widths.values())) > 1:
            raise UserError(f"vocabularies differ in width ({listed}); give num_classes, the real vocabulary size")
        return next(iter(widths.values()))
    if not 1 <= num_classes <= min(widths.values()):
        raise UserError(f"num_classes={num_classes} must lie between 1 and every width ({listed})")
    return num_classes


def _check_labels(labels_N: Tensor, num_classes: int, ignore_index: int) -> None:
    """Labels on the CPU must be classes or `ignore_index`."""
    if labels_N.is_cuda or torch.compiler.is_compiling():
        return
    wrong = ((labels_N < 0) | (labels_N >= num_classes)) & (labels_N != ignore_index)
    if bool(wrong.any()):
        value = int(labels_N[wrong][0])
        raise UserError(f"label {value} is neither a class (0 to {num_classes - 1}) nor ignore_index={ignore_index}")
