"""From hidden states to loss and gradients in chunks of rows: GEMMs around the rows of the loss.

Of either model's logits only one chunk exists. The gradients of hidden states, weight and bias are made
together with the loss, because every chunk's logits are gone afterwards; the weight's is summed in float32.

Shape suffixes: N rows, R rows of a chunk, M rows of one teacher, V rows of a head's weight (logits), D hidden.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ki_ds.objective import reference
from ki_ds.objective.rows import (
    PLAIN,
    LogitForm,
    LossSums,
    RowTask,
    RowTerms,
    compute_dtype,
    mix_teachers,
    project,
    sum_rows,
    teacher_row,
)

CHUNK_BYTES_CPU = 1 << 27
CHUNK_BYTES_GPU = 1 << 28


class Head(NamedTuple):
    """A teacher's hidden states and output projection; row i of `hidden_MD` belongs to student row `rows_M[i]`."""

    hidden_MD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    rows_M: Tensor | None
    form: LogitForm = PLAIN


class Wanted(NamedTuple):
    """Whose gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of the summed loss times `grad_scale`; an unwanted one has no elements."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor


@dataclass(frozen=True)
class Problem:
    """Everything `linear_rows` needs; tensors of the student first."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    form: LogitForm
    labels_N: Tensor
    row_weights_N: Tensor | None
    heads: list[Head]
    shares: list[float]  # empty: each head teaches its own rows; else all rows by the shares' average
    topk: tuple[Tensor, Tensor] | None
    task: RowTask
    chunk_rows: int
    backend: str


