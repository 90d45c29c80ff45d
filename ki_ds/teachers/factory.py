"""From the configuration to a teacher, with every check that must come before the first step."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ki_ds import lineage
from ki_ds.config import Task, TeacherConfig
from ki_ds.data.datasets import check_tokenizer
from ki_ds.errors import UserError
from ki_ds.lineage import Lineage
from ki_ds.models import (
    DTYPES,
    check_vocabulary,
    count_parameters,
    load_lm,
    max_positions,
    model_folder,
    read_config,
    weights_sha256,
)
from ki_ds.signals import Teacher
from ki_ds.teachers.cache import CachedTeacher, check_coverage, fitting_semantics
from ki_ds.teachers.cache_files import CacheFiles, Manifest
from ki_ds.teachers.online import OnlineTeacher
from ki_ds.teachers.questions import Questions

_LARGEST_PADDING = 1024  # output classes beyond the tokenizer's ids that can still be padding


@dataclass(frozen=True)
class TeacherFacts:
    """What a run's manifest says about its teacher."""

    path: str
    weights_sha256: str | None
    num_parameters: int
    dense_parameters: int
    tokenizer_checked: bool
    valid_ppl: float | None  # of a run of ours, on its own validation set
    lineage: Lineage | None  # of a model of ours
    cache: dict[str, Any] | None = None  # where its signals are read from: path, key_sha256, kind, forward_flops


def make_teacher(
    config: TeacherConfig,
    task: Task,
    *,
    tokenizer_sha256: str,
    num_classes: int,
    seq_len: int,
    device: torch.device,
    packing: bool = False,
    questions: Questions | None = None,
) -> tuple[Teacher, TeacherFacts]:
    """The teacher that the configuration asks for, and its facts.

    Args:
        tokenizer_sha256: hash of the vocabulary of the corpus: of a tokenizer, or of a fairseq dictionary.
        num_classes: its ids.
        seq_len: the longest row that it will be asked about, in tokens.
        packing: whether several blocks may share a row.
        questions: the masked samples that it will be asked about; a cache wants to know.

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
    read_config(folder, what="teacher.path")  # the cheapest way to find that it is no model at all
    checked = check_tokenizer(folder, tokenizer_sha256, what="teacher.path")
    lm = load_lm(folder, task, dtype, what="teacher.path")
    _check_shape(lm, config.path, num_classes=num_classes, seq_len=seq_len)
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
    return OnlineTeacher(lm, device=device, packing=packing), facts


def _cached(config: TeacherConfig, questions: Questions, device: torch.device) -> tuple[Teacher, TeacherFacts]:
    """The teacher that a cache stands for, whose facts are in its manifest."""
    assert config.path is not None
    folder = Path(config.path)
    manifest = Manifest.read(folder)
    expected = dict(questions.key)
    if manifest.key["kind"] == "topk":
        expected["inherit.tau"] = questions.tau
    if config.dtype != "auto":
        expected["teacher.dtype"] = config.dtype
    fix = "give the run the cache's value, or make a cache with this run's configuration (tools/cache_teacher.py)"
    manifest.check(expected, folder=folder, fix=fix)
    semantics = fitting_semantics(config, manifest.key)
    files = CacheFiles.open(folder, manifest)
    check_coverage(files, questions, folder=folder)
    cache = {
        "path": config.path,
        "key_sha256": manifest.key_sha256,
        "kind": manifest.key["kind"],
        "forward_flops": manifest.forward_flops,
    }
    teacher = CachedTeacher(files, manifest, folder=folder, semantics=semantics, device=device)
    return teacher, replace(TeacherFacts(**manifest.teacher), cache=cache)


def _valid_ppl(folder: str) -> float | None:
    path = Path(folder) / "valid.json"
    return json.loads(path.read_text(encoding="utf-8"))["ppl"] if path.exists() else None


def _check_shape(lm: PreTrainedModel, path: str, *, num_classes: int, seq_len: int) -> None:
    check_vocabulary(lm, num_classes, what=f"teacher.path={path}")
    size = lm.get_output_embeddings().weight.shape[0]
    if size > num_classes + _LARGEST_PADDING:
        raise UserError(
            f"teacher.path={path} has {size} output classes, too many for the tokenizer's {num_classes} ids and "
            "padding; take a teacher of the same vocabulary"
        )
    limit = max_positions(lm)
    if limit is not None and seq_len > limit:
        raise UserError(
            f"data.seq_len={seq_len} exceeds the teacher's {limit} positions; lower it or take another teacher"
        )
