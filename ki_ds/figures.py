"""The curves of a comparison: perplexity against what was spent, alpha, CE and KL over the steps."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ki_ds.errors import UserError
from ki_ds.savings import Comparison, Curve, Savings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
COLOURS = ("#d1701f", "#2f7fc1", "#3a9a4b", "#a35cc4", "#b8912a", "#c2467c")  # readable on white and on black
INK = "#123456"  # axes and text of a figure; becomes the page's own text colour in the HTML


def draw_curves(comparison: Comparison) -> Figure:
    """Validation perplexity against steps, FLOPs with the teacher, and time: three panels."""
    axes, figure = _panels(3)
    unit, scale = _time_unit(comparison)
    exponent = _flops_exponent(comparison)
    _draw_panel(axes[0], comparison, "steps", 1, "steps")
    _draw_panel(axes[1], comparison, "flops_with_teacher", 10**exponent, f"FLOPs with teacher, $10^{{{exponent}}}$")
    _draw_panel(axes[2], comparison, "seconds", scale, f"{unit} of training")
    axes[0].set_ylabel("validation perplexity")
    axes[0].legend(frameon=False, labelcolor=INK, fontsize="small")
    return figure


def draw_training(comparison: Comparison) -> Figure:
    """alpha, CE and KL of the training batches over steps: three panels."""
    axes, figure = _panels(3)
    for axis, key, title in zip(
        axes, ("alpha", "ce", "kl"), ("alpha", "CE, nats", "KL(teacher || student) at tau, nats"), strict=True
    ):
        for colour, arm in zip(_colours(comparison), comparison.arms, strict=True):
            for run in arm.runs:
                points = [(record["step"], record[key]) for record in run.training if key in record]
                axis.plot(*zip(*points, strict=True) if points else ([], []), color=colour, linewidth=1)
        axis.set_xlabel("steps")
        axis.set_title(title, color=INK, fontsize="medium")
    return figure


def draw_scores(curves: Mapping[str, Sequence[tuple[int, float, float | None]]], title: str) -> Figure:
    """Scores in hundredths against steps: (step, mean, standard deviation) by name; a lone point is a level line."""
    (axis,), figure = _panels(1)
    for index, (name, points) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        steps, means = [step for step, _, _ in points], [100 * mean for _, mean, _ in points]
        if len(points) == 1 and steps[0] == 0:
            axis.axhline(means[0], color=colour, linewidth=1, linestyle=":", label=name)
        else:
            errors = [100 * (std or 0.0) for _, _, std in points]
            axis.errorbar(steps, means, yerr=errors, color=colour, marker=".", capsize=2, linewidth=1.5, label=name)
    axis.set_xlabel("steps")
    axis.set_ylabel(title)
    axis.legend(frameon=False, labelcolor=INK, fontsize="small")
    return figure


def _panels(count: int) -> tuple[list[Axes], Figure]:
    """Axes side by side, drawn in INK on nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("curves need matplotlib, which is missing; pip install 'ki_ds[demo]'") from None
    figure = Figure(figsize=(4.2 * count, 3.6), layout="constrained")
    axes = [figure.add_subplot(1, count, index + 1) for index in range(count)]
    for axis in axes:
        axis.set_facecolor("none")
        axis.tick_params(colors=INK, which="both", labelsize="small")
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(INK)
        axis.grid(color=INK, alpha=0.12, linewidth=0.6)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
    return axes, figure


def _draw_panel(axis: Axes, comparison: Comparison, cost: str, scale: float, title: str) -> None:
    """Every run's curve, and what was reached when."""
    for colour, arm in zip(_colours(comparison), comparison.arms, strict=True):
        width = 1.8 if len(arm.runs) == 1 else 1.0
        for index, run in enumerate(arm.runs):
            x = [getattr(point.costs, cost) / scale for point in run.curve]
            label = arm.label if index == 0 else None
            axis.plot(x, [point.ppl for point in run.curve], color=colour, linewidth=width, marker=".", label=label)
    _scale_perplexity(axis, comparison)
    _mark_targets(axis, comparison, cost, scale)
    _mark_teacher(axis, comparison)
    axis.set_xlabel(title)


