"""The demo's first steps are what they have always been."""

import json

import pytest

from tests.golden import GOLDEN, measure, platform_class


@pytest.mark.parametrize("task", ["mlm", pytest.param("causal", marks=pytest.mark.slow)])
def test_losses_metrics_and_checkpoints_are_the_golden_ones(task, tmp_path):
    """Bit for bit where this class of machine has figures of its own; elsewhere losses to 1e-4 of any other's."""
    found, known = measure(task, tmp_path), json.loads(GOLDEN.read_text())
    own, other = known.get(platform_class()), next(iter(known.values()))
    for case, figures in found.items():
        if own is None:
            assert figures["losses"] == pytest.approx(other[case]["losses"], rel=1e-4), case
        else:
            assert figures == own[case], case
