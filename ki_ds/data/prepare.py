"""From sources of text to a corpus folder, in parallel processes with bounded memory.

    OUT/train.{bin,idx,json}   OUT/valid.{bin,idx,json}   OUT/tokenizer/   OUT/corpus.json

The folder is built under a temporary name and renamed when it is complete. It is the same, to the byte, for
any number of workers.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from ki_ds.data.corpora import Corpus, Document, RawDocument
from ki_ds.data.store import StoreWriter, sync_folder, token_dtype, write_atomically, write_errors_are_one_line
from ki_ds.data.tokenize import (
    TokenizerKind,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_hash,
    train_tokenizer,
)
from ki_ds.errors import UserError

CORPUS_VERSION = 1
CHUNK_CHARACTERS = 1 << 18  # of raw text in one message to a worker
CHUNKS_PER_WORKER = 3  # in flight: bounds the memory whatever the input's size

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """A tokenizer to be trained on the corpus itself, on its first `max_characters` of clean text."""

    vocab_size: int
    kind: TokenizerKind = "bytebpe"
    max_characters: int = 1_000_000_000


@dataclass(frozen=True)
class PreparedCorpus:
    """A finished corpus folder; `info` is its corpus.json."""

    folder: Path
    info: dict[str, Any]

    @property
    def train_prefix(self) -> Path:
        """Prefix of the training store."""
        return self.folder / "train"

    @property
    def valid_prefix(self) -> Path | None:
        """Prefix of the validation store; None when it was prepared with valid_fraction=0."""
        return self.folder / "valid" if "valid" in self.info["counts"] else None

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer."""
        return self.folder / "tokenizer"


def open_corpus(folder: str | os.PathLike[str]) -> PreparedCorpus:
    """The corpus in a folder that `build_store` has finished; UserError otherwise."""
    path = Path(folder) / "corpus.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(info, dict)
        version = info["format_version"]
    except (OSError, ValueError, KeyError, AssertionError):
        raise UserError(f"{folder} is no prepared corpus; make one with tools/prepare_data.py") from None
    if version != CORPUS_VERSION:
        raise UserError(f"{path} has format version {version}, not {CORPUS_VERSION}; prepare the corpus again")
    return PreparedCorpus(Path(folder), info)


def build_store(
    sources: Sequence[str | Path],
    tokenizer: str | Path | TokenizerSpec,
    out: str | os.PathLike[str],
    *,
    num_workers: int | None = None,
    valid_fraction: float = 1 / 200,
    seed: int = 0,
    text_key: str = "text",
    domain: str = "",
    show_progress: bool = True,
) -> PreparedCorpus:
    """The corpus folder `out`: every line of `sources` an item that ends with eos, split by whole documents.

    A document is for validation when a hash of its text keyed by `seed` falls below `valid_fraction`; where
    that chooses none, the document with the lowest hash is taken. `tokenizer` is a folder, a hub name or a
    `TokenizerSpec` to train. Called again with the same inputs it finds its work done. UserError: bad
    sources, a full disk, `out` holds something else, or too few documents for a split.
    """
    if not 0 <= valid_fraction < 1:
        raise UserError(f"valid_fraction={valid_fraction} is not in [0, 1); take e.g. 0.005")
    if seed < 0:
        raise UserError(f"seed={seed} is negative; take one from 0 on")
    corpus = Corpus(sources, domain=domain, text_key=text_key)
    request = {
        "files": corpus.fingerprint(),
        "tokenizer": _requested_tokenizer(tokenizer),
        "valid_fraction": valid_fraction,
        "seed": seed,
        "text_key": text_key,
        "domain": domain,
    }
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _finished(folder, request)
    workers = num_workers if num_workers is not None else len(os.sched_getaffinity(0))
    with _partial_folder(folder) as partial, _progress_bar(show_progress) as progress:
        run = _Run(corpus, workers, progress)
        if isinstance(tokenizer, TokenizerSpec):
            _train(run, tokenizer, partial / "tokenizer")
        else:
            save_tokenizer(load_tokenizer(tokenizer), partial / "tokenizer")
        info = _write_stores(run, partial, request)
        write_atomically(partial / "corpus.json", json.dumps(info, indent=2, sort_keys=True) + "\n")
    return open_corpus(folder)


