"""Intervals against textbook values."""

import math

import pytest

from ki_ds.reports.intervals import spread


def test_students_interval_of_known_samples():
    """t(0.975) is 12.706 with one degree of freedom and 4.303 with two."""
    two = spread([1.0, 3.0])
    assert two.mean == 2
    assert two.half_width == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2), rel=1e-4)
    three = spread([4.0, 5.0, 9.0])
    assert three.half_width == pytest.approx(4.3027 * math.sqrt(7) / math.sqrt(3), rel=1e-4)
    assert (three.smallest, three.mean, three.largest, three.count) == (4, 6, 9, 3)


def test_one_value_has_no_interval_and_what_is_unknown_stays_so():
    assert spread([5.0]).half_width is None
    assert math.isnan(spread([1.0, math.nan]).half_width)
    assert math.isnan(spread([1.0, math.inf]).half_width)
    assert math.isnan(spread([1.0, math.nan]).mean)
