"""Caches of the tiny teachers, and the runs that they are for, without a command line between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ki_ds import config as configuration
from ki_ds.config import RunConfig
from ki_ds.config.schedules import taught_steps
from ki_ds.data.datasets import Datasets, open_datasets
from ki_ds.models.presets import Rows
from ki_ds.teachers.cache_build import CHUNK_BYTES, Recording, build_cache, record_teacher
from ki_ds.teachers.cache_files import Manifest
from ki_ds.teachers.factory import make_teacher
from ki_ds.teachers.questions import Questions
from tests.tiny import tiny_config, write_config

CPU = torch.device("cpu")


def config_of(base: Path, task: str = "mlm", **groups) -> RunConfig:
    """The configuration of a run that inherits from the tiny teacher online; `groups` are laid over it."""
    groups.setdefault("inherit", {"schedule": "linear", "steps": 4})
    config = tiny_config(base / "cached", base / "corpus", task=task, **groups)
    config["teacher"] = {"path": str(base / f"{task}_teacher"), **groups.get("teacher", {})}
    if config["data"].get("sources"):
        del config["data"]["corpus"]
    return configuration.load(write_config(base / "cached.yaml", config))


_OPENED: dict[str, Datasets] = {}


def data_of(config: RunConfig) -> Datasets:
    """Its samples, opened once: no test changes a corpus under its path."""
    name = repr((config.data, config.task))
    if name not in _OPENED:
        _OPENED[name] = open_datasets(config.data, config.task, other_index_dir=Path(config.run_dir) / "index")
    return _OPENED[name]


def questions_of(config: RunConfig, data: Datasets | None = None, *, steps: range | None = None) -> Questions:
    """What it asks its teacher."""
    if steps is None:
        steps = taught_steps(config)
    return Questions.of_run(config, data or data_of(config), steps=steps)


def teacher_of(config: RunConfig, data: Datasets | None = None):
    """(teacher, facts) as a run would make them."""
    data = data or data_of(config)
    return make_teacher(
        config.teacher,
        Rows(config.task, config.data.seq_len, packing=config.data.packing),
        tokenizer_sha256=data.vocabulary.sha256,
        num_classes=data.vocabulary.size,
        device=CPU,
        questions=questions_of(config, data),
    )


def recording_of(config: RunConfig, questions: Questions, **spec) -> Recording:
    """The run's online teacher, to be recorded."""
    online = replace(config, teacher=replace(config.teacher, placement="online", topk_semantics="renormalise"))
    spec = {"kind": "topk", "topk": 10, "dtype": "fp16"} | spec
    return record_teacher(*teacher_of(online), questions, **spec, device=CPU)


def cache_of(
    config: RunConfig, out: Path, *, epochs: int | None = None, chunk_bytes: int = CHUNK_BYTES, **spec
) -> Manifest:
    """Write the cache that the run needs, or that of some epochs."""
    questions = questions_of(config)
    if epochs is not None:
        questions = questions.of_epochs(epochs)
    return build_cache(out, questions, recording_of(config, questions, **spec), chunk_bytes=chunk_bytes)


def reading(config: RunConfig, cache: Path, **teacher) -> RunConfig:
    """The same run, reading a cache."""
    changed = replace(config.teacher, placement="cache", path=str(cache), **teacher)
    return replace(config, teacher=changed)
