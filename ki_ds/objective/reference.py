"""The rows of the loss in plain PyTorch: the CPU's default, and the yardstick of the kernels.

Rows are worked off in blocks small enough for the CPU's caches, so nothing here is larger than a few MiB
whatever N is, and the gradient may be written over the student's logits. Why it is written as it is:
`torch.softmax` is faster than the exponential alone (it may be less exact in the last digits), so that
log-sum-exps are read off softmaxes; at tau = 2, softmax(z) is softmax(z / 2)^2 over its sum.

Shape suffixes: N rows, R rows of one block, V stored logits of a row, C real classes, K teacher entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ki_ds.objective.rows import RowTask, RowTerms, cap_slope, capped, compute_dtype

BLOCK_ELEMENTS_CPU = 1 << 18  # a thread's share of a block
BLOCK_ELEMENTS_GPU = 1 << 26


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
    has_teacher = teacher_NV is not None and task.uses_teacher()
    terms = _empty_terms(student_NV, task, has_teacher=has_teacher, has_logits=has_teacher)
    for rows in _blocks(student_NV, task):
        block = _Block(student_NV[rows], labels_N[rows], task, _part(row_scale_N, rows), _part(grad_NV, rows))
        if terms.kl_N is None or teacher_NV is None:
            block.label_only()
        else:
            block.dense(teacher_NV[rows])
        block.store(terms, rows)
    return terms


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
    terms = _empty_terms(student_NV, task, has_teacher=True, has_logits=False)
    for rows in _blocks(student_NV, task):
        block = _Block(student_NV[rows], labels_N[rows], task, _part(row_scale_N, rows), _part(grad_NV, rows))
        block.topk(topk_ids_NK[rows], topk_probs_NK[rows])
        block.store(terms, rows)
    return terms


def _blocks(student_NV: Tensor, task: RowTask) -> list[slice]:
    budget = BLOCK_ELEMENTS_GPU if student_NV.is_cuda else BLOCK_ELEMENTS_CPU * torch.get_num_threads()
    step, num_rows = max(1, budget // task.num_classes), student_NV.shape[0]
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _empty_terms(student_NV: Tensor, task: RowTask, *, has_teacher: bool, has_logits: bool) -> RowTerms:
    ce_N = student_NV.new_empty(student_NV.shape[0], dtype=compute_dtype(student_NV))
    smooth_ce_N = torch.empty_like(ce_N) if task.label_smoothing else ce_N
    kl_N = torch.empty_like(ce_N) if has_teacher else None
    teacher_ce_N = torch.empty_like(ce_N) if has_logits else None
    return RowTerms(ce_N, smooth_ce_N, kl_N, teacher_ce_N, torch.empty_like(ce_N) if any(task.added) else None)


class _Softmax(NamedTuple):
    """A softmax of rows: its logits (over tau) and probabilities [R, C], its log-sum-exp [R, 1]."""

    logits: Tensor
    prob: Tensor
    lse: Tensor


def _softmax(logits_RC: Tensor, tau: float) -> _Softmax:
    scaled_RC = logits_RC if tau == 1.0 else logits_RC * (1.0 / tau)
    prob_RC = torch.softmax(scaled_RC, dim=-1)
    # the largest probability is exp(0) / sum, so its logarithm is never that of 0
    return _Softmax(scaled_RC, prob_RC, scaled_RC.amax(-1, keepdim=True) - prob_RC.amax(-1, keepdim=True).log())


def _sum_of_squares(prob_RC: Tensor) -> Tensor:
    return torch.linalg.vector_norm(prob_RC, dim=-1, keepdim=True).square()


class _Block:
    """One block of rows, from logits to terms and gradient."""

    def __init__(
        self, student_RV: Tensor, labels_R: Tensor, task: RowTask, scale_R: Tensor | None, grad_RV: Tensor | None
    ) -> None:
        self.task, self.grad_RV = task, grad_RV
        product_RC = student_RV[:, : task.num_classes].to(compute_dtype(student_RV))
        self.logits_RC = capped(product_RC, task.cap)
        self.slope_RC = None if task.cap is None or grad_RV is None else cap_slope(product_RC, task.cap)
        keep_R = labels_R != task.ignore_index
        # the host may look at CPU tensors only
        self.ignored_R1 = ~keep_R[:, None] if keep_R.is_cuda or not bool(keep_R.all()) else None
        self.label_R1 = labels_R[:, None] if self.ignored_R1 is None else torch.where(keep_R, labels_R, 0)[:, None]
        self.label_R1 = self.label_R1.long()
        self.label_logit_R1 = self.logits_RC.gather(1, self.label_R1)
        self.logit_sum_R1 = self.logits_RC.sum(dim=-1, keepdim=True) if task.label_smoothing else None
        # what every gradient of a row is multiplied by
        self.scale: float | Tensor = task.grad_scale if scale_R is None else scale_R[:, None] * task.grad_scale
        self.lse_R1 = self.kl_R1 = self.teacher_ce_R1 = self.label_logit_R1
        # where the gradient is computed at once if it needs no rounding
        same = grad_RV is not None and grad_RV.dtype == self.logits_RC.dtype
        self.target_RC = grad_RV[:, : task.num_classes] if grad_RV is not None and same else None

    # -- the three kinds of rows

    def label_only(self) -> None:
        plain = _softmax(self.logits_RC, 1.0)
        self.lse_R1 = plain.lse
        if self.grad_RV is not None:
            self._write(torch.mul(plain.prob, self._plain_weight(self.scale), out=self.target_RC), self.scale)

    def dense(self, teacher_RV: Tensor) -> None:
        task = self.task
        teacher_RC = capped(teacher_RV[:, : task.num_classes].to(self.logits_RC.dtype), task.teacher_cap)
        if isinstance(task.alpha, Tensor):  # at 0 the teacher must not show, whatever it holds
            teacher_RC = torch.where(task.alpha == 0, self.logits_RC, teacher_RC)
        teacher, student = _softmax(teacher_RC, task.tau), _softmax(self.logits_RC, task.tau)
        # as one product with the difference, so that equal logits give exactly 0
        gap_RC = teacher.logits.sub_(student.logits) if task.tau != 1.0 else teacher.logits - student.logits
        cross_R1 = torch.linalg.vecdot(teacher.prob, gap_RC)[:, None]
        self.kl_R1 = cross_R1 - (teacher.lse - student.lse)
        self.teacher_ce_R1 = self._plain_lse(teacher, teacher_RC) - teacher_RC.gather(1, self.label_R1)
        plain = None if task.tau == 2.0 else _softmax(self.logits_RC, 1.0)
        squares_R1 = _sum_of_squares(student.prob)
        self.lse_R1 = 2.0 * student.lse + squares_R1.log() if plain is None else plain.lse
        if self.grad_RV is None:
            return
        ce_weight, kl_weight = (1 - task.alpha) * self.scale, task.alpha * task.tau * self.scale
        if plain is None:  # p^2 ce_weight / sum p^2 + p kl_weight
            grad_RC = torch.mul(student.prob, self._plain_weight(ce_weight) / squares_R1, out=gap_RC)
            grad_RC.add_(kl_weight).mul_(student.prob)
        else:
            grad_RC = plain.prob.mul_(self._plain_weight(ce_weight)).add_(student.prob.mul_(kl_weight))
        self._write(torch.sub(grad_RC, teacher.prob.mul_(kl_weight), out=self.target_RC), ce_weight)

    def topk(self, ids_RK: Tensor, probs_RK: Tensor) -> None:
        task = self.task
        entry = _TopK(self.logits_RC, ids_RK, probs_RK, task)
        self.lse_R1, self.kl_R1 = entry.plain_lse_R1, entry.kl_R1
        if self.grad_RV is None:
            return
        ce_weight, kl_weight = (1 - task.alpha) * self.scale, task.alpha * task.tau * self.scale
        plain_weight = self._plain_weight(ce_weight)
        grad_RC = entry.rest_gradient(plain_weight, kl_weight)  # 0 on the entries
        entries_RK = plain_weight * (entry.logits_RK - self.lse_R1).exp()
        entries_RK = entries_RK + kl_weight * (entry.mass_R1 * entry.student_RK - entry.probs_RK)
        grad_RC.scatter_add_(1, entry.ids_RK, torch.where(entry.present_RK, entries_RK, 0.0))
        self._write(grad_RC, ce_weight)

    def _plain_weight(self, ce_weight: float | Tensor) -> float | Tensor:
        """What the softmax at 1 is multiplied by in the gradient: the cross-entropy's weight and 2 z_weight lse."""
        if not self.task.z_weight:
            return ce_weight
        return ce_weight + 2.0 * self.task.z_weight * self.scale * self.lse_R1

    def _plain_lse(self, soft: _Softmax, logits_RC: Tensor) -> Tensor:
        """The log-sum-exp at 1 of logits whose softmax at tau is known."""
        if self.task.tau == 2.0:
            return 2.0 * soft.lse + _sum_of_squares(soft.prob).log()
        return soft.lse if self.task.tau == 1.0 else _softmax(logits_RC, 1.0).lse

    # -- shared ends

    def _write(self, grad_RC: Tensor, ce_weight: float | Tensor) -> None:
        """Take the label's target off and write the rows' gradient in its own dtype."""
        task, num_classes, grad_RV = self.task, self.task.num_classes, self.grad_RV
        assert grad_RV is not None
        on_label: float | Tensor = ce_weight
        if task.label_smoothing:
            on_others = task.label_smoothing / (num_classes - 1)
            grad_RC.sub_(ce_weight * on_others)
            on_label = ce_weight * (1 - task.label_smoothing - on_others)
        grad_RC.scatter_add_(1, self.label_R1, -on_label * torch.ones_like(self.label_logit_R1))
        if self.slope_RC is not None:
            grad_RC.mul_(self.slope_RC)
        if grad_RC is not self.target_RC:
            grad_RV[:, :num_classes].copy_(grad_RC)
        if grad_RV.shape[1] > num_classes:
            grad_RV[:, num_classes:] = 0
        if self.ignored_R1 is not None:
            grad_RV.masked_fill_(self.ignored_R1, 0)

    def store(self, terms: RowTerms, rows: slice) -> None:
        """Put the block's terms where they belong, 0 for ignored rows."""
        task = self.task
        ce_R1 = self.lse_R1 - self.label_logit_R1
        terms.ce_N[rows] = self._kept(ce_R1)
        if self.logit_sum_R1 is not None:
            on_others = task.label_smoothing / (task.num_classes - 1)
            others_R1 = (task.num_classes - 1) * self.lse_R1 - (self.logit_sum_R1 - self.label_logit_R1)
            terms.smooth_ce_N[rows] = self._kept((1 - task.label_smoothing) * ce_R1 + on_others * others_R1)
        if terms.kl_N is not None:
            terms.kl_N[rows] = self._kept(self.kl_R1)
        if terms.added_N is not None:
            terms.added_N[rows] = self._kept(task.z_weight * self.lse_R1.square())
        if terms.teacher_ce_N is not None:
            terms.teacher_ce_N[rows] = self._kept(self.teacher_ce_R1)

    def _kept(self, term_R1: Tensor) -> Tensor:
        return (term_R1 if self.ignored_R1 is None else term_R1.masked_fill(self.ignored_R1, 0.0))[:, 0]


