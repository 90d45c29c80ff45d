"""A teacher on ranks of its own: they run ahead of the students and send the hidden states of the labelled rows.

Batches are pure functions of the configuration and a step: a teacher rank makes those of its students itself and learns
from them only where to begin. For every micro-batch it sends a header and N hidden states of D numbers, and the first
time its output projection with the form of its logits. Of several teachers each rank runs all, and sends the part of
each. It is at most `teacher.ahead` and two micro-batches ahead, for a tensor leaves it when the student takes it.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ki_ds.config import RunConfig, TeacherConfig, schedules
from ki_ds.data.batches import Batch, TrainBatches
from ki_ds.data.datasets import Datasets, open_datasets
from ki_ds.errors import ResumableError, UserError
from ki_ds.objective.types import Head, LogitForm, Signal
from ki_ds.ranks.bridge import Bridge
from ki_ds.ranks.world import from_main, on_main, say
from ki_ds.teachers.factory import identify_teachers, make_teachers, notes_on
from ki_ds.teachers.questions import Questions
from ki_ds.teachers.teacher import Assignment, Teacher, TeacherFacts, hidden_answers

_REMIND_SECONDS = 30.0
_LET_STUDENTS_LEAVE_SECONDS = 3.0  # a launcher reports the first exit code that it sees: theirs tells more
_HANDED_OVER = "handed_over"  # the note with which the students end a teaching whose last step nobody knew
_END = -1  # instead of a micro-batch's number: no other follows


# --- the teacher's side -------------------------------------------------------------------------------------------


def teach(config: RunConfig, bridge: Bridge, device: torch.device) -> None:
    """Answer this rank's students until alpha is 0 or the run ends.

    Raises:
        UserError: the data or the teacher cannot be used.
        ResumableError: a student is gone; the students say why, as they end.
    """
    try:
        _teach(config, bridge, device)
    except ConnectionError:
        time.sleep(_LET_STUDENTS_LEAVE_SECONDS)
        error = ResumableError("a student rank is gone; start the job again to go on from its last checkpoint")
        error.said_by_main = True
        raise error from None


def _teach(config: RunConfig, bridge: Bridge, device: torch.device) -> None:
    try:
        data = open_datasets(config.data, config.task, other_index_dir=Path(config.run_dir) / "index")
        online = replace(config, teacher=replace(config.teacher, placement="online"))
        teacher, facts = make_teachers(online, data, device=device)
    except UserError as error:
        bridge.put(f"facts_{bridge.rank}", {"error": str(error)})
        error.said_by_main = True
        raise
    bridge.put(f"facts_{bridge.rank}", {"facts": [asdict(known) for known in facts]})
    steps, world, pinned = _steps(config, bridge.get("start")), bridge.num_students, device.type == "cuda"
    streams = [
        TrainBatches.of_run(config, data.train, steps=steps, rank=student, world_size=world, pin_memory=pinned)
        for student in bridge.students
    ]
    busy = idle = 0.0
    heads_sent: set[tuple[int, int]] = set()  # (student, teacher)
    rounds = (micro_batches for step in zip(*streams, strict=True) for micro_batches in zip(*step, strict=True))
    for number, micro_batches in enumerate(rounds):
        if config.inherit.schedule == "auto" and bridge.has(_HANDED_OVER):
            for student in bridge.students:
                bridge.send([torch.tensor([_END])], student)
            return
        for student, batch in zip(bridge.students, micro_batches, strict=True):
            began = time.perf_counter()
            answers = hidden_answers(teacher.signal(batch.to(device, non_blocking=True)))
            tensors = [head.hidden_ND.cpu() for _, head in answers]
            busy, began = busy + time.perf_counter() - began, time.perf_counter()
            for which, head in answers:
                if (student, which) not in heads_sent:
                    heads_sent.add((student, which))
                    tensors += _head(head)
            header = torch.tensor([number, batch.num_tokens, round(busy * 1e6), round(idle * 1e6)])
            bridge.send([header, *tensors], student)
            idle += time.perf_counter() - began


def _head(head: Head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output projection and its form on their way to a student: a bias that is not there has no elements."""
    bias_V = head.weight_VD.new_empty(0) if head.bias_V is None else head.bias_V
    return head.weight_VD, bias_V, torch.tensor(head.form.numbers, dtype=torch.float64)


def _steps(config: RunConfig, start: int) -> range:
    """The steps from `start` on that are taught before the run ends or stops."""
    taught = schedules.taught_steps(config)
    first = max(start, taught.start)
    return range(first, max(min(taught.stop, config.train.stop_at_step or taught.stop), first))


# --- the student's side -------------------------------------------------------------------------------------------


def name_teachers(config: RunConfig, bridge: Bridge | None) -> list[dict[str, Any]]:
    """What tells the teachers that a run names from others, asked or not; the same on every rank, which all call this.

    Raises:
        UserError: as `identify_teachers`; or what teacher ranks could not use, or that one of them did not come up
            within teacher.patience.
    """
    if bridge is None:
        return from_main(on_main(lambda: identify_teachers(config))) or []
    try:
        note = bridge.get(f"facts_{bridge.teacher}", seconds=config.teacher.patience or math.inf)
    except TimeoutError:
        raise UserError(
            f"teacher rank {bridge.teacher} was not ready within teacher.patience={config.teacher.patience:g} s; look "
            "at its host, or raise it"
        ) from None
    if "error" in note:
        raise UserError(note["error"])
    return note["facts"]


