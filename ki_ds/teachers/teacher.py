"""The protocol of everything that says something about a batch's labelled rows, and several of them as one.

Each of several teachers teaches the rows of its domains (Table 3), or all of them every row, averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ki_ds.checkpoints.lineage import Lineage
from ki_ds.config import TeacherEntry
from ki_ds.data.batches import Batch
from ki_ds.objective.types import Average, Head, Part, Routed, Signal, Sparse


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


@dataclass(frozen=True)
class TeacherFacts:
    """What a run's manifest says about a teacher."""

    path: str
    weights_sha256: str | None
    num_parameters: int
    dense_parameters: int
    tokenizer_checked: bool
    valid_ppl: float | None  # of a run of ours, on its own validation set
    lineage: Lineage | None  # of a model of ours
    cache: dict[str, Any] | None = None  # where its signals are read from: path, key_sha256, kind, forward_flops
    name: str | None = None  # in the metrics of a run with several teachers
    domains: list[str] | None = None  # whose rows it teaches; None is all
    share: float | None = None  # in the average of several teachers


def teacher_tokens(signal: Signal | None, batch: Batch) -> list[int]:
    """Tokens of the batch that each of the run's teachers saw; nothing without a signal."""
    match signal:
        case None:
            return []
        case Routed(parts, num_teachers):
            tokens = {part.teacher: part.num_tokens for part in parts}
            return [tokens.get(number, 0) for number in range(num_teachers)]
        case Average(parts):
            return [batch.num_tokens] * len(parts)
    return [batch.num_tokens]


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
        return list(self._routed(batch, self.domain_ids))

    def _routed(self, batch: Batch, domain_ids: Sequence[frozenset[int]]) -> Iterator[Question]:
        host, device = batch.host or batch, batch.rows_N.device
        domain_ids_B = host.domain_ids_B.numpy()
        for number, mine in enumerate(domain_ids):
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
        heads = tuple(answer for answer in answers if isinstance(answer, Head))
        assert len(heads) == len(self.shares)
        return Average(heads, self.shares)


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


def hidden_answers(signal: Signal) -> list[tuple[int, Head]]:
    """(number, signal) of each teacher that gave hidden states, in their order."""
    match signal:
        case Head():
            return [(0, signal)]
        case Average(parts, _):
            return [(number, part) for number, part in enumerate(parts) if isinstance(part, Head)]
        case Routed(parts, _):
            return [(part.teacher, part.signal) for part in parts if isinstance(part.signal, Head)]
    return []
