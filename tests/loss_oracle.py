"""The objective once more, for tests: float64, row by row, gradients by autograd; shares no code with the package."""

from dataclasses import dataclass, field

import torch


@dataclass
class Oracle:
    """Sums of rows against dense probabilities; `dense_rows` etc. return (loss_sum, ce_sum, kl_sum, num_rows)."""

    alpha: float = 0.0
    tau: float = 2.0
    num_classes: int | None = None
    smoothing: float = 0.0
    ignore_index: int = -100
    weights: list[float] | None = None
    terms: list = field(default_factory=list)

    def target(self, teacher_row):
        z = teacher_row.detach().double()[: self.num_classes] / self.tau
        e = (z - z.max()).exp()
        return e / e.sum()

    def dense(self, student, labels, teacher=None):
        targets = None if teacher is None else [self.target(row) for row in teacher]
        return self.against(student, labels, targets, lambda q, p: torch.xlogy(q, q).sum() - (q * p.log()).sum())

    def topk(self, student, labels, ids, probs, semantics):
        targets = list(zip(ids.tolist(), probs.double().tolist(), strict=True))
        return self.against(student, labels, targets, lambda q, p: self.sparse_kl(q, p, semantics))

    def sparse_kl(self, entries, p, semantics):
        pairs = [(i, q) for i, q in zip(*entries, strict=True) if q > 0 and 0 <= i < len(p)]
        total = sum(q for _, q in pairs)
        if semantics == "renormalise":
            pairs = [(i, q / total) for i, q in pairs]
        kl = sum((q * (torch.tensor(q).double().log() - p[i].log()) for i, q in pairs), p.sum() * 0)
        rest = [v for v in range(len(p)) if v not in {i for i, _ in pairs}]
        if semantics == "tail" and rest and total < 1:
            kl = kl + (1 - total) * (torch.tensor(1 - total).double().log() - p[rest].sum().log())
        return kl

    def against(self, student, labels, targets, divergence):
        loss = ce_sum = kl_sum = student.double().sum() * 0
        count = 0
        for r, label in enumerate(labels.tolist()):
            if label == self.ignore_index:
                continue
            z = student[r].double()[: self.num_classes]
            log_p = z - torch.logsumexp(z, 0)
            width = len(z)
            aim = torch.full((width,), self.smoothing / max(width - 1, 1), dtype=torch.float64)
            aim[label] = 1 - self.smoothing
            kl = z.sum() * 0
            if targets is not None and self.alpha:
                soft = z / self.tau
                kl = divergence(targets[r], (soft - torch.logsumexp(soft, 0)).exp().clamp(min=1e-300))
            weight = 1.0 if self.weights is None else self.weights[r]
            loss = loss + weight * ((1 - self.alpha) * -(aim * log_p).sum() + self.alpha * self.tau**2 * kl)
            ce_sum, kl_sum, count = ce_sum - log_p[label], kl_sum + kl, count + 1
        return loss, ce_sum, kl_sum, count
