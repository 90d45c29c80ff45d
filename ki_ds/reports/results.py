"""A finished run read from its folder: what it is, its lineage, and its perplexity against what it had spent."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ki_ds.checkpoints import lineage
from ki_ds.checkpoints.lineage import Lineage, teachers_of
from ki_ds.errors import UserError
from ki_ds.reports.metrics import perplexity


@dataclass(frozen=True)
class Costs:
    """What a run had spent at some point of its training. FLOPs: 6 a parameter and token, 2 of a teacher's forward."""

    steps: float
    tokens: float
    student_flops: float
    flops_with_teacher: float  # and its forward while it teaches
    flops_with_ancestors: float  # and all that was spent before on what taught or started it; NaN if not known
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
    """One validation: what had been spent, and the perplexity it bought, also by domain where there are several."""

    costs: Costs
    ppl: float
    domains: Mapping[str, float] = field(default_factory=dict)


Curve = tuple[Point, ...]


@dataclass(frozen=True, eq=False)
class Run:
    """A run read from its folder."""

    path: Path
    label: str | None  # of its arm, if the user gave one
    config: dict[str, Any]  # flat: {"optim.lr": ...}
    manifest: dict[str, Any]  # run.json
    lineage: Lineage | None  # the last record that the run wrote
    validations: tuple[dict[str, Any], ...]  # records of metrics.jsonl
    training: tuple[dict[str, Any], ...]
    curve: Curve
    over_all_domains: bool = False  # the curve's perplexities, whatever the run trains on
    title: str = ""  # the end of its path that tells it from the other runs of a comparison

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def teachers(self) -> list[dict[str, Any]]:
        return teachers_of(self.manifest)

    @property
    def measured_domains(self) -> frozenset[str] | None:
        """Domains that the run's own perplexity is of; None for all, the empty set where it is not recorded."""
        reported = {domain for record in self.validations for domain in record.get("domains", {})}
        measured = frozenset(self.manifest.get("valid_domains", ()))
        return None if not reported or measured == reported else measured

    def measured_on_all_domains(self) -> Run:
        """The run with perplexities of all its validation domains together."""
        curve = tuple(
            dataclasses.replace(point, ppl=_joint_ppl(record)) if record.get("domains") else point
            for point, record in zip(self.curve, self.validations, strict=True)
        )
        return dataclasses.replace(self, curve=curve, over_all_domains=True)

    @property
    def teacher_ppl(self) -> float | None:
        """Of the only teacher, where its lineage says that it was measured on the same text with the same masks."""
        if len(self.teachers) != 1 or self.over_all_domains or not (record := self.teachers[0].get("lineage")):
            return None
        facts = ("task", "valid_masks", "valid_domains")
        same = all(record.get(name) == self.manifest.get(name) is not None for name in facts)
        return record["valid_ppl"] if same and validation_data(record) == validation_data(self.manifest) else None

    @property
    def teacher_gaps(self) -> list[tuple[float, float]]:
        """(step, validation CE minus the teacher's, nats a row); empty where that is not known."""
        if self.teacher_ppl is None:
            return []
        return [(point.costs.steps, math.log(point.ppl / self.teacher_ppl)) for point in self.curve]


def with_titles(runs: Sequence[Run]) -> list[Run]:
    """The runs, each called by as much of its path as tells it from the others."""
    parts = [run.path.resolve().parts for run in runs]
    titled = []
    for run, own in zip(runs, parts, strict=True):
        others = [other for other in parts if other != own]
        depth = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        titled.append(dataclasses.replace(run, title="/".join(own[-depth:])))
    return titled


def validation_data(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of what a run is measured on: the tokenizer and the validation text, not what it trains on."""
    return {name: digest for name, digest in manifest["data"].items() if name != "train_sha256"}


def read_run(spec: str | Path, *, allow_unfinished: bool = False) -> Run:
    """The run in a folder.

    Args:
        spec: the folder, or LABEL=FOLDER to name its arm.
        allow_unfinished: take a run that has not come to its last step.

    Raises:
        UserError: no run there, a broken file, nothing validated yet, or an unfinished run.
    """
    label, equals, folder = str(spec).partition("=")
    labelled = bool(equals) and not Path(spec).exists()
    path = Path(folder if labelled else spec)
    manifest = _read_manifest(path / "run.json")
    if manifest["status"] != "finished" and not allow_unfinished:
        raise UserError(f"{path} is not finished; call it again to go on, or allow it with --allow_unfinished")
    records = _read_records(path / "metrics.jsonl")
    if not records["valid"]:
        raise UserError(f"{path} has no validation yet; wait for the first one")
    config, record = _read_config(path / "config.yaml"), _read_lineage(path)
    spent_before = _ancestors_flops(manifest, config, record)
    curve = tuple(_point(record, path, spent_before) for record in records["valid"])
    return Run(
        path,
        label if labelled else None,
        config,
        manifest,
        record,
        tuple(records["valid"]),
        tuple(records["train"]),
        curve,
    )


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


def _read_lineage(path: Path) -> Lineage | None:
    """The record of the latest weights: a teacher that came late is only in there. None where there is no record."""
    newest = sorted((path / "checkpoints").glob("step_*/hf"))[-1:]
    found = [(folder, lineage.read(folder, None)) for folder in (path / "best", *newest)]
    records = [(folder, record) for folder, record in found if record is not None]
    for folder, record in records:
        try:
            lineage.costs(record)
            lineage.tree(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{folder / lineage.FILE_NAME} is no record of a model's lineage"
            raise UserError(f"{what} ({type(error).__name__} {error}); restore it, or remove it") from None
    return max((record for _, record in records), key=lambda record: record["step"], default=None)


def _ancestors_flops(manifest: dict[str, Any], config: dict[str, Any], record: Lineage | None) -> float:
    """What was spent before the run began; NaN where a record is missing."""
    if record is None:
        alone = not teachers_of(manifest) and not manifest.get("former_teachers")
        return 0.0 if alone and config.get("model.init", "random") == "random" else math.nan
    return lineage.costs(record).ancestors if lineage.is_whole(record) else math.nan


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


def _point(record: dict[str, Any], path: Path, spent_before: float) -> Point:
    try:
        student, both = record["student_flops"], record["student_flops"] + record["teacher_flops"]
        costs = Costs(record["step"], record["tokens"], student, both, both + spent_before, record["seconds"])
        domains = {name: figures["ppl"] for name, figures in record.get("domains", {}).items()}
        return Point(costs, record["ppl"], domains)
    except KeyError as error:
        raise UserError(f"{path}/metrics.jsonl: the validation at step {record['step']} lacks {error}") from None


def _joint_ppl(record: dict[str, Any]) -> float:
    parts = record["domains"].values()
    return perplexity(sum(part["ce_sum"] for part in parts), sum(part["num_rows"] for part in parts))