class _TopK:
    """A block's K teacher entries next to the student's softmax over all classes.

    The student is kept as K entries and a softmax of the rest alone. With `mass` the target's whole mass,
    d KL / d (z_v / tau) is mass * p_v - q_v on the entries; off them it is the rest's softmax times
    mass * p_rest - q_rest, where q_rest = 0 but for "tail". This stays finite when p_rest underflows.
    """

    def __init__(self, logits_RC: Tensor, ids_RK: Tensor, probs_RK: Tensor, task: RowTask) -> None:
        self.task = task
        if isinstance(task.alpha, Tensor):  # at 0 the teacher must not show, whatever it holds
            probs_RK = torch.where(task.alpha == 0, 0.0, probs_RK)
        self.present_RK = (probs_RK > 0) & (ids_RK >= 0) & (ids_RK < task.num_classes)
        self.ids_RK = torch.where(self.present_RK, ids_RK, 0).long()
        self.probs_RK = torch.where(self.present_RK, probs_RK, 0.0).to(logits_RC.dtype)
        if task.semantics == "renormalise":
            self.probs_RK = self.probs_RK / self.probs_RK.sum(-1, keepdim=True).clamp(min=1e-30)
        self.logits_RK = logits_RC.gather(1, self.ids_RK)
        hole_RK = torch.where(self.present_RK, float("-inf"), 0.0).to(logits_RC.dtype)
        rest_RC = logits_RC.scatter_add(1, self.ids_RK, hole_RK)
        self.rest = self._softmax_of_rest(rest_RC, task.tau)
        self.squares_R1 = _sum_of_squares(self.rest.prob)
        self.plain_rest = self._softmax_of_rest(rest_RC, 1.0) if task.tau != 2.0 else None
        plain_rest_lse_R1 = (
            2.0 * self.rest.lse + self.squares_R1.log() if self.plain_rest is None else self.plain_rest.lse
        )
        self.plain_lse_R1 = self._lse_of_all(plain_rest_lse_R1, 1.0)
        self.soft_lse_R1 = self._lse_of_all(self.rest.lse, task.tau)
        self.plain_rest_prob_R1 = (plain_rest_lse_R1 - self.plain_lse_R1).exp()
        self._compare()

    def _softmax_of_rest(self, rest_RC: Tensor, tau: float) -> _Softmax:
        rest = _softmax(rest_RC, tau)
        if self.ids_RK.shape[1] < rest_RC.shape[1]:
            return rest
        # K covers all classes: a rest may be empty, a softmax of nothing
        empty_R1 = torch.isneginf(rest.logits.amax(-1, keepdim=True))
        return _Softmax(
            rest.logits, rest.prob.masked_fill(empty_R1, 0.0), rest.lse.masked_fill(empty_R1, float("-inf"))
        )

    def _lse_of_all(self, rest_lse_R1: Tensor, tau: float) -> Tensor:
        entries_RK = torch.where(self.present_RK, self.logits_RK / tau, float("-inf"))
        return torch.logaddexp(rest_lse_R1, torch.logsumexp(entries_RK, -1, keepdim=True))

    def _compare(self) -> None:
        """Student against teacher at tau: the KL, the target's mass, and the pull on the rest."""
        log_student_RK = self.logits_RK / self.task.tau - self.soft_lse_R1
        self.student_RK = log_student_RK.exp()
        self.mass_R1 = self.probs_RK.sum(-1, keepdim=True)
        log_probs_RK = torch.where(self.present_RK, self.probs_RK, 1.0).log()
        self.kl_R1 = (self.probs_RK * (log_probs_RK - log_student_RK)).sum(-1, keepdim=True)
        log_rest_R1 = self.rest.lse - self.soft_lse_R1
        left_R1 = torch.zeros_like(self.mass_R1)
        if self.task.semantics == "tail":
            has_rest = ~torch.isneginf(log_rest_R1)
            left_R1 = torch.where(has_rest, (1 - self.mass_R1).clamp(min=0.0), 0.0)
            log_left_R1 = left_R1.clamp(min=1e-30).log()
            self.kl_R1 = self.kl_R1 + left_R1 * (log_left_R1 - torch.where(has_rest, log_rest_R1, 0.0))
            self.mass_R1 = self.mass_R1 + left_R1
        self.pull_R1 = self.mass_R1 * log_rest_R1.exp() - left_R1

    def rest_gradient(self, ce_weight: float | Tensor, kl_weight: float | Tensor) -> Tensor:
        """d loss / d z off the entries [R, C], without the label's target; 0 on the entries."""
        pull_R1, plain_R1 = kl_weight * self.pull_R1, ce_weight * self.plain_rest_prob_R1
        if self.plain_rest is not None:
            return self.plain_rest.prob.mul_(plain_R1).add_(self.rest.prob.mul_(pull_R1))
        at_least = torch.finfo(self.squares_R1.dtype).tiny  # an empty rest has no squares
        grad_RC = torch.mul(self.rest.prob, plain_R1 / self.squares_R1.clamp(min=at_least), out=self.rest.logits)
        return grad_RC.add_(pull_R1).mul_(self.rest.prob)
