"""The curves of a comparison: perplexity against what was spent, savings, and the inheritance over the steps."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ki_ds.errors import UserError
from ki_ds.reports.intervals import spread
from ki_ds.reports.results import Run
from ki_ds.reports.savings import Arm, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
COLOURS = ("#d1701f", "#2f7fc1", "#3a9a4b", "#a35cc4", "#b8912a", "#c2467c")  # readable on white and on black
STYLES = ("-", "--", "-.", ":")  # of every six arms more
INK = "#123456"  # axes and text of a figure; becomes the page's own text colour in the HTML
WIDTH = 12.6  # inches
COST_TITLES = {
    "steps": "steps",
    "tokens": "tokens",
    "student_flops": "FLOPs, student only",
    "flops_with_teacher": "FLOPs with teacher",
    "flops_with_ancestors": "FLOPs with all ancestors",
    "seconds": "training",
}
GAP = "validation CE minus the teacher's, nats"
SAVED_COSTS = tuple(name for name in COST_TITLES if name != "tokens")  # as good as steps


Points = Callable[[Run], Sequence[tuple[float, float]]]  # (step, value) of a run


class GrowthPanel(NamedTuple):
    """One quantity over one dimension; both axes are logarithmic. Points are (x, y) by name."""

    xlabel: str
    ylabel: str
    measured: Mapping[str, Sequence[tuple[float, float]]]  # drawn as dots
    expected: Mapping[str, Sequence[tuple[float, float]]]  # as lines


class Look(NamedTuple):
    """How an arm is drawn."""

    color: str
    linestyle: str


def draw_curves(*sections: Comparison) -> Figure:
    """Validation perplexity against each cost: six panels for every section, and a legend below."""
    axes, figure = _panels(6 * len(sections), columns=3, height=3.1)
    for number, section in enumerate(sections):
        panels = axes[6 * number : 6 * number + 6]
        for axis, cost in zip(panels, COST_TITLES, strict=True):
            scale, title = _cost_scale(section, cost)
            _draw_panel(axis, section, cost, scale, title)
        panels[0].set_ylabel("validation perplexity")
        panels[3].set_ylabel("validation perplexity")
        if len(sections) > 1:
            panels[0].set_title(f"{section.task}, {section.num_parameters:,} parameters", color=INK, loc="left")
            panels[0].legend(frameon=False, labelcolor=INK, fontsize="small")
    if len(sections) == 1:
        _legend_below(figure, axes[0])
    return figure


def draw_savings(comparison: Comparison) -> Figure:
    """Shares saved of each cost, and the change of the final perplexity: a dot a run, a bar for the 95% interval."""
    (shares, change), figure = _panels(2, columns=2, height=0.9 + 0.32 * len(SAVED_COSTS) * len(comparison.others))
    others = list(zip(comparison.others, comparison.savings, strict=True))
    costs = [cost for cost in SAVED_COSTS if cost != "seconds" or comparison.same_machine]
    for index, (arm, pairs) in enumerate(others):
        offset, look = (index - (len(others) - 1) / 2) * 0.7 / len(others), _looks(comparison)[arm]
        reached = [pair.saved for pair in pairs if pair.saved is not None]
        for place, cost in enumerate(costs):
            if len(reached) == len(pairs):
                _dots(shares, place + offset, [100 * getattr(saved, cost) for saved in reached], look)
        _dots(change, offset, [100 * pair.ppl_change for pair in pairs], look)
        change.plot([], [], "o", color=look.color, label=arm.label)
    names = [COST_TITLES[cost] if cost != "seconds" else "time" for cost in costs]
    _name_rows(shares, names, "saved up to the self-learner's final perplexity, %")
    _name_rows(change, [""], "final perplexity against the self-learner's, %")
    _legend_below(figure, change)
    return figure


def draw_training(comparison: Comparison) -> Figure:
    """alpha, CE and KL of the training batches, and the validation CE above the teacher's, over steps.

    A panel for each of them that is known of some run.
    """
    looks = _looks(comparison)
    drawn: dict[str, list[tuple[Arm, Sequence[tuple[float, float]]]]] = {}
    for title, points_of in TRAINING_PANELS.items():
        found = [(arm, points) for arm in comparison.arms for run in arm.runs if (points := points_of(run))]
        drawn |= {title: found} if found else {}
    axes, figure = _panels(len(drawn), columns=2, height=2.8)
    for axis, (title, found) in zip(axes, drawn.items(), strict=True):
        for arm, points in found:
            axis.plot(*zip(*points, strict=True), linewidth=1, label=arm.label, **looks[arm]._asdict())
        axis.set_xlabel("steps")
        axis.set_title(title, color=INK, fontsize="medium")
        if title == GAP:
            axis.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    if axes:
        _legend_below(figure, axes[0])
    return figure


def _recorded(key: str, *, of_heirs: bool = False) -> Points:
    """Records of training steps; `of_heirs`: only of runs with a teacher."""
    return lambda run: [(r["step"], r[key]) for r in run.training if key in r] if run.teachers or not of_heirs else []


TRAINING_PANELS: dict[str, Points] = {
    "CE of the training batches, nats": _recorded("ce"),
    "alpha": _recorded("alpha", of_heirs=True),
    "KL(teacher || student) at tau, nats": _recorded("kl", of_heirs=True),
    GAP: lambda run: [gap for gap in run.teacher_gaps if math.isfinite(gap[1])],
}


def draw_scores(curves: Mapping[str, Sequence[tuple[int, float, float | None]]], title: str) -> Figure:
    """Scores in hundredths against steps: (step, mean, standard deviation) by name; a lone point is a level line."""
    (axis,), figure = _panels(1, columns=1, height=3.3)
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


def draw_growth(panels: Sequence[GrowthPanel]) -> Figure:
    """Measured dots and expected lines, four panels a row."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes, figure = _panels(len(panels), columns=4, height=2.7)
    for axis, panel in zip(axes, panels, strict=True):
        for index, (name, points) in enumerate(panel.measured.items()):
            axis.plot(*zip(*points, strict=True), "o", color=COLOURS[index], markersize=5, label=name)
        for index, (name, points) in enumerate(panel.expected.items()):
            axis.plot(*zip(*points, strict=True), color=COLOURS[~index], linewidth=1.2, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=10)
        low, high = axis.get_ylim()
        axis.set_ylim(low / 1.3, high * 1.3)
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        for which in (axis.xaxis, axis.yaxis):
            which.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axis.set_xlabel(panel.xlabel)
        axis.set_ylabel(panel.ylabel)
        axis.legend(frameon=False, labelcolor=INK, fontsize="x-small")
    return figure


