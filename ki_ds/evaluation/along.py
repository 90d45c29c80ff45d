"""Downstream scores of a run's checkpoints against its steps (Table 5, Figure 6)."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from ki_ds.checkpoints.checkpoint import damage
from ki_ds.errors import UserError
from ki_ds.evaluation.downstream import MAJORITY, Row, evaluate
from ki_ds.evaluation.finetune import RANDOM, Candidate
from ki_ds.evaluation.scores import METRICS, Spread
from ki_ds.evaluation.tasks import GLUE, Grid, TaskData
from ki_ds.files import write_atomically, write_json
from ki_ds.reports.figures import draw_scores, png_bytes


@dataclass(frozen=True)
class Curve:
    """A run's scores along its training, or a baseline's single one (no steps).

    Args:
        points: step -> spread over the seeds; of several sets the mean of each seed's scores.
    """

    name: str
    points: dict[int, Spread]


def checkpoints(run: str) -> list[tuple[int, Path]]:
    """The steps of a run and the Hugging Face folders of its checkpoints, oldest first.

    Raises:
        UserError: it is no run, or has no checkpoint, or one is damaged.
    """
    root = Path(run)
    if not (root / "run.json").exists():
        raise UserError(f"{run} is no run of ours, whose checkpoints could be compared; name its folder")
    found = []
    for folder in sorted((root / "checkpoints").glob("step_*")):
        match = re.fullmatch(r"step_(\d+)", folder.name)
        if match is not None and folder.is_dir():
            if (what := damage(folder)) is not None:
                raise UserError(f"{folder} is damaged: {what}; remove it, or restore it")
            found.append((int(match[1]), folder))
    if not found:
        raise UserError(
            f"{run} has no checkpoint yet; train it, with train.keep_checkpoints for as many as you compare"
        )
    return found


def evaluate_along(
    runs: Sequence[str],
    sets: Sequence[TaskData],
    grid: Grid,
    out: Path,
    *,
    num_seeds: int | None = None,
    tokenizer: str | None = None,
    places: Sequence[str] | None = None,
    show_progress: bool = True,
) -> list[Curve]:
    """A curve for each run, then the baselines; `along.json` and `along.png` in `out` hold them.

    Every checkpoint is evaluated as `downstream.evaluate` does. Where a set is repeated more often than another, the
    mean over the sets is that of the seeds that all of them have.

    Raises:
        UserError: see `checkpoints` and `downstream.evaluate`.
    """
    names = [Path(run).resolve().name for run in runs]
    names = [run if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
    candidates: dict[tuple[str, int], Candidate] = {}
    for run, name in zip(runs, names, strict=True):
        for step, folder in checkpoints(run):
            found = Candidate.find(str(folder), tokenizer=tokenizer)
            candidates[name, step] = replace(found, name=f"{name}, step {step}")
    rows = evaluate(
        [*candidates.values()], sets, grid, out, num_seeds=num_seeds, places=places, show_progress=show_progress
    )
    curves = []
    for name in names:
        of_run = {step: candidate.name for (run, step), candidate in candidates.items() if run == name}
        curves.append(Curve(name, {step: _together(rows, sets, model) for step, model in of_run.items()}))
    for name in dict.fromkeys(row.model for row in rows if row.model.startswith((RANDOM, MAJORITY))):
        curves.append(Curve(name, {0: _together(rows, sets, name)}))
    points = {
        curve.name: [{"step": s, "mean": p.mean, "std": p.std, "values": p.values} for s, p in curve.points.items()]
        for curve in curves
    }
    write_json(out / "along.json", {"score": score_name(sets), "curves": points})
    figure = draw_scores({c.name: [(s, p.mean, p.std) for s, p in c.points.items()] for c in curves}, score_name(sets))
    write_atomically(out / "along.png", png_bytes(figure))
    return curves


def _together(rows: Sequence[Row], sets: Sequence[TaskData], model: str) -> Spread:
    found = {row.data: row for row in rows if row.model == model}
    values = [found[data.name].scores[data.scored_part][data.metrics[0]].values for data in sets]
    return Spread(tuple(statistics.fmean(some) for some in zip(*values, strict=False)))


def score_name(sets: Sequence[TaskData]) -> str:
    """What the curves show."""
    if len(sets) > 1:
        return f"mean of {len(sets)} tasks"
    name = GLUE[sets[0].name].title if sets[0].name in GLUE else sets[0].name
    return f"{name}, {METRICS[sets[0].metrics[0]]} ({sets[0].scored_part})"


def table(curves: Sequence[Curve], sets: Sequence[TaskData]) -> Table:
    """A row a step, a column a run; the baselines and what was reached when below."""
    shown = Table("step", box=None, caption=score_name(sets), caption_justify="left")
    runs = [curve for curve in curves if not curve.name.startswith((RANDOM, MAJORITY))]
    for curve in runs:
        shown.add_column(curve.name, justify="right", no_wrap=True)
    for step in sorted({step for curve in runs for step in curve.points}):
        shown.add_row(f"{step:,}", *(str(curve.points.get(step, "")) for curve in runs))
    for curve in curves[len(runs) :]:
        shown.add_row(curve.name, *[str(curve.points[0])] * len(runs))
    return shown


def reached(curves: Sequence[Curve]) -> list[str]:
    """For each run but the first, a line with the first of its steps that has the first run's last score."""
    runs = [curve for curve in curves if not curve.name.startswith((RANDOM, MAJORITY))]
    first = runs[0]
    last = max(first.points)
    target = first.points[last].mean
    lines = []
    for curve in runs[1:]:
        step = next((s for s in sorted(curve.points) if curve.points[s].mean >= target), None)
        if step is None:
            lines.append(f"{curve.name} does not reach {first.name}'s {100 * target:.1f} of step {last:,}")
        else:
            lines.append(
                f"{curve.name} reaches {first.name}'s {100 * target:.1f} of step {last:,} at step {step:,} "
                f"({step / last - 1:+.1%}), as far as its checkpoints tell"
            )
    return lines