def _requested_tokenizer(tokenizer: str | Path | TokenizerSpec) -> Any:
    return asdict(tokenizer) if isinstance(tokenizer, TokenizerSpec) else tokenizer_hash(load_tokenizer(tokenizer))


def _finished(folder: Path, request: dict[str, Any]) -> PreparedCorpus:
    """The corpus in `folder` if it was made of the same inputs."""
    prepared = open_corpus(folder)
    differing = sorted(key for key in request if prepared.info["inputs"].get(key) != request[key])
    if differing:
        raise UserError(f"{folder} was prepared with other {', '.join(differing)}; remove it or take another folder")
    return prepared


# ----------------------------------------------------------------------------------------------- processes


def ordered_map(function: Callable[[In], Out], items: Iterable[In], *, num_workers: int) -> Iterator[Out]:
    """`map` over processes, in order, with a bounded number of items in flight; in-process for one worker."""
    if num_workers <= 1:
        yield from map(function, items)
        return
    # spawn: the parent has threads (progress bar, tokenizers), which a fork would tear apart
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    waiting: deque[Future[Out]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= CHUNKS_PER_WORKER * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process died, most likely for memory; take fewer num_workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core, and no threads beside it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers: they watch it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _chunks(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    chunk: list[RawDocument] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True)
class _Run:
    """What both passes over the text share."""

    corpus: Corpus
    num_workers: int
    progress: Progress

    def map(self, function: Callable[[list[RawDocument]], Out], title: str) -> Generator[Out, None, None]:
        """The function's results on the chunks of the corpus, under a progress bar."""
        task = self.progress.add_task(title, total=self.corpus.total_bytes)
        for result in ordered_map(function, _chunks(self.corpus), num_workers=self.num_workers):
            self.progress.update(task, completed=self.corpus.bytes_read)
            yield result
        self.progress.update(task, completed=self.corpus.total_bytes)


def _progress_bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show,
    )


# ------------------------------------------------------------------------------------------------ the work


def _train(run: _Run, spec: TokenizerSpec, folder: Path) -> None:
    chunks = run.map(_clean, "training tokenizer")
    with contextlib.closing(chunks):  # when the text is cut short, its workers end here
        documents = _first_characters((doc for chunk in chunks for doc in chunk), spec.max_characters)
        train_tokenizer(documents, spec.vocab_size, spec.kind, out_dir=folder)


def _clean(chunk: list[RawDocument]) -> list[Document]:
    return [document.cleaned() for document in chunk]


def _first_characters(documents: Iterable[Document], limit: int) -> Iterator[Document]:
    for document in documents:
        yield document
        limit -= sum(map(len, document.lines))
        if limit <= 0:
            return


@dataclass(frozen=True)
class _TokenizedPart:
    """A document or a part of one as ids; `draw` in [0, 1) is the hash of the document's first part."""

    tokens: np.ndarray
    sizes: np.ndarray
    draw: float
    starts: bool
    ends: bool
    num_characters: int


@functools.cache
def _backend(path: Path) -> Tokenizer:
    backend = Tokenizer.from_file(str(path))
    backend.encode_special_tokens = True  # "</s>" within a text is text, and must not end an item
    return backend


