import pytest
import torch

from ki_ds.errors import UserError
from ki_ds.objective.arguments import Call, check_num_classes


def _call(labels, **changes):
    options = {
        "alpha": 0.5,
        "tau": 2.0,
        "ignore_index": -100,
        "row_weights": None,
        "label_smoothing": 0.0,
        "backend": "auto",
    }
    return Call.check(torch.zeros(4, 9), labels, **(options | changes))


LABELS = torch.tensor([1, -100, 3, 8])


def test_a_call_is_flat_and_knows_whether_a_teacher_speaks():
    call = _call(LABELS)
    assert (call.uses_teacher, call.backend) == (True, "torch")
    assert not _call(LABELS, alpha=0.0).uses_teacher
    assert _call(LABELS, alpha=torch.tensor(0.0)).uses_teacher
    assert not call.only(torch.tensor([0, 2]), label_only=True).uses_teacher
    assert call.only(torch.tensor([0, 2])).labels_N.tolist() == [1, 3]


def test_labels_must_be_classes():
    _call(LABELS).check_labels(9)
    with pytest.raises(UserError, match="label 8 is neither a class"):
        _call(LABELS).check_labels(8)


def test_widths_must_agree_or_num_classes_say_what_is_real():
    assert check_num_classes(None, {"student": 9, "teacher": 9}) == 9
    assert check_num_classes(7, {"student": 9, "teacher": 8}) == 7
    with pytest.raises(UserError, match="student 9, teacher 8"):
        check_num_classes(None, {"student": 9, "teacher": 8})
    with pytest.raises(UserError, match="num_classes=9 must lie"):
        check_num_classes(9, {"student": 9, "teacher": 8})


@pytest.mark.parametrize(
    ("rows", "shares", "message"),
    [
        ([], None, "teachers is empty"),
        ([(4, None)], (0.0,), "give one positive number each"),
        ([(3, None)], (1.0,), "needs all rows"),
        ([(4, None)], None, "say which with rows"),
        ([(2, torch.tensor([0, 7]))], None, "there are 4"),
        ([(2, torch.tensor([0, 1])), (1, torch.tensor([1]))], None, "name a row twice"),
    ],
)
def test_teachers_must_have_their_rows(rows, shares, message):
    with pytest.raises(UserError, match=message):
        _call(LABELS).check_teachers(rows, shares)


def test_rows_without_a_teacher_are_found():
    assert _call(LABELS).untaught([torch.tensor([2]), torch.tensor([0])]).tolist() == [1, 3]


def test_float64_is_left_to_pytorch():
    options = {"alpha": 0.0, "tau": 2.0, "ignore_index": -100, "row_weights": None, "label_smoothing": 0.0}
    with pytest.raises(UserError, match="computes in float32"):
        Call.check(torch.zeros(4, 9, dtype=torch.float64), LABELS, backend="triton", **options)
