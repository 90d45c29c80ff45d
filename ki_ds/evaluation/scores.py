"""The scores of downstream tasks, from scikit-learn and scipy, and what the simplest guess would get."""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ki_ds.errors import UserError

METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
GRADED = ("pearson", "spearman")  # of graded similarity; the others are of classes


def score(metric: str, predicted: Sequence[float], labels: Sequence[float]) -> float:
    """One of `METRICS`, between -1 and 1.

    Args:
        predicted: class indices, or grades where the metric is one of `GRADED`.
        labels: the truth, equally many.

    "f1" is that of class 1; "macro_f1" the mean over the classes that the truth or the predictions have; a class
    without any right prediction counts 0. "micro_f1" is over all classes and so equals accuracy. A correlation with a
    constant is undefined and counts 0, as scikit-learn counts Matthews'. So does one with predictions that are not
    finite.

    Raises:
        UserError: scikit-learn or scipy is missing.
    """
    assert len(predicted) == len(labels) > 0
    if metric in GRADED:
        return _correlation(metric, predicted, labels)
    try:
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    except ImportError:
        raise UserError("scores need scikit-learn, which is missing; pip install 'ki_ds[eval]'") from None
    if metric == "accuracy":
        return float(accuracy_score(labels, predicted))
    if metric == "matthews":
        return float(matthews_corrcoef(labels, predicted))
    average = {"f1": "binary", "macro_f1": "macro", "micro_f1": "micro"}[metric]
    return float(f1_score(labels, predicted, average=average, zero_division=0))


def _correlation(metric: str, predicted: Sequence[float], labels: Sequence[float]) -> float:
    try:
        from scipy.stats import pearsonr, spearmanr
    except ImportError:
        raise UserError("scores need scipy, which is missing; pip install 'ki_ds[eval]'") from None
    if not all(map(math.isfinite, predicted)) or len(set(predicted)) == 1 or len(set(labels)) == 1:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nearly constant input
        found = float((pearsonr if metric == "pearson" else spearmanr)(predicted, labels).statistic)
    return found if math.isfinite(found) else 0.0


def simplest_guess(train: Sequence[float], *, graded: bool) -> float:
    """The most frequent class of the training part (of equals the first index), or the mean of its grades."""
    if graded:
        return statistics.fmean(train)
    counts = Counter(train)
    return min(counts, key=lambda label: (-counts[label], label))


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the latter is None for a single value."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        """In hundredths: "68.5 ± 1.2"."""
        spread = f" ± {100 * self.std:.1f}" if self.std is not None else ""
        return f"{100 * self.mean:.1f}{spread}"
