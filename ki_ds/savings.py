"""Finished runs compared at equal perplexity: curves, arms, and what inheriting saved (section 3.1, footnote 1).

The self-learner's final validation perplexity is the target; what counts is what the inheriting student had spent when
it first got there: steps, FLOPs (with the teacher's forward) and time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ki_ds.config import is_operational
from ki_ds.errors import UserError
from ki_ds.lineage import teachers_of

if TYPE_CHECKING:
    pass
TRAINING_FLOPS = 6  # per parameter and token: forward 2, backward 4 (Kaplan et al. 2020, as footnote 3 counts)
FORWARD_FLOPS = 2


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
    def teachers(self) -> list[dict[str, Any]]:
        return teachers_of(self.manifest)


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ in their seed only."""

    label: str
    runs: tuple[Run, ...]

    @property
    def inherits(self) -> bool:
        return bool(self.runs[0].teachers)


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
    """What tells two arms apart: every field that changes the training, but the seed; and the teachers' sizes."""
    identity = {key: value for key, value in run.config.items() if key != "seed" and not is_operational(key)}
    sizes = [teacher["num_parameters"] for teacher in run.teachers]
    return identity | ({"teacher.num_parameters": sizes if len(sizes) > 1 else sizes[0]} if sizes else {})


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
    kind = "inheriting" if run.teachers else "self-learning"
    peers = [_identity(group[0]) for group in groups if bool(group[0].teachers) == bool(run.teachers)]
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
    if any(run.teachers for run in runs):
        yield (
            "FLOPs: 6 a parameter and token for the student, 2 for the teacher's forward while it teaches. "
            "As in the paper, the teacher's own earlier training is not counted."
        )


# --- reading runs ---------------------------------------------------------------------------------------------------


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
        elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            yield from _flat({f"{key}.{number}": entry for number, entry in enumerate(value)}, prefix)
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
