"""From the configuration to a teacher, with every check that must come before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ki_ds.checkpoints import lineage
from ki_ds.config import RunConfig, TeacherConfig
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
    rows_of,
    weights_sha256,
)
from ki_ds.objective.types import Head, Sparse
from ki_ds.teachers.cache import facts_of_cache, open_cache
from ki_ds.teachers.cache_files import Manifest
from ki_ds.teachers.online import OnlineTeacher, OverlappedTeacher, largest_entries
from ki_ds.teachers.questions import Questions
from ki_ds.teachers.teacher import Assignment, ManyTeachers, Teacher, TeacherFacts

_LARGEST_PADDING = 1024  # output classes beyond the tokenizer's ids that can still be padding


def identify_teachers(config: RunConfig) -> list[dict[str, Any]]:
    """path, weights_sha256, cache, name, domains and share of all teachers of a run, of which none is loaded.

    Raises:
        UserError: there is no model, or no cache, at a path.
    """
    names = _names(config)
    identities = []
    for number, entry in enumerate(config.all_teachers):
        known: dict[str, Any] = {"path": entry.path, "cache": None}
        if config.teacher.placement == "cache":
            manifest = Manifest.read(Path(entry.path))
            known = {name: manifest.teacher[name] for name in ("path", "weights_sha256")}
            known["cache"] = facts_of_cache(entry.path, manifest)
        else:
            folder = model_folder(entry.path)
            read_config(folder, what=_field_of_path(config, number))
            known["weights_sha256"] = weights_sha256(folder) if Path(folder).is_dir() else None
        identities.append(known | {"name": names[number], "domains": entry.domains, "share": entry.share})
    return identities


def make_teachers(
    config: RunConfig,
    data: Datasets,
    *,
    device: torch.device,
    questions: Questions | None = None,
    named: Sequence[dict[str, Any]] | None = None,
) -> tuple[Teacher, list[TeacherFacts]]:
    """All teachers of a run as one, and the facts of each in the order of the configuration.

    Args:
        questions: the masked samples that they will be asked about; a cache wants to know.
        named: what `identify_teachers` has said of them.

    Raises:
        UserError: as `make_teacher`; or a cache holds K entries a row where all are needed.
    """
    assignment = Assignment.of(config.all_teachers, data.domains)
    cut = _cut_to_topk(config, data.vocabulary.size)
    teachers, facts = [], []
    for number, known in enumerate(named or identify_teachers(config)):
        entry = config.all_teachers[number]
        teacher, own = make_teacher(
            replace(config.teacher, path=entry.path),
            rows_of(config, data),
            tokenizer_sha256=data.vocabulary.sha256,
            num_classes=data.vocabulary.size,
            device=device,
            questions=None if questions is None else questions.of_domains(assignment.of_teacher(number)),
            what=_field_of_path(config, number),
            cut=cut,
            weights=known["weights_sha256"],
        )
        facts.append(replace(own, **{name: known[name] for name in ("name", "domains", "share")}))
        teachers.append(teacher)
    _check_topk_caches(config, assignment, facts)
    teacher = teachers[0] if config.teachers is None else ManyTeachers(teachers, assignment)
    return OverlappedTeacher(teacher, device) if config.teacher.placement == "overlap" else teacher, facts


def _field_of_path(config: RunConfig, number: int) -> str:
    return "teacher.path" if config.teachers is None else f"teachers.{number}.path"


def _names(config: RunConfig) -> list[str | None]:
    """A name for each of several teachers: that of its domains, or of its folder, numbered where two are alike."""
    if config.teachers is None:
        return [None] * len(config.all_teachers)
    names = ["+".join(entry.domains) if entry.domains else Path(entry.path).name for entry in config.teachers]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name}_{number}" for number, name in enumerate(names)]


def _cut_to_topk(config: RunConfig, num_classes: int) -> Callable[[Head], Sparse] | None:
    """What cuts a teacher's distribution to its K largest entries, where the run asks for that."""
    topk, tau, semantics = config.teacher.topk, config.inherit.tau, config.teacher.topk_semantics
    if topk is None:
        return None
    if topk > num_classes:
        raise UserError(f"teacher.topk={topk} exceeds the {num_classes:,} ids of the vocabulary; lower it")

    def cut(head: Head) -> Sparse:
        ids, log_probs = largest_entries(head, topk=topk, tau=tau, num_classes=num_classes)
        return Sparse(ids, log_probs.exp(), semantics)

    return cut


