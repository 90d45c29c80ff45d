"""From sources of text to a corpus folder, in parallel with bounded memory.

    OUT/train.{bin,idx,json}   OUT/valid.{bin,idx,json}   OUT/tokenizer/   OUT/corpus.json

It is the same, to the byte, for any number of workers and of interruptions. The work is done in .OUT.partial:

    request.json       the inputs; another call with the same goes on here, with others starts anew
    pieces/            the tokens of finished stretches of the text, see `ki_ds.data.pieces`
    corpus/            what becomes OUT by a rename when it is complete

Documents are cleaned and tokenized once; all that follows (duplicates, split, stores) is copying. Until OUT is
complete, the tokens take twice their space.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from ki_ds.data import corpora
from ki_ds.data.corpora import Corpus, Document
from ki_ds.data.pieces import Piece, PieceFolder, work_stays
from ki_ds.data.processes import StoppedError, ordered_map
from ki_ds.data.selection import DROPPED, TRAIN, VALID, destinations
from ki_ds.data.store import SpecialIds, StoreWriter, token_dtype
from ki_ds.data.tokenize import (
    TokenizerKind,
    former_tokenizer_hash,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_from_fairseq,
    tokenizer_hash,
    train_tokenizer,
    up_to,
)
from ki_ds.errors import UserError
from ki_ds.files import check_space, sync_folder, write_atomically, write_errors_are_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CORPUS_VERSION = 1
CHUNK_CHARACTERS = 1 << 17  # of raw text in one message to a worker
PIECE_CHUNKS = 32  # in one file of tokens: what an interruption costs at most
# Encoding plain text runs outside Python's lock, so that threads do, in a third of the memory of processes.
MAX_THREADS = 8

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
    drop_duplicates: bool = False,
    pad_vocab_to: int = 1,
    fairseq_dict: str | Path | None = None,
    show_progress: bool = True,
) -> PreparedCorpus:
    """The corpus folder `out`: every line of `sources` an item that ends with eos, split by whole documents.

    A document is for validation when a hash of its text keyed by `seed` falls below `valid_fraction`; where
    that chooses none, the document with the lowest hash is taken. `tokenizer` is a folder, a SentencePiece
    model, a hub name or a `TokenizerSpec` to train; with `fairseq_dict` the ids are those of that dict.txt, whose
    symbols are ids of `tokenizer` (GPT-2). `drop_duplicates` leaves out documents whose clean text came before
    (compared by 128-bit hashes; documents handed on in parts by those of their parts). `pad_vocab_to` only notes
    the vocabulary size rounded up to its multiple. What is no Unicode becomes U+FFFD, counted in corpus.json. With
    `show_progress` a table on stderr says first what is read and what is left out.

    Called again with the same inputs it finds its work done, or goes on where it was stopped (only the training of
    a tokenizer begins again). UserError: bad sources, `out` holds something else, too few documents for a split:
    nothing is left. StoppedError, which is one: a full disk, a dead worker: what is done stays.
    """
    if not 0 <= valid_fraction < 1:
        raise UserError(f"valid_fraction={valid_fraction} is not in [0, 1); take e.g. 0.005")
    if seed < 0:
        raise UserError(f"seed={seed} is negative; take one from 0 on")
    if pad_vocab_to < 1:
        raise UserError(f"pad_vocab_to={pad_vocab_to} is below 1; take e.g. 64")
    corpus = Corpus(sources, text_key=text_key)
    wanted = _wanted_tokenizer(tokenizer, fairseq_dict)
    sha = None if isinstance(wanted, TokenizerSpec) else tokenizer_hash(wanted)
    request = {
        "files": corpus.fingerprint(),
        "tokenizer": asdict(wanted) if isinstance(wanted, TokenizerSpec) else tokenizer_hash(wanted, masked=True),
        "valid_fraction": valid_fraction,
        "seed": seed,
        "text_key": text_key,
        "domain": "",  # as folders made before have it
        # said only where asked for, so that folders made before they existed still fit
        **({"drop_duplicates": True} if drop_duplicates else {}),
        **({"pad_vocab_to": pad_vocab_to} if pad_vocab_to > 1 else {}),
    }
    folder = Path(out)
    if _is_taken(folder):
        former = None if isinstance(wanted, TokenizerSpec) else former_tokenizer_hash(wanted)
        return _finished(folder, request, former)
    if show_progress:
        print(corpus.found.table(), file=sys.stderr)
    workers = num_workers if num_workers is not None else len(os.sched_getaffinity(0))
    with _work_folder(folder, request, tell=show_progress) as work, _progress_bar(show_progress) as progress:
        run = _Run(corpus, workers, progress)
        encoder = _provide_tokenizer(run, wanted, sha, work / "corpus" / "tokenizer")
        del wanted  # its memory is needed no longer
        pieces = _tokenize_all(run, PieceFolder(work / "pieces"), encoder, request)
        chosen = destinations(pieces, valid_fraction=valid_fraction, drop_duplicates=drop_duplicates)
        with work_stays(work):
            info = _write_stores(pieces, chosen, work / "corpus", encoder, request)
            told = {"replaced_characters": corpus.replaced, "left_out_pages": corpus.left_out_pages}
            # said only where there are some, as folders made before do not tell
            info |= {name: dict(counts) for name, counts in told.items() if counts}
            write_atomically(work / "corpus" / "corpus.json", json.dumps(info, indent=2, sort_keys=True) + "\n")
    return open_corpus(folder)


def _is_taken(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _finished(folder: Path, request: dict[str, Any], former_tokenizer: str | None) -> PreparedCorpus:
    """The corpus in `folder` if it was made of the same inputs; the tokenizer may have its former hash there."""
    prepared = open_corpus(folder)
    inputs = prepared.info["inputs"]
    if former_tokenizer is not None and inputs.get("tokenizer") == former_tokenizer:
        request = request | {"tokenizer": former_tokenizer}
    differing = _differing(inputs, request)
    if differing:
        raise UserError(f"{folder} was prepared with other {differing}; remove it or take another folder")
    shutil.rmtree(_work_path(folder), ignore_errors=True)  # left by a kill right after the rename
    return prepared


def _differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    return ", ".join(sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)))


# ------------------------------------------------------------------------------------------ the work folder


def _work_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


@contextlib.contextmanager
def _work_folder(folder: Path, request: dict[str, Any], *, tell: bool) -> Iterator[Path]:
    """The locked folder beside `folder` whose "corpus" becomes `folder` when the block ends well.

    It stays when the block is interrupted or stopped, and vanishes when the inputs are at fault. What another call
    left in it stays there if that had the same inputs. UserError when another process works in it right now.
    """
    work = _work_path(folder)
    with write_errors_are_one_line(folder):
        work.mkdir(parents=True, exist_ok=True)
    with _locked(work, folder):
        try:
            _take_over(work, request, tell=tell)
            yield work
        except StoppedError:
            raise
        except UserError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        with write_errors_are_one_line(folder):
            (work / "corpus").replace(folder)  # also over an empty folder
        sync_folder(folder.parent)
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _locked(work: Path, folder: Path) -> Iterator[None]:
    handle = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino != work.stat().st_ino or _is_taken(folder):  # the other has just finished
            raise FileNotFoundError
        yield
    except (BlockingIOError, FileNotFoundError):
        raise UserError(f"{folder} is being prepared by another process; wait for it and call again") from None
    finally:
        os.close(handle)


def _take_over(work: Path, request: dict[str, Any], *, tell: bool) -> None:
    """Keep what an earlier call did on the same inputs, and remove what it did on others."""
    note = work / "request.json"
    # another cutting of the text gives other pieces
    request = {**request, "cutting": [CHUNK_CHARACTERS, PIECE_CHUNKS, corpora.MAX_PART_CHARACTERS]}
    try:
        differing = _differing(json.loads(note.read_text(encoding="utf-8")), request)
    except (OSError, ValueError):
        differing = "inputs"
    if differing:
        left = list(work.iterdir())
        if left and tell:
            print(f"{work} holds unfinished work with other {differing}; starting anew", file=sys.stderr)
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with write_errors_are_one_line(work):
            (work / "corpus").mkdir()
        write_atomically(note, json.dumps(request, indent=2, sort_keys=True) + "\n")
    elif tell:
        done = len(PieceFolder(work / "pieces"))
        print(f"{work} holds unfinished work on the same inputs; going on after {done} pieces", file=sys.stderr)


# ----------------------------------------------------------------------------------------------- the text


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
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

    def map(
        self, function: Callable[[list[Document]], Out], title: str, *, first_chunk: int = 0, threads: bool = False
    ) -> Generator[Out, None, None]:
        """The function's results on the chunks of the corpus from `first_chunk` on, under a progress bar."""
        task = self.progress.add_task(title, total=self.corpus.total_bytes or None)
        chunks = itertools.islice(_chunks(self.corpus), first_chunk, None)
        for result in ordered_map(function, chunks, num_workers=self.num_workers, threads=threads):
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


