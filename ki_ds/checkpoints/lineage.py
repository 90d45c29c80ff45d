"""Where weights come from: a record beside every exported model, which holds those of its teachers in turn.

`lineage.json` travels with the weights, so that the tree of a third generation is whole without the first one's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.tree import Tree

from ki_ds.errors import UserError
from ki_ds.files import read_json

FILE_NAME = "lineage.json"
VERSION = 1

Lineage = dict[str, Any]


@dataclass(frozen=True)
class Costs:
    """FLOPs: of the model's own training, of its teachers' forwards, and of both over all of its ancestors."""

    own: float
    teachers: float
    ancestors: float

    @property
    def cumulative(self) -> float:
        """Everything that was spent for this model to exist."""
        return self.own + self.teachers + self.ancestors


def teachers_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of a run's teachers, as its run.json has them, in the order of the configuration."""
    if "teachers" in manifest:
        return manifest["teachers"]
    return [manifest["teacher"]] if manifest.get("teacher") else []  # written when a run had one teacher at most


def identities(teachers: Sequence[dict[str, Any]]) -> list[Any]:
    """What tells teachers, by their facts, from others: weights (or a hub's name), domains and share of each."""
    return [[known["weights_sha256"] or known["path"], known["domains"], known["share"]] for known in teachers]


def check_run(
    run_dir: Path, data: dict[str, str], teachers: Sequence[dict[str, Any]], *, other_teachers: bool
) -> dict[str, Any]:
    """What run.json says of a run's teachers, those that it had, and the model that it started from; {} of a new run.

    Args:
        data: hashes of the run's vocabulary and data, now.
        teachers: facts of the teachers that the configuration names, asked or not.
        other_teachers: whether they may be others than before.

    Raises:
        UserError: data, tokenizer or a teacher changed under the run.
    """
    if not (run_dir / "run.json").exists():
        return {}
    before = read_json(run_dir / "run.json", "data")
    for name, digest in data.items():
        if before["data"][name] != digest:
            raise UserError(
                f"run_dir={run_dir}: {name} was {before['data'][name][:12]}, data.corpus has {digest[:12]}; "
                "give the run its own data back, or start in another run_dir"
            )
    had = teachers_of(before)
    if had and teachers and not other_teachers:
        check_teachers(run_dir, had, teachers)
    return {
        "teachers": had,
        "former_teachers": before.get("former_teachers", []),
        "started_from": before.get("started_from"),
    }


