"""From a checked call to sums and gradients, in chunks of rows: GEMMs around the rows of the loss.

Of a model given by its hidden states and head only one chunk of logits exists. The gradients of hidden states, weight
and bias are made together with the loss, because every chunk's logits are gone afterwards; the weight's is summed in
float32.

Shape suffixes: N rows, R rows of a chunk, M rows of one teacher, V rows of a head's weight (logits), D hidden,
T teachers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ki_ds.objective import reference
from ki_ds.objective.rows import (
    Objective,
    RowSums,
    RowTask,
    RowTerms,
    compute_dtype,
    grad_scale_for,
    mix_teachers,
    project,
    sum_rows,
)
from ki_ds.objective.types import Average, Head, Logits, Routed, Signal, Sparse, Student

CHUNK_BYTES_CPU = 1 << 27
CHUNK_BYTES_GPU = 1 << 28


@dataclass(frozen=True)
class Problem:
    """A call of the loss whose tensors fit together: flat, cast, on one device; `num_classes` is known."""

    student: Student
    labels_N: Tensor
    row_weights_N: Tensor | None
    teacher: Signal | None
    objective: Objective
    chunk_rows: int | None  # of a head; None: by the sizes
    backend: str  # triton or torch
    wanted: tuple[bool, ...]  # of which of the student's tensors gradients are wanted

    @property
    def num_teachers(self) -> int:
        """Teachers that the sums tell of."""
        if isinstance(self.teacher, Routed):
            return self.teacher.num_teachers
        return int(self.teacher is not None)


class Sums(NamedTuple):
    """Sums over rows in the compute dtype, 0-d, the number of rows (int64); of each teacher KL, own CE, rows, CE."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    num_rows: Tensor
    teachers_T4: Tensor


Gradients = tuple[Tensor, ...]  # of the student's tensors, times `grad_scale`; an unwanted one has no elements


