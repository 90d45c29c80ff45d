import dataclasses
import inspect
from typing import get_args

import pytest
import torch

from ki_ds.signals import HiddenSignal, Signal, Teacher, TopKSignal
from ki_ds.teachers.cache import CachedTeacher
from ki_ds.teachers.online import OnlineTeacher
from ki_ds.teachers.ranks import RanksTeacher

TEACHERS = [OnlineTeacher, CachedTeacher, RanksTeacher]


def public_methods(kind):
    return {name: m for name, m in vars(kind).items() if inspect.isfunction(m) and not name.startswith("_")}


@pytest.mark.parametrize("kind", TEACHERS)
def test_every_teacher_has_the_protocols_methods_and_no_others(kind):
    """The trainer must not come to depend on what only one kind of teacher can do."""
    promised, given = public_methods(Teacher), public_methods(kind)
    assert promised.keys() == {"signal", "figures", "free"} == given.keys()
    for name, method in promised.items():
        expected, found = inspect.signature(method), inspect.signature(inspect.unwrap(given[name]))
        assert list(found.parameters) == list(expected.parameters)
        signals = {kind.__name__ for kind in get_args(Signal)} | {"Signal"}
        assert found.return_annotation == expected.return_annotation or found.return_annotation in signals


@pytest.mark.parametrize(
    "signal",
    [
        HiddenSignal(torch.zeros(3, 2), torch.zeros(5, 2), None),
        TopKSignal(torch.zeros(3, 2).long(), torch.zeros(3, 2), "tail"),
    ],
)
def test_a_signal_cannot_be_changed(signal):
    for field in dataclasses.fields(signal):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(signal, field.name, torch.ones(1))