def _short(value: float) -> str:
    """A number in few signs: 262144 as 256k."""
    for size, sign in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{sign}"
    return f"{value:,g}" if value < 1e6 else f"{value:.0e}"


def _panels(count: int, *, columns: int, height: float) -> tuple[list[Axes], Figure]:
    """Axes in rows of `columns`, each row `height` inches high, drawn in INK on nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("curves need matplotlib, which is missing; pip install 'ki_ds[demo]'") from None
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH / 3, height * rows + 0.3), layout="constrained")
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    for axis in axes:
        axis.set_facecolor("none")
        axis.tick_params(colors=INK, which="both", labelsize="small")
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(INK)
        axis.grid(color=INK, alpha=0.12, linewidth=0.6)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
    return axes, figure


def _legend_below(figure: Figure, axis: Axes) -> None:
    """One legend of what `axis` shows, each label once."""
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    longest = max(map(len, handles), default=1)
    columns = max(1, min(len(handles), 150 // (longest + 8)))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize="small",
    )


def _dots(axis: Axes, place: float, values: Sequence[float], look: Look) -> None:
    """The values on a line of their own, and the interval of their mean."""
    if not all(map(math.isfinite, values)):
        return
    found = spread(values)
    axis.plot(values, [place] * len(values), "o", color=look.color, markersize=5, alpha=0.75)
    if found.half_width is not None:
        axis.errorbar(found.mean, place, xerr=found.half_width, color=look.color, capsize=3, marker="|", linewidth=1.4)


def _name_rows(axis: Axes, names: Sequence[str], title: str) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axis.set_xlabel(title)


def _draw_panel(axis: Axes, comparison: Comparison, cost: str, scale: float, title: str) -> None:
    """Every run's curve, and what was reached when."""
    looks = _looks(comparison)
    for arm in comparison.arms:
        for index, run in enumerate(arm.runs):
            x = [getattr(point.costs, cost) / scale for point in run.curve]
            label, width = arm.label if index == 0 else None, 1.8 if len(arm.runs) == 1 else 1.0
            y = [point.ppl for point in run.curve]
            axis.plot(x, y, linewidth=width, marker=".", markersize=4, label=label, **looks[arm]._asdict())
    _scale_perplexity(axis, comparison)
    _mark_targets(axis, comparison, cost, scale)
    _mark_teacher(axis, comparison)
    axis.set_xlabel(title)
    if not any(math.isfinite(getattr(run.curve[-1].costs, cost)) for run in comparison.runs):
        axis.text(0.5, 0.5, "not known", transform=axis.transAxes, ha="center", color=INK, alpha=0.7)


