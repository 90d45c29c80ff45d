"""The drawn curves hold what the runs hold."""

import math
import re

import pytest

from ki_ds.reports.figures import (
    COST_TITLES,
    GAP,
    GrowthPanel,
    draw_curves,
    draw_growth,
    draw_savings,
    draw_scores,
    draw_training,
    png_bytes,
    svg_text,
)
from ki_ds.reports.results import read_run
from ki_ds.reports.savings import compare
from tests.fake_runs import teacher_record, write_run


def comparison(tmp_path, **teacher):
    write_run(tmp_path / "self", [100, 50, 30, 25, 22])
    write_run(tmp_path / "inherit", [100, 40, 25, 21, 20], **(teacher or {"inherits": True}))
    (section,) = compare([read_run(tmp_path / name) for name in ("self", "inherit")])
    return section


def test_perplexity_is_drawn_against_each_cost(tmp_path):
    section = comparison(tmp_path, teacher=teacher_record(flops=5e8))
    figure = draw_curves(section)
    assert len(figure.axes) == len(COST_TITLES) == 6
    for axis in figure.axes:
        drawn = [list(line.get_ydata()) for line in axis.get_lines() if len(line.get_ydata()) >= 4]
        assert any(22 in curve for curve in drawn)
        assert any(20 in curve for curve in drawn)
    ancestors = next(axis for axis in figure.axes if "ancestors" in axis.get_xlabel())
    heir = next(line for line in ancestors.get_lines() if 20 in list(line.get_ydata()))
    assert heir.get_xdata()[0] == pytest.approx(
        5e8 / 10 ** int(math.log10(section.runs[1].curve[-1].costs.flops_with_ancestors))
    )


def test_sections_lie_below_one_another(tmp_path):
    (tmp_path / "a").mkdir()
    section = comparison(tmp_path / "a")
    figure = draw_curves(section, section)
    assert len(figure.axes) == 12
    assert figure.axes[6].get_title(loc="left") == "causal, 1,000 parameters"


def test_savings_have_a_dot_for_each_run_and_a_bar_for_seeds(tmp_path):
    ends = {("self", 1): 50, ("self", 2): 50, ("ki", 1): 40, ("ki", 2): 45}
    for (kind, seed), end in ends.items():
        write_run(tmp_path / f"{kind}{seed}", [400, 100, end], seed=seed, inherits=kind == "ki")
    (section,) = compare([read_run(tmp_path / f"{kind}{seed}") for kind, seed in ends])
    shares, change = draw_savings(section).axes
    saved = [list(line.get_xdata()) for line in shares.get_lines()]
    assert [pytest.approx(100 * pair.saved.steps) for pair in section.savings[0]] in saved
    assert [pytest.approx(-20), pytest.approx(-10)] in [list(line.get_xdata()) for line in change.get_lines()]
    (bar,) = change.collections
    low, high = bar.get_segments()[0][:, 0]
    assert (low + high) / 2 == pytest.approx(-15)
    assert high - low == pytest.approx(2 * 12.7062 * 5, rel=1e-4)  # t(0.975, 1) times 7.07 / sqrt 2


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def test_training_shows_what_is_known(tmp_path):
    figure = draw_training(comparison(tmp_path, teacher=teacher_record(ppl=25.0)))
    assert titles(figure)[-1] == GAP
    assert len(titles(figure)) == 4
    (gaps,) = (list(line.get_ydata()) for line in figure.axes[-1].get_lines() if len(line.get_ydata()) == 5)
    assert gaps[2:] == pytest.approx([0, math.log(21 / 25), math.log(20 / 25)])


def test_training_without_a_comparable_teacher_or_any(tmp_path):
    section = comparison(tmp_path)
    assert titles(draw_training(section)) == [t for t in titles(draw_training(section)) if t != GAP]
    assert len(titles(draw_training(section))) == 3
    (alone,) = compare([read_run(tmp_path / "self")])
    assert titles(draw_training(alone)) == ["CE of the training batches, nats"]


def test_the_teachers_perplexity_is_drawn_only_where_it_says_something(tmp_path):
    for name, teacher in {"known": {"teacher": teacher_record(ppl=21.5)}, "unknown": {"inherits": True}}.items():
        (tmp_path / name).mkdir()
        text = svg_text(draw_curves(comparison(tmp_path / name, **teacher)), name="x")
        assert ("the teacher</text>" in re.sub("- ", "", text)) == (name == "known")


def test_curves_without_a_finite_perplexity(tmp_path):
    (section,) = compare([read_run(write_run(tmp_path / "run", [math.inf]))])
    assert png_bytes(draw_curves(section)).startswith(b"\x89PNG")


def test_pictures_need_nothing_from_outside(tmp_path):
    figure = draw_training(comparison(tmp_path))
    assert png_bytes(figure).startswith(b"\x89PNG")
    svg = svg_text(figure, name="training")
    assert svg.startswith("<svg")
    assert not re.search(r"(href|src)=\"http", svg)


def test_scores_against_steps():
    figure = draw_scores({"run": [(2, 0.5, 0.1), (4, 0.75, None)], "chance": [(0, 0.25, None)]}, "accuracy")
    (axis,) = figure.axes
    drawn = [list(line.get_ydata()) for line in axis.get_lines()]
    assert [25.0, 25.0] in drawn
    assert [50.0, 75.0] in drawn
    assert [40.0, 75.0] in drawn  # the lower ends of the bars
    assert {text.get_text() for text in axis.get_legend().get_texts()} == {"run", "chance"}
    assert axis.get_ylabel() == "accuracy"
    assert png_bytes(figure).startswith(b"\x89PNG")


def test_growth_has_dots_for_what_was_measured_and_lines_for_what_was_expected():
    measured = {"ours": [(8_192, 10.0), (262_144, 20.0)], "eager": [(8_192, 30.0)]}
    first = GrowthPanel("classes", "MiB", measured, {"forecast": [(8_192, 9.0), (262_144, 21.0)]})
    axes = draw_growth([first, first._replace(xlabel="ranks", measured={"ours": [(1, 2.0), (4, 3.0)]})]).axes
    assert [(axis.get_xlabel(), axis.get_xscale(), axis.get_yscale()) for axis in axes] == [
        ("classes", "log", "log"),
        ("ranks", "log", "log"),
    ]
    ours, eager, forecast = axes[0].get_lines()
    assert [line.get_label() for line in (ours, eager, forecast)] == ["ours", "eager", "forecast"]
    assert ours.get_marker() == eager.get_marker() == "o"
    assert (ours.get_linestyle(), forecast.get_linestyle()) == ("None", "-")
    assert list(forecast.get_ydata()) == [9.0, 21.0]
    named = axes[0].xaxis.get_major_formatter()
    assert [named(value, 0) for value in (512, 8_192, 262_144, 2**25, 1.5)] == ["512", "8k", "256k", "32M", "1.5"]
