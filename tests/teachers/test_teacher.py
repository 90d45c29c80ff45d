import inspect
from typing import get_args

import numpy as np
import pytest
import torch

from ki_ds.data.batches import Sample, collate
from ki_ds.objective.types import Average, Head, Part, Routed, Signal, Sparse
from ki_ds.teachers.cache import CachedTeacher
from ki_ds.teachers.online import OnlineTeacher, OverlappedTeacher
from ki_ds.teachers.ranks import RanksTeacher
from ki_ds.teachers.teacher import ManyTeachers, Teacher, teacher_tokens

TEACHERS = [OnlineTeacher, CachedTeacher, RanksTeacher, ManyTeachers, OverlappedTeacher]
HIDDEN = Head(torch.zeros(3, 2), torch.zeros(5, 2), None)
ENTRIES = Sparse(torch.zeros(3, 2).long(), torch.zeros(3, 2), "tail")
ROUTED = Routed((Part(1, ENTRIES, torch.arange(3), 7), Part(2, HIDDEN, torch.arange(3, 6), 4)), 4)
AVERAGED = Average((HIDDEN, HIDDEN), (1.0, 2.0))


def public_methods(kind):
    return {name: m for name, m in vars(kind).items() if inspect.isfunction(m) and not name.startswith("_")}


@pytest.mark.parametrize("kind", TEACHERS)
def test_every_teacher_has_the_protocols_methods_and_no_others(kind):
    """The trainer must not come to depend on what only one kind of teacher can do."""
    promised, given = public_methods(Teacher), public_methods(kind)
    assert Teacher in kind.__mro__
    assert promised.keys() == {"ask", "signal", "figures", "free"} >= given.keys() >= {"signal", "free"}
    for name, method in given.items():
        expected, found = inspect.signature(promised[name]), inspect.signature(inspect.unwrap(method))
        assert list(found.parameters) == list(expected.parameters)
        signals = {kind.__name__ for kind in get_args(Signal)} | {"Signal"}
        assert found.return_annotation == expected.return_annotation or found.return_annotation in signals


def test_tokens_that_each_teacher_saw():
    ids = np.arange(20)
    batch = collate([Sample(0, ids, ids[:3], ids[:3]), Sample(1, ids[:5], ids[:3], ids[:3])], pad_id=1, seq_len=32)
    assert teacher_tokens(None, batch) == []
    assert teacher_tokens(HIDDEN, batch) == teacher_tokens(ENTRIES, batch) == [25]
    assert teacher_tokens(ROUTED, batch) == [0, 7, 4, 0]
    assert teacher_tokens(AVERAGED, batch) == [25, 25]