def _mark_targets(axis: Axes, comparison: Comparison, cost: str, scale: float) -> None:
    """The target as a dotted line, a ring where a run first reached it, and the share saved if one arm inherits."""
    if comparison.baseline is None:
        return
    target = statistics.fmean(run.curve[-1].ppl for run in comparison.baseline.runs)
    axis.axhline(target, color=INK, linewidth=0.8, linestyle=":")
    looks = _looks(comparison)
    for arm, pairs in zip(comparison.others, comparison.savings, strict=True):
        reached = [getattr(pair.inheriting, cost) / scale for pair in pairs if pair.inheriting]
        targets = [pair.target_ppl for pair in pairs if pair.inheriting]
        axis.plot(reached, targets, "o", color=looks[arm].color, markersize=7, markerfacecolor="none", linestyle="none")
        saved = [getattr(pair.saved, cost) for pair in pairs if pair.saved]
        known = len(saved) == len(pairs) and all(map(math.isfinite, saved))
        if len(comparison.others) == 1 and known and (cost != "seconds" or comparison.same_machine):
            place = (statistics.fmean(reached), target)
            text = f"{statistics.fmean(saved):.0%} saved"
            axis.annotate(text, place, (-7, -13), textcoords="offset points", ha="right", color=INK, fontsize="small")


def _mark_teacher(axis: Axes, comparison: Comparison) -> None:
    """The teacher's own perplexity, if one and the same taught every inheriting run, as a dashed line."""
    ppls = {run.teacher_ppl for run in comparison.runs if run.teachers}
    low, high = axis.get_ylim()
    if len(ppls) == 1 and (ppl := ppls.pop()) and ppl < high:
        axis.axhline(ppl, color=INK, linewidth=0.8, linestyle="--", alpha=0.6, label="the teacher")
        axis.set_ylim(min(low, ppl * 0.97), high)


def _looks(comparison: Comparison) -> dict[Arm, Look]:
    number = len(COLOURS)
    return {
        arm: Look(COLOURS[index % number], STYLES[index // number % len(STYLES)])
        for index, arm in enumerate(comparison.arms)
    }


def _scale_perplexity(axis: Axes, comparison: Comparison) -> None:
    """Logarithmic, without the fall from the size of the vocabulary, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    values = [p.ppl for run in comparison.runs for p in run.curve if math.isfinite(p.ppl)]
    if not values:
        return
    late = [  # after the first eighth of the steps, or at the end
        p.ppl
        for run in comparison.runs
        for p in run.curve
        if math.isfinite(p.ppl) and p.costs.steps >= run.curve[-1].costs.steps / 8
    ] or values
    axis.set_yscale("log")
    axis.set_ylim(min(values) * 0.96, min(max(values), max(late)) * 1.04)
    wide = axis.get_ylim()[1] > 4 * axis.get_ylim()[0]
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 4, 6, 8)) if wide else MaxNLocator(8))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _cost_scale(comparison: Comparison, cost: str) -> tuple[float, str]:
    """What to divide a cost by, and the title of its axis."""
    spent = [getattr(run.curve[-1].costs, cost) for run in comparison.runs]
    largest = max((value for value in spent if math.isfinite(value)), default=0.0)
    title = COST_TITLES[cost]
    if cost == "seconds":
        return (3600.0, f"hours of {title}") if largest >= 7200 else (60.0, f"minutes of {title}")
    if cost == "steps" or largest < 1e4:
        return 1.0, title
    exponent = int(math.log10(largest))
    return 10.0**exponent, f"{title}, $10^{{{exponent}}}$"


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
