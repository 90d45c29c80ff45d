"""Models, or a run's checkpoints, compared on downstream tasks (Tables 1 and 5, Figure 6).

A grid of settings, several seeds, and baselines beside them.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from ki_ds.checkpoints.checkpoint import claimed, damage
from ki_ds.errors import UserError
from ki_ds.evaluation.finetune import RANDOM, Candidate, Outcome
from ki_ds.evaluation.scores import METRICS, Spread, score, simplest_guess
from ki_ds.evaluation.tasks import Grid, Settings, TaskData
from ki_ds.evaluation.trials import Trial, run_trials
from ki_ds.files import write_atomically, write_json
from ki_ds.reports.figures import draw_scores, png_bytes

MAJORITY = "majority class"


@dataclass(frozen=True)
class Row:
    """A model's (or a baseline's) scores on one data set.

    Args:
        model: its name.
        data: the set's name.
        settings: those with the best mean score on the validation part; None of the majority class.
        seeds: of the fine-tunings that `scores` holds, in their order.
        scores: part -> metric -> spread over the seeds.
        seconds: of all fine-tunings, those with other settings too.
        num_parameters: of the fine-tuned model; 0 of the majority class.
        share_cut: of the examples, that were longer than the model reads.
    """

    model: str
    data: str
    settings: Settings | None
    seeds: tuple[int, ...]
    scores: dict[str, dict[str, Spread]]
    seconds: float = 0.0
    num_parameters: int = 0
    share_cut: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        scores = {
            part: {
                metric: {"mean": spread.mean, "std": spread.std, "values": list(spread.values)}
                for metric, spread in of_part.items()
            }
            for part, of_part in self.scores.items()
        }
        settings = asdict(self.settings) if self.settings else None
        return vars(self) | {"settings": settings, "seeds": list(self.seeds), "scores": scores}


def evaluate(
    candidates: Sequence[Candidate],
    sets: Sequence[TaskData],
    grid: Grid,
    out: Path,
    *,
    num_seeds: int | None = None,
    places: Sequence[str] | None = None,
    show_progress: bool = True,
) -> list[Row]:
    """A row for each model and set, and for each set a row of every architecture's random start and of the majority.

    Every setting of the grid is run with every seed, for the baselines too. A model's setting is the one with the
    best mean score on the validation part; no test example has a part in the choice.

    Args:
        out: results are kept here, and read when they are asked for again; `scores.json` holds the rows.
        num_seeds: 1 ... N; None repeats each set as often as the paper.

    Raises:
        UserError: see `trials.run_trials`; or another evaluation works in `out`.
    """
    everyone = [*dict.fromkeys(candidates), *_baselines(candidates)]
    hashes = {data.name: data.sha256() for data in sets}
    majority = {data.name: majority_row(data) for data in sets}  # first: it needs the packages that score
    with claimed(out, what="--out"):
        trials = {
            (candidate, data.name): [
                Trial(candidate, data.name, hashes[data.name], settings, seed)
                for settings in grid.settings()
                for seed in range(1, 1 + (num_seeds or data.seeds))
            ]
            for data in sets
            for candidate in everyone
        }
        outcomes = run_trials(
            [trial for some in trials.values() for trial in some],
            {hashes[data.name]: data for data in sets},
            out,
            places=places,
            show_progress=show_progress,
        )
        rows = []
        for data in sets:
            for candidate in everyone:
                rows.append(_row(candidate, data, trials[candidate, data.name], outcomes))
            rows.append(majority[data.name])
        write_json(out / "scores.json", {"rows": [row.as_dict() for row in rows]})
    return rows


def _baselines(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Random weights of every architecture among the models, named by the first model of each if there are several."""
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        first.setdefault(candidate.architecture, candidate)
    return [c.untrained(f"{RANDOM} as {c.name}" if len(first) > 1 else RANDOM) for c in first.values()]


def _row(
    candidate: Candidate,
    data: TaskData,
    trials: Sequence[Trial],
    outcomes: dict[Trial, Outcome],
) -> Row:
    by_settings: dict[Settings, list[Trial]] = {}
    for trial in trials:
        by_settings.setdefault(trial.settings, []).append(trial)
    best = choose({settings: [outcomes[t] for t in some] for settings, some in by_settings.items()}, data.metrics[0])
    chosen = [outcomes[trial] for trial in by_settings[best]]
    first = chosen[0]
    return Row(
        model=candidate.name,
        data=data.name,
        settings=best,
        seeds=tuple(trial.seed for trial in by_settings[best]),
        scores={
            part: {metric: Spread(tuple(o.scores[part][metric] for o in chosen)) for metric in data.metrics}
            for part in first.scores
        },
        seconds=sum(outcomes[trial].seconds for trial in trials),
        num_parameters=first.num_parameters,
        share_cut=first.share_cut,
    )


def choose(outcomes: dict[Settings, list[Outcome]], metric: str) -> Settings:
    """The settings with the best mean validation score; of equals the first."""
    return max(outcomes, key=lambda s: statistics.fmean(o.scores["valid"][metric] for o in outcomes[s]))


