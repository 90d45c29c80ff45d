import dataclasses

import pytest
import torch

from ki_ds.objective.types import Average, Head, Part, Routed, Sparse

HIDDEN = Head(torch.zeros(3, 2), torch.zeros(5, 2), None)
ENTRIES = Sparse(torch.zeros(3, 2).long(), torch.zeros(3, 2), "tail")
ROUTED = Routed((Part(1, ENTRIES, torch.arange(3), 7), Part(2, HIDDEN, torch.arange(3, 6), 4)), 4)
AVERAGED = Average((HIDDEN, HIDDEN), (1.0, 2.0))


@pytest.mark.parametrize("signal", [HIDDEN, ENTRIES, ROUTED, AVERAGED, ROUTED.parts[0]])
def test_a_signal_cannot_be_changed(signal):
    for field in dataclasses.fields(signal):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(signal, field.name, torch.ones(1))
