"""Answers from elsewhere: the masked samples as JSON lines for whoever can be asked, and what came back as a teacher.

A request, one object a line:

    {"sample_id": 7, "mask": 0, "input_ids": [0, 52, 4], "positions": [1], "text": "<s> the<mask>"}

`positions` count from 0 in `input_ids`: the rows that are to be answered. For mlm the token at that position is asked
for, for causal the one behind it. `text` is given where a tokenizer is known. An answer, one a line, in any order:

    {"sample_id": 7, "mask": 0, "rows": [{"ids": [31, 8], "log_probs": [-0.1, -2.5]}]}

`rows` are the positions' in order, with natural logarithms; `tokens` (the tokenizer's own) may stand for `ids`, and
`input_ids` for `sample_id`; `mask` may be left out where all requests have the same. Rows may differ in length: the K
likeliest entries are kept, and of a shorter row all.

Shape suffixes: N labelled rows of a sample, K entries of a row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ki_ds.data.batches import Batch
from ki_ds.data.store import token_dtype
from ki_ds.errors import UserError
from ki_ds.files import file_sha256, sync_folder, write_errors_are_one_line
from ki_ds.teachers.cache_build import Recording, missing_places, topk_key
from ki_ds.teachers.cache_files import CacheFiles, Columns
from ki_ds.teachers.questions import Questions, input_hashes, row_bounds
from ki_ds.teachers.teacher import TeacherFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_MASS = 1.01  # of the probabilities of a row, which may be rounded


def _asked(questions: Questions) -> Iterator[tuple[int, int]]:
    """(mask, sample id) of every masked sample, once, in the order of the stream."""
    for place in missing_places(questions, CacheFiles([], num_samples=len(questions.train))):
        epochs, ids = questions.train.stream(int(place), int(place) + 1, seed=questions.seed)
        yield int(questions.masks(epochs)[0]), int(ids[0])


def export_requests(path: Path, questions: Questions, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Write what a teacher is to be asked, whole or not at all; the number of requests. UserError on a full disk."""
    temporary, num_requests = path.with_name(path.name + ".tmp"), 0
    with write_errors_are_one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with write_errors_are_one_line(path), temporary.open("w", encoding="utf-8") as file:
            for mask, sample_id in _asked(questions):
                sample = questions.train.sample(sample_id, seed=questions.seed, epoch=mask)
                request = {"sample_id": sample_id, "mask": mask, "input_ids": sample.input_ids_T.tolist()}
                request["positions"] = sample.positions_N.tolist()
                if tokenizer is not None:
                    request["text"] = tokenizer.decode(request["input_ids"])
                file.write(json.dumps(request, ensure_ascii=False) + "\n")
                num_requests += 1
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return num_requests


def record_answers(
    path: Path,
    questions: Questions,
    *,
    topk: int,
    answers_tau: float,
    num_parameters: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Recording:
    """The answers in a file as a recording of a teacher that is identified by the file's SHA-256.

    Args:
        topk: entries kept a row, at most.
        answers_tau: temperature of the softmax whose logarithms are given. Where it is not the run's own, rows are
            brought to the run's and normalised over their entries.
        num_parameters: the teacher's, for FLOPs; 0 where it is not known.
        tokenizer: for answers that give tokens.

    Raises:
        UserError: a line is not as described above, or a sample lacks its answer.
    """
    key = topk_key(questions, topk, normalised=answers_tau != questions.tau)
    parse = _RowParser(key, answers_tau=answers_tau, tokenizer=tokenizer)
    wanted = set(_asked(questions))
    finder = _Finder(questions, wanted)
    answers: dict[int, Columns] = {}
    lacking = set(wanted)
    for where, entry in _entries(path):
        mask, sample_id = finder.find(entry, where)
        batch = questions.one(mask, sample_id)
        answers[input_hashes(batch)[0]] = parse.rows(entry, batch.num_rows, where)
        lacking.discard((mask, sample_id))
    if lacking:
        mask, sample_id = min(lacking)
        raise UserError(
            f"{path} lacks the answers to {len(lacking):,} of {len(wanted):,} requests (sample_id {sample_id}, mask "
            f"{mask}, ...); ask again for those, or cache fewer steps (--steps)"
        )
    digest = file_sha256(path)
    facts = TeacherFacts(str(path), digest, num_parameters, num_parameters, True, None, None)
    identity = {"teacher.weights_sha256": digest, "teacher.dtype": "imported"}

    def answer(batch: Batch) -> Columns:
        # a micro-batch may hold samples of other masks that are cached already, or not wanted
        bounds, hashes = row_bounds(batch), input_hashes(batch)
        parts = [answers.get(h) or parse.empty(bounds[i + 1] - bounds[i]) for i, h in enumerate(hashes)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return Recording(key=key | identity, teacher=asdict(facts), head=None, answer=answer)


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE line N", object) for each line that is not blank."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path} line {number}"
                if not line.strip():
                    continue
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("rows"), list):
                    raise UserError(f"{where} is no answer; give an object with sample_id (or input_ids) and rows")
                yield where, entry
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); give JSON lines as docs/teachers.md describes them"
        ) from None