def _tokenize(chunk: list[RawDocument], *, path: Path, eos: int, dtype: np.dtype, seed: int) -> list[_TokenizedPart]:
    """The documents of a chunk as ids, those without any text left out."""
    parts = []
    for raw in chunk:
        lines = raw.cleaned().lines
        if not lines:
            continue
        encodings = _backend(path).encode_batch_fast(list(lines), add_special_tokens=False)
        ids = [[*encoding.ids, eos] for encoding in encodings]
        sizes = np.fromiter(map(len, ids), np.int32, len(ids))
        tokens = np.fromiter((i for line in ids for i in line), dtype, int(sizes.sum()))
        digest = hashlib.blake2b(raw.text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
        draw = int.from_bytes(digest, "little") / 2**64
        parts.append(_TokenizedPart(tokens, sizes, draw, raw.starts, raw.ends, sum(map(len, lines))))
    return parts


def _write_stores(run: _Run, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Write both stores; what corpus.json says."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids, vocab_size, sha = special_ids(tokenizer), len(tokenizer), tokenizer_hash(tokenizer)
    assert ids.eos is not None
    names = ["train", "valid"] if request["valid_fraction"] > 0 else ["train"]
    num_characters = 0
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                StoreWriter(
                    folder / name,
                    vocab_size=vocab_size,
                    special_ids=ids,
                    tokenizer_hash=sha,
                    source={**request, "split": name},
                    expected_bytes=run.corpus.total_bytes // 2 if name == "train" else 0,
                )
            )
            for name in names
        }
        split = _Split(writers["train"], writers.get("valid"), request["valid_fraction"])
        tokenize = functools.partial(
            _tokenize,
            path=folder / "tokenizer" / "tokenizer.json",
            eos=ids.eos,
            dtype=token_dtype(vocab_size),
            seed=request["seed"],
        )
        for parts in run.map(tokenize, "writing tokens"):
            for part in parts:
                split.add(part)
                num_characters += part.num_characters
        split.finish()
    counts = {
        name: {"documents": w.num_documents, "items": w.num_items, "tokens": w.num_tokens}
        for name, w in writers.items()
    }
    return {
        "format_version": CORPUS_VERSION,
        "inputs": request,
        "tokenizer_hash": sha,
        "vocab_size": vocab_size,
        "num_characters": num_characters,
        "counts": counts,
    }


class _Sink(Protocol):
    """Where documents go: a `StoreWriter` or, for the time being, `_Held`."""

    def add_items(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Append items."""

    def end_document(self) -> None:
        """End the document."""


class _Held:
    """A document kept back, with its draw."""

    def __init__(self, draw: float) -> None:
        self.draw = draw
        self._items: list[tuple[np.ndarray, np.ndarray]] = []

    def add_items(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        self._items.append((tokens, sizes))

    def end_document(self) -> None:
        pass

    def pour(self, sink: _Sink) -> None:
        for tokens, sizes in self._items:
            sink.add_items(tokens, sizes)
        sink.end_document()


class _Split:
    """Sends documents to one of two stores by their draw.

    Until a draw falls below the fraction, the document with the lowest draw is held back: it becomes the
    validation set if none does.
    """

    def __init__(self, train: StoreWriter, valid: StoreWriter | None, fraction: float) -> None:
        self._train = train
        self._valid = valid
        self._fraction = fraction
        self._held: _Held | None = None
        self._chosen = valid is None  # whether nobody needs to be held back any more
        self._sink: _Sink = train

    def add(self, part: _TokenizedPart) -> None:
        """Write a part to its document's store."""
        if part.starts:
            self._sink = self._sink_of(part.draw)
        self._sink.add_items(part.tokens, part.sizes)
        if part.ends:
            self._sink.end_document()

    def finish(self) -> None:
        """Decide on the document held back; UserError when one of the stores got nothing."""
        if self._held is not None:
            assert self._valid is not None
            self._held.pour(self._valid)
        if self._train.num_items == 0:
            raise UserError(
                "too few documents to split off some for validation; put blank lines between documents, bring "
                "more text, or say valid_fraction=0"
            )

    def _sink_of(self, draw: float) -> _Sink:
        if self._valid is not None and draw < self._fraction:
            self._chosen = True
            self._release()
            return self._valid
        if self._chosen or (self._held is not None and draw >= self._held.draw):
            return self._train
        self._release()
        self._held = _Held(draw)
        return self._held

    def _release(self) -> None:
        if self._held is not None:
            self._held.pour(self._train)
            self._held = None


@contextlib.contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and vanishes when it does not.

    What a killed process left of it is removed first. UserError when another process builds it right now.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with write_errors_are_one_line(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with write_errors_are_one_line(folder), folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder} is being prepared by another process; wait for it") from None
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            partial.replace(folder)  # also over an empty folder
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            Path(lock.name).unlink(missing_ok=True)
