"""The drawn curves hold what the runs hold."""

import re

from ki_ds.figures import draw_curves, draw_scores, draw_training, png_bytes, svg_text
from ki_ds.savings import compare, read_run
from tests.fake_runs import write_run


def comparison(tmp_path):
    write_run(tmp_path / "self", [100, 50, 30, 25, 22])
    write_run(tmp_path / "inherit", [100, 40, 25, 21, 20], inherits=True)
    return compare([read_run(tmp_path / name) for name in ("self", "inherit")])


def test_perplexity_is_drawn_against_each_cost(tmp_path):
    figure = draw_curves(comparison(tmp_path))
    assert len(figure.axes) == 3
    for axis in figure.axes:
        drawn = [list(line.get_ydata()) for line in axis.get_lines() if len(line.get_ydata()) >= 4]
        assert any(22 in curve for curve in drawn)
        assert any(20 in curve for curve in drawn)


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