def default_chunk_rows(num_rows: int, num_logits: int, logits: Tensor) -> int:
    """Rows a chunk: one chunk's logits of one model take about 128 MiB on a CPU, 256 MiB on a GPU."""
    budget = CHUNK_BYTES_GPU if logits.is_cuda else CHUNK_BYTES_CPU
    fit = max(budget // (logits.element_size() * max(1, num_logits)), 128)
    num_chunks = max(1, -(-num_rows // fit))
    even = -(-num_rows // num_chunks)  # equal chunks: no small last one
    return max(1, min(num_rows, -(-even // 128) * 128))


class LinearSums(NamedTuple):
    """Sums over rows in the compute dtype, the number of rows (int64); for each teacher its `teacher_row`."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    num_rows: Tensor
    teachers_T4: Tensor


def linear_rows(problem: Problem, wanted: Wanted) -> tuple[LinearSums, Gradients]:
    """The sums over rows, on the device, and the wanted gradients."""
    labels_N, ignore_index = problem.labels_N, problem.task.ignore_index
    num_rows = (labels_N != ignore_index).sum()
    worker = _Worker(problem, wanted)
    totals, teachers = [], []
    for all_rows in _groups(problem):
        group = _without_ignored(all_rows, labels_N, ignore_index)
        sums = _add_up(worker.chunks(group), like=problem.hidden_ND)
        totals.append(sums)
        if group.heads or group.topk is not None:
            taught = num_rows if all_rows.rows is None else (labels_N[all_rows.rows] != ignore_index).sum()
            teachers.append(teacher_row(sums, taught))
    total = _add_up(totals, like=problem.hidden_ND)
    teachers_T4 = torch.stack(teachers) if teachers else total.kl.new_empty(0, 4)
    return LinearSums(total.loss, total.ce, total.kl, num_rows, teachers_T4), worker.gradients()


def _add_up(parts: Iterable[LossSums], *, like: Tensor) -> LossSums:
    total: LossSums | None = None
    for part in parts:
        total = part if total is None else LossSums(*(a + b for a, b in zip(total, part, strict=True)))
    return total or LossSums(*(like.new_zeros((), dtype=compute_dtype(like)) for _ in range(4)))


@dataclass(frozen=True)
class _Group:
    """Rows that one set of teachers speaks for; an index of None means all rows in order."""

    num_rows: int
    rows: Tensor | None
    teacher_rows: Tensor | None
    heads: list[Head]
    topk: tuple[Tensor, Tensor] | None
    task: RowTask


def _groups(problem: Problem) -> Iterator[_Group]:
    num_rows, task = problem.hidden_ND.shape[0], replace(problem.task, cap=problem.form.cap)
    routed = [head for head in problem.heads if head.rows_M is not None]
    if not task.uses_teacher():
        yield _Group(num_rows, None, None, [], None, task)
    elif not routed:
        # an average is made of capped logits
        only = problem.heads[0].form.cap if len(problem.heads) == 1 else None
        yield _Group(num_rows, None, None, problem.heads, problem.topk, replace(task, teacher_cap=only))
    else:
        for head in routed:
            own = replace(task, teacher_cap=head.form.cap)
            yield _Group(head.hidden_MD.shape[0], head.rows_M, None, [head], None, own)
        num_taught = sum(head.hidden_MD.shape[0] for head in routed)
        if num_taught < num_rows:  # the others learn from their labels alone
            rows = _untaught(problem, routed, num_rows - num_taught)
            yield _Group(rows.shape[0], rows, None, [], None, replace(task, alpha=0.0))


def _untaught(problem: Problem, routed: list[Head], num_untaught: int) -> Tensor:
    untaught_N = torch.ones(problem.hidden_ND.shape[0], dtype=torch.bool, device=problem.labels_N.device)
    for head in routed:
        untaught_N[head.rows_M] = False
    return torch.nonzero_static(untaught_N, size=num_untaught)[:, 0]


def _without_ignored(group: _Group, labels_N: Tensor, ignore_index: int) -> _Group:
    """The group without ignored rows. On a GPU as it is: counting them would make the host wait."""
    if labels_N.is_cuda:
        return group
    keep = (_take(labels_N, group.rows) != ignore_index).nonzero()[:, 0]
    if keep.shape[0] == group.num_rows:
        return group
    return replace(group, num_rows=keep.shape[0], rows=_take(group.rows, keep, or_index=keep), teacher_rows=keep)


def _take(tensor: Tensor | None, rows: Tensor | None, *, or_index: Tensor | None = None) -> Tensor:
    if tensor is None:
        assert or_index is not None
        return or_index
    return tensor if rows is None else tensor.index_select(0, rows)


def _slice(tensor: Tensor, index: Tensor | None, chunk: slice) -> Tensor:
    """Rows `index[chunk]` (a copy) or, without an index, rows `chunk` (a view)."""
    return tensor[chunk] if index is None else tensor.index_select(0, index[chunk])


class _Worker:
    """Runs chunks and gathers gradients; holds one chunk's logits of each model at most."""

    def __init__(self, problem: Problem, wanted: Wanted) -> None:
        self.problem, self.wanted = problem, wanted
        hidden_ND, weight_VD = problem.hidden_ND, problem.weight_VD
        self.rows = row_functions(problem.backend)
        self.needs_grad = any(wanted)
        self.logits = hidden_ND.new_empty(min(problem.chunk_rows, hidden_ND.shape[0]), weight_VD.shape[0])
        self.teacher_logits: dict[tuple[int, torch.dtype], Tensor] = {}
        self.started = False
        dtype = compute_dtype(hidden_ND)
        self.grad_hidden_ND = torch.zeros_like(hidden_ND) if wanted.hidden else hidden_ND.new_empty(0)
        self.grad_weight_VD = weight_VD.new_empty(weight_VD.shape if wanted.weight else 0, dtype=dtype)
        self.grad_bias_V = weight_VD.new_zeros(weight_VD.shape[0] if wanted.bias else 0, dtype=dtype)

    def chunks(self, group: _Group) -> Iterator[LossSums]:
        """Work off the group's rows; the sums of one chunk after another."""
        for start in range(0, group.num_rows, self.problem.chunk_rows):
            yield self.chunk(group, slice(start, min(start + self.problem.chunk_rows, group.num_rows)))

    def chunk(self, group: _Group, chunk: slice) -> LossSums:
        """Add one chunk's gradients; its sums are returned."""
        problem = self.problem
        hidden_RD = _slice(problem.hidden_ND, group.rows, chunk)
        labels_R = _slice(problem.labels_N, group.rows, chunk)
        weights_R = None if problem.row_weights_N is None else _slice(problem.row_weights_N, group.rows, chunk)
        out_RV = self.logits[: hidden_RD.shape[0]]
        logits_RV = project(hidden_RD, problem.weight_VD, problem.bias_V, problem.form.scale, out=out_RV)
        grad_RV = logits_RV if self.needs_grad else None
        terms = self._terms(group, chunk, logits_RV, labels_R, weights_R, grad_RV)
        if grad_RV is not None:
            self._gather(group, chunk, hidden_RD, grad_RV)
        return sum_rows(terms, group.task, weights_R)

    def _terms(
        self,
        group: _Group,
        chunk: slice,
        logits_RV: Tensor,
        labels_R: Tensor,
        weights_R: Tensor | None,
        grad_RV: Tensor | None,
    ) -> RowTerms:
        if group.topk is not None:
            ids_RK, probs_RK = (_slice(t, group.teacher_rows, chunk) for t in group.topk)
            return self.rows.topk(
                logits_RV, labels_R, ids_RK, probs_RK, group.task, row_scale_N=weights_R, grad_NV=grad_RV
            )
        teacher_RV = self._teacher(group, chunk)
        return self.rows.dense(logits_RV, labels_R, teacher_RV, group.task, row_scale_N=weights_R, grad_NV=grad_RV)

    def _teacher(self, group: _Group, chunk: slice) -> Tensor | None:
        logits = []
        for number, head in enumerate(group.heads):
            hidden_RD = _slice(head.hidden_MD, group.teacher_rows, chunk)
            key = (number, hidden_RD.dtype)
            shape = (self.logits.shape[0], head.weight_VD.shape[0])
            if key not in self.teacher_logits or self.teacher_logits[key].shape != shape:
                self.teacher_logits[key] = hidden_RD.new_empty(shape)
            buffer = self.teacher_logits[key][: hidden_RD.shape[0]]
            logits.append(project(hidden_RD, head.weight_VD, head.bias_V, head.form.scale, out=buffer))
        if not logits:
            return None
        if len(logits) == 1:
            return logits[0]
        return mix_teachers(logits, self.problem.shares, group.task, [head.form.cap for head in group.heads])

    def _gather(self, group: _Group, chunk: slice, hidden_RD: Tensor, grad_RV: Tensor) -> None:
        wanted, weight_VD, scale = self.wanted, self.problem.weight_VD, self.problem.form.scale
        if wanted.hidden:
            rows = group.rows
            out_RD = self.grad_hidden_ND[chunk] if rows is None else torch.empty_like(hidden_RD)
            torch.addmm(out_RD, grad_RV, weight_VD, beta=0.0, alpha=scale, out=out_RD)
            if rows is not None:
                self.grad_hidden_ND.index_copy_(0, rows[chunk], out_RD)
        if wanted.weight:
            add_outer(self.grad_weight_VD, grad_RV, hidden_RD, scale, first=not self.started)
            self.started = True
        if wanted.bias:
            self.grad_bias_V += grad_RV.sum(0, dtype=self.grad_bias_V.dtype)

    def gradients(self) -> Gradients:
        if not self.started:
            self.grad_weight_VD.zero_()
        return Gradients(self.grad_hidden_ND, self.grad_weight_VD, self.grad_bias_V)


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
    elif grad_RV.is_cuda:
        _add_outer_mixed(total_VD, grad_RV, hidden_RD, scale, first)
    else:
        product_VD = grad_RV.t() @ hidden_RD
        (total_VD.zero_() if first else total_VD).add_(product_VD, alpha=scale)


def _add_outer_mixed(total_VD: Tensor, grad_RV: Tensor, hidden_RD: Tensor, scale: float, first: bool) -> None:
    """Half-precision factors, float32 sum: one cuBLAS call, nothing rounded between chunks."""
    if first:
        torch.mm(grad_RV.t(), hidden_RD, out_dtype=total_VD.dtype, out=total_VD)
        if scale != 1.0:
            total_VD.mul_(scale)
    else:
        torch.addmm(total_VD, grad_RV.t(), hidden_RD, out_dtype=total_VD.dtype, alpha=scale, out=total_VD)
