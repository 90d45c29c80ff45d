"""A comparison of runs in figures: the table of its arms, its findings in words, and a CSV of every run."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from ki_ds.reports.intervals import Spread, spread
from ki_ds.reports.results import Costs, Run
from ki_ds.reports.savings import Arm, Comparison, Savings, costs_to_reach

SHOWN_COSTS = {
    "steps": "steps",
    "student_flops": "FLOPs, student only",
    "flops_with_teacher": "FLOPs with teacher",
    "flops_with_ancestors": "FLOPs with all ancestors",
    "seconds": "time",
}
SAVING = "  saving"  # first cell of the rows that state shares saved
MEANINGS = (
    "The target is the final validation perplexity of the self-learner of the same seed (the baseline: the first arm "
    "of its section that learns alone). A run is charged what it had spent when it first reached the target, linear "
    "in log-perplexity between two validations; the baseline too, up to its own first crossing. A saving is 1 minus "
    "that cost over the baseline's; the change of the final perplexity needs no crossing.",
    "With several seeds: the mean ± half of its 95% interval (Student's t over the seeds), below it the smallest and "
    "the largest.",
    "FLOPs: 6 a parameter and token for the student alone, as in the paper; with 2 a parameter and token for the "
    "teacher's forward while it teaches; and with everything that was spent before on its teachers, on theirs, and on "
    "what it started from, each ancestor once, as the lineage records say.",
)


# --- numbers ----------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """How a kind of figure is written: value / scale, in `form` (or with significant digits), with a suffix."""

    scale: float
    form: str | None
    suffix: str

    def show(self, value: float, *, digits: int = 3) -> str:
        """The value without its suffix."""
        scaled = value / self.scale
        return format(scaled, self.form) if self.form else f"{float(f'{scaled:.{digits}g}'):g}"


PERPLEXITY, STEPS = Unit(1, ".2f", ""), Unit(1, ",.0f", "")
SHARE, CHANGE = Unit(0.01, ".1f", "%"), Unit(0.01, "+.1f", "%")


def _flops(value: float) -> Unit:
    """With an SI prefix: 1.23 PFLOP."""
    for prefix, scale in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return Unit(scale, None, f" {prefix}FLOP")
    return Unit(1, None, " FLOP")


def _time(seconds: float) -> Unit:
    return Unit(3600, ",.1f", " h") if seconds >= 7200 else Unit(60, ".2f", " min")


COST_UNITS: dict[str, Callable[[float], Unit]] = {
    "steps": lambda _: STEPS,
    "student_flops": _flops,
    "flops_with_teacher": _flops,
    "flops_with_ancestors": _flops,
    "seconds": _time,
}


def duration(seconds: float) -> str:
    """In minutes or hours."""
    unit = _time(seconds)
    return unit.show(seconds) + unit.suffix


def shown(values: Sequence[float], unit: Unit) -> str:
    """The value; of several runs mean ± half of the 95% interval, and smallest to largest in a second line."""
    found = spread(values)
    if math.isnan(found.mean):
        return "unknown"
    lines = [_mean(found, unit)]
    if found.smallest < found.largest:
        lines.append(f"{unit.show(found.smallest)} to {unit.show(found.largest)}{unit.suffix}")
    return "\n".join(lines)


def _mean(found: Spread, unit: Unit) -> str:
    if not found.half_width or math.isnan(found.half_width):
        return unit.show(found.mean) + unit.suffix
    return f"{unit.show(found.mean)} ± {unit.show(found.half_width, digits=2).lstrip('+')}{unit.suffix}"


# --- the table --------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Text in rows and columns, for a terminal (`report`) and for HTML (`page`). A cell's further lines are small."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    title: str = ""


def comparison_table(comparison: Comparison) -> Table:
    """Costs and final perplexities: a row for the baseline, two (costs and savings) for every other arm."""
    columns = ("", *SHOWN_COSTS.values(), "final perplexity", *comparison.domains)
    if (baseline := comparison.baseline) is None:
        rows = [_row(comparison, arm, [run.curve[-1].costs for run in arm.runs]) for arm in comparison.arms]
        return Table(columns, rows, "Costs up to the last validation")
    rows = [_row(comparison, baseline, [costs_to_reach(run.curve, run.curve[-1].ppl) for run in baseline.runs])]
    for arm, pairs in zip(comparison.others, comparison.savings, strict=True):
        rows.append(_row(comparison, arm, [pair.inheriting for pair in pairs]))
        saved = _cost_cells([pair.saved for pair in pairs], lambda _name, _mean: SHARE)
        if "not reached" not in saved[0] and not comparison.same_machine:
            saved[-1] = "other machine"
        changes = [
            [pair.domain_changes[name] for pair in pairs if name in pair.domain_changes] for name in comparison.domains
        ]
        changes = [[pair.ppl_change for pair in pairs], *changes]
        rows.append((SAVING, *saved, *(_known(values, CHANGE) for values in changes)))
    several = len(baseline.runs) > 1 and comparison.others
    title = f"Costs up to the final validation perplexity of the self-learner, {_ends(baseline.runs)}"
    return Table(columns, rows, f"{title}, each run against the baseline of its own seed" if several else title)


def _row(comparison: Comparison, arm: Arm, costs: Sequence[Costs | None]) -> tuple[str, ...]:
    ends = [run.curve[-1] for run in arm.runs]
    by_domain = [[end.domains[name] for end in ends if name in end.domains] for name in comparison.domains]
    ppls = [_known(values, PERPLEXITY) for values in ([end.ppl for end in ends], *by_domain)]
    return (arm.label, *_cost_cells(costs, lambda name, mean: COST_UNITS[name](mean)), *ppls)


def _known(values: Sequence[float], unit: Unit) -> str:
    return shown(values, unit) if values else "-"


def _cost_cells(costs: Sequence[Costs | None], unit: Callable[[str, float], Unit]) -> list[str]:
    """Each cost; "not reached" as soon as one run did not get there: no mean over the others."""
    reached = [spent for spent in costs if spent is not None]
    if len(reached) < len(costs):
        return [_not_reached(costs), *["-"] * (len(SHOWN_COSTS) - 1)]
    values = {name: [getattr(spent, name) for spent in reached] for name in SHOWN_COSTS}
    return [shown(column, unit(name, spread(column).mean)) for name, column in values.items()]


def _not_reached(costs: Sequence[Costs | None]) -> str:
    return "not reached" if len(costs) == 1 else f"not reached in {costs.count(None)} of {len(costs)}"


# --- words ------------------------------------------------------------------------------------------------------


def section_title(comparison: Comparison) -> str:
    """Task and size of the students."""
    task = {"mlm": "Masked LM", "causal": "Causal LM"}.get(comparison.task, comparison.task)
    return f"{task}, students of {comparison.num_parameters:,} parameters"


def findings(comparison: Comparison) -> list[str]:
    """A sentence for each arm: what it saved, and where it ended."""
    if not comparison.others:
        return [f"{arm.label}: final perplexity {_ends(arm.runs)}" for arm in comparison.arms]
    return [_finding(arm, pairs) for arm, pairs in zip(comparison.others, comparison.savings, strict=True)]


def _ends(runs: Sequence[Run]) -> str:
    return _mean(spread([run.curve[-1].ppl for run in runs]), PERPLEXITY)


def _finding(arm: Arm, pairs: Sequence[Savings]) -> str:
    change = _mean(spread([pair.ppl_change for pair in pairs]), CHANGE)
    end = f"final perplexity {_ends(arm.runs)} ({change} against the self-learner's)"
    shares = [pair.saved for pair in pairs]
    saved = [share for share in shares if share is not None]
    if len(saved) < len(shares):
        return f"{arm.label}: the self-learner's final perplexity was {_not_reached(shares)}; {end}"
    flops = _mean(spread([share.flops_with_teacher for share in saved]), SHARE)
    steps = _mean(spread([share.steps for share in saved]), SHARE)
    return f"{arm.label}: {flops} of the FLOPs saved with the teacher counted, {steps} of the steps; {end}"


# --- the CSV ----------------------------------------------------------------------------------------------------


def csv_text(sections: Sequence[Comparison]) -> str:
    """One line a run; empty cells where nothing can be stated.

    Costs up to the target, the shares of them saved (`saved_`), all costs to the end (`end_`), the change of the final
    perplexity, the gap to the teacher at the end (nats a row), and the final perplexity of each domain (`ppl_`).
    """
    costs = [f.name for f in fields(Costs)]
    domains = dict.fromkeys(name for section in sections for name in section.domains)
    columns = ["arm", "run", "seed", "status", "task", "student_parameters", "final_ppl", "target_ppl", *costs]
    columns += [f"saved_{name}" for name in costs] + [f"end_{name}" for name in costs]
    columns += ["ppl_change", "gap_to_teacher", *(f"ppl_{name}" for name in domains), "path"]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for section in sections:
        savings_of = dict(zip(section.others, section.savings, strict=True))
        for arm in section.arms:
            for run, pair in zip(arm.runs, savings_of.get(arm, itertools.repeat(None)), strict=False):
                row = _csv_row(section, arm, run, pair)
                writer.writerow({name: cell for name, cell in row.items() if cell == cell})  # no NaN
    return out.getvalue()


def _csv_row(section: Comparison, arm: Arm, run: Run, pair: Savings | None) -> dict[str, Any]:
    end = run.curve[-1]
    row = {"arm": arm.label, "run": run.name, "seed": run.seed, "status": run.manifest["status"], "task": section.task}
    row |= {"student_parameters": section.num_parameters, "final_ppl": end.ppl, "path": str(run.path)}
    row |= {f"ppl_{name}": ppl for name, ppl in end.domains.items()}
    row |= {f"end_{name}": cost for name, cost in asdict(end.costs).items()}
    if run.teacher_gaps:
        row["gap_to_teacher"] = run.teacher_gaps[-1][1]
    if pair or arm is section.baseline:
        row["target_ppl"] = pair.target_ppl if pair else end.ppl
        row |= asdict(spent) if (spent := costs_to_reach(run.curve, row["target_ppl"])) else {}
    if pair:
        row["ppl_change"] = pair.ppl_change
        saved = asdict(pair.saved) if pair.saved else {}
        row |= {f"saved_{name}": part for name, part in saved.items() if name != "seconds" or section.same_machine}
    return row