def _mark_targets(axis: Axes, comparison: Comparison, cost: str, scale: float) -> None:
    """The target as a dotted line, a ring where a run first reached it, and the share saved if one arm inherits."""
    if comparison.baseline is None:
        return
    target = statistics.fmean(run.curve[-1].ppl for run in comparison.baseline.runs)
    axis.axhline(target, color=INK, linewidth=0.8, linestyle=":")
    for colour, pairs in _compared(comparison):
        reached = [getattr(pair.inheriting, cost) / scale for pair in pairs if pair.inheriting]
        targets = [pair.target_ppl for pair in pairs if pair.inheriting]
        axis.plot(reached, targets, "o", color=colour, markersize=7, markerfacecolor="none", linestyle="none")
        saved = [getattr(pair.saved, cost) for pair in pairs if pair.saved]
        if len(comparison.others) == 1 and len(saved) == len(pairs) and (cost != "seconds" or comparison.same_machine):
            place = (statistics.fmean(reached), target)
            text = f"{statistics.fmean(saved):.0%} saved"
            axis.annotate(text, place, (-7, -13), textcoords="offset points", ha="right", color=INK, fontsize="small")


def _mark_teacher(axis: Axes, comparison: Comparison) -> None:
    """The teacher's own perplexity, if one and the same taught every inheriting run alone, as a dashed line."""
    teachers = [run.teachers for arm in comparison.arms for run in arm.runs if run.teachers]
    ppls = {teacher.get("valid_ppl") if not others else None for teacher, *others in teachers}
    low, high = axis.get_ylim()
    if len(ppls) == 1 and (ppl := ppls.pop()) and ppl < high:
        axis.axhline(ppl, color=INK, linewidth=0.8, linestyle="--", alpha=0.6, label="the teacher")
        axis.set_ylim(min(low, ppl * 0.97), high)


def _compared(comparison: Comparison) -> Iterator[tuple[str, tuple[Savings, ...]]]:
    colours = dict(zip(comparison.arms, _colours(comparison), strict=True))
    for arm, pairs in zip(comparison.others, comparison.savings, strict=True):
        yield colours[arm], pairs


def _colours(comparison: Comparison) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(comparison.arms))]


def _scale_perplexity(axis: Axes, comparison: Comparison) -> None:
    """Logarithmic, without the fall from the size of the vocabulary, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    values = [p.ppl for arm in comparison.arms for run in arm.runs for p in run.curve if math.isfinite(p.ppl)]
    late = [max(p.ppl for p in _later_part(run.curve)) for arm in comparison.arms for run in arm.runs]
    axis.set_yscale("log")
    axis.set_ylim(min(values) * 0.96, min(max(values), max(late)) * 1.04)
    wide = axis.get_ylim()[1] > 4 * axis.get_ylim()[0]
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 4, 6, 8)) if wide else MaxNLocator(8))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _later_part(curve: Curve) -> Curve:
    """The points after the first eighth of the steps (the last point at least)."""
    return [point for point in curve if point.costs.steps >= curve[-1].costs.steps / 8 and math.isfinite(point.ppl)]


def _time_unit(comparison: Comparison) -> tuple[str, float]:
    longest = max(run.curve[-1].costs.seconds for arm in comparison.arms for run in arm.runs)
    return ("hours", 3600.0) if longest >= 7200 else ("minutes", 60.0)


def _flops_exponent(comparison: Comparison) -> int:
    largest = max(run.curve[-1].costs.flops_with_teacher for arm in comparison.arms for run in arm.runs)
    return int(math.log10(largest)) if largest >= 1 else 0


def png_bytes(figure: Figure) -> bytes:
    """The figure on white."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, facecolor="white")
    return out.getvalue()


def svg_text(figure: Figure, *, name: str) -> str:
    """The figure as an <svg> element that takes its text colour from the page around it; ids begin with `name`."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
