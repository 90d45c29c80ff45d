"""What inheritance saved: finished runs compared at equal perplexity; a table, a CSV, curves, one HTML page.

The paper's way (section 3.1): the self-learner's final validation perplexity is the target; what counts is what the
inheriting student had spent when it first got there, in steps, in FLOPs (with the teacher's forward) and in time.
Reading and writing sit at the ends of this file, everything between is a pure function of the runs.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.markup import escape
from rich.table import Table

from ki_ds.config import OPERATIONAL_FIELDS
from ki_ds.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING_FLOPS = 6  # per parameter and token: forward 2, backward 4 (Kaplan et al. 2020, as footnote 3 counts)
FORWARD_FLOPS = 2
COLOURS = ("#d1701f", "#2f7fc1", "#3a9a4b", "#a35cc4", "#b8912a", "#c2467c")  # readable on white and on black
INK = "#123456"  # axes and text of a figure; becomes the page's own text colour in the HTML


# --- formulas and curves ----------------------------------------------------------------------------------------


def flops_saved_with_teacher(step_saving: float, *, student_params: float, teacher_params: float) -> float:
    """Share of the FLOPs saved when a share of the steps is saved and the teacher's forward runs in all others.

    A student costs 6 P_S FLOPs a token, its teacher's forward 2 P_T. Source: footnote 3, where 27.3% of the steps
    becomes 18.7% for P_S = 355M and P_T = 125M.
    """
    student, teacher = TRAINING_FLOPS * student_params, FORWARD_FLOPS * teacher_params
    return 1 - (1 - step_saving) * (student + teacher) / student


@dataclass(frozen=True)
class Costs:
    """What a run had spent at some point of its training."""

    steps: float
    student_flops: float
    flops_with_teacher: float  # and its forward while it teaches
    seconds: float  # of training, without validation and saving

    def toward(self, other: Costs, fraction: float) -> Costs:
        """The costs at a fraction of the way from here to `other`."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(Costs))
        return Costs(*(a + fraction * (b - a) for a, b in pairs))

    def saved_against(self, baseline: Costs) -> Costs:
        """Shares saved: 1 - own cost / baseline's cost, negative where more was spent; NaN where that cost is 0."""
        pairs = ((getattr(self, f.name), getattr(baseline, f.name)) for f in fields(Costs))
        return Costs(*(1 - own / other if other else math.nan for own, other in pairs))


@dataclass(frozen=True)
class Point:
    """One validation: what had been spent, and the perplexity it bought."""

    costs: Costs
    ppl: float


Curve = Sequence[Point]


def costs_to_reach(curve: Curve, ppl: float) -> Costs | None:
    """Costs at the first crossing of `ppl`, linear in log-perplexity between two validations; None if never reached."""
    before: Point | None = None
    for point in curve:
        if point.ppl <= ppl:
            if before is None or not math.isfinite(before.ppl):
                return point.costs
            span = math.log(before.ppl) - math.log(point.ppl)
            return before.costs.toward(point.costs, (math.log(before.ppl) - math.log(ppl)) / span)
        before = point
    return None


def steps_to_reach(curve: Curve, ppl: float) -> float | None:
    """Steps at the first crossing of `ppl`, as `costs_to_reach` finds it; None if never reached."""
    costs = costs_to_reach(curve, ppl)
    return None if costs is None else costs.steps


@dataclass(frozen=True)
class Savings:
    """One inheriting run against one self-learning run, at the latter's final perplexity."""

    target_ppl: float
    baseline: Costs
    inheriting: Costs | None  # None: the target was not reached
    final_ppl: float  # of the inheriting run

    @property
    def saved(self) -> Costs | None:
        """Shares of the baseline's costs saved; None if the target was not reached."""
        return None if self.inheriting is None else self.inheriting.saved_against(self.baseline)


def savings(baseline: Curve, inheriting: Curve) -> Savings:
    """What `inheriting` saved on the way to the final perplexity of `baseline`.

    Both are charged up to their first crossing of it: a baseline that had been there before its end gets no blame
    for the rest.
    """
    target = baseline[-1].ppl
    spent = costs_to_reach(baseline, target)
    assert spent is not None
    return Savings(target, spent, costs_to_reach(inheriting, target), inheriting[-1].ppl)


