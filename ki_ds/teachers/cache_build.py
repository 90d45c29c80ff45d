"""Writing a teacher cache: what is lacking, a forecast, chunk after chunk on all ranks, the manifest last.

A chunk is there whole or not at all, so that a cache that was killed, or is made larger, goes on with what it lacks.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ki_ds.data.batches import Batch
from ki_ds.errors import UserError
from ki_ds.files import check_space, write_errors_are_one_line
from ki_ds.models.presets import DTYPES
from ki_ds.objective.types import PLAIN, Head
from ki_ds.ranks.world import from_main, is_main, on_main, rank, say, together, world_size
from ki_ds.teachers.cache import encode
from ki_ds.teachers.cache_files import (
    FORMAT,
    HEAD,
    LOGIT_FORM,
    MANIFEST,
    CacheFiles,
    Chunk,
    Columns,
    Manifest,
    bytes_per_row,
    row_columns,
    write_chunk,
    write_head,
)
from ki_ds.teachers.questions import Questions, input_hashes, row_bounds
from ki_ds.teachers.teacher import Teacher, TeacherFacts

CHUNK_BYTES = 64 << 20
_INDEX_BYTES = 20  # of a record, beside its rows
_ROWS_PROBED = 1000  # records whose rows are counted for the forecast


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A teacher that can be recorded."""

    key: dict[str, Any]  # the cache's
    teacher: dict[str, Any]  # its facts
    head: bytes | None  # as safetensors
    answer: Callable[[Batch], Columns]  # the columns over the batch's labelled rows


def record_teacher(
    teacher: Teacher,
    facts: TeacherFacts,
    questions: Questions,
    *,
    kind: str,
    topk: int,
    dtype: str,
    device: torch.device,
) -> Recording:
    """A running teacher as a recording.

    Args:
        kind: topk or hidden.
        topk: K entries a row.
        dtype: of stored hidden states: fp32, fp16 or int8.

    Raises:
        UserError: K exceeds the vocabulary.
    """

    def ask(batch: Batch) -> Head:
        signal = teacher.signal(batch.to(device))
        assert isinstance(signal, Head)
        return signal

    probe = ask(questions.one(0, 0))
    identity: dict[str, Any] = {
        "teacher.weights_sha256": facts.weights_sha256 or f"of {facts.path}",
        "teacher.dtype": next(name for name, known in DTYPES.items() if known == probe.weight_VD.dtype),
    }
    if probe.form != PLAIN:
        identity[LOGIT_FORM] = list(probe.form)
    head = None
    if kind == "topk":
        key = topk_key(questions, topk) | identity
    else:
        width = probe.hidden_ND.shape[1]
        key = questions.key | {"kind": kind, "dtype": dtype, "hidden_size": width, **identity, "format": FORMAT}
        tensors = {"weight": probe.weight_VD, "bias": probe.bias_V}
        head = safetensors.torch.save({n: t.detach().cpu().contiguous() for n, t in tensors.items() if t is not None})
    return Recording(key=key, teacher=asdict(facts), head=head, answer=lambda batch: encode(ask(batch), key))


def topk_key(questions: Questions, topk: int, *, normalised: bool = False) -> dict[str, Any]:
    """The key of a top-K cache, but for the teacher. UserError when K exceeds the vocabulary.

    `normalised`: the K probabilities are divided by their sum, for what they leave over is not known.
    """
    num_classes = questions.key["num_classes"]
    if not 1 <= topk <= num_classes:
        raise UserError(f"--topk {topk} is outside [1, {num_classes:,}], the ids of the vocabulary; change it")
    own = {"kind": "topk", "topk": topk, "inherit.tau": questions.tau, "normalised": normalised, "format": FORMAT}
    return questions.key | own


def build_cache(out: Path, questions: Questions, recording: Recording, *, chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    """Write the records that the folder lacks, and its manifest. Called by all ranks, on a file system they share.

    Raises:
        UserError: the folder holds a cache of another key or is written by another process, the disk is too small, or
            the teacher's answers cannot be stored.
    """
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(_claimed(out)))
        on_main(lambda: _begin(out, recording))
        manifest = Manifest.read(out)
        present = _open_all(out, manifest, questions)
        places = missing_places(questions, present)
        plan, num_bytes = _plan(out, questions, places, manifest.key, chunk_bytes=chunk_bytes, present=present)
        on_main(lambda: check_space(out, num_bytes))
        error = None
        try:
            _write_all(out, questions, recording, manifest.key_sha256, plan[rank() :: world_size()])
        except UserError as refused:
            error = refused
        together(error)
        written = _open_all(out, manifest, questions)
        manifest = replace(manifest, chunks={chunk.path.name: chunk.facts for chunk in written.chunks})
        on_main(lambda: manifest.write(out))
    return manifest


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold the folder for this job while the context lasts."""
    with write_errors_are_one_line(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out {out} is being written by another job; wait for it or give another") from None
        yield


def _begin(out: Path, recording: Recording) -> None:
    """Leave a manifest of the recording's key in the folder, and no half-written file."""
    for half in out.glob("*.tmp"):
        half.unlink()
    if (out / MANIFEST).exists():
        there = Manifest.read(out)
        # a field that only the other has is one that differs, too
        there.check(dict.fromkeys(there.key) | recording.key, folder=out, fix="give another --out, or remove the cache")
        return
    strangers = [p.name for p in out.iterdir() if p.name not in (".lock", HEAD, "index")]
    if strangers:
        raise UserError(f"--out {out} holds {strangers[0]} but no cache; give an empty or new folder")
    head = write_head(out, recording.head) if recording.head is not None else None
    Manifest(key=recording.key, teacher=recording.teacher, head_sha256=head, chunks={}).write(out)


