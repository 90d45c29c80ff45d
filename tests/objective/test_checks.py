"""What the public functions' tests do not see: names and counts in the lines that are about several teachers."""

import pytest
import torch

from ki_ds import loss
from ki_ds.errors import UserError
from ki_ds.loss import TeacherLogits
from ki_ds.objective.checks import checked
from ki_ds.objective.rows import Objective
from ki_ds.objective.types import Average, Head, Logits, Part, Routed, Sparse

LABELS = torch.tensor([1, -100, 3, 8])
CALL = {"row_weights": None, "backend": "auto", "chunk_rows": None}


def _checked(labels=LABELS, teacher=None, rows=None, **numbers):
    student = torch.zeros(4, 9) if rows is None else rows
    return checked(Logits(student), labels, teacher, Objective(**numbers), **CALL)


def test_a_checked_call_is_flat_and_knows_its_classes():
    problem = _checked(torch.tensor([[1, -100], [3, 8]]), Logits(torch.zeros(2, 2, 9)), torch.zeros(2, 2, 9), alpha=0.5)
    assert problem.labels_N.tolist() == LABELS.tolist()
    assert problem.teacher.logits_NV.shape == problem.student.logits_NV.shape == (4, 9)
    assert (problem.objective.num_classes, problem.backend, problem.wanted) == (9, "torch", (False,))


def test_where_alpha_is_known_to_be_0_no_teacher_is_looked_at():
    poison = Logits(torch.zeros(1, 1))
    assert _checked(teacher=poison, alpha=0.0).teacher is None
    with pytest.raises(UserError, match="teacher_logits has rows"):
        _checked(teacher=poison, alpha=torch.tensor(0.0))


def test_labels_must_be_classes():
    _checked(num_classes=9)
    with pytest.raises(UserError, match="label 8 is neither a class"):
        _checked(num_classes=8)


def test_widths_must_agree_or_num_classes_say_what_is_real():
    narrow = Logits(torch.zeros(4, 8))
    labels = torch.zeros(4, dtype=torch.int64)
    assert _checked(labels, narrow, alpha=0.5, num_classes=7).objective.num_classes == 7
    with pytest.raises(UserError, match="student_logits 9, teacher_logits 8"):
        _checked(labels, narrow, alpha=0.5)
    with pytest.raises(UserError, match="num_classes=9 must lie"):
        _checked(labels, narrow, alpha=0.5, num_classes=9)


@pytest.mark.parametrize(
    ("rows", "shares", "message"),
    [
        ([], None, "teachers is empty"),
        ([(4, None)], (0.0,), "give one positive number each"),
        ([(3, None)], (1.0,), "needs all rows"),
        ([(4, torch.arange(4))], (1.0,), "needs all rows"),
        ([(4, None)], None, "say which with rows"),
        ([(2, torch.tensor([0, 1, 2]))], None, "has 2 rows; say which with rows"),
        ([(2, torch.tensor([0, 7]))], None, "there are 4"),
        ([(2, torch.tensor([0, 1])), (1, torch.tensor([1]))], None, "name a row twice"),
    ],
)
def test_teachers_must_have_their_rows(rows, shares, message):
    teachers = [TeacherLogits(torch.zeros(count, 9), index) for count, index in rows]
    with pytest.raises(UserError, match=message):
        loss.multi_teacher_loss(torch.zeros(4, 9), LABELS, teachers=teachers, shares=shares, alpha=0.5)
    loss.multi_teacher_loss(torch.zeros(4, 9), LABELS, teachers=teachers, shares=shares)  # alpha is 0: not looked at


def test_an_average_of_one_is_that_teacher():
    one = Head(torch.zeros(4, 2), torch.zeros(9, 2), None)
    assert isinstance(_checked(teacher=Average((one,), (3.0,)), alpha=0.5).teacher, Head)


def test_routed_entries_are_checked_as_any():
    part = Part(0, Sparse(torch.zeros(2, 3).long(), torch.zeros(2, 4), "tail"), torch.tensor([0, 2]))
    with pytest.raises(UserError, match="differ; give both"):
        _checked(teacher=Routed((part,), 1), alpha=0.5)


def test_float64_is_left_to_pytorch():
    with pytest.raises(UserError, match="computes in float32"):
        checked(
            Logits(torch.zeros(4, 9, dtype=torch.float64)), LABELS, None, Objective(), **CALL | {"backend": "triton"}
        )