# --- runs, arms, comparison -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Run:
    """A run read from its folder."""

    path: Path
    label: str | None  # of its arm, if the user gave one
    config: dict[str, Any]  # flat: {"optim.lr": ...}
    manifest: dict[str, Any]  # run.json
    curve: tuple[Point, ...]
    training: tuple[dict[str, Any], ...]  # records of training steps

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def teacher(self) -> dict[str, Any] | None:
        return self.manifest.get("teacher")


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ in their seed only."""

    label: str
    runs: tuple[Run, ...]

    @property
    def inherits(self) -> bool:
        return self.runs[0].teacher is not None


@dataclass(frozen=True)
class Comparison:
    """Arms of equal data and student; `savings[i]` has one entry for each run of `others[i]`."""

    arms: tuple[Arm, ...]
    baseline: Arm | None  # the first arm that learnt alone
    others: tuple[Arm, ...]
    savings: tuple[tuple[Savings, ...], ...]
    same_machine: bool  # else times say nothing
    notes: tuple[str, ...]


def compare(runs: Sequence[Run]) -> Comparison:
    """The runs sorted into arms, and every other arm's savings against the first self-learning one.

    A run is compared with the baseline of its own seed, or with the first baseline where no seed fits.

    Raises:
        UserError: runs differ in what makes them comparable, or cannot be told apart.
    """
    if not runs:
        raise UserError("no run was given; give at least one run folder")
    _check_comparable(runs)
    arms = _arms(runs)
    baseline = next((arm for arm in arms if not arm.inherits), None)
    others = tuple(arm for arm in arms if baseline and arm is not baseline)
    pairs = tuple(
        tuple(savings(_partner(baseline, run).curve, run.curve) for run in arm.runs) for arm in others if baseline
    )
    same_machine = len({(run.manifest.get("device"), run.manifest.get("world_size")) for run in runs}) == 1
    return Comparison(arms, baseline, others, pairs, same_machine, tuple(_notes(runs, baseline, same_machine)))


def _partner(baseline: Arm, run: Run) -> Run:
    return next((other for other in baseline.runs if other.seed == run.seed), baseline.runs[0])


def _check_comparable(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        a, b = (_comparability(each.manifest) for each in (first, run))
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                raise UserError(
                    f"{first.path} and {run.path} cannot be compared: {key} is {_short(a.get(key))} and "
                    f"{_short(b.get(key))}; give runs of the same data, masks and student"
                )


def _comparability(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must be equal between two runs for their perplexities to be comparable."""
    facts = {"task": manifest["task"], "student.num_parameters": manifest["student"]["num_parameters"]}
    return facts | {f"{part}.{key}": value for part in ("data", "valid_masks") for key, value in manifest[part].items()}


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def _identity(run: Run) -> dict[str, Any]:
    """What tells two arms apart: every field that changes the training, but the seed; and the teacher's size."""
    ignored = OPERATIONAL_FIELDS | {"seed"}
    identity = {key: value for key, value in run.config.items() if key not in ignored}
    return identity | ({"teacher.num_parameters": run.teacher["num_parameters"]} if run.teacher else {})


def _arms(runs: Sequence[Run]) -> tuple[Arm, ...]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label or json.dumps(_identity(run), sort_keys=True, default=str), []).append(run)
    for group in groups.values():
        _check_seeds(group)
    return tuple(Arm(_label(group[0], list(groups.values())), tuple(group)) for group in groups.values())


def _check_seeds(group: list[Run]) -> None:
    seen: dict[int, Run] = {}
    for run in group:
        if run.seed in seen:
            raise UserError(
                f"{seen[run.seed].path} and {run.path} have the same configuration and seed {run.seed}; "
                "give one of them, or label the arms: LABEL=RUN"
            )
        seen[run.seed] = run


def _label(run: Run, groups: list[list[Run]]) -> str:
    """The user's label; else the kind, with the fields that tell it from other arms of its kind."""
    if run.label:
        return run.label
    kind = "inheriting" if run.teacher else "self-learning"
    peers = [_identity(group[0]) for group in groups if bool(group[0].teacher) == bool(run.teacher)]
    own = _identity(run)
    parts = [f"{key}={value}" for key, value in own.items() if any(peer.get(key) != value for peer in peers)]
    return f"{kind} ({', '.join(parts)})" if parts else kind


def _notes(runs: Sequence[Run], baseline: Arm | None, same_machine: bool) -> Iterator[str]:
    """What a reader must know to take the figures for what they are."""
    if baseline is None:
        yield "No self-learning run was given, so no saving can be stated."
    if unfinished := [run.name for run in runs if run.manifest["status"] != "finished"]:
        yield f"Not finished: {', '.join(unfinished)}; their final perplexity is the one so far."
    if not same_machine:
        yield "The runs used different machines or numbers of ranks, so their times are not compared."
    if any(run.teacher for run in runs):
        yield (
            "FLOPs: 6 a parameter and token for the student, 2 for the teacher's forward while it teaches. "
            "As in the paper, the teacher's own earlier training is not counted."
        )


