"""The objective once more, for tests: float64, row by row, gradients by autograd; shares no code with the package."""

from dataclasses import dataclass

import torch

ADDED = ({"z_weight": 0.3},)  # terms that are added to a row's loss, with weights to test them at


@dataclass
class Oracle:
    """Sums over rows: every method returns (loss_sum, ce_sum, kl_sum, num_rows), differentiable in the student."""

    alpha: float = 0.0
    tau: float = 2.0
    num_classes: int | None = None
    smoothing: float = 0.0
    z_weight: float = 0.0
    ignore_index: int = -100
    weights: list[float] | None = None

    def target(self, teacher_row):
        z = teacher_row.detach().double()[: self.num_classes] / self.tau
        e = (z - z.max()).exp()
        return e / e.sum()

    def labels_only(self, student, labels):
        return self._sum(student, labels, [None] * len(labels), None)

    def dense(self, student, labels, teacher):
        return self.mixed(student, labels, [self.target(row) for row in teacher])

    def mixed(self, student, labels, targets):
        """`targets` holds a row's teacher probabilities, or None where the row has no teacher."""
        return self._sum(
            student, labels, targets, lambda q, log_p: torch.xlogy(q, q).sum() - torch.where(q > 0, q * log_p, 0).sum()
        )

    def topk(self, student, labels, ids, probs, semantics):
        targets = list(zip(ids.tolist(), probs.double().tolist(), strict=True))
        return self._sum(student, labels, targets, lambda q, log_p: self._sparse_kl(q, log_p, semantics))

    def _sparse_kl(self, entries, log_p, semantics):
        pairs = [(i, q) for i, q in zip(*entries, strict=True) if q > 0 and 0 <= i < len(log_p)]
        total = sum(q for _, q in pairs)
        if semantics == "renormalise":
            pairs = [(i, q / total) for i, q in pairs]
        kl = sum((q * (torch.tensor(q).double().log() - log_p[i]) for i, q in pairs), log_p[0] * 0)
        rest = sorted(set(range(len(log_p))) - {i for i, _ in pairs})
        if semantics == "tail" and rest and total < 1:
            kl = kl + (1 - total) * (torch.tensor(1 - total).double().log() - torch.logsumexp(log_p[rest], 0))
        return kl

    def _sum(self, student, labels, targets, divergence):
        loss = ce_sum = kl_sum = student.double().sum() * 0
        count = 0
        for r, label in enumerate(labels.tolist()):
            if label == self.ignore_index:
                continue
            z = student[r].double()[: self.num_classes]
            log_p = z - torch.logsumexp(z, 0)
            aim = torch.full((len(z),), self.smoothing / max(len(z) - 1, 1), dtype=torch.float64, device=z.device)
            aim[label] = 1 - self.smoothing
            alpha, kl = (self.alpha, z[0] * 0) if targets[r] is not None else (0.0, z[0] * 0)
            if alpha:
                soft = z / self.tau
                kl = divergence(targets[r], soft - torch.logsumexp(soft, 0))
            weight = 1.0 if self.weights is None else self.weights[r]
            loss = loss + weight * self.z_weight * torch.logsumexp(z, 0) ** 2
            loss = loss + weight * ((1 - alpha) * -(aim * log_p).sum() + alpha * self.tau**2 * kl)
            ce_sum, kl_sum, count = ce_sum - log_p[label], kl_sum + kl, count + 1
        return loss, ce_sum, kl_sum, count
