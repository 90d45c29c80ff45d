"""Every range is really held, at both of its ends."""

import pytest

from ki_ds.config import RunConfig, flatten
from ki_ds.config.ranges import RANGES, check_ranges
from ki_ds.errors import UserError

DEFAULTS = flatten(RunConfig())


def test_the_defaults_are_in_range():
    check_ranges(DEFAULTS)


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_a_range(name):
    low, high, closed = RANGES[name]
    beyond = [low - max(1e-3, abs(low)), high + max(1, high)] + ([] if closed else [high])
    within = [low] + ([high] if closed else [])
    for value in within:
        check_ranges(DEFAULTS | {name: value})
    for value in [*beyond, float("nan")]:
        with pytest.raises(UserError, match=rf"^{name}=.* is outside \[") as caught:
            check_ranges(DEFAULTS | {name: value})
        assert "\n" not in str(caught.value)
