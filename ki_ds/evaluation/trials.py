"""Many fine-tunings: finished ones are kept by all that they depend on, the others run, a process for each GPU."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ki_ds.errors import UserError
from ki_ds.evaluation.finetune import Candidate, Outcome, fine_tune
from ki_ds.evaluation.tasks import Settings, TaskData
from ki_ds.files import read_json, write_json

_FORMAT = 1  # of what a fine-tuning does with the same settings; raised when that changes


@dataclass(frozen=True)
class Trial:
    """One fine-tuning; `data` names its set by hash, since a worker holds the sets itself."""

    candidate: Candidate
    data_name: str
    data_sha256: str
    settings: Settings
    seed: int

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Everything that its outcome depends on."""
        return {
            "format": _FORMAT,
            "architecture": self.candidate.architecture,
            "weights": self.candidate.weights,
            "data": {"name": self.data_name, "sha256": self.data_sha256},
            "settings": asdict(self.settings),
            "seed": self.seed,
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

    @property
    def key(self) -> str:
        """Hash of the facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:24]


def devices() -> list[str]:
    """A name for each place to compute on: every visible GPU, else the CPU."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def run_trials(
    trials: Sequence[Trial],
    sets: Mapping[str, TaskData],
    out: Path,
    *,
    places: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[Trial, Outcome]:
    """The outcomes of all trials, of which those that `out` holds are read and the others are computed.

    Args:
        sets: by hash.
        out: folder of results, one JSON file a trial, each written when its trial ends.
        places: see `devices`; with several, as many processes work side by side.

    Raises:
        UserError: a trial cannot be done, or a result is damaged. Finished trials stay.
    """
    outcomes = {trial: _read(path) for trial in trials if (path := _path(out, trial)).exists()}
    left = [trial for trial in trials if trial not in outcomes]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for unfinished in out.glob(".*.tmp"):  # of a process that was killed
        shutil.rmtree(unfinished)
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        bar = progress.add_task("fine-tuning", total=len(trials), completed=len(outcomes))

        def finished(trial: Trial, outcome: Outcome) -> None:
            outcomes[trial] = outcome
            write_json(_path(out, trial), trial.facts | {"name": trial.candidate.name, "outcome": asdict(outcome)})
            progress.update(bar, completed=len(outcomes), description=_what(trial))

        if left:
            (out / "results").mkdir(parents=True, exist_ok=True)
            places = places or devices()
            if len(places) == 1:
                for trial in left:
                    progress.update(bar, description=_what(trial))
                    moved = lambda share: progress.update(bar, completed=len(outcomes) + share)  # noqa: E731
                    finished(trial, _run(trial, sets[trial.data_sha256], out, places[0].partition(":")[0], moved))
            else:
                _side_by_side(left, sets, out, places[: len(left)], finished)
    return outcomes


def _what(trial: Trial) -> str:
    name = Path(trial.candidate.name).name
    return f"{trial.data_name}, {name}, lr {trial.settings.lr:g}, seed {trial.seed}"


def _path(out: Path, trial: Trial) -> Path:
    return out / "results" / f"{trial.key}.json"


def _read(path: Path) -> Outcome:
    content = read_json(path)
    try:
        return Outcome(**content["outcome"])
    except (KeyError, TypeError):
        raise UserError(f"{path} is no result of a fine-tuning; remove it, and it is computed again") from None


def _run(trial: Trial, data: TaskData, out: Path, device: str, on_step: Callable[[float], None] | None) -> Outcome:
    scratch = out / f".{trial.key}.tmp"
    try:
        return fine_tune(
            trial.candidate, data, trial.settings, seed=trial.seed, scratch=scratch, device=device, on_step=on_step
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# --- several processes ------------------------------------------------------------------------------------------


def _side_by_side(
    trials: Sequence[Trial],
    sets: Mapping[str, TaskData],
    out: Path,
    places: Sequence[str],
    finished: Callable[[Trial, Outcome], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for place in places:
        queue.put(place)
    pool = ProcessPoolExecutor(
        len(places), mp_context=context, initializer=_take_place, initargs=(queue, len(places), dict(sets), out)
    )
    try:
        futures = {pool.submit(_run_here, trial): trial for trial in trials}
        for future in as_completed(futures):
            finished(futures[future], future.result())
    except BrokenProcessPool:
        raise UserError(
            "a process that fine-tuned has ended (out of memory?); finished ones are kept: call it again to go on, "
            "with a lower --micro_batch_size if that was it"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((pool._processes or {}).values()):
            process.terminate()


_HERE: dict[str, Any] = {}  # a worker's own place and data, set once when it starts


def _take_place(queue: Any, num_places: int, sets: dict[str, TaskData], out: Path) -> None:
    place = queue.get()
    kind, _, number = place.partition(":")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if kind == "cuda":  # before this process looks at a GPU: Trainer takes all that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(number)] if visible else number
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # accelerate would take this process for a rank of the job that set them
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_places)))  # accelerate reads it
    _HERE.update(kind=kind, sets=sets, out=out)


def _run_here(trial: Trial) -> Outcome:
    return _run(trial, _HERE["sets"][trial.data_sha256], _HERE["out"], _HERE["kind"], None)
