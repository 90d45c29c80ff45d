"""Scores against their definitions, and the cases that definitions leave open."""

import math
import random
import statistics
import sys

import pytest

from ki_ds.errors import UserError
from ki_ds.evaluation.scores import METRICS, Spread, score, simplest_guess

DRAW = random.Random(0)
TRUTH = [DRAW.randrange(3) for _ in range(200)]
GUESS = [label if DRAW.random() < 0.6 else DRAW.randrange(3) for label in TRUTH]


def f1_of(label, guess, truth):
    right = sum(g == t == label for g, t in zip(guess, truth, strict=True))
    either = sum(g == label for g in guess) + sum(t == label for t in truth)
    return 2 * right / either if either else 0.0


def pearson(x, y):
    mx, my = statistics.fmean(x), statistics.fmean(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return top / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def test_classes():
    right = sum(g == t for g, t in zip(GUESS, TRUTH, strict=True)) / len(TRUTH)
    assert score("accuracy", GUESS, TRUTH) == score("micro_f1", GUESS, TRUTH) == pytest.approx(right)
    expected = statistics.fmean(f1_of(label, GUESS, TRUTH) for label in range(3))
    assert score("macro_f1", GUESS, TRUTH) == pytest.approx(expected)
    two = [[min(label, 1) for label in labels] for labels in (GUESS, TRUTH)]
    assert score("f1", *two) == pytest.approx(f1_of(1, *two))
    assert score("matthews", *two) == pytest.approx(pearson(*two))  # of two classes it is their correlation


def test_macro_f1_counts_the_classes_that_are_there():
    assert score("macro_f1", [0, 0, 1], [0, 0, 1]) == 1.0  # a class that neither has does not count
    assert score("macro_f1", [0, 0, 2], [0, 0, 1]) == pytest.approx(1 / 3)


def test_grades():
    truth = [DRAW.random() * 5 for _ in range(50)]
    guess = [grade + DRAW.gauss(0, 1) for grade in truth]
    assert score("pearson", guess, truth) == pytest.approx(pearson(guess, truth))
    ranks = [[sorted(values).index(value) for value in values] for values in (guess, truth)]
    assert score("spearman", guess, truth) == pytest.approx(pearson(*ranks))


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
@pytest.mark.parametrize("guess", [[2.0] * 4, [math.nan, 1.0, 2.0, 3.0], [math.inf, 1.0, 2.0, 3.0]])
def test_a_correlation_that_is_undefined_counts_nothing(metric, guess):
    assert score(metric, guess, [1.0, 2.0, 3.0, 4.0]) == 0.0


def test_constant_classes():
    assert score("matthews", [1, 1, 1], [0, 1, 1]) == 0.0
    assert score("f1", [0, 0], [1, 0]) == 0.0


def test_the_simplest_guess():
    assert simplest_guess([2, 1, 1, 2, 0], graded=False) == 1  # of equals the first index
    assert simplest_guess([0.0, 1.0, 5.0], graded=True) == 2.0


def test_spread():
    assert str(Spread((0.5, 0.6, 0.7))) == "60.0 ± 10.0"
    assert str(Spread((0.123,))) == "12.3"
    assert Spread((0.123,)).std is None


def test_without_scikit_learn_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match=r"scores need scikit-learn, which is missing; pip install 'ki_ds\[eval\]'"):
        score("accuracy", [1], [1])


def test_every_metric_has_a_name():
    assert all(isinstance(score(metric, [0, 1, 1], [0, 1, 0]), float) for metric in METRICS)