def default_chunk_rows(num_rows: int, num_logits: int, logits: Tensor) -> int:
    """Rows a chunk: one chunk's logits of one model take about 128 MiB on a CPU, 256 MiB on a GPU."""
    budget = CHUNK_BYTES_GPU if logits.is_cuda else CHUNK_BYTES_CPU
    fit = max(budget // (logits.element_size() * max(1, num_logits)), 128)
    num_chunks = max(1, -(-num_rows // fit))
    even = -(-num_rows // num_chunks)  # equal chunks: no small last one
    return max(1, min(num_rows, -(-even // 128) * 128))


def compute(problem: Problem) -> tuple[Sums, Gradients]:
    """The sums over rows, on the device, and the wanted gradients."""
    labels_N, weights_N, ignore_index = problem.labels_N, problem.row_weights_N, problem.objective.ignore_index
    num_rows = (labels_N != ignore_index).sum()
    student = _HeadStudent(problem) if isinstance(problem.student, Head) else _LogitsStudent(problem)
    row_loss, step, task = row_functions(problem.backend), student.chunk_rows, _task(problem)
    zero = labels_N.new_zeros((), dtype=compute_dtype(problem.student.tensors[0]))
    total: RowSums | None = None
    told = [zero.expand(4)] * (problem.num_teachers if task.uses_teacher() else 0)
    buffers: dict[tuple[int, int, torch.dtype], Tensor] = {}
    for whole in _groups(problem, task):
        group = _without_ignored(whole, labels_N, ignore_index) if student.drops_ignored else whole
        sums: RowSums | None = None
        for chunk in (slice(start, min(start + step, group.num_rows)) for start in range(0, group.num_rows, step)):
            logits_RV, grad_RV = student.logits(group.rows, chunk)
            labels_R = _slice(labels_N, group.rows, chunk)
            weights_R = None if weights_N is None else _slice(weights_N, group.rows, chunk)
            written: dict[str, Any] = {"row_scale_N": weights_R, "grad_NV": grad_RV}
            if isinstance(group.teacher, Sparse):
                ids_NK, probs_NK = group.teacher.ids_NK, group.teacher.probs_NK
                entries = [_slice(tensor, group.teacher_rows, chunk) for tensor in (ids_NK, probs_NK)]
                terms = row_loss.topk(logits_RV, labels_R, *entries, group.task, **written)
            else:
                teacher_RV = _teacher_logits(group, chunk, buffers, step)
                terms = row_loss.dense(logits_RV, labels_R, teacher_RV, group.task, **written)
            if grad_RV is not None:
                student.gather(group.rows, chunk, grad_RV)
            sums = _added(sums, sum_rows(terms, group.task, weights_R))
        sums = sums or RowSums(*(zero.clone() for _ in RowSums._fields))
        total = _added(total, sums)
        if group.teacher is not None:
            taught = num_rows if whole.rows is None else (labels_N[whole.rows] != ignore_index).sum()
            told[group.number] = torch.stack([sums.kl, sums.teacher_ce, taught.to(zero.dtype), sums.ce])
    assert total is not None  # there is a group, if an empty one
    teachers_T4 = torch.stack(told) if told else zero.new_empty(0, 4)
    return Sums(total.loss, total.ce, total.kl, num_rows, teachers_T4), student.gradients()


def _added(total: RowSums | None, part: RowSums) -> RowSums:
    return part if total is None else RowSums(*(a + b for a, b in zip(total, part, strict=True)))


# --- rows that one teacher, or none, speaks for ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Rows with their teacher; an index of None means all rows in order."""

    num_rows: int
    rows: Tensor | None  # among the student's
    teacher_rows: Tensor | None
    teacher: Head | Logits | Sparse | Average | None
    number: int  # of the teacher
    task: RowTask


def _task(problem: Problem) -> RowTask:
    """The task without what depends on a teacher; a CPU tensor as alpha is read at once, a device tensor never."""
    objective, student = problem.objective, problem.student
    alpha = objective.alpha if problem.teacher is not None else 0.0
    if isinstance(alpha, Tensor):
        alpha = alpha.detach() if alpha.is_cuda else float(alpha)
    given: dict[str, Any] = vars(objective) | {"alpha": alpha}
    cap = student.form.cap if isinstance(student, Head) else None
    return RowTask(**given, grad_scale=grad_scale_for(problem.student.tensors[0].dtype), cap=cap)


def _groups(problem: Problem, task: RowTask) -> Iterator[_Group]:
    teacher, num_rows = problem.teacher, problem.labels_N.shape[0]
    label_only = replace(task, alpha=0.0)
    if teacher is None or not task.uses_teacher():
        yield _Group(num_rows, None, None, None, 0, label_only)
    elif not isinstance(teacher, Routed):
        yield _Group(num_rows, None, None, teacher, 0, _taught_by(teacher, task))
    else:
        free_N = torch.ones(num_rows, dtype=torch.bool, device=problem.labels_N.device)
        for part in teacher.parts:
            yield _Group(len(part.rows_M), part.rows_M, None, part.signal, part.teacher, _taught_by(part.signal, task))
            free_N[part.rows_M] = False
        num_free = num_rows - sum(len(part.rows_M) for part in teacher.parts)  # known without a wait
        if num_free or not teacher.parts:  # these learn from their labels alone
            rows = torch.nonzero_static(free_N, size=num_free)[:, 0] if teacher.parts else None
            yield _Group(num_free, rows, None, None, 0, label_only)


def _taught_by(teacher: Head | Logits | Sparse | Average, task: RowTask) -> RowTask:
    if isinstance(teacher, Sparse):
        return replace(task, semantics=teacher.semantics)
    return replace(task, teacher_cap=teacher.form.cap) if isinstance(teacher, Head) else task


def _without_ignored(group: _Group, labels_N: Tensor, ignore_index: int) -> _Group:
    """The group without ignored rows. On a GPU as it is: counting them would make the host wait."""
    if labels_N.is_cuda:
        return group
    labels_M = labels_N if group.rows is None else labels_N.index_select(0, group.rows)
    keep = (labels_M != ignore_index).nonzero()[:, 0]
    if keep.shape[0] == group.num_rows:
        return group
    rows = keep if group.rows is None else group.rows.index_select(0, keep)
    return replace(group, num_rows=keep.shape[0], rows=rows, teacher_rows=keep)


def _slice(tensor: Tensor, index: Tensor | None, chunk: slice) -> Tensor:
    """Rows `index[chunk]` (a copy) or, without an index, rows `chunk` (a view)."""
    return tensor[chunk] if index is None else tensor.index_select(0, index[chunk])


def _teacher_logits(
    group: _Group, chunk: slice, buffers: dict[tuple[int, int, torch.dtype], Tensor], chunk_rows: int
) -> Tensor | None:
    """What the teacher's rows hold for a chunk: uncapped of a head, an average's logits of several; None: no teacher.

    `buffers` hold one chunk of each head.
    """
    if group.teacher is None or isinstance(group.teacher, Sparse):
        return None
    parts = group.teacher.parts if isinstance(group.teacher, Average) else (group.teacher,)
    logits = []
    for number, part in enumerate(parts):
        if isinstance(part, Logits):
            logits.append(_slice(part.logits_NV, group.teacher_rows, chunk))
            continue
        hidden_RD = _slice(part.hidden_ND, group.teacher_rows, chunk)
        key = (number, part.weight_VD.shape[0], hidden_RD.dtype)
        if key not in buffers:
            buffers[key] = hidden_RD.new_empty(chunk_rows, part.weight_VD.shape[0])
        out_RV = buffers[key][: hidden_RD.shape[0]]
        logits.append(project(hidden_RD, part.weight_VD, part.bias_V, part.form.scale, out=out_RV))
    if not isinstance(group.teacher, Average):
        return logits[0]
    caps = [part.form.cap if isinstance(part, Head) else None for part in parts]
    return mix_teachers(logits, group.teacher.shares, group.task, caps)


# --- the student's side: logits of a chunk, and where their gradient goes -------------------------------------------


class _LogitsStudent:
    """Logits as they are given: all rows at once, nothing to save by dropping some."""

    drops_ignored = False

    def __init__(self, problem: Problem) -> None:
        self.logits_NV = problem.student.tensors[0]
        self.chunk_rows = max(1, self.logits_NV.shape[0])
        (self.wanted,) = problem.wanted
        self.grad_NV = torch.empty_like(self.logits_NV) if self.wanted else self.logits_NV.new_empty(0)

    def logits(self, rows: Tensor | None, chunk: slice) -> tuple[Tensor, Tensor | None]:
        """A chunk's logits, and where to write their gradient."""
        logits_RV = _slice(self.logits_NV, rows, chunk)
        if not self.wanted:
            return logits_RV, None
        return logits_RV, self.grad_NV[chunk] if rows is None else torch.empty_like(logits_RV)

    def gather(self, rows: Tensor | None, chunk: slice, grad_RV: Tensor) -> None:
        """Take a chunk's gradient in."""
        if rows is not None:
            self.grad_NV.index_copy_(0, rows[chunk], grad_RV)

    def gradients(self) -> Gradients:
        return (self.grad_NV,)


class _HeadStudent:
    """Hidden states and a head; holds one chunk's logits, over which their gradient is written."""

    drops_ignored = True

    def __init__(self, problem: Problem) -> None:
        assert isinstance(problem.student, Head)
        self.head = problem.student
        self.wants_hidden, self.wants_weight, self.wants_bias = problem.wanted
        hidden_ND, weight_VD = self.head.hidden_ND, self.head.weight_VD
        num_rows, num_logits = hidden_ND.shape[0], weight_VD.shape[0]
        chunk_rows = problem.chunk_rows or default_chunk_rows(num_rows, num_logits, hidden_ND)
        self.chunk_rows = max(1, min(chunk_rows, num_rows))
        self.buffer_RV = hidden_ND.new_empty(self.chunk_rows, num_logits)
        self.hidden_RD = hidden_ND
        self.started = False
        dtype = compute_dtype(hidden_ND)
        self.grad_hidden_ND = torch.zeros_like(hidden_ND) if self.wants_hidden else hidden_ND.new_empty(0)
        self.grad_weight_VD = weight_VD.new_empty(weight_VD.shape if self.wants_weight else 0, dtype=dtype)
        self.grad_bias_V = weight_VD.new_zeros(num_logits if self.wants_bias else 0, dtype=dtype)

    def logits(self, rows: Tensor | None, chunk: slice) -> tuple[Tensor, Tensor | None]:
        """A chunk's products without their cap, and where to write their gradient."""
        head = self.head
        self.hidden_RD = _slice(head.hidden_ND, rows, chunk)
        out_RV = self.buffer_RV[: self.hidden_RD.shape[0]]
        logits_RV = project(self.hidden_RD, head.weight_VD, head.bias_V, head.form.scale, out=out_RV)
        return logits_RV, logits_RV if self.wants_hidden or self.wants_weight or self.wants_bias else None

    def gather(self, rows: Tensor | None, chunk: slice, grad_RV: Tensor) -> None:
        """Take the gradient of the last chunk's products in."""
        hidden_RD, weight_VD, scale = self.hidden_RD, self.head.weight_VD, self.head.form.scale
        if self.wants_hidden:
            out_RD = self.grad_hidden_ND[chunk] if rows is None else torch.empty_like(hidden_RD)
            torch.addmm(out_RD, grad_RV, weight_VD, beta=0.0, alpha=scale, out=out_RD)
            if rows is not None:
                self.grad_hidden_ND.index_copy_(0, rows[chunk], out_RD)
        if self.wants_weight:
            add_outer(self.grad_weight_VD, grad_RV, hidden_RD, scale, first=not self.started)
            self.started = True
        if self.wants_bias:
            self.grad_bias_V += grad_RV.sum(0, dtype=self.grad_bias_V.dtype)

    def gradients(self) -> Gradients:
        """Those of hidden states, weight and bias."""
        if not self.started:
            self.grad_weight_VD.zero_()
        return self.grad_hidden_ND, self.grad_weight_VD, self.grad_bias_V


class RowFunctions(NamedTuple):
    """The rows of one backend."""

    dense: Callable[..., RowTerms]
    topk: Callable[..., RowTerms]


def row_functions(backend: str) -> RowFunctions:
    """The rows of `backend` ("triton" or "torch"); Triton is imported only when it is used."""
    if backend == "triton":
        from ki_ds.objective import triton_dense, triton_topk

        return RowFunctions(triton_dense.dense_rows, triton_topk.topk_rows)
    return RowFunctions(reference.dense_rows, reference.topk_rows)


def add_outer(total_VD: Tensor, grad_RV: Tensor, hidden_RD: Tensor, scale: float = 1.0, *, first: bool) -> None:
    """total_VD (+)= scale grad_RV^T hidden_RD, summed in the total's dtype; the first time it is overwritten."""
    if grad_RV.dtype == total_VD.dtype:
        torch.addmm(total_VD, grad_RV.t(), hidden_RD, beta=0.0 if first else 1.0, alpha=scale, out=total_VD)
    elif not grad_RV.is_cuda:
        product_VD = grad_RV.t() @ hidden_RD
        (total_VD.zero_() if first else total_VD).add_(product_VD, alpha=scale)
    elif first:  # half-precision factors, a float32 sum: one cuBLAS call, nothing rounded between chunks
        torch.mm(grad_RV.t(), hidden_RD, out_dtype=total_VD.dtype, out=total_VD)
        if scale != 1.0:
            total_VD.mul_(scale)
    else:
        torch.addmm(total_VD, grad_RV.t(), hidden_RD, out_dtype=total_VD.dtype, alpha=scale, out=total_VD)
