"""The protocol of everything that says something about a batch's labelled rows."""

from __future__ import annotations

from typing import Protocol

from ki_ds.data.batches import Batch
from ki_ds.objective.types import Average, Routed, Signal


class Teacher(Protocol):
    """A frozen teacher. It is never trained, and never consulted once alpha is 0."""

    def ask(self, batch: Batch) -> None:
        """Announce the next batch, in the host's memory: one that answers ahead begins now. The others do nothing."""
        return

    def signal(self, batch: Batch) -> Signal:
        """What the teacher says about the labelled rows of exactly this (masked) batch."""
        ...

    def figures(self) -> dict[str, float]:
        """What the metrics say of its work, by name; nothing where the student's own figures say it all."""
        return {}

    def free(self) -> None:
        """Give all of the teacher's memory back; `signal` must not be called again."""
        ...


def teacher_tokens(signal: Signal | None, batch: Batch) -> list[int]:
    """Tokens of the batch that each of the run's teachers saw; nothing without a signal."""
    match signal:
        case None:
            return []
        case Routed(parts, num_teachers):
            tokens = [0] * num_teachers
            for part in parts:
                tokens[part.teacher] = part.num_tokens
            return tokens
        case Average(parts):
            return [batch.num_tokens] * len(parts)
    return [batch.num_tokens]
