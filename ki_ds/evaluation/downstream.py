"""Models compared on downstream tasks: a grid of settings, several seeds, baselines beside them, one table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from ki_ds.checkpoints.checkpoint import claimed
from ki_ds.evaluation.finetune import RANDOM, Candidate, Outcome
from ki_ds.evaluation.scores import METRICS, Spread, score, simplest_guess
from ki_ds.evaluation.tasks import GLUE, Grid, Settings, TaskData
from ki_ds.evaluation.trials import Trial, run_trials
from ki_ds.files import write_json

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
                for metric, spread in found.items()
            }
            for part, found in self.scores.items()
        }
        figures = {"seconds": self.seconds, "num_parameters": self.num_parameters, "share_cut": self.share_cut}
        settings = self.settings.as_dict() if self.settings else None
        names = {"model": self.model, "data": self.data, "settings": settings, "seeds": list(self.seeds)}
        return {**names, "scores": scores, **figures}


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


def _title(data: TaskData) -> str:
    name = GLUE[data.name].title if data.name in GLUE else data.name
    sizes = ", ".join(f"{len(examples):,} {part}" for part, examples in data.parts.items())
    chosen = "the validation part" if data.scored_part == "test" else "it, as in the paper"
    return f"{name} ({sizes}); {data.scored_part} is scored, epoch and settings are chosen on {chosen}"


def _overview(rows: Sequence[Row], sets: Sequence[TaskData]) -> Table:
    """The first score of each set, and the mean over the sets (Tables 1 and 5)."""
    shown = Table("model", box=None)
    for data in sets:
        name = GLUE[data.name].title if data.name in GLUE else data.name
        shown.add_column(f"{name}\n{METRICS[data.metrics[0]]}", justify="right", no_wrap=True)
    shown.add_column("mean", justify="right")
    for model in dict.fromkeys(row.model for row in rows):
        found = {row.data: row.scores[data_of(sets, row.data).scored_part] for row in rows if row.model == model}
        spreads = [found[data.name][data.metrics[0]] for data in sets]
        mean = statistics.fmean(spread.mean for spread in spreads)
        shown.add_row(model, *map(str, spreads), f"{100 * mean:.1f}")
    return shown


def data_of(sets: Sequence[TaskData], name: str) -> TaskData:
    """The set of a name."""
    return next(data for data in sets if data.name == name)