def teachers_of_run(
    config: RunConfig,
    data: Datasets,
    named: Sequence[dict[str, Any]],
    device: torch.device,
    bridge: Bridge | None,
    *,
    step: int,
    taught: range,
) -> tuple[Teacher | None, list[TeacherFacts]]:
    """A run's teachers as one, wherever they run, and the facts of each; no facts where none is asked any more.

    Args:
        named: as `name_teachers` gives them.
        step: completed updates.
        taught: those at which alpha can be above 0.

    Raises:
        UserError: as `make_teachers`.
    """
    steps = range(max(step, taught.start), taught.stop)
    teacher: Teacher | None = None
    facts: list[TeacherFacts] = []
    if bridge is not None:
        start = step if steps else config.train.num_steps
        if bridge.rank == 0:
            bridge.put("start", start)
        accumulation = config.train.global_batch_size // (config.train.micro_batch_size * bridge.num_students)
        num_batches = len(_steps(config, start)) * accumulation
        assignment = Assignment.of(config.all_teachers, data.domains)
        teacher = RanksTeacher(config.teacher, bridge, assignment, device, num_batches=num_batches)
        facts = [TeacherFacts(**known) for known in named] if steps else []
    elif steps:
        questions = Questions.of_run(config, data, steps=steps)
        teacher, facts = make_teachers(config, data, device=device, questions=questions, named=named)
    for note in notes_on(facts, config, data):
        say(note)
    if not steps and step < config.train.num_steps:
        for entry in config.all_teachers:
            say(f"the teacher {entry.path} is not asked: alpha is 0 from step {step + 1} on")
    return teacher, facts


class RanksTeacher(Teacher):
    """Receives in a thread of its own what a teacher rank sends, `ahead` micro-batches at most beforehand."""

    def __init__(
        self, config: TeacherConfig, bridge: Bridge, assignment: Assignment, device: torch.device, *, num_batches: int
    ) -> None:
        self._bridge, self._assignment, self._device, self._patience = bridge, assignment, device, config.patience
        self._heads: dict[int, tuple[torch.Tensor, torch.Tensor | None, LogitForm]] = {}
        self._number, self._num_batches = 0, num_batches
        self._waited, self._busy, self._idle = 0.0, 0, 0
        self._received: queue.Queue[list[torch.Tensor] | ConnectionError | None] = queue.Queue(maxsize=config.ahead)
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        try:
            for _ in range(self._num_batches):
                tensors = self._bridge.receive(self._bridge.teacher)
                if int(tensors[0][0]) == _END:
                    break
                self._received.put(tensors)
            self._received.put(None)
        except ConnectionError as error:
            self._received.put(error)

    def signal(self, batch: Batch) -> Signal:
        """What the teacher in the process would say: hidden states and an output projection in its own dtype."""
        questions = self._assignment.questions(batch)
        header, *tensors = self._next()
        hidden, heads = tensors[: len(questions)], tensors[len(questions) :]
        number, num_tokens, self._busy, self._idle = header.tolist()
        rows = [question.batch.num_rows for question in questions]
        if (number, num_tokens, list(map(len, hidden))) != (self._number, batch.num_tokens, rows):
            raise UserError(
                f"{self._name} answers micro-batch {number} with {sum(map(len, hidden))} rows, the student asks for "
                f"{self._number} with {sum(rows)}; give all ranks the same code, data and configuration"
            )
        self._number += 1
        new = [question.teacher for question in questions if question.teacher not in self._heads]
        for which, weight_VD, bias_V, numbers in zip(new, heads[::3], heads[1::3], heads[2::3], strict=True):
            bias = bias_V.to(self._device) if len(bias_V) else None
            self._heads[which] = weight_VD.to(self._device), bias, LogitForm.of_numbers(*numbers.tolist())
        answers = [
            Head(hidden_ND.to(self._device, non_blocking=True), *self._heads[question.teacher])
            for question, hidden_ND in zip(questions, hidden, strict=True)
        ]
        return self._assignment.joined(questions, answers)

    def figures(self) -> dict[str, float]:
        """Seconds, so far, that this student waited for its teacher, and that the teacher worked and waited."""
        return {
            "teacher_wait_seconds": self._waited,
            "teacher_busy_seconds": self._busy / 1e6,
            "teacher_idle_seconds": self._idle / 1e6,
        }

    def free(self) -> None:
        """Give the output projections' memory back, and let a teacher's rank go that has not ended by itself."""
        self._heads = {}
        if self._number < self._num_batches:
            if self._bridge.rank == 0:
                self._bridge.put(_HANDED_OVER, self._number)
            while isinstance(self._received.get(), list):
                pass  # what it has sent in the meantime

    @property
    def _name(self) -> str:
        return f"teacher rank {self._bridge.teacher} ({self._bridge.get(f'teacher_{self._bridge.teacher}')})"

    def _next(self) -> list[torch.Tensor]:
        """The next message; says every 30 s that the teacher is slow. ResumableError when it is too slow, or gone."""
        began = time.monotonic()
        while True:
            try:
                message = self._received.get(timeout=min(_REMIND_SECONDS, self._patience or math.inf))
                break
            except queue.Empty:
                waited = time.monotonic() - began
                if self._patience and waited >= self._patience:
                    raise ResumableError(
                        f"{self._name} has sent nothing for {waited:.0f} s (teacher.patience={self._patience:g}); look "
                        "at its host, then start the job again to go on from the last checkpoint"
                    ) from None
                print(f"student rank {self._bridge.rank} has waited {waited:.0f} s for {self._name}", flush=True)
        self._waited += time.monotonic() - began
        if isinstance(message, ConnectionError):
            raise ResumableError(f"{self._name} is gone; start the job again to go on from the last checkpoint")
        assert message is not None, "more was asked than there are steps to teach"
        return message