def majority_row(data: TaskData) -> Row:
    """What the most frequent class (or mean grade) of the training part would get."""
    guess = simplest_guess([example.label for example in data.parts["train"]], graded=data.is_graded)
    scores = {}
    for part, examples in data.parts.items():
        if part != "train":
            truth = [example.label for example in examples]
            found = {metric: score(metric, [guess] * len(truth), truth) for metric in data.metrics}
            scores[part] = {metric: Spread((value,)) for metric, value in found.items()}
    return Row(MAJORITY, data.name, None, (), scores)


# --- tables -----------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row], sets: Sequence[TaskData]) -> Iterator[Group]:
    """A table for each set and, of several, one of them all with their mean; each below a line that says what it is."""
    for data in sets:
        yield Group(_title(data), _table([row for row in rows if row.data == data.name], data), "")
    if len(sets) > 1:
        yield Group("together", _overview(rows, sets))


def _table(rows: Sequence[Row], data: TaskData) -> Table:
    part, others = data.scored_part, [name for name in data.parts if name not in ("train", data.scored_part)]
    shown = Table(box=None)
    shown.add_column("model", no_wrap=True)
    columns = [(part, metric) for metric in data.metrics] + [(name, data.metrics[0]) for name in others]
    for name, metric in columns:
        shown.add_column(f"{METRICS[metric]}, {name}", justify="right", no_wrap=True)
    for name in ("lr", "batch", "seeds", "minutes", "cut"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [str(row.scores[name][metric]) for name, metric in columns]
        if row.settings is not None:
            cells += [f"{row.settings.lr:g}", f"{row.settings.batch_size}", f"{len(row.seeds)}"]
            cells += [f"{row.seconds / 60:.1f}", f"{row.share_cut:.0%}"]
        shown.add_row(row.model, *cells)
    return shown


def main_scores(rows: Sequence[Row], sets: Sequence[TaskData], model: str) -> list[Spread]:
    """A model's scores that stand for each set."""
    of_model = {row.data: row for row in rows if row.model == model}
    return [of_model[data.name].scores[data.scored_part][data.metrics[0]] for data in sets]


def _title(data: TaskData) -> str:
    sizes = ", ".join(f"{len(examples):,} {part}" for part, examples in data.parts.items())
    chosen = "the validation part" if data.scored_part == "test" else "it, as in the paper"
    return f"{data.title} ({sizes}); {data.scored_part} is scored, epoch and settings are chosen on {chosen}"


def _overview(rows: Sequence[Row], sets: Sequence[TaskData]) -> Table:
    """The first score of each set, and the mean over the sets (Tables 1 and 5)."""
    shown = Table("model", box=None)
    for data in sets:
        shown.add_column(f"{data.title}\n{METRICS[data.metrics[0]]}", justify="right", no_wrap=True)
    shown.add_column("mean", justify="right")
    for model in dict.fromkeys(row.model for row in rows):
        spreads = main_scores(rows, sets, model)
        mean = statistics.fmean(spread.mean for spread in spreads)
        shown.add_row(model, *map(str, spreads), f"{100 * mean:.1f}")
    return shown


# --- scores against steps ------------------------------------------------------------------------------------------


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
        curves.append(Curve(name, {step: _mean_over_sets(rows, sets, model) for step, model in of_run.items()}))
    for name in dict.fromkeys(row.model for row in rows if _is_baseline(row.model)):
        curves.append(Curve(name, {0: _mean_over_sets(rows, sets, name)}))
    points = {
        curve.name: [{"step": s, "mean": p.mean, "std": p.std, "values": p.values} for s, p in curve.points.items()]
        for curve in curves
    }
    write_json(out / "along.json", {"score": score_name(sets), "curves": points})
    figure = draw_scores({c.name: [(s, p.mean, p.std) for s, p in c.points.items()] for c in curves}, score_name(sets))
    write_atomically(out / "along.png", png_bytes(figure))
    return curves


def _mean_over_sets(rows: Sequence[Row], sets: Sequence[TaskData], model: str) -> Spread:
    by_seed = zip(*(spread.values for spread in main_scores(rows, sets, model)), strict=False)
    return Spread(tuple(map(statistics.fmean, by_seed)))


def _is_baseline(name: str) -> bool:
    return name.startswith((RANDOM, MAJORITY))


def score_name(sets: Sequence[TaskData]) -> str:
    """What the curves show."""
    if len(sets) > 1:
        return f"mean of {len(sets)} tasks"
    return f"{sets[0].title}, {METRICS[sets[0].metrics[0]]} ({sets[0].scored_part})"


def curve_table(curves: Sequence[Curve], sets: Sequence[TaskData]) -> Table:
    """A row a step, a column a run; the baselines and what was reached when below."""
    shown = Table("step", box=None, caption=score_name(sets), caption_justify="left")
    runs = [curve for curve in curves if not _is_baseline(curve.name)]
    for curve in runs:
        shown.add_column(curve.name, justify="right", no_wrap=True)
    for step in sorted({step for curve in runs for step in curve.points}):
        shown.add_row(f"{step:,}", *(str(curve.points.get(step, "")) for curve in runs))
    for curve in curves[len(runs) :]:
        shown.add_row(curve.name, *[str(curve.points[0])] * len(runs))
    return shown


def reached(curves: Sequence[Curve]) -> list[str]:
    """For each run but the first, a line with the first of its steps that has the first run's last score."""
    runs = [curve for curve in curves if not _is_baseline(curve.name)]
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