# ------------------------------------------------------------------------------------------- the tokenizer


class _Encoder:
    """The tokenizer in a folder; pickled by its file, which each worker process reads once."""

    def __init__(self, backend: Tokenizer, path: Path, ids: SpecialIds, vocab_size: int, sha: str) -> None:
        assert ids.eos is not None
        self.eos: int = ids.eos
        self.backend = backend
        backend.encode_special_tokens = True  # "</s>" within a text is text, and must not end an item
        self.path = path
        self.ids = ids
        self.vocab_size = vocab_size
        self.sha = sha
        self.dtype = token_dtype(vocab_size)

    def encode(self, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all lines, int32 sizes in tokens), each line with its eos."""
        ids = [encoding.ids for encoding in self.backend.encode_batch_fast(lines, add_special_tokens=False)]
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(sizes.sum()))
        if self.backend.get_vocab_size() > self.vocab_size and self.ids.unk is not None:
            tokens[tokens >= self.vocab_size] = self.ids.unk  # what a fairseq dictionary lacks
        elif tokens.size and tokens.max() >= self.vocab_size:
            raise UserError(
                f"the tokenizer gives id {tokens.max()} with {self.vocab_size:,} tokens: its ids have holes; number "
                "them without"
            )
        return np.insert(tokens, np.cumsum(sizes), self.eos).astype(self.dtype), (sizes + 1).astype(np.int32)

    def __reduce__(self) -> tuple[Any, ...]:
        return _read_encoder, (self.path, self.ids, self.vocab_size, self.sha)


@functools.lru_cache(maxsize=1)
def _read_encoder(path: Path, ids: SpecialIds, vocab_size: int, sha: str) -> _Encoder:
    return _Encoder(Tokenizer.from_file(str(path)), path, ids, vocab_size, sha)


def _wanted_tokenizer(
    tokenizer: str | Path | TokenizerSpec, fairseq_dict: str | Path | None
) -> "PreTrainedTokenizerBase | TokenizerSpec":
    """The tokenizer given, or the specification of one to train; UserError when it is not fit for a corpus."""
    if isinstance(tokenizer, TokenizerSpec):
        if fairseq_dict is not None:
            raise UserError(f"fairseq_dict={fairseq_dict} numbers GPT-2's BPE; give the folder of that tokenizer")
        return tokenizer
    given = load_tokenizer(tokenizer) if fairseq_dict is None else tokenizer_from_fairseq(fairseq_dict, tokenizer)
    special_ids(given)  # refuses one without eos
    return given


def _provide_tokenizer(
    run: _Run, wanted: "PreTrainedTokenizerBase | TokenizerSpec", sha: str | None, folder: Path
) -> _Encoder:
    """Save the tokenizer given (its hash is `sha`), or train and save one, unless an earlier call did so."""
    if not isinstance(wanted, TokenizerSpec):
        tokenizer = wanted
        if not folder.exists():
            save_tokenizer(tokenizer, folder)
    elif folder.exists():
        tokenizer = load_tokenizer(folder)
    else:
        chunks = run.map(_lines, "training tokenizer")
        with contextlib.closing(chunks):  # when the text is cut short, its workers end here
            documents = up_to(itertools.chain.from_iterable(chunks), wanted.max_characters, _num_characters)
            tokenizer = train_tokenizer(documents, wanted.vocab_size, wanted.kind, out_dir=folder)
    ids, path = special_ids(tokenizer), folder / "tokenizer.json"
    return _Encoder(tokenizer.backend_tokenizer, path, ids, len(tokenizer), sha or tokenizer_hash(tokenizer))


def _lines(chunk: list[Document]) -> list[tuple[str, ...]]:
    return [document.lines() for document in chunk]


def _num_characters(lines: Iterable[str]) -> int:
    return sum(map(len, lines))


# ---------------------------------------------------------------------------------------------- the tokens


def _tokenize_all(run: _Run, pieces: PieceFolder, encoder: _Encoder, request: dict[str, Any]) -> PieceFolder:
    """The pieces of the whole corpus; those that are there already are not made again."""
    if not len(pieces):
        check_space(pieces.folder, run.corpus.total_bytes)
    tokenize = functools.partial(
        _tokenize, encoder=encoder, seed=request["seed"], with_digests=request.get("drop_duplicates", False)
    )
    has_wikitext = any(source.kind == "wiki" for source in run.corpus.sources)  # whose cleaning is Python's
    threads = not has_wikitext and run.num_workers <= MAX_THREADS
    results = run.map(tokenize, "tokenizing", first_chunk=len(pieces) * PIECE_CHUNKS, threads=threads)
    with _serial_tokenizers(run.num_workers), contextlib.closing(results):
        while batch := list(itertools.islice(results, PIECE_CHUNKS)):
            pieces.append(Piece.joined(batch))
    return pieces


@contextlib.contextmanager
def _serial_tokenizers(num_workers: int) -> Iterator[None]:
    """Keep the threads of the tokenizers library from coming on top of `num_workers` of ours."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.__setitem__(name, before)