class _Finder:
    """Which masked sample an answer is for."""

    def __init__(self, questions: Questions, wanted: set[tuple[int, int]]) -> None:
        self._questions, self._wanted = questions, wanted
        masks = {mask for mask, _ in wanted}
        self._only_mask = masks.pop() if len(masks) == 1 else None
        self._by_input: dict[bytes, tuple[int, int]] | None = None

    def find(self, entry: dict[str, Any], where: str) -> tuple[int, int]:
        if "input_ids" in entry and "sample_id" not in entry:
            return self._by_ids(entry["input_ids"], where)
        mask: Any = entry.get("mask", self._only_mask)
        sample_id: Any = entry.get("sample_id")
        if mask is None:
            raise UserError(f"{where} has no mask, but samples are asked about with several; give the request's")
        if (mask, sample_id) not in self._wanted:
            raise UserError(
                f"{where}: sample_id {sample_id} with mask {mask} is not asked about; take those of --export_requests"
            )
        return mask, sample_id

    def _by_ids(self, input_ids: Any, where: str) -> tuple[int, int]:
        if self._by_input is None:
            train, seed = self._questions.train, self._questions.seed
            self._by_input = {
                _digest(train.sample(sample_id, seed=seed, epoch=mask).input_ids_T): (mask, sample_id)
                for mask, sample_id in self._wanted
            }
            if len(self._by_input) < len(self._wanted):
                raise UserError(f"{where}: several requests have equal input_ids; give sample_id and mask instead")
        try:
            return self._by_input[_digest(np.array(input_ids, np.int64))]
        except (KeyError, ValueError, TypeError, OverflowError):
            raise UserError(f"{where}: its input_ids are of no request; take those of --export_requests") from None


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=16).digest()


class _RowParser:
    """Rows of an answer as columns of K entries, likeliest first; what is missing has probability 0."""

    def __init__(self, key: dict[str, Any], *, answers_tau: float, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._k, self._num_classes = key["topk"], key["num_classes"]
        self._scale, self._normalise = answers_tau / key["inherit.tau"], key["normalised"]
        self._vocabulary = tokenizer.get_vocab() if tokenizer is not None else None

    def empty(self, num_rows: int) -> Columns:
        """Rows without any entry."""
        ids_NK = np.zeros((num_rows, self._k), token_dtype(self._num_classes))
        return {"ids": ids_NK, "log_probs": np.full((num_rows, self._k), -np.inf, np.float16)}

    def rows(self, entry: dict[str, Any], num_rows: int, where: str) -> Columns:
        rows = entry["rows"]
        if len(rows) != num_rows:
            raise UserError(f"{where} has {len(rows)} rows for {num_rows} positions; give one for each, in their order")
        columns = self.empty(num_rows)
        for number, row in enumerate(rows):
            ids, log_probs = self._row(row, f"{where}, row {number + 1}")
            columns["ids"][number, : len(ids)] = ids
            columns["log_probs"][number, : len(ids)] = log_probs
        return columns

    def _row(self, row: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(row, dict) or "log_probs" not in row or ("ids" in row) == ("tokens" in row):
            raise UserError(f"{where} is no row; give log_probs, and either ids or tokens")
        given = row["ids"] if "ids" in row else self._ids_of(row["tokens"], where)
        try:
            ids, log_probs = np.array(given, np.int64), np.array(row["log_probs"], np.float64)
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{where}: ids and log_probs must be lists of numbers") from None
        if ids.ndim != 1 or ids.shape != log_probs.shape or not len(ids) or len(np.unique(ids)) < len(ids):
            raise UserError(f"{where}: give as many log_probs as ids, at least one, and no id twice")
        if ids.min() < 0 or ids.max() >= self._num_classes:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(f"{where}: id {wrong} is outside the vocabulary of {self._num_classes:,}")
        if not np.isfinite(log_probs).all() or np.exp(log_probs).sum() > _MOST_MASS:
            raise UserError(
                f"{where}: log_probs up to {log_probs.max():g} are no logarithms of probabilities, "
                "which sum up to at most 1; give natural logarithms"
            )
        log_probs = log_probs * self._scale
        order = np.argsort(-log_probs, kind="stable")[: self._k]
        log_probs = log_probs[order]
        if self._normalise:
            largest = float(log_probs.max())
            log_probs = log_probs - (largest + math.log(float(np.exp(log_probs - largest).sum())))
        return ids[order], log_probs.astype(np.float16)

    def _ids_of(self, tokens: Any, where: str) -> list[int]:
        if self._vocabulary is None:
            raise UserError(
                f"{where} gives tokens, but no tokenizer is known; give ids, or name one with data.tokenizer"
            )
        unknown = [t for t in tokens if t not in self._vocabulary] if isinstance(tokens, list) else [tokens]
        if unknown:
            raise UserError(
                f"{where}: {unknown[0]!r} is no token of the vocabulary; give tokens as the tokenizer has them"
            )
        return [self._vocabulary[token] for token in tokens]
