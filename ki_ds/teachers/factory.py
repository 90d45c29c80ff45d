"""From the configuration to a teacher, with every check that must come before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ki_ds.checkpoints import lineage
from ki_ds.checkpoints.lineage import Lineage
from ki_ds.config import RunConfig, Task, TeacherConfig
from ki_ds.data.datasets import Datasets, check_tokenizer
from ki_ds.errors import UserError
from ki_ds.files import read_json
from ki_ds.models.presets import (
    DTYPES,
    Rows,
    check_vocabulary,
    count_parameters,
    load_lm,
    max_positions,
    model_folder,
    read_config,
    weights_sha256,
)
from ki_ds.teachers.cache import CachedTeacher, check_coverage, fitting_semantics
from ki_ds.teachers.cache_files import CacheFiles, Manifest
from ki_ds.teachers.many import Assignment, ManyTeachers
from ki_ds.teachers.online import OnlineTeacher
from ki_ds.teachers.overlap import OverlappedTeacher
from ki_ds.teachers.questions import Questions
from ki_ds.teachers.teacher import Teacher
from ki_ds.teachers.topk import TopKTeacher

_LARGEST_PADDING = 1024  # output classes beyond the tokenizer's ids that can still be padding


@dataclass(frozen=True)
class TeacherFacts:
    """What a run's manifest says about a teacher."""

    path: str
    weights_sha256: str | None
    num_parameters: int
    dense_parameters: int
    tokenizer_checked: bool
    valid_ppl: float | None  # of a run of ours, on its own validation set
    lineage: Lineage | None  # of a model of ours
    cache: dict[str, Any] | None = None  # where its signals are read from: path, key_sha256, kind, forward_flops
    name: str | None = None  # in the metrics of a run with several teachers
    domains: list[str] | None = None  # whose rows it teaches; None is all
    share: float | None = None  # in the average of several teachers


def make_teachers(
    config: RunConfig, data: Datasets, *, device: torch.device, questions: Questions | None = None
) -> tuple[Teacher, list[TeacherFacts]]:
    """All teachers of a run as one, and the facts of each in the order of the configuration.

    Arguments and errors as in `make_teacher`; a cache of K entries cannot be averaged either.
    """
    entries = config.all_teachers
    assignment = Assignment.of(entries, data.domains)
    made = [
        make_teacher(
            replace(config.teacher, path=entry.path),
            config.task,
            tokenizer_sha256=data.vocabulary.sha256,
            num_classes=data.vocabulary.size,
            seq_len=config.data.seq_len,
            packing=config.data.packing,
            padded=data.padded,
            pad_id=data.train.pad_id,
            device=device,
            questions=None if questions is None else questions.of_domains(assignment.of_teacher(number)),
            what="teacher.path" if config.teachers is None else f"teachers.{number}.path",
        )
        for number, entry in enumerate(entries)
    ]
    facts = [found for _, found in made]
    teachers = [_cut(teacher, config, data.vocabulary.size) for teacher, _ in made]
    if config.teachers is None:
        return _placed(teachers[0], config.teacher, device), facts
    _check_average(assignment, facts)
    names = _names([entry.domains for entry in entries], [entry.path for entry in entries])
    facts = [
        replace(found, name=name, domains=entry.domains, share=entry.share)
        for found, name, entry in zip(facts, names, entries, strict=True)
    ]
    return _placed(ManyTeachers(teachers, assignment), config.teacher, device), facts


def identify_teachers(config: RunConfig) -> list[dict[str, Any]]:
    """path, weights_sha256, cache, name, domains and share of all teachers of a run, of which none is loaded.

    Raises:
        UserError: there is no model, or no cache, at a path.
    """
    found = []
    for number, entry in enumerate(config.all_teachers):
        known: dict[str, Any] = {"path": entry.path, "cache": None}
        if config.teacher.placement == "cache":
            manifest = Manifest.read(Path(entry.path))
            known |= {"path": manifest.teacher["path"], "weights_sha256": manifest.teacher["weights_sha256"]}
            known["cache"] = _facts_of_cache(entry.path, manifest)
        else:
            what = "teacher.path" if config.teachers is None else f"teachers.{number}.path"
            folder = model_folder(entry.path)
            read_config(folder, what=what)
            known["weights_sha256"] = weights_sha256(folder) if Path(folder).is_dir() else None
        name = None if config.teachers is None else str(number)
        found.append(known | {"name": name, "domains": entry.domains, "share": entry.share})
    return found


def _cut(teacher: Teacher, config: RunConfig, num_classes: int) -> Teacher:
    """The teacher with its K largest entries alone, where the run asks for that."""
    topk, semantics = config.teacher.topk, config.teacher.topk_semantics
    if topk is None:
        return teacher
    if topk > num_classes:
        raise UserError(f"teacher.topk={topk} exceeds the {num_classes:,} ids of the vocabulary; lower it")
    return TopKTeacher(teacher, topk=topk, tau=config.inherit.tau, num_classes=num_classes, semantics=semantics)


def _placed(teacher: Teacher, config: TeacherConfig, device: torch.device) -> Teacher:
    return OverlappedTeacher(teacher, device) if config.placement == "overlap" else teacher