def _tokenize(chunk: list[Document], *, encoder: _Encoder, seed: int, with_digests: bool) -> Piece:
    """The documents of a chunk as ids, those without any text left out."""
    kept = [(document, lines) for document in chunk if (lines := document.lines())]
    tokens, item_sizes = encoder.encode([line for _, lines in kept for line in lines])
    key = seed.to_bytes(8, "little")
    draws = [hashlib.blake2b(document.text.encode(), digest_size=8, key=key).digest() for document, _ in kept]
    digests = [hashlib.blake2b("\n".join(lines).encode(), digest_size=16).digest() for _, lines in kept]
    return Piece(
        tokens=tokens,
        item_sizes=item_sizes,
        part_items=np.array([len(lines) for _, lines in kept], np.int64),
        part_characters=np.array([_num_characters(lines) for _, lines in kept], np.int64),
        starts=np.array([document.starts for document, _ in kept], bool),
        ends=np.array([document.ends for document, _ in kept], bool),
        draws=np.frombuffer(b"".join(draws), "<u8") / 2**64,
        digests=np.frombuffer(b"".join(digests) if with_digests else b"", np.uint64).reshape(-1, 2),
    )


def _write_stores(
    pieces: PieceFolder, chosen: np.ndarray, folder: Path, encoder: _Encoder, request: dict[str, Any]
) -> dict[str, Any]:
    """Write the stores from the pieces, each document where it was chosen to go; what corpus.json says."""
    names = ["train", "valid"] if request["valid_fraction"] > 0 else ["train"]
    for left in (path for name in names for path in folder.glob(f"{name}.*")):
        left.unlink()  # of a call that was stopped here
    expected = sum(path.stat().st_size for path in pieces.folder.iterdir())
    num_characters = 0
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                StoreWriter(
                    folder / name,
                    vocab_size=encoder.vocab_size,
                    special_ids=encoder.ids,
                    tokenizer_hash=encoder.sha,
                    source={**request, "split": name},
                    expected_bytes=expected if name == "train" else 0,
                )
            )
            for name in names
        }
        stores = {VALID: writers.get("valid"), TRAIN: writers["train"]}
        document = -1
        for piece in pieces:
            first_item = first_token = 0
            for i, (num_items, start, end) in enumerate(zip(piece.part_items, piece.starts, piece.ends, strict=True)):
                sizes = piece.item_sizes[first_item : first_item + num_items]
                tokens = piece.tokens[first_token : first_token + sizes.sum()]
                first_item, first_token = first_item + num_items, first_token + len(tokens)
                document += bool(start)
                store = stores.get(int(chosen[document]))
                if store is None:
                    continue
                store.add_items(tokens, sizes)
                num_characters += int(piece.part_characters[i])
                if end:
                    store.end_document()
    counts = {
        name: {"documents": w.num_documents, "items": w.num_items, "tokens": w.num_tokens}
        for name, w in writers.items()
    }
    return {
        "format_version": CORPUS_VERSION,
        "inputs": request,
        "tokenizer_hash": encoder.sha,
        "vocab_size": encoder.vocab_size,
        "num_characters": num_characters,
        "counts": counts,
        **({"num_duplicates": int((chosen == DROPPED).sum())} if "drop_duplicates" in request else {}),
        **({"padded_vocab_size": -(-encoder.vocab_size // pad) * pad} if (pad := request.get("pad_vocab_to")) else {}),
    }
