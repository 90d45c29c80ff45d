"""Validation perplexity: sums of the student's plain cross-entropy over fixed masks, divided once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch

from ki_ds.data.batches import Batch
from ki_ds.errors import UserError
from ki_ds.objective.types import LossOutput
from ki_ds.ranks.world import all_sum
from ki_ds.reports.metrics import perplexity


@dataclass(frozen=True)
class Perplexity:
    """Cross-entropy in nats summed over `num_rows` labelled rows of all ranks."""

    ce_sum: float
    num_rows: int

    @property
    def ce(self) -> float:
        """Mean cross-entropy in nats."""
        return self.ce_sum / max(self.num_rows, 1)

    @property
    def ppl(self) -> float:
        """exp(ce)."""
        return perplexity(self.ce_sum, self.num_rows)

    @property
    def figures(self) -> dict[str, float]:
        """Sums, and what is made of them, by name."""
        return {"ce_sum": self.ce_sum, "num_rows": self.num_rows, "ce": self.ce, "ppl": self.ppl}

    @classmethod
    def together(cls, parts: Iterable[Self]) -> Self:
        """That of all rows of some parts."""
        parts = list(parts)
        return cls(sum(part.ce_sum for part in parts), sum(part.num_rows for part in parts))


def validate(batches: Iterable[Batch], evaluate: Callable[[Batch], LossOutput], *, device: torch.device) -> Perplexity:
    """The perplexity over all ranks' batches; the same whatever the number of ranks (up to float64 rounding).

    Args:
        batches: this rank's share; every rank must have equally many.
        evaluate: the cross-entropy sums of one batch on the device, without gradient.

    Raises:
        UserError: no row of any batch is labelled.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        out = evaluate(batch.to(device, non_blocking=True))
        sums += torch.stack([out.ce_sum.double(), out.num_rows.double()])
    ce_sum, num_rows = all_sum(sums).tolist()
    if not num_rows:
        raise UserError("the validation set has no labelled row; give it more text, or raise data.mask_probability")
    return Perplexity(ce_sum, int(num_rows))