def check_teachers(run_dir: Path, old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> None:
    """UserError when the teachers of a run that goes on are not, one by one, those that it had."""
    allow = "--train.changed_config allow"
    if len(old) != len(new):
        raise UserError(
            f"run_dir={run_dir} inherited from {len(old)} teachers, now there are {len(new)}; give the same, or {allow}"
        )
    for number, (before, now) in enumerate(zip(old, new, strict=True)):
        hub_names = {known["path"] for known in (before, now) if known["weights_sha256"] is None}
        if before["weights_sha256"] != now["weights_sha256"] or len(hub_names) > 1:
            field_name = "teacher.path" if now["name"] is None else f"teachers.{number}.path"
            raise UserError(
                f"run_dir={run_dir} inherited from {before['path']}, {field_name}={now['path']} has other weights; "
                f"give the same teacher, or {allow}"
            )
        # the same teacher would say something else: from another cache, or all where it said its top K
        old_cache, new_cache = before.get("cache"), now["cache"]
        other_key = old_cache and new_cache and old_cache["key_sha256"] != new_cache["key_sha256"]
        if other_key or _is_topk(old_cache) != _is_topk(new_cache):
            raise UserError(
                f"run_dir={run_dir} inherited from {_speaker(old_cache)}, now it is {_speaker(new_cache)}; give the "
                f"same, or {allow}"
            )


def _is_topk(cache: dict[str, Any] | None) -> bool:
    return cache is not None and cache["kind"] == "topk"


def _speaker(cache: dict[str, Any] | None) -> str:
    return f"the cache {cache['path']} ({cache['kind']}, key {cache['key_sha256'][:12]})" if cache else "the teacher"


def describe(
    manifest: dict[str, Any], *, step: int, tokens: int, flops: tuple[float, float], ppl: float | None, weights: str
) -> Lineage:
    """The record of a model at `step` of the run that `manifest` (run.json) describes.

    Args:
        flops: (the student's training, its teachers' forwards) so far.
        ppl: on the run's own validation set (of `valid_domains`, with `valid_masks`), if measured with these weights.
        weights: SHA-256 of the weight files, which ties the record to them.
    """
    return {
        "version": VERSION,
        "name": manifest["name"],
        "task": manifest["task"],
        "weights_sha256": weights,
        "num_parameters": manifest["student"]["num_parameters"],
        "data": manifest["data"],
        "seed": manifest["seed"],
        "step": step,
        "tokens": tokens,
        "student_flops": flops[0],
        "teacher_flops": flops[1],
        "valid_ppl": ppl,
        "valid_domains": manifest["valid_domains"],
        "valid_masks": manifest["valid_masks"],
        "inherit": manifest["inherit"],
        "teachers": [*manifest["former_teachers"], *teachers_of(manifest)],
        "started_from": manifest["started_from"],
    }


def read(folder: Path, weights: str | None) -> Lineage | None:
    """The record beside some weights, or None where there is none.

    Raises:
        UserError: it cannot be read, or `weights` (SHA-256 of the weight files) is not what it was written for.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, expected = record["version"], record["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a model's lineage ({error}); restore it, or remove it") from None
    if version != VERSION:
        raise UserError(f"{path} has version {version}, this program reads {VERSION}; remove it to go on without")
    if weights is not None and weights != expected:
        raise UserError(
            f"the weights in {folder} have SHA-256 {weights[:12]}, {FILE_NAME} says {expected[:12]}; they were "
            "changed: restore them, or remove the record"
        )
    return record


def costs(record: Lineage) -> Costs:
    """FLOPs of a model; an ancestor that taught several generations counts once."""
    ancestors = {parent["weights_sha256"]: parent for parent in _ancestors(record)}
    spent = sum(parent["student_flops"] + parent["teacher_flops"] for parent in ancestors.values())
    return Costs(record["student_flops"], record["teacher_flops"], spent)


def is_whole(record: Lineage) -> bool:
    """Whether every ancestor has a record, so that `costs` has all that was spent."""
    return all(parent["lineage"] is not None and is_whole(parent["lineage"]) for parent in _parents(record))


def _ancestors(record: Lineage) -> Iterator[Lineage]:
    for parent in _parents(record):
        if parent["lineage"] is not None:
            yield parent["lineage"]
            yield from _ancestors(parent["lineage"])


def _parents(record: Lineage) -> list[dict[str, Any]]:
    return [*record["teachers"], *([record["started_from"]] if record["started_from"] else [])]


def tree(record: Lineage) -> Tree:
    """The model, below it its teachers (and what it started from), below each of them theirs."""
    return _grow(Tree(_label(record)), record)


def _grow(branch: Tree, record: Lineage) -> Tree:
    for parent in _parents(record):
        what = "started from" if parent is record["started_from"] else f"taught{_part(parent)} by"
        if parent["lineage"] is None:
            digest = f", weights {parent['weights_sha256'][:12]}" if parent["weights_sha256"] else ""
            branch.add(f"{what} {parent['path']} ({parent['num_parameters']:,} parameters{digest}; no record)")
        else:
            _grow(branch.add(f"{what} {_label(parent['lineage'])}"), parent["lineage"])
    return branch


def _part(teacher: dict[str, Any]) -> str:
    """What one of several teachers was there for."""
    if teacher.get("domains"):
        return f" ({', '.join(teacher['domains'])})"
    return "" if teacher.get("share") is None else f" (share {teacher['share']:g})"


def _label(record: Lineage) -> str:
    spent = costs(record)
    parts = [
        f"{record['name']} ({record['task']}, {record['num_parameters']:,} parameters)",
        f"step {record['step']:,}, {record['tokens']:,} tokens",
        f"FLOPs {spent.own:.3g} own, {spent.teachers:.3g} for teachers, {spent.cumulative:.3g} with all ancestors",
        f"data {record['data']['train_sha256'][:12]}, weights {record['weights_sha256'][:12]}",
    ]
    if record["valid_ppl"] is not None:
        parts.insert(1, f"valid ppl {record['valid_ppl']:.2f}")
    if record["inherit"]["schedule"] != "none":
        inherit = record["inherit"]
        steps = f", T_inherit {inherit['steps']:,}" if inherit["steps"] else ""
        parts.insert(1, f"inherited ({inherit['schedule']}{steps}, tau {inherit['tau']:g})")
    return "\n".join(parts)