def _check_topk_caches(config: RunConfig, assignment: Assignment, facts: Sequence[TeacherFacts]) -> None:
    """UserError where the run needs more of a teacher than the K entries a row that its cache holds."""
    for number, own in enumerate(facts):
        if own.cache is None or own.cache["kind"] != "topk":
            continue
        path = own.cache["path"]
        if assignment.domain_ids is None and len(facts) > 1:
            raise UserError(
                f"teachers.{number}.path={path} holds K entries a row, which cannot be averaged with "
                "other teachers; cache hidden states (--kind hidden), or give every entry domains"
            )
        if config.inherit.schedule == "auto":
            raise UserError(
                f"inherit.schedule=auto compares the student with the whole teacher, and {path} holds K "
                "entries a row; cache hidden states (--kind hidden), or give another schedule"
            )


def notes_on(facts: Sequence[TeacherFacts], config: RunConfig, data: Datasets) -> Iterator[str]:
    """Lines for the user: vocabularies that could not be compared, and rows that nobody teaches."""
    for own in facts:
        if not own.tokenizer_checked:
            yield f"{own.path} has no tokenizer: of the teacher's vocabulary only the size could be checked"
    taught = {domain for entry in config.all_teachers for domain in entry.domains or data.trained_domains}
    if facts and (alone := [domain for domain in data.trained_domains if domain not in taught]):
        yield f"rows of {', '.join(alone)} have no teacher: they learn from their labels alone"


def make_teacher(
    config: TeacherConfig,
    rows: Rows,
    *,
    tokenizer_sha256: str,
    num_classes: int,
    device: torch.device,
    questions: Questions | None = None,
    what: str = "teacher.path",
    cut: Callable[[Head], Sparse] | None = None,
    weights: str | None = None,
) -> tuple[Teacher, TeacherFacts]:
    """The teacher that the configuration asks for, and its facts.

    Args:
        rows: that it will be asked about.
        tokenizer_sha256: hash of the vocabulary of the corpus: of a tokenizer, or of a fairseq dictionary.
        num_classes: its ids.
        questions: the masked samples that it will be asked about; a cache wants to know.
        what: the configuration's field that names its path, for error lines.
        cut: as of `OnlineTeacher`.
        weights: SHA-256 of its weights where it is known.

    Raises:
        UserError: it cannot be read, has another tokenizer or vocabulary, or too few positions; or the cache was made
            for other samples, or lacks some.
    """
    assert config.path is not None
    if config.placement == "cache":
        assert questions is not None
        return open_cache(config, questions, device)
    assert rows.task is not None
    folder = model_folder(config.path)
    name = "fp16" if device.type == "cuda" else "fp32"
    dtype = DTYPES[name if config.dtype == "auto" else config.dtype]
    read_config(folder, what=what)  # the cheapest way to find that it is no model at all
    checked = check_tokenizer(folder, tokenizer_sha256, rows.task, what=what)
    lm = load_lm(folder, rows.task, dtype, what=what)
    named = f"{what}={config.path}"
    check_vocabulary(lm, num_classes, what=named)
    size, limit = lm.get_output_embeddings().weight.shape[0], max_positions(lm)
    if size > num_classes + _LARGEST_PADDING:
        raise UserError(
            f"{named} has {size} output classes, too many for the tokenizer's {num_classes} ids and "
            "padding; take a teacher of the same vocabulary"
        )
    if limit is not None and rows.seq_len > limit:
        raise UserError(
            f"data.seq_len={rows.seq_len} exceeds the teacher's {limit} positions ({named}); lower it or take another"
        )
    if weights is None and Path(folder).is_dir():
        weights = weights_sha256(folder)
    parameters = count_parameters(lm)
    facts = TeacherFacts(
        config.path,
        weights,
        parameters["num_parameters"],
        parameters["dense_parameters"],
        tokenizer_checked=checked,
        valid_ppl=_valid_ppl(folder),
        lineage=lineage.read(Path(folder), weights),
    )
    return OnlineTeacher(lm, device=device, rows=rows, cut=cut), facts


def _valid_ppl(folder: str) -> float | None:
    path = Path(folder) / "valid.json"
    fix = "restore it, or remove it: it says how good the teacher is, and nothing more"
    return read_json(path, "ppl", fix=fix)["ppl"] if path.exists() else None