# --- the table --------------------------------------------------------------------------------------------------

COLUMNS = ("", "steps", "FLOPs, student only", "FLOPs with teacher", "time", "final perplexity")
SAVING = "  saving"  # first cell of the rows that state shares saved


def table_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Cells of the table, COLUMNS wide: a row for the baseline, two (costs and savings) for every other arm."""
    if comparison.baseline is None:
        return [_last_row(arm) for arm in comparison.arms]
    spent = [costs_to_reach(run.curve, run.curve[-1].ppl) for run in comparison.baseline.runs]
    finals = [run.curve[-1].ppl for run in comparison.baseline.runs]
    rows = [(comparison.baseline.label, *_cost_cells(spent), _spread(finals, _ppl))]
    for arm, pairs in zip(comparison.others, comparison.savings, strict=True):
        cells = _cost_cells([pair.inheriting for pair in pairs])
        rows.append((arm.label, *cells, _spread([pair.final_ppl for pair in pairs], _ppl)))
        rows.append((SAVING, *_saving_cells(pairs, comparison.same_machine), _ppl_change(pairs)))
    return rows


def _last_row(arm: Arm) -> tuple[str, ...]:
    """An arm's costs at its end: there is no target."""
    cells = _cost_cells([run.curve[-1].costs for run in arm.runs])
    return (arm.label, *cells, _spread([run.curve[-1].ppl for run in arm.runs], _ppl))


def _cost_cells(costs: Sequence[Costs | None]) -> tuple[str, ...]:
    """Mean and spread of each cost; "not reached" as soon as one run did not get there: no mean over the others."""
    reached = [each for each in costs if each is not None]
    if len(reached) < len(costs):
        return (_not_reached(len(costs) - len(reached), len(costs)), "-", "-", "-")
    return (
        _spread([each.steps for each in reached], lambda value: f"{value:,.0f}"),
        _spread([each.student_flops for each in reached], _flops),
        _spread([each.flops_with_teacher for each in reached], _flops),
        _spread([each.seconds for each in reached], _duration),
    )


def _saving_cells(pairs: Sequence[Savings], same_machine: bool) -> tuple[str, ...]:
    saved = [pair.saved for pair in pairs if pair.saved is not None]
    if len(saved) < len(pairs):
        return (_not_reached(len(pairs) - len(saved), len(pairs)), "-", "-", "-")
    columns = [[getattr(each, f.name) for each in saved] for f in fields(Costs)]
    cells = [_spread(column, lambda value: f"{value:.1%}") for column in columns]
    return (*cells[:-1], cells[-1] if same_machine else "other machine")


def _not_reached(missing: int, total: int) -> str:
    return "not reached" if total == 1 else f"not reached in {missing} of {total}"


def _ppl_change(pairs: Sequence[Savings]) -> str:
    return _spread([pair.final_ppl / pair.target_ppl - 1 for pair in pairs], lambda value: f"{value:+.1%}")


def _spread(values: Sequence[float], show: Any) -> str:
    """The value, or mean ± sample standard deviation over several runs."""
    if len(values) == 1:
        return show(values[0])
    return f"{show(statistics.fmean(values))} ± {show(statistics.stdev(values)).lstrip('+')}"


def _ppl(value: float) -> str:
    return f"{value:.2f}"


def _flops(value: float) -> str:
    """With an SI prefix: 1.23 PFLOP."""
    for prefix, scale in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}FLOP"
    return f"{value:.3g} FLOP"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 7200 else f"{seconds / 60:.2f} min"


def caption(comparison: Comparison) -> str:
    """One sentence on what the costs of the table lead to."""
    if comparison.baseline is None:
        return "Costs up to the last validation"
    targets = [run.curve[-1].ppl for run in comparison.baseline.runs]
    spread = " (mean ± standard deviation over seeds)" if any(len(arm.runs) > 1 for arm in comparison.arms) else ""
    return f"Costs up to the self-learner's final validation perplexity of {_spread(targets, _ppl)}{spread}"


def text_table(comparison: Comparison) -> Table:
    """The table for a terminal, for rich to print; notes are its caption."""
    table = Table(title=caption(comparison), caption=escape("\n".join(comparison.notes)), title_justify="left")
    table.caption_justify = "left"
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for row in table_rows(comparison):
        saving = row[0] == SAVING
        table.add_row(*map(escape, row), end_section=saving, style="bold" if saving else None)
    return table


