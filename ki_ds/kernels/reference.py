"""The rows of the loss in plain PyTorch: the CPU's default, and the yardstick of the kernels.

Rows are worked off in blocks small enough for the CPU's caches, so nothing here is larger than a
few MiB whatever N is, and the gradient may be written over the student's logits.

Shape suffixes: N rows, R rows of one block, V stored logits of a row, C real classes, K teacher entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ki_ds.kernels.rows import RowTask, RowTerms, compute_dtype

BLOCK_ELEMENTS_CPU = 1 << 18
BLOCK_ELEMENTS_GPU = 1 << 26


class _Softmax(NamedTuple):
    """One row-wise softmax: probabilities [R, C] and log-sum-exp [R, 1]."""

    prob: Tensor
    lse: Tensor


class _Block(NamedTuple):
    """What one block of rows knows about its student: probabilities at temperature 1 and tau."""

    plain: _Softmax
    soft: _Softmax | None


def dense_rows(
    student_NV: Tensor,
    labels_N: Tensor,
    teacher_NV: Tensor | None,
    task: RowTask,
    *,
    row_scale_N: Tensor | None = None,
    grad_NV: Tensor | None = None,
) -> RowTerms:
    """Terms of every row against a label and, if given, a teacher's logits.

    With `grad_NV` the gradient of the rows' summed loss, times `row_scale_N` and `task.grad_scale`, is
    written there (it may be `student_NV` itself); columns from `num_classes` on get 0.
    """
    return _in_blocks(student_NV, labels_N, task, row_scale_N, grad_NV, teacher_NV=teacher_NV)


def topk_rows(
    student_NV: Tensor,
    labels_N: Tensor,
    topk_ids_NK: Tensor,
    topk_probs_NK: Tensor,
    task: RowTask,
    *,
    row_scale_N: Tensor | None = None,
    grad_NV: Tensor | None = None,
) -> RowTerms:
    """Terms of every row against a label and a teacher's K entries, read by `task.semantics`.

    Entries whose probability is 0 or whose id is no class are absent. Otherwise as `dense_rows`.
    """
    topk = (topk_ids_NK, topk_probs_NK)
    return _in_blocks(student_NV, labels_N, task, row_scale_N, grad_NV, topk=topk)


def _in_blocks(
    student_NV: Tensor,
    labels_N: Tensor,
    task: RowTask,
    row_scale_N: Tensor | None,
    grad_NV: Tensor | None,
    *,
    teacher_NV: Tensor | None = None,
    topk: tuple[Tensor, Tensor] | None = None,
) -> RowTerms:
    num_rows = student_NV.shape[0]
    has_teacher = task.uses_teacher() and (teacher_NV is not None or topk is not None)
    terms = _empty_terms(student_NV, task, has_teacher)
    budget = BLOCK_ELEMENTS_GPU if student_NV.is_cuda else BLOCK_ELEMENTS_CPU
    block_rows = max(1, budget // max(1, task.num_classes))
    for start in range(0, num_rows, block_rows):
        rows = slice(start, min(start + block_rows, num_rows))
        block = _BlockWork(student_NV[rows], labels_N[rows], task, None if row_scale_N is None else row_scale_N[rows])
        grad_RV = None if grad_NV is None else grad_NV[rows]
        if not has_teacher:
            block.label_only(grad_RV)
        elif teacher_NV is not None:
            block.dense(teacher_NV[rows], grad_RV)
        else:
            assert topk is not None
            block.topk(topk[0][rows], topk[1][rows], grad_RV)
        block.store(terms, rows)
    return terms


def _empty_terms(student_NV: Tensor, task: RowTask, has_teacher: bool) -> RowTerms:
    ce_N = student_NV.new_zeros(student_NV.shape[0], dtype=compute_dtype(student_NV))
    smooth_ce_N = torch.zeros_like(ce_N) if task.label_smoothing else ce_N
    return RowTerms(ce_N, smooth_ce_N, torch.zeros_like(ce_N) if has_teacher else None)


def _softmax(logits_RC: Tensor, tau: float) -> _Softmax:
    """Softmax and log-sum-exp of logits / tau; `logits_RC` is left as it is."""
    peak_R1 = logits_RC.amax(dim=-1, keepdim=True)
    prob = (logits_RC - peak_R1).mul_(1.0 / tau).exp_() if tau != 1.0 else (logits_RC - peak_R1).exp_()
    total_R1 = prob.sum(dim=-1, keepdim=True)
    return _Softmax(prob.mul_(total_R1.reciprocal()), total_R1.log().add_(peak_R1, alpha=1.0 / tau))


class _BlockWork:
    """One block of rows, from logits to terms and gradient."""

    def __init__(self, student_RV: Tensor, labels_R: Tensor, task: RowTask, scale_R: Tensor | None) -> None:
        self.task = task
        self.logits_RC = student_RV[:, : task.num_classes].to(compute_dtype(student_RV))
        keep_R = labels_R != task.ignore_index
        self.keep_R1 = keep_R[:, None]
        self.may_ignore = keep_R.is_cuda or not bool(keep_R.all())  # the host may look at CPU tensors only
        self.label_R1 = torch.where(keep_R, labels_R, 0)[:, None].long()
        self.scale_R1 = None if scale_R is None else scale_R[:, None]
        self.label_logit_R1 = self.logits_RC.gather(1, self.label_R1)
        self.smooth_sum_R1 = self.logits_RC.sum(dim=-1, keepdim=True) if task.label_smoothing else None
        self.lse_R1 = self.kl_R1 = torch.empty(0)

    # -- the three kinds of rows

    def label_only(self, grad_RV: Tensor | None) -> None:
        plain = _softmax(self.logits_RC, 1.0)
        self.lse_R1 = plain.lse
        if grad_RV is not None:
            self._finish(plain.prob, 1.0, grad_RV)

    def dense(self, teacher_RV: Tensor, grad_RV: Tensor | None) -> None:
        task, tau = self.task, self.task.tau
        teacher_RC = teacher_RV[:, : task.num_classes].to(self.logits_RC.dtype)
        if isinstance(task.alpha, Tensor):  # at 0 the teacher must not show, whatever it holds
            teacher_RC = torch.where(task.alpha == 0, self.logits_RC, teacher_RC)
        teacher = _softmax(teacher_RC, tau)
        student = _softmax(self.logits_RC, tau)
        # as one dot product of differences, so that equal logits give exactly 0
        gap_RC = teacher_RC - self.logits_RC
        self.kl_R1 = (gap_RC.mul_(teacher.prob).sum(-1, keepdim=True) / tau) - (teacher.lse - student.lse)
        plain_total_R1 = self._plain_lse(student)
        if grad_RV is None:
            return
        soft_weight = task.alpha * tau
        if tau == 2.0:  # softmax(z) = softmax(z / 2)^2 / sum of it: no second exponential
            grad_RC = student.prob * ((1 - task.alpha) / plain_total_R1)
            grad_RC.add_(soft_weight).mul_(student.prob)
        else:
            grad_RC = (self.logits_RC - self.lse_R1).exp_().mul_(1 - task.alpha)
            grad_RC.add_(student.prob.mul_(soft_weight))
        grad_RC.sub_(teacher.prob.mul_(soft_weight))
        self._finish(grad_RC, 1 - task.alpha, grad_RV)

    def topk(self, ids_RK: Tensor, probs_RK: Tensor, grad_RV: Tensor | None) -> None:
        task, tau = self.task, self.task.tau
        entry = _TopK(self.logits_RC, ids_RK, probs_RK, task)
        self.lse_R1, self.kl_R1 = entry.plain_lse(), entry.kl_R1
        if grad_RV is None:
            return
        # the rest of the vocabulary first (the K entries hold -inf there, so they get 0), then the entries
        plain = (entry.rest_RC - self.lse_R1).exp_().mul_(1 - task.alpha)
        soft = entry.rest_RC.mul_(1.0 / tau).sub_(entry.rest_lse_or_0_R1).exp_()
        grad_RC = plain.add_(soft.mul_(task.alpha * tau * entry.rest_pull_R1))
        entries_RK = (1 - task.alpha) * (entry.logits_RK - self.lse_R1).exp()
        entries_RK = entries_RK + task.alpha * tau * (entry.mass_R1 * entry.student_RK - entry.probs_RK)
        grad_RC.scatter_add_(1, entry.ids_RK, torch.where(entry.present_RK, entries_RK, 0.0))
        self._finish(grad_RC, 1 - task.alpha, grad_RV)

    # -- shared ends

    def _plain_lse(self, student: _Softmax) -> Tensor:
        """Set the log-sum-exp at temperature 1; at tau 2 also return sum softmax(z / 2)^2."""
        if self.task.tau != 2.0:
            self.lse_R1 = torch.logsumexp(self.logits_RC, dim=-1, keepdim=True)
            return self.lse_R1
        total_R1 = torch.linalg.vector_norm(student.prob, dim=-1, keepdim=True).square()
        self.lse_R1 = 2.0 * student.lse + total_R1.log()
        return total_R1

    def _finish(self, grad_RC: Tensor, ce_weight: float | Tensor, grad_RV: Tensor) -> None:
        """Take the label's target off, scale, and write the rows' gradient in its own dtype."""
        task, num_classes = self.task, self.task.num_classes
        on_label: float | Tensor = ce_weight
        if task.label_smoothing:
            on_others = task.label_smoothing / (num_classes - 1)
            grad_RC.sub_(ce_weight * on_others)
            on_label = ce_weight * (1 - task.label_smoothing - on_others)
        grad_RC.scatter_add_(1, self.label_R1, -on_label * torch.ones_like(self.label_logit_R1))
        if self.scale_R1 is not None:
            grad_RC.mul_(self.scale_R1)
        if task.grad_scale != 1.0:
            grad_RC.mul_(task.grad_scale)
        grad_RV[:, :num_classes].copy_(grad_RC)
        if grad_RV.shape[1] > num_classes:
            grad_RV[:, num_classes:] = 0
        if self.may_ignore:
            grad_RV.masked_fill_(~self.keep_R1, 0)

    def store(self, terms: RowTerms, rows: slice) -> None:
        keep_R, task = self.keep_R1[:, 0], self.task
        ce_R1 = self.lse_R1 - self.label_logit_R1
        terms.ce_N[rows] = torch.where(keep_R, ce_R1[:, 0], 0.0)
        if self.smooth_sum_R1 is not None:
            on_others = task.label_smoothing / (task.num_classes - 1)
            others_R1 = (task.num_classes - 1) * self.lse_R1 - (self.smooth_sum_R1 - self.label_logit_R1)
            smooth_R1 = (1 - task.label_smoothing) * ce_R1 + on_others * others_R1
            terms.smooth_ce_N[rows] = torch.where(keep_R, smooth_R1[:, 0], 0.0)
        if terms.kl_N is not None:
            terms.kl_N[rows] = torch.where(keep_R, self.kl_R1[:, 0], 0.0)


class _TopK:
    """A block's K teacher entries next to the student's softmax over all classes.

    With `mass` the target's whole mass, d KL / d (z_v / tau) is mass * p_v - q_v on the entries. Off them
    it is mass * p_v - q_rest * p_v / p_rest ("tail"; q_rest = 0 otherwise), kept as the softmax of the
    rest alone times `rest_pull` = mass * p_rest - q_rest, which stays finite when p_rest underflows.
    """

    def __init__(self, logits_RC: Tensor, ids_RK: Tensor, probs_RK: Tensor, task: RowTask) -> None:
        if isinstance(task.alpha, Tensor):  # at 0 the teacher must not show, whatever it holds
            probs_RK = torch.where(task.alpha == 0, 0.0, probs_RK)
        self.present_RK = (probs_RK > 0) & (ids_RK >= 0) & (ids_RK < task.num_classes)
        self.ids_RK = torch.where(self.present_RK, ids_RK, 0).long()
        self.probs_RK = torch.where(self.present_RK, probs_RK, 0.0).to(logits_RC.dtype)
        if task.semantics == "renormalise":
            self.probs_RK = self.probs_RK / self.probs_RK.sum(-1, keepdim=True).clamp(min=1e-30)
        self.logits_RK = logits_RC.gather(1, self.ids_RK)
        hole = torch.where(self.present_RK, float("-inf"), 0.0).to(logits_RC.dtype)
        self.rest_RC = logits_RC.scatter_add(1, self.ids_RK, hole)
        self.peak_R1 = self.rest_RC.amax(-1, keepdim=True)
        self._compare(task)

    def _compare(self, task: RowTask) -> None:
        """Student against teacher at tau: the KL and what its gradient needs."""
        rest_lse_R1 = self._rest_lse(task.tau)
        soft_lse_R1 = self._all_lse(rest_lse_R1, task.tau)
        log_student_RK = self.logits_RK / task.tau - soft_lse_R1
        self.student_RK = log_student_RK.exp()
        self.mass_R1 = self.probs_RK.sum(-1, keepdim=True)
        log_probs_RK = torch.where(self.present_RK, self.probs_RK, 1.0).log()
        self.kl_R1 = (self.probs_RK * (log_probs_RK - log_student_RK)).sum(-1, keepdim=True)
        has_rest = ~torch.isneginf(rest_lse_R1)
        self.rest_lse_or_0_R1 = torch.where(has_rest, rest_lse_R1, 0.0)
        log_rest_R1 = torch.where(has_rest, rest_lse_R1 - soft_lse_R1, 0.0)
        left_R1 = torch.zeros_like(self.mass_R1)
        if task.semantics == "tail":
            left_R1 = torch.where(has_rest, (1 - self.mass_R1).clamp(min=0.0), 0.0)
            self.kl_R1 = self.kl_R1 + left_R1 * (left_R1.clamp(min=1e-30).log() - log_rest_R1)
            self.mass_R1 = self.mass_R1 + left_R1
        self.rest_pull_R1 = self.mass_R1 * log_rest_R1.exp() - left_R1

    def _rest_lse(self, tau: float) -> Tensor:
        """Log-sum-exp of the classes off the entries: -inf if there are none."""
        peak_R1 = torch.where(torch.isneginf(self.peak_R1), 0.0, self.peak_R1)
        total_R1 = (self.rest_RC - peak_R1).mul_(1.0 / tau).exp_().sum(-1, keepdim=True)
        return total_R1.log() + peak_R1 / tau

    def _all_lse(self, rest_lse_R1: Tensor, tau: float) -> Tensor:
        entries_RK = torch.where(self.present_RK, self.logits_RK / tau, float("-inf"))
        return torch.logaddexp(rest_lse_R1, torch.logsumexp(entries_RK, -1, keepdim=True))

    def plain_lse(self) -> Tensor:
        """Log-sum-exp of all classes at temperature 1."""
        return self._all_lse(self._rest_lse(1.0), 1.0)
