"""Token stores on disk: Megatron `.bin/.idx` read and written, fairseq mmap read as it is.

`token_index` has the layouts. A store that we write also has `PREFIX.json`, a `Manifest` with the SHA-256 of
both files, written last.
"""

import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from ki_ds.data.token_index import DTYPES, WINDOW, TokenIndex, index_head, map_bytes, pointer_windows, read_index
from ki_ds.errors import UserError
from ki_ds.files import check_space, file_sha256, sync_folder, write_errors_are_one_line

MANIFEST_VERSION = 2
UINT16_VOCAB_LIMIT = 65_500
FAIRSEQ_EOS = 2

_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Ids with a role of their own; None where a vocabulary has no such token. `others` has no role here."""

    bos: int | None = None
    pad: int | None = None
    eos: int | None = None
    unk: int | None = None
    mask: int | None = None
    others: tuple[int, ...] = ()

    @property
    def padding(self) -> int | None:
        """The id that pads and is never in a text; None without one, and where another role has it as well."""
        return None if self.pad in (self.bos, self.eos, self.unk, self.mask) else self.pad

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Every special id once, ascending."""
        roles = (self.bos, self.pad, self.eos, self.unk, self.mask, *self.others)
        return tuple(sorted({i for i in roles if i is not None}))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `PREFIX.json` says about a store that we wrote."""

    format_version: int
    bin_sha256: str
    idx_sha256: str
    dtype: str
    num_tokens: int
    num_items: int
    num_documents: int
    vocab_size: int
    special_ids: SpecialIds
    tokenizer_hash: str | None
    source: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """The manifest in a file; UserError when it is not one of ours, or was changed."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version, digest = data["format_version"], data.pop("manifest_sha256", None)
            data["special_ids"]["others"] = tuple(data["special_ids"]["others"])
            data["special_ids"] = SpecialIds(**data["special_ids"])
            manifest = cls(**data)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not a manifest of a token store ({error}); prepare the data again") from None
        if version != MANIFEST_VERSION:
            raise UserError(
                f"{path} has format version {version}, this program reads {MANIFEST_VERSION}; prepare the data again"
            )
        if digest != manifest.digest():
            raise UserError(f"{path} is not as it was written; the manifest was changed: prepare the data again")
        return manifest

    def digest(self) -> str:
        """SHA-256 over every field."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of the file, stable for equal manifests; it carries its own digest."""
        return json.dumps(asdict(self) | {"manifest_sha256": self.digest()}, indent=2, sort_keys=True) + "\n"


# ------------------------------------------------------------------------------------------------ reading