def csv_text(comparison: Comparison) -> str:
    """One line a run: costs up to the target, and the shares saved; empty cells where nothing can be stated."""
    names = [f.name for f in fields(Costs)]
    head = ["arm", "run", "seed", "status", "final_ppl", "target_ppl", *names, *(f"saved_{name}" for name in names)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for arm in comparison.arms:
        pairs = dict(zip(comparison.others, comparison.savings, strict=True)).get(arm)
        for index, run in enumerate(arm.runs):
            writer.writerow(_csv_row(arm, run, pairs[index] if pairs else None, comparison))
    return out.getvalue()


def _csv_row(arm: Arm, run: Run, pair: Savings | None, comparison: Comparison) -> list[object]:
    final = run.curve[-1].ppl
    target = pair.target_ppl if pair else (final if arm is comparison.baseline else None)
    costs = None if target is None else costs_to_reach(run.curve, target)
    saved = pair.saved if pair else None
    row: list[object] = [arm.label, run.name, run.seed, run.manifest["status"], final, target]
    for source in (costs, saved):
        row += [getattr(source, f.name) if source else None for f in fields(Costs)]
    if not comparison.same_machine:
        row[-1] = None
    return row


# --- figures ----------------------------------------------------------------------------------------------------


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
    """The teacher's own perplexity, if one and the same taught every inheriting run, as a dashed line."""
    teachers = [run.teacher for arm in comparison.arms for run in arm.runs if run.teacher]
    ppls = {teacher.get("valid_ppl") for teacher in teachers}
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


# --- the page ---------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --faint: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; padding: .3rem 0; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.saving { font-weight: 600; background: var(--faint); }
svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
.notes { font-size: .9rem; }
@media print { body { max-width: none; margin: 0; } h2 { break-after: avoid; } svg, table { break-inside: avoid; } }
"""


def page(comparison: Comparison, curves_svg: str, training_svg: str) -> str:
    """One HTML page that needs nothing beside itself."""
    task = comparison.arms[0].runs[0].manifest["task"]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in comparison.notes)
    rows = table_rows(comparison)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Knowledge inheritance: {html.escape(headline(comparison))}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(headline(comparison))}</h1>
<div class="wide">{_html_table(COLUMNS, rows, caption(comparison))}</div>
<div class="notes">{notes}</div>
<h2>Validation perplexity ({html.escape(task)})</h2>
<p>Dotted: the self-learner's final perplexity; a ring marks where another arm first reached it.
Dashed: the teacher.</p>
{curves_svg}
<h2>Inheritance rate and losses during training</h2>
{training_svg}
<h2>Runs</h2>
<div class="wide">{_html_table(*_details(comparison), "")}</div>
</body></html>
"""


def headline(comparison: Comparison) -> str:
    """The main finding in one sentence."""
    if not comparison.others:
        return "Perplexity of " + ", ".join(arm.label for arm in comparison.arms)
    arm, pairs = comparison.others[0], comparison.savings[0]
    cells = _saving_cells(pairs, comparison.same_machine)
    if any(pair.saved is None for pair in pairs):
        return f"{arm.label}: the self-learner's final perplexity was {cells[0]}"
    return f"{arm.label}: {cells[2]} of the FLOPs saved with the teacher counted, {cells[0]} of the steps"


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str) -> str:
    lines = [f"<table><caption>{html.escape(title)}</caption>" if title else "<table>"]
    lines.append("<thead><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr></thead><tbody>")
    for row in rows:
        kind = ' class="saving"' if row[0] == SAVING else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join(lines) + "</tbody></table>"


