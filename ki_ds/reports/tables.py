"""A comparison of runs in figures: the table of its arms, its findings in words, and a CSV of every run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import NamedTuple

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


def columns(comparison: Comparison) -> tuple[str, ...]:
    """Heads of the table's columns: the arm, costs, and final perplexities."""
    return ("", *SHOWN_COSTS.values(), "final perplexity", *comparison.domains)


def table_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Cells under `columns`: a row for the baseline, two (costs and savings) for every other arm."""
    if comparison.baseline is None:
        return [_row(comparison, arm, [run.curve[-1].costs for run in arm.runs]) for arm in comparison.arms]
    baseline = comparison.baseline
    rows = [_row(comparison, baseline, [costs_to_reach(run.curve, run.curve[-1].ppl) for run in baseline.runs])]
    for arm, pairs in zip(comparison.others, comparison.savings, strict=True):
        rows.append(_row(comparison, arm, [pair.inheriting for pair in pairs]))
        rows.append((SAVING, *_saving_cells(pairs, comparison.same_machine), *_change_cells(pairs, comparison.domains)))
    return rows


def _row(comparison: Comparison, arm: Arm, costs: Sequence[Costs | None]) -> tuple[str, ...]:
    ends = [run.curve[-1] for run in arm.runs]
    by_domain = [[end.domains[name] for end in ends if name in end.domains] for name in comparison.domains]
    return (arm.label, *_cost_cells(costs), *(_ppl_cell(ppls) for ppls in ([end.ppl for end in ends], *by_domain)))


def _ppl_cell(ppls: Sequence[float]) -> str:
    return shown(ppls, PERPLEXITY) if ppls else "-"


def _cost_cells(costs: Sequence[Costs | None]) -> list[str]:
    """Each cost; "not reached" as soon as one run did not get there: no mean over the others."""
    reached = [each for each in costs if each is not None]
    if len(reached) < len(costs):
        return _not_reached(len(costs) - len(reached), len(costs))
    values = {name: [getattr(each, name) for each in reached] for name in SHOWN_COSTS}
    return [shown(values[name], COST_UNITS[name](spread(values[name]).mean)) for name in SHOWN_COSTS]


def _saving_cells(pairs: Sequence[Savings], same_machine: bool) -> list[str]:
    saved = [pair.saved for pair in pairs if pair.saved is not None]
    if len(saved) < len(pairs):
        return _not_reached(len(pairs) - len(saved), len(pairs))
    cells = [shown([getattr(each, name) for each in saved], SHARE) for name in SHOWN_COSTS]
    return [*cells[:-1], cells[-1] if same_machine else "other machine"]


def _not_reached(missing: int, total: int) -> list[str]:
    said = "not reached" if total == 1 else f"not reached in {missing} of {total}"
    return [said, *["-"] * (len(SHOWN_COSTS) - 1)]


def _change_cells(pairs: Sequence[Savings], domains: Iterable[str]) -> list[str]:
    columns = [[pair.ppl_change for pair in pairs]]
    columns += [[pair.domain_changes[name] for pair in pairs if name in pair.domain_changes] for name in domains]
    return [shown(changes, CHANGE) if changes else "-" for changes in columns]


def caption(comparison: Comparison) -> str:
    """What the costs of the table lead to."""
    if comparison.baseline is None:
        return "Costs up to the last validation"
    targets = [run.curve[-1].ppl for run in comparison.baseline.runs]
    each = ", each run against the baseline of its own seed" if len(targets) > 1 and comparison.others else ""
    mean = _mean(spread(targets), PERPLEXITY)
    return f"Costs up to the final validation perplexity of the self-learner, {mean}{each}"


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
    saved = [pair.saved for pair in pairs if pair.saved is not None]
    if len(saved) < len(pairs):
        return f"{arm.label}: the self-learner's final perplexity was {_saving_cells(pairs, True)[0]}; {end}"
    flops, steps = (
        _mean(spread([getattr(each, name) for each in saved]), SHARE) for name in ("flops_with_teacher", "steps")
    )
    return f"{arm.label}: {flops} of the FLOPs saved with the teacher counted, {steps} of the steps; {end}"


# --- the CSV ----------------------------------------------------------------------------------------------------


def csv_text(sections: Sequence[Comparison]) -> str:
    """One line a run; empty cells where nothing can be stated.

    Costs up to the target, the shares of them saved (`saved_`), all costs to the end (`end_`), the change of the final
    perplexity, the gap to the teacher at the end (nats a row), and the final perplexity of each domain (`ppl_`).
    """
    names = [f.name for f in fields(Costs)]
    domains = list(dict.fromkeys(name for section in sections for name in section.domains))
    head = ["arm", "run", "seed", "status", "task", "student_parameters", "final_ppl", "target_ppl", *names]
    head += [f"saved_{name}" for name in names] + [f"end_{name}" for name in names]
    head += ["ppl_change", "gap_to_teacher", *(f"ppl_{name}" for name in domains), "path"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for section in sections:
        pairs_of = dict(zip(section.others, section.savings, strict=True))
        for arm in section.arms:
            pairs: Sequence[Savings | None] = pairs_of.get(arm, [None] * len(arm.runs))
            for run, pair in zip(arm.runs, pairs, strict=True):
                writer.writerow([_stated(cell) for cell in _csv_row(section, arm, run, pair, domains)])
    return out.getvalue()


def _csv_row(section: Comparison, arm: Arm, run: Run, pair: Savings | None, domains: Iterable[str]) -> list[object]:
    end, names = run.curve[-1], [f.name for f in fields(Costs)]
    target = pair.target_ppl if pair else (end.ppl if arm is section.baseline else None)
    costs = None if target is None else costs_to_reach(run.curve, target)
    row: list[object] = [arm.label, run.name, run.seed, run.manifest["status"], section.task, section.num_parameters]
    row += [end.ppl, target, *(getattr(costs, name, None) for name in names)]
    saved = pair.saved if pair else None
    row += [getattr(saved, name, None) if name != "seconds" or section.same_machine else None for name in names]
    row += [getattr(end.costs, name) for name in names]
    row += [pair.ppl_change if pair else None, run.teacher_gaps[-1][1] if run.teacher_gaps else None]
    return [*row, *(end.domains.get(name) for name in domains), str(run.path)]


def _stated(cell: object) -> object:
    return None if isinstance(cell, float) and math.isnan(cell) else cell
