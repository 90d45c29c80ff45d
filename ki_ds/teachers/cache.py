"""A teacher whose signals were written beforehand: no weights but its head's, and of top-K not even these.

Shape suffixes: N labelled rows, D hidden size, V padded vocabulary, K teacher entries of a row.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ki_ds.config import TeacherConfig
from ki_ds.data.batches import Batch
from ki_ds.data.store import token_dtype
from ki_ds.errors import UserError
from ki_ds.objective.types import PLAIN, Head, LogitForm, Signal, Sparse
from ki_ds.teachers.cache_files import HIDDEN_DTYPES, LOGIT_FORM, CacheFiles, Columns, Manifest, read_head
from ki_ds.teachers.online import largest_entries
from ki_ds.teachers.questions import Questions, input_hashes
from ki_ds.teachers.teacher import Teacher, TeacherFacts


class CachedTeacher(Teacher):
    """Reads the records of the batch's samples, by sample id; each is compared with the masked input and its CRC32."""

    def __init__(
        self, files: CacheFiles, manifest: Manifest, *, folder: Path, semantics: str, device: torch.device
    ) -> None:
        self._files: CacheFiles | None = files
        self._key, self._semantics, self._device = manifest.key, semantics, device
        self._head: dict[str, Tensor] = {}
        if manifest.head_sha256 is not None:
            head = safetensors.torch.load(read_head(folder, manifest.head_sha256))
            self._head = {name: tensor.to(device) for name, tensor in head.items()}

    def signal(self, batch: Batch) -> Signal:
        """The records of the batch's samples, of which each answers exactly this masked input.

        Raises:
            UserError: a record is missing, damaged, or answers another input.
        """
        assert self._files is not None, "a freed teacher was asked"
        batch = batch.host or batch
        ids, hashes = batch.sample_ids_B.tolist(), input_hashes(batch)
        records = [self._files.read(*question) for question in zip(ids, hashes, strict=True)]
        rows = {name: np.concatenate([record[name] for record in records]) for name in records[0]}
        return decode(rows, self._key, head=self._head, semantics=self._semantics, device=self._device)

    def free(self) -> None:
        """Let go of the files and of the head."""
        assert self._files is not None
        self._files = None
        self._head = {}


def open_cache(config: TeacherConfig, questions: Questions, device: torch.device) -> tuple[CachedTeacher, TeacherFacts]:
    """The teacher that a cache stands for, and its facts, which are in the cache's manifest.

    Raises:
        UserError: the cache is damaged, was made for other samples, or lacks some.
    """
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
    _check_semantics(config, manifest.key)
    files = CacheFiles.open(folder, manifest)
    _check_coverage(files, questions, folder=folder)
    teacher = CachedTeacher(files, manifest, folder=folder, semantics=config.topk_semantics, device=device)
    return teacher, replace(TeacherFacts(**manifest.teacher), cache=facts_of_cache(config.path, manifest))


def facts_of_cache(path: str, manifest: Manifest) -> dict[str, Any]:
    """`TeacherFacts.cache`."""
    own = {"key_sha256": manifest.key_sha256, "kind": manifest.key["kind"], "forward_flops": manifest.forward_flops}
    return {"path": path, **own}


def _check_semantics(config: TeacherConfig, key: dict[str, Any]) -> None:
    semantics = config.topk_semantics
    if semantics != TeacherConfig.topk_semantics and key["kind"] != "topk":
        raise UserError(
            f"teacher.topk_semantics={semantics} has no meaning for {config.path}, a cache of hidden states; "
            "leave it out"
        )
    if semantics == "tail" and key["normalised"]:
        raise UserError(
            f"teacher.topk_semantics=tail needs probabilities at inherit.tau={key['inherit.tau']}, those of "
            f"{config.path} were imported at another and normalised; take renormalise"
        )


def _check_coverage(files: CacheFiles, questions: Questions, *, folder: Path) -> None:
    """UserError when a record is missing that the run's steps will need."""
    lacking, needed, last_mask = 0, 0, 0
    for _, masks, ids in questions.blocks():
        lacking += int((~files.has(masks, ids)).sum())
        needed += len(masks)
        last_mask = max(last_mask, int(masks.max(initial=0)))
    if not lacking:
        return
    steps, train, have = questions.steps, questions.train, len(files.masks)
    text = f"{folder} lacks {lacking:,} of the {needed:,} records that steps {steps.start + 1} to {steps.stop} need"
    again = "call tools/cache_teacher.py again with this run's configuration: what is finished stays"
    if train.task == "mlm" and train.shares is None and last_mask not in files.masks:
        variants = train.datasets[0].masking.num_variants
        text += f" (masks of {last_mask + 1} {'variants' if variants else 'epochs'} are needed, it has {have})"
        again += "" if variants else ", or give both data.mask_variants to reuse masks"
    raise UserError(f"{text}; {again}")


# ---------------------------------------------------------------------------------- signals as columns, and back


@torch.no_grad()
def encode(signal: Head, key: dict[str, Any]) -> Columns:
    """The columns over rows (see `cache_files`) of an online teacher's signal.

    Raises:
        UserError: hidden states too large for float16.
    """
    if key["kind"] == "hidden":
        return _encode_hidden(signal.hidden_ND, key["dtype"])
    num_classes = key["num_classes"]
    ids, log_probs = largest_entries(signal, topk=key["topk"], tau=key["inherit.tau"], num_classes=num_classes)
    return {"ids": ids.cpu().numpy().astype(token_dtype(num_classes)), "log_probs": log_probs.half().cpu().numpy()}


def _encode_hidden(hidden_ND: Tensor, dtype: str) -> Columns:
    hidden_ND = hidden_ND.float()
    if dtype == "int8":
        scales_N = hidden_ND.abs().amax(dim=-1).clamp(min=1e-30) / 127
        return {
            "hidden": (hidden_ND / scales_N[:, None]).round().to(torch.int8).cpu().numpy(),
            "scales": scales_N.cpu().numpy(),
        }
    largest = float(hidden_ND.abs().max()) if hidden_ND.numel() else 0.0
    if dtype == "fp16" and not largest <= 65504:
        raise UserError(f"the teacher's hidden states reach {largest:g}, too much for float16; take --dtype fp32")
    return {"hidden": hidden_ND.cpu().numpy().astype(HIDDEN_DTYPES[dtype])}


def decode(
    rows: Columns, key: dict[str, Any], *, head: dict[str, Tensor], semantics: str, device: torch.device
) -> Signal:
    """The signal that `encode` made the columns of: top-K, or hidden states in the dtype of the head."""
    if key["kind"] == "topk":
        log_probs_NK = torch.from_numpy(rows["log_probs"]).to(device)
        ids_NK = torch.from_numpy(rows["ids"].astype(np.int64)).to(device)
        return Sparse(ids_NK, log_probs_NK.float().exp(), semantics)
    hidden_ND = torch.from_numpy(rows["hidden"]).to(device)
    if key["dtype"] == "int8":
        hidden_ND = hidden_ND.float() * torch.from_numpy(rows["scales"]).to(device)[:, None]
    form = LogitForm(*key.get(LOGIT_FORM, PLAIN))
    return Head(hidden_ND.to(head["weight"].dtype), head["weight"], head.get("bias"), form)
