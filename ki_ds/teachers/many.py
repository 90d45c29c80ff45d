"""Several teachers as one: each teaches the rows of its domains (Table 3), or all of them every row, averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ki_ds.config import TeacherEntry
from ki_ds.data.batches import Batch
from ki_ds.objective.types import Average, Head, Part, Routed, Signal, Sparse
from ki_ds.teachers.teacher import Teacher


@dataclass(frozen=True)
class Question:
    """What one of several teachers is asked about a batch: the part of it that has its rows."""

    teacher: int
    batch: Batch  # the whole one where it is, or a part of it in the host's memory
    rows_M: Tensor | None  # numbers of its rows among the batch's; None is all of them, in order


@dataclass(frozen=True)
class Assignment:
    """Which of a run's teachers speaks for which rows: by domain ids, or by shares for all of them."""

    domain_ids: tuple[frozenset[int], ...] | None
    shares: tuple[float, ...]

    @classmethod
    def of(cls, entries: Sequence[TeacherEntry], domains: Sequence[str]) -> Assignment:
        """That of checked entries (`check_entries`); `domains` are the names behind the domain ids."""
        shares = tuple(1.0 if entry.share is None else entry.share for entry in entries)
        if not entries or entries[0].domains is None:
            return cls(None, shares)
        ids = (frozenset(domains.index(name) for name in entry.domains or ()) for entry in entries)
        return cls(tuple(ids), shares)

    def of_teacher(self, number: int) -> frozenset[int] | None:
        """The domains that a teacher speaks for; None is all."""
        return None if self.domain_ids is None else self.domain_ids[number]

    def questions(self, batch: Batch) -> list[Question]:
        """What each teacher is asked, in their order; a teacher without rows in the batch is not. No wait."""
        if self.domain_ids is None:
            return [Question(number, batch, None) for number in range(len(self.shares))]
        return list(self._routed(batch))

    def _routed(self, batch: Batch) -> Iterator[Question]:
        assert self.domain_ids is not None
        host, device = batch.host or batch, batch.rows_N.device
        domain_ids_B = host.domain_ids_B.numpy()
        for number, mine in enumerate(self.domain_ids):
            sequences = np.flatnonzero(np.isin(domain_ids_B, sorted(mine)))
            if len(sequences) == len(domain_ids_B):
                yield Question(number, batch, torch.arange(batch.num_rows, device=device))
            elif len(sequences):
                part, rows_M = host.select(sequences)
                if part.num_rows:
                    yield Question(number, part, rows_M.to(device, non_blocking=True))

    def joined(self, questions: Sequence[Question], answers: Sequence[Signal]) -> Signal:
        """The answers to `questions` as one signal for the batch; of an only teacher its own."""
        if self.domain_ids is not None:
            parts = []
            for question, answer in zip(questions, answers, strict=True):
                assert isinstance(answer, Head | Sparse)
                assert question.rows_M is not None
                parts.append(Part(question.teacher, answer, question.rows_M, question.batch.num_tokens))
            return Routed(tuple(parts), len(self.domain_ids))
        if len(answers) == 1:
            return answers[0]
        hidden = tuple(answer for answer in answers if isinstance(answer, Head))
        assert len(hidden) == len(self.shares)
        return Average(hidden, self.shares)


def hidden_answers(signal: Signal) -> list[tuple[int, Head]]:
    """(number, signal) of each teacher that gave hidden states, in their order."""
    match signal:
        case Head():
            return [(0, signal)]
        case Average(parts, _):
            return list(enumerate(parts))
        case Routed(parts, _):
            return [(part.teacher, part.signal) for part in parts if isinstance(part.signal, Head)]
    return []


class ManyTeachers(Teacher):
    """Asks each of several teachers about its part of a batch."""

    def __init__(self, teachers: Sequence[Teacher], assignment: Assignment) -> None:
        self._teachers, self._assignment = list(teachers), assignment

    def signal(self, batch: Batch) -> Signal:
        """The teachers' signals, each for its rows."""
        assert self._teachers, "freed teachers were asked"
        questions, device = self._assignment.questions(batch), batch.rows_N.device
        answers = [
            self._teachers[question.teacher].signal(question.batch.to(device, non_blocking=True))
            for question in questions
        ]
        return self._assignment.joined(questions, answers)

    def free(self) -> None:
        """Give the memory of every teacher back."""
        for teacher in self._teachers:
            teacher.free()
        self._teachers = []