class TokenStore:
    """A memory-mapped store, made by `open_store`; pickled by its prefix, so that loader workers re-open it.

    `paths` are the `.bin` and the `.idx`; `kind` is "Megatron" or "fairseq"; `sizes` (int32 [num_items]) are those of
    the items, the lines of the text, in tokens; `tokens` is the flat view [num_tokens] over all items in order, of an
    integer dtype, little-endian (uint16 or int32 in stores that we write); `manifest` is None for files of others.
    """

    def __init__(self, prefix: Path, index: TokenIndex, tokens: np.ndarray) -> None:
        self.prefix = prefix
        self.paths = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self.kind, self.sizes, self.num_items = index.kind, index.sizes, len(index.sizes)
        self.tokens, self.dtype, self.num_tokens = tokens, tokens.dtype, len(tokens)
        self.manifest: Manifest | None = None
        self._index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(open_store, checked=True), (self.prefix,)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    @cached_property
    def document_indices(self) -> np.ndarray:
        """int64 [num_documents + 1], in items: the first is 0, the last `num_items`.

        fairseq writes none: there a blank input line, an item that is a lone `</s>`, ends its document.
        """
        if self._index.document_indices is not None:
            return self._index.document_indices
        singles = np.flatnonzero(self.sizes == 1)
        blank = singles[self.tokens[self.item_starts(singles)] == FAIRSEQ_EOS]
        return np.unique(np.concatenate([[0], blank + 1, [self.num_items]])).astype(np.int64)

    def item(self, i: int) -> np.ndarray:
        """The tokens of item `i`, a view."""
        start = int(self.item_starts(i))
        return self.tokens[start : start + int(self.sizes[i])]

    def item_starts(self, items: np.ndarray | int) -> np.ndarray:
        """int64 positions in `tokens` where items (their numbers, below `num_items`) start."""
        return self._index.pointers[items] // self.dtype.itemsize

    def verify(self, sha256: Callable[[Path], str] = file_sha256) -> Manifest | None:
        """The manifest whose hashes both files match; None for a store without one; UserError otherwise."""
        if self.manifest is None:
            return None
        for path, expected in zip(self.paths, (self.manifest.bin_sha256, self.manifest.idx_sha256), strict=True):
            if (actual := sha256(path)) != expected:
                raise UserError(
                    f"{path} has SHA-256 {actual[:12]}…, its manifest says {expected[:12]}…; "
                    "the file was changed: prepare the data again"
                )
        return self.manifest

    def _check_manifest(self, path: Path) -> None:
        """UserError when the manifest in `path` speaks of another store."""
        assert self.manifest is not None
        manifest = self.manifest
        actual = (self.kind, self.num_tokens, self.num_items, self.num_documents, self.dtype.name)
        said = ("Megatron", manifest.num_tokens, manifest.num_items, manifest.num_documents, manifest.dtype)
        if actual != said:
            raise UserError(
                f"{path} speaks of (kind, tokens, items, documents, dtype) {said}, the files have {actual}; "
                "they do not belong together: prepare the data again"
            )


def store_prefix(path: str | os.PathLike[str]) -> Path:
    """The prefix of a store, whichever of its files was named."""
    text = os.fspath(path)
    for suffix in (".bin", ".idx"):
        text = text.removesuffix(suffix)
    return Path(text)


def open_store(prefix: str | os.PathLike[str], *, checked: bool = False) -> TokenStore:
    """A validated, memory-mapped store, Megatron or fairseq; UserError for what is exactly neither.

    `checked` looks at lengths only, which takes the same time for any number of items: for a store that this
    run has opened before.
    """
    path = store_prefix(prefix)
    index = read_index(Path(f"{path}.idx"), checked=checked)
    bin_path, manifest_path = Path(f"{path}.bin"), Path(f"{path}.json")
    tokens = map_bytes(bin_path)
    if len(tokens) != index.num_bytes:
        raise UserError(
            f"{bin_path} has {len(tokens):,} bytes, but its index speaks of {index.num_bytes:,}; "
            "the pair is cut or mixed up: copy both files again or prepare the data again"
        )
    store = TokenStore(path, index, tokens.view(index.dtype))
    if manifest_path.exists():
        store.manifest = Manifest.read(manifest_path)
        store._check_manifest(manifest_path)
    return store


def open_shards(path: str | os.PathLike[str], *, checked: bool = False) -> list[TokenStore]:
    """The stores that `path` stands for, in order; UserError when one is missing or they do not agree.

    A glob stands for the Megatron stores that it matches, sorted naturally (`corpus_2` before `corpus_10`).
    A fairseq prefix stands for itself and its shards `PREFIX1`, `PREFIX2`, …, as fairseq reads them, unless it
    ends in a digit: then it is that one shard. Any other prefix is one store. `checked` as in `open_store`.
    """
    if glob.has_magic(os.fspath(path)) and not Path(f"{store_prefix(path)}.idx").exists():
        stores = [open_store(prefix, checked=checked) for prefix in _matching_prefixes(os.fspath(path))]
        for store in stores:
            if store.kind == "fairseq":
                raise UserError(
                    f"{store.prefix} is a fairseq store, whose shards have numbers; name the first one without a glob"
                )
    else:
        stores = [open_store(path, checked=checked)]
        if stores[0].kind == "fairseq":
            stores += [open_store(prefix, checked=checked) for prefix in _numbered_shards(stores[0].prefix)]
    _check_agreement(stores)
    return stores