def _details(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(head, rows): a column for each run, so that many runs scroll sideways and facts read downwards."""
    runs = [(arm, run) for arm in comparison.arms for run in arm.runs]
    facts = [_facts(arm, run) for arm, run in runs]
    rows = [(key, *(each.get(key, "-") for each in facts)) for key in facts[0]]
    return ("", *(run.name for _, run in runs)), rows


def _facts(arm: Arm, run: Run) -> dict[str, str]:
    manifest, config, teacher = run.manifest, run.config, run.teacher
    end = run.curve[-1].costs
    return {
        "arm": arm.label,
        "seed": str(run.seed),
        "status": manifest["status"],
        "student parameters": f"{manifest['student']['num_parameters']:,}",
        "teacher parameters": f"{teacher['num_parameters']:,}" if teacher else "-",
        "teacher perplexity": _ppl(teacher["valid_ppl"]) if teacher and teacher.get("valid_ppl") else "-",
        "teacher weights": teacher["weights_sha256"][:12] if teacher else "-",
        "alpha": str(config.get("inherit.schedule", "-")),
        "steps": f"{end.steps:,.0f}",
        "steps with teacher": f"{manifest.get('inheriting_steps', 0):,}",
        "sequences a step": str(config.get("train.global_batch_size", "-")),
        "tokens a sequence": str(config.get("data.seq_len", "-")),
        "peak learning rate": str(config.get("optim.lr", "-")),
        "time": _duration(end.seconds),
        "device": f"{manifest.get('world_size', '?')} x {manifest.get('device', '?')}",
        "data": manifest["data"].get("train_sha256", "-")[:12],
    }


# --- effects: reading runs, writing files -----------------------------------------------------------------------


def read_run(spec: str | Path, *, allow_unfinished: bool = False) -> Run:
    """The run in a folder.

    Args:
        spec: the folder, or LABEL=FOLDER to name its arm.
        allow_unfinished: take a run that has not come to its last step.

    Raises:
        UserError: no run there, a broken file, nothing validated yet, or an unfinished run.
    """
    label, path = _split_label(spec)
    manifest = _read_manifest(path / "run.json")
    if manifest["status"] != "finished" and not allow_unfinished:
        raise UserError(f"{path} is not finished; call it again to go on, or allow it with --allow_unfinished")
    records = _read_records(path / "metrics.jsonl")
    curve = tuple(_point(record, path) for record in records["valid"])
    if not curve:
        raise UserError(f"{path} has no validation yet; wait for the first one")
    return Run(path, label, _read_config(path / "config.yaml"), manifest, curve, tuple(records["train"]))


def _split_label(spec: str | Path) -> tuple[str | None, Path]:
    label, equals, folder = str(spec).partition("=")
    if equals and not Path(spec).exists():
        return label, Path(folder)
    return None, Path(spec)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"{path} cannot be read; {path.parent} is not the folder of a run") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; it was damaged, restore it or leave the run out") from None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_read_text(path))
        needed = ("task", "status", "student", "data", "valid_masks")
        missing = [key for key in needed if key not in manifest]
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON ({error}); restore it or leave the run out") from None
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it is not the record of a training run")
    return manifest


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration with dotted names."""
    try:
        config = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML ({error}); restore it or leave the run out") from None
    if not isinstance(config, dict) or "seed" not in config:
        raise UserError(f"{path} has no seed; it is not the configuration of a run")
    return dict(_flat(config))


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_records(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Training and validation records in order of steps: a step that was done again replaces what came after it."""
    records: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        try:
            record = json.loads(line)
            kind, step = record["kind"], record["step"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number} is not a record of metrics; remove or restore the line") from None
        kept = records.setdefault(kind, [])
        while kept and kept[-1]["step"] >= step:
            kept.pop()
        kept.append(record)
    return records


def _point(record: dict[str, Any], path: Path) -> Point:
    try:
        student, teacher = record["student_flops"], record["teacher_flops"]
        return Point(Costs(record["step"], student, student + teacher, record["seconds"]), record["ppl"])
    except KeyError as error:
        raise UserError(f"{path}/metrics.jsonl: the validation at step {record['step']} lacks {error}") from None


def write_report(
    specs: Sequence[str | Path], out: str | Path = "report.html", *, allow_unfinished: bool = False
) -> Comparison:
    """Compare the runs and write OUT.html, OUT.png and OUT.csv; the comparison, for `text_table` to print.

    Args:
        specs: run folders, or LABEL=FOLDER.
        out: the page; the curves and the CSV get its name with their own suffix.
        allow_unfinished: take runs that have not come to their last step.

    Raises:
        UserError: a run cannot be read, the runs cannot be compared, or the files cannot be written.
    """
    comparison = compare([read_run(spec, allow_unfinished=allow_unfinished) for spec in specs])
    curves, training = draw_curves(comparison), draw_training(comparison)
    text = page(comparison, svg_text(curves, name="curves"), svg_text(training, name="training"))
    base = Path(out)
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        base.with_suffix(".png").write_bytes(png_bytes(curves))
        base.with_suffix(".csv").write_text(csv_text(comparison), encoding="utf-8")
        base.with_suffix(".html").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{base} cannot be written ({error.strerror}); give another place with --out") from None
    return comparison
