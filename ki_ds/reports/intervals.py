"""The mean of a figure over several seeds, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A figure over `count` runs."""

    mean: float
    half_width: float | None  # of the t-interval around the mean; None for one run
    smallest: float
    largest: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Mean, 95% interval of Student's t and range of at least one value; NaN where a value is no number."""
    assert values
    mean = statistics.fmean(values)
    return Spread(mean, _half_width(values), min(values), max(values), len(values))


def _half_width(values: Sequence[float]) -> float | None:
    if len(values) == 1:
        return None
    if not all(map(math.isfinite, values)):
        return math.nan
    from scipy.special import stdtrit  # quantiles of Student's t, without all of scipy.stats

    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