def is_fairseq_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is the output of fairseq-preprocess: a dict.txt beside a train.idx."""
    return all(Path(folder, name).is_file() for name in ("dict.txt", "train.idx"))


def _matching_prefixes(pattern: str) -> list[Path]:
    """Prefixes with a file that matches, so that half a store is noticed too."""
    stem = str(store_prefix(pattern))
    prefixes = {store_prefix(name) for suffix in (".idx", ".bin") for name in glob.glob(stem + suffix)}
    if not prefixes:
        raise UserError(f"{pattern} matches no token store (PREFIX.bin with PREFIX.idx); mend the glob or the folder")

    def natural_order(path: Path) -> tuple[list[int | str], str]:
        # digits and what lies between them take turns in the split, so that numbers are compared with numbers
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))], str(path)

    return sorted(prefixes, key=natural_order)


def _numbered_shards(first: Path) -> list[Path]:
    """The shards after the first one of a fairseq split."""
    if first.name[-1:].isdecimal():
        return []
    name = re.compile(re.escape(first.name) + r"([1-9][0-9]*)\.(?:idx|bin)")
    numbers = sorted({int(match[1]) for path in first.parent.iterdir() if (match := name.fullmatch(path.name))})
    for expected, number in enumerate(numbers, 1):
        if number != expected:
            raise UserError(
                f"{first}{expected} is missing, but there is {first}{number}; shards are numbered without a gap: "
                "fetch it, or rename those after it"
            )
    return [first.with_name(f"{first.name}{number}") for number in numbers]


def _check_agreement(stores: list[TokenStore]) -> None:
    """UserError when shards cannot be read as one; one without a manifest has no say in what manifests tell."""
    first: dict[str, tuple[Path, Any]] = {}
    for store in stores:
        facts: dict[str, Any] = {"kind": store.kind, "dtype": store.dtype}
        if store.manifest is not None:
            facts |= {name: getattr(store.manifest, name) for name in ("tokenizer_hash", "vocab_size", "special_ids")}
        for name, value in facts.items():
            prefix, expected = first.setdefault(name, (store.prefix, value))
            if value != expected:
                raise UserError(
                    f"{store.prefix} has {name} {value}, {prefix} has {expected}; shards must agree: "
                    "prepare them with one tokenizer"
                )


# ------------------------------------------------------------------------------------------------ writing


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 ids, else int32."""
    return DTYPES[8] if vocab_size < UINT16_VOCAB_LIMIT else DTYPES[4]