def _names(domains: Sequence[list[str] | None], paths: Sequence[str]) -> list[str]:
    """A name for each of several teachers: that of its domains, or of its folder, numbered where two are alike."""
    names = [
        "+".join(taught) if taught is not None else Path(path).name for taught, path in zip(domains, paths, strict=True)
    ]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name}_{number}" for number, name in enumerate(names)]


def _check_average(assignment: Assignment, facts: Sequence[TeacherFacts]) -> None:
    """UserError where the average of several teachers would need more than what a cache holds of one."""
    for number, found in enumerate(facts):
        if assignment.domain_ids is None and len(facts) > 1 and found.cache and found.cache["kind"] == "topk":
            raise UserError(
                f"teachers.{number}.path={found.cache['path']} holds K entries a row, which cannot be averaged with "
                "other teachers; cache hidden states (--kind hidden), or give every entry domains"
            )


def make_teacher(
    config: TeacherConfig,
    task: Task,
    *,
    tokenizer_sha256: str,
    num_classes: int,
    seq_len: int,
    device: torch.device,
    packing: bool = False,
    padded: bool = True,
    pad_id: int | None = None,
    questions: Questions | None = None,
    what: str = "teacher.path",
) -> tuple[Teacher, TeacherFacts]:
    """The teacher that the configuration asks for, and its facts.

    Args:
        tokenizer_sha256: hash of the vocabulary of the corpus: of a tokenizer, or of a fairseq dictionary.
        num_classes: its ids.
        seq_len: the longest row that it will be asked about, in tokens.
        packing: whether several blocks may share a row.
        padded: whether rows may get padding, and
        pad_id: what it is made of; None: as the teacher's own.
        questions: the masked samples that it will be asked about; a cache wants to know.
        what: the configuration's field that names its path, for error lines.

    Raises:
        UserError: it cannot be read, has another tokenizer or vocabulary, or too few positions; or the cache was made
            for other samples, or lacks some.
    """
    if config.placement == "cache":
        assert questions is not None
        return _cached(config, questions, device)
    assert config.path is not None
    folder = model_folder(config.path)
    name = "fp16" if device.type == "cuda" else "fp32"
    dtype = DTYPES[name if config.dtype == "auto" else config.dtype]
    read_config(folder, what=what)  # the cheapest way to find that it is no model at all
    checked = check_tokenizer(folder, tokenizer_sha256, task, what=what)
    lm = load_lm(folder, task, dtype, what=what)
    _check_shape(lm, f"{what}={config.path}", num_classes=num_classes, seq_len=seq_len)
    digest = weights_sha256(folder) if Path(folder).is_dir() else None
    parameters = count_parameters(lm)
    facts = TeacherFacts(
        config.path,
        digest,
        parameters["num_parameters"],
        parameters["dense_parameters"],
        tokenizer_checked=checked,
        valid_ppl=_valid_ppl(folder),
        lineage=lineage.read(Path(folder), digest),
    )
    return OnlineTeacher(lm, device=device, rows=Rows(task, seq_len, padded, packing, pad_id)), facts


def _cached(config: TeacherConfig, questions: Questions, device: torch.device) -> tuple[Teacher, TeacherFacts]:
    """The teacher that a cache stands for, whose facts are in its manifest."""
    assert config.path is not None
    folder = Path(config.path)
    manifest = Manifest.read(folder)
    expected = dict(questions.key)
    if (name := manifest.key.get("vocabulary_sha256")) in questions.vocabulary_names:
        expected["vocabulary_sha256"] = name
    if manifest.key["kind"] == "topk":
        expected["inherit.tau"] = questions.tau
    if config.dtype != "auto":
        expected["teacher.dtype"] = config.dtype
    fix = "give the run the cache's value, or make a cache with this run's configuration (tools/cache_teacher.py)"
    manifest.check(expected, folder=folder, fix=fix)
    semantics = fitting_semantics(config, manifest.key)
    files = CacheFiles.open(folder, manifest)
    check_coverage(files, questions, folder=folder)
    teacher = CachedTeacher(files, manifest, folder=folder, semantics=semantics, device=device)
    return teacher, replace(TeacherFacts(**manifest.teacher), cache=_facts_of_cache(config.path, manifest))


def _facts_of_cache(path: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "path": path,
        "key_sha256": manifest.key_sha256,
        "kind": manifest.key["kind"],
        "forward_flops": manifest.forward_flops,
    }


def _valid_ppl(folder: str) -> float | None:
    path = Path(folder) / "valid.json"
    fix = "restore it, or remove it: it says how good the teacher is, and nothing more"
    return read_json(path, "ppl", fix=fix)["ppl"] if path.exists() else None


def _check_shape(lm: PreTrainedModel, what: str, *, num_classes: int, seq_len: int) -> None:
    check_vocabulary(lm, num_classes, what=what)
    size = lm.get_output_embeddings().weight.shape[0]
    if size > num_classes + _LARGEST_PADDING:
        raise UserError(
            f"{what} has {size} output classes, too many for the tokenizer's {num_classes} ids and "
            "padding; take a teacher of the same vocabulary"
        )
    limit = max_positions(lm)
    if limit is not None and seq_len > limit:
        raise UserError(
            f"data.seq_len={seq_len} exceeds the teacher's {limit} positions ({what}); lower it or take another"
        )