def _open_all(out: Path, manifest: Manifest, questions: Questions) -> CacheFiles:
    """All chunks of the folder, listed in the manifest or not; the same on every rank."""
    names = from_main(sorted(path.name for path in out.glob("chunk_*.safetensors")))
    return CacheFiles([Chunk(out / name, manifest) for name in names], num_samples=len(questions.train))


def missing_places(questions: Questions, present: CacheFiles) -> np.ndarray:
    """int64 [P], ascending: the places whose masked sample comes there for the first time and has no record yet."""
    seen: dict[int, np.ndarray] = {}
    missing = [np.zeros(0, np.int64)]
    for places, masks, ids in questions.blocks():
        new = ~present.has(masks, ids)
        for mask in np.unique(masks[new]).tolist():
            flags = seen.setdefault(mask, np.zeros(len(questions.train), bool))
            mine = np.flatnonzero(new & (masks == mask))
            mine = mine[~flags[ids[mine]]]
            mine = mine[np.unique(ids[mine], return_index=True)[1]]
            flags[ids[mine]] = True
            missing.append(places[mine])
    return np.sort(np.concatenate(missing))


def _plan(
    out: Path,
    questions: Questions,
    places: np.ndarray,
    key: dict[str, Any],
    *,
    chunk_bytes: int,
    present: CacheFiles,
) -> tuple[list[np.ndarray], int]:
    """(places of each chunk to be written: whole micro-batches, and something for every rank; their bytes). Says it."""
    steps = f"steps 1 to {questions.steps.stop:,}"
    if not len(places):
        say(f"{out}: all records for {steps} are there ({present.num_records:,})")
        return [], 0
    mean_rows, row_bytes = _mean_rows(questions, places), bytes_per_row(key)
    num_bytes = int(len(places) * (mean_rows * row_bytes + _INDEX_BYTES))
    numbers, starts = np.unique(places // questions.micro_batch_size, return_index=True)
    per_micro_batch = (mean_rows * row_bytes + _INDEX_BYTES) * len(places) / len(numbers)
    size = int(max(1, min(chunk_bytes // per_micro_batch, -(-len(numbers) // world_size()))))
    plan = np.split(places, starts[size::size])
    say(
        f"{out}: {len(places):,} records for {steps} ({present.num_records:,} are there), about "
        f"{mean_rows * len(places):,.0f} rows of {row_bytes} bytes, {num_bytes / 1e6:,.2f} MB in {len(plan):,} chunks, "
        f"{world_size()} ranks"
    )
    return plan, num_bytes


def _mean_rows(questions: Questions, places: np.ndarray) -> float:
    """Labelled rows of a masked sample, the mean over some of them."""
    chosen = places[np.linspace(0, len(places) - 1, min(len(places), _ROWS_PROBED)).astype(np.int64)]
    rows = []
    for place in chosen.tolist():
        (epoch,), (sample_id,) = questions.train.stream(place, place + 1, seed=questions.seed)
        rows.append(questions.train.num_rows(int(sample_id), seed=questions.seed, epoch=int(epoch)))
    return float(np.mean(rows))


def _write_all(
    out: Path, questions: Questions, recording: Recording, key_sha256: str, chunks: Sequence[np.ndarray]
) -> None:
    """Write this rank's chunks."""
    micro_batches = sum(len(np.unique(places // questions.micro_batch_size)) for places in chunks)
    started = time.monotonic()
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    show = is_main() and sys.stdout.isatty()
    with Progress(*bar, console=Console(file=sys.stdout), disable=not show) as progress:
        task = progress.add_task("micro-batches" + (" of rank 0" if world_size() > 1 else ""), total=micro_batches)
        for number, places in enumerate(chunks):
            columns, tokens = _record(questions, recording, places, lambda: progress.advance(task))
            write_chunk(out / f"chunk_{places[0]:012d}.safetensors", columns, key_sha256=key_sha256, tokens=tokens)
            if number == 0:
                seconds = time.monotonic() - started
                say(f"first chunk after {seconds:.1f} s, about {seconds * (len(chunks) - 1) / 60:.1f} minutes to go")


def _record(
    questions: Questions, recording: Recording, places: np.ndarray, advance: Callable[[], None]
) -> tuple[Columns, int]:
    """(columns of one chunk, tokens of the teacher's forward): the teacher's answers at some places."""
    index: list[tuple[int, int, int, int]] = []
    rows: dict[str, list[np.ndarray]] = {name: [] for name in row_columns(recording.key)}
    tokens = 0
    for number in np.unique(places // questions.micro_batch_size).tolist():
        asked, masks, ids, batch = questions.micro_batch(number)
        answers, bounds, hashes = recording.answer(batch), row_bounds(batch), input_hashes(batch)
        tokens += batch.num_tokens
        for i in np.flatnonzero(np.isin(asked, places)).tolist():
            index.append((int(ids[i]), int(masks[i]), bounds[i + 1] - bounds[i], hashes[i]))
            for name, column in answers.items():
                rows[name].append(column[bounds[i] : bounds[i + 1]])
        advance()
    names = ("sample_ids", "masks", "num_rows", "input_hashes")
    columns = {name: np.array(values, np.uint64) for name, values in zip(names, zip(*index, strict=True), strict=True)}
    return columns | {name: np.concatenate(parts) for name, parts in rows.items()}, tokens