class StoreWriter:
    """Context manager that writes one store: items stream to temporary names, and are renamed at its end.

    On an exception nothing is left. A killed process leaves `*.tmp` files only, which the next writer of the
    same prefix takes over. UserError: the store exists, another process writes it, the disk is full, or an id
    is not in [0, vocab_size).
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        vocab_size: int,
        special_ids: SpecialIds,
        tokenizer_hash: str | None = None,
        source: dict[str, Any] | None = None,
        expected_bytes: int = 0,
    ) -> None:
        self.prefix = store_prefix(prefix)
        self.vocab_size = vocab_size
        self.special_ids = special_ids
        self.tokenizer_hash = tokenizer_hash
        self.source = source or {}
        self.dtype = token_dtype(vocab_size)
        self.num_items = 0
        self.num_tokens = 0
        self._expected_bytes = expected_bytes
        self._documents = array("q", [0])
        self._sha = hashlib.sha256()

    @property
    def num_documents(self) -> int:
        """Documents ended so far."""
        return len(self._documents) - 1

    def __enter__(self) -> Self:
        for suffix in (".idx", ".json"):
            if Path(f"{self.prefix}{suffix}").exists():
                raise UserError(f"{self.prefix}{suffix} exists already; remove that store or take another name")
        with write_errors_are_one_line(self.prefix):
            self._open_files()
        return self

    def _open_files(self) -> None:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        check_space(self.prefix.parent, max(self._expected_bytes, 2 * _BUFFER_BYTES))
        # Opened for appending: another writer's file must not be harmed before its lock is seen.
        self._bin: BinaryIO = self._temporary(".bin").open("ab")
        try:
            fcntl.flock(self._bin, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._bin.close()
            raise UserError(f"{self.prefix}.bin is being written by another process; wait for it") from None
        self._bin.truncate(0)
        # Sizes go through a file of their own: the index wants their number before them.
        self._sizes: BinaryIO = self._temporary(".sizes").open("w+b")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with write_errors_are_one_line(self.prefix):
                    self._finish()
        finally:
            for file in (self._bin, self._sizes):
                with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
                    file.close()
            for suffix in (".bin", ".sizes", ".idx", ".json"):
                self._temporary(suffix).unlink(missing_ok=True)

    def add_items(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Append items given as flat ids (any integer dtype) and their sizes in tokens."""
        tokens, sizes = np.asarray(tokens), np.asarray(sizes)
        assert tokens.size == sizes.sum(dtype=np.int64), "sizes do not sum up to the tokens"
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise UserError(
                f"token ids {tokens.min()} to {tokens.max()} leave the vocabulary of {self.vocab_size:,}; "
                "tokenize with the tokenizer that this store is meant for"
            )
        data = np.ascontiguousarray(tokens, self.dtype).tobytes()
        with write_errors_are_one_line(self.prefix):
            if self.num_tokens * self.dtype.itemsize % _BUFFER_BYTES + len(data) >= _BUFFER_BYTES:
                check_space(self.prefix.parent, len(data) + 12 * self.num_items)
            self._bin.write(data)
            self._sizes.write(sizes.astype("<i4").tobytes())
        self._sha.update(data)
        self.num_tokens += tokens.size
        self.num_items += sizes.size

    def end_document(self) -> None:
        """Say that the items so far end a document; without new items it does nothing."""
        if self._documents[-1] != self.num_items:
            self._documents.append(self.num_items)

    def add_document(self, items: Sequence[Sequence[int] | np.ndarray]) -> None:
        """Append a document given as lists of ids, one a line."""
        sizes = np.fromiter(map(len, items), np.int64, len(items))
        tokens = np.concatenate([np.asarray(item, np.int64) for item in items] or [np.empty(0, np.int64)])
        self.add_items(tokens, sizes)
        self.end_document()

    def _temporary(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}.tmp")

    def _finish(self) -> None:
        """Write the index, make both files durable, rename them, and put the manifest last."""
        self.end_document()
        idx_sha256 = self._write(".idx", self._index_parts())
        self._bin.flush()
        os.fsync(self._bin.fileno())
        manifest = Manifest(
            format_version=MANIFEST_VERSION,
            bin_sha256=self._sha.hexdigest(),
            idx_sha256=idx_sha256,
            dtype=self.dtype.name,
            num_tokens=self.num_tokens,
            num_items=self.num_items,
            num_documents=self.num_documents,
            vocab_size=self.vocab_size,
            special_ids=self.special_ids,
            tokenizer_hash=self.tokenizer_hash,
            source=self.source,
        )
        self._write(".json", [manifest.to_json().encode()])
        for suffix in (".bin", ".idx", ".json"):  # renames need no space, so none of them meets a full disk
            self._temporary(suffix).replace(f"{self.prefix}{suffix}")
        sync_folder(self.prefix.parent)

    def _write(self, suffix: str, parts: Iterable[bytes]) -> str:
        """Write a temporary file durably and return its SHA-256."""
        sha = hashlib.sha256()
        with self._temporary(suffix).open("wb") as file:
            for part in parts:
                file.write(part)
                sha.update(part)
            file.flush()
            os.fsync(file.fileno())
        return sha.hexdigest()

    def _index_parts(self) -> Iterable[bytes]:
        yield index_head(self.dtype, num_items=self.num_items, num_bounds=len(self._documents))
        for sizes in self._size_windows():
            yield sizes.tobytes()
        for starts in pointer_windows(self._size_windows(), self.dtype.itemsize):
            yield starts[:-1].astype("<i8").tobytes()
        yield np.frombuffer(self._documents, np.int64).astype("<i8").tobytes()

    def _size_windows(self) -> Iterator[np.ndarray]:
        self._sizes.seek(0)
        while chunk := self._sizes.read(4 * WINDOW):
            yield np.frombuffer(chunk, "<i4")
