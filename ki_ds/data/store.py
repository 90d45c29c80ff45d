"""Token stores on disk: Megatron `.bin/.idx` read and written, fairseq mmap read as it is.

Both are little-endian and begin with the same 18 bytes; only the length of the index tells them apart:

    fairseq    magic 9 B, u64 version, u8 dtype, u64 n,        int32 sizes[n], int64 pointers[n]
    Megatron   magic 9 B, u64 version, u8 dtype, u64 n, u64 d, int32 sizes[n], int64 pointers[n],
               int64 document_indices[d] [, int8 modes[n]]

Sizes are in tokens, pointers in bytes of the `.bin`, document indices in items (the first is 0, the last n).
A store that we write also has `PREFIX.json`, a `Manifest` with the SHA-256 of both files, written last.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from ki_ds.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
INDEX_VERSION = 1
MANIFEST_VERSION = 1
# The only two codes that token files are written with, and on which fairseq and Megatron agree.
DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
UINT16_VOCAB_LIMIT = 65_500
FAIRSEQ_EOS = 2

_PREAMBLE = struct.Struct("<9sQBQ")  # magic, version, dtype code, number of items
_WINDOW = 1 << 20  # items handled at once, so that memory does not grow with the index
_BUFFER_BYTES = 8 << 20
_UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
}


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
        """The manifest in a file; UserError when it is not one of ours."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data["special_ids"]["others"] = tuple(data["special_ids"]["others"])
            data["special_ids"] = SpecialIds(**data["special_ids"])
            manifest = cls(**data)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is not a manifest of a token store ({error}); prepare the data again") from None
        if manifest.format_version != MANIFEST_VERSION:
            raise UserError(
                f"{path} has format version {manifest.format_version}, this program reads "
                f"{MANIFEST_VERSION}; prepare the data again"
            )
        return manifest

    def to_json(self) -> str:
        """The text of the file, stable for equal manifests."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


# ------------------------------------------------------------------------------------------------ reading


class TokenStore:
    """A memory-mapped store, made by `open_store`; pickled by its prefix, so that loader workers re-open it.

    `kind` is "Megatron" or "fairseq"; `sizes` int32 [num_items] in tokens; `tokens` is the flat view
    [num_tokens] of dtype uint16 or int32 over all items in order; `manifest` is None for files of others.
    """

    def __init__(self, prefix: Path, kind: str, index: "_Index", tokens: np.ndarray) -> None:
        self.prefix = prefix
        self.kind = kind
        self.tokens = tokens
        self.sizes = index.sizes
        self._pointers = index.pointers
        self._document_indices = index.document_indices
        self.manifest: Manifest | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.prefix,)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_items(self) -> int:
        """Number of items (lines of the text)."""
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all items."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    @property
    def dtype(self) -> np.dtype:
        """Type of a stored token, uint16 or int32."""
        return self.tokens.dtype

    @cached_property
    def document_indices(self) -> np.ndarray:
        """int64 [num_documents + 1], in items: the first is 0, the last `num_items`.

        fairseq writes none: there a blank input line, an item that is a lone `</s>`, ends its document.
        """
        if self._document_indices is not None:
            return self._document_indices
        singles = np.flatnonzero(self.sizes == 1)
        blank = singles[self.tokens[self._pointers[singles] // self.dtype.itemsize] == FAIRSEQ_EOS]
        return np.unique(np.concatenate([[0], blank + 1, [self.num_items]])).astype(np.int64)

    def item(self, i: int) -> np.ndarray:
        """The tokens of item `i`, a view."""
        start = int(self._pointers[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[i])]

    def item_ends(self, first: int, last: int) -> np.ndarray:
        """int64 positions in `tokens` where items first..last-1 end."""
        return self._pointers[first:last] // self.dtype.itemsize + self.sizes[first:last]

    def document_ends(self) -> np.ndarray:
        """int64 positions in `tokens` where the documents end, ascending, the last one `num_tokens`."""
        bounds = np.asarray(self.document_indices)
        last_items = bounds[1:][bounds[1:] > 0] - 1
        return self._pointers[last_items] // self.dtype.itemsize + self.sizes[last_items]


@dataclass(frozen=True)
class _Index:
    """The parsed `.idx`: views into the mapped file."""

    kind: str
    dtype: np.dtype
    sizes: np.ndarray
    pointers: np.ndarray
    document_indices: np.ndarray | None


def store_prefix(path: str | os.PathLike[str]) -> Path:
    """The prefix of a store, whichever of its files was named."""
    text = os.fspath(path)
    for suffix in (".bin", ".idx"):
        text = text.removesuffix(suffix)
    return Path(text)


def open_store(prefix: str | os.PathLike[str]) -> TokenStore:
    """A validated, memory-mapped store, Megatron or fairseq; UserError for what is exactly neither."""
    path = store_prefix(prefix)
    index_path, bin_path = Path(f"{path}.idx"), Path(f"{path}.bin")
    index = _read_index(index_path, _map_bytes(index_path))
    tokens = _map_bytes(bin_path)
    expected = int(index.sizes.sum(dtype=np.int64)) * index.dtype.itemsize
    if len(tokens) != expected:
        raise UserError(
            f"{bin_path} has {len(tokens):,} bytes, but its index speaks of {expected:,}; "
            "the pair is cut or mixed up: copy both files again or prepare the data again"
        )
    store = TokenStore(path, index.kind, index, tokens.view(index.dtype))
    manifest_path = Path(f"{path}.json")
    if manifest_path.exists():
        store.manifest = Manifest.read(manifest_path)
        _check_manifest(store, store.manifest, manifest_path)
    return store


def verify_store(prefix: str | os.PathLike[str]) -> Manifest | None:
    """The manifest whose hashes both files match; None for a store without one; UserError otherwise."""
    store = open_store(prefix)
    if store.manifest is None:
        return None
    for suffix, expected in ((".bin", store.manifest.bin_sha256), (".idx", store.manifest.idx_sha256)):
        path = Path(f"{store.prefix}{suffix}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise UserError(
                f"{path} has SHA-256 {found[:12]}…, its manifest says {expected[:12]}…; "
                "the file was changed: prepare the data again"
            )
    return store.manifest


def _map_bytes(path: Path) -> np.ndarray:
    try:
        if path.stat().st_size == 0:
            return np.empty(0, np.uint8)  # an empty file cannot be mapped
        return np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); a token store is PREFIX.bin with PREFIX.idx"
        ) from None


def _read_index(path: Path, data: np.ndarray) -> _Index:
    """The index in `data`, told apart by its length, with its sums checked."""
    if data[: len(LEGACY_MAGIC)].tobytes() == LEGACY_MAGIC:
        raise UserError(
            f"{path} is a legacy fairseq index (TNTIDX), which is not read here; "
            "convert it: fairseq-preprocess with --dataset-impl mmap, or tools/prepare_data.py on the text"
        )
    if len(data) < _PREAMBLE.size:
        raise UserError(f"{path} has {len(data)} bytes, too few for a token index; it is cut or something else")
    magic, version, code, n = _PREAMBLE.unpack(data[: _PREAMBLE.size].tobytes())
    if magic != MAGIC:
        raise UserError(f"{path} does not begin like a token index (MMIDIDX); name a Megatron or fairseq mmap store")
    if version != INDEX_VERSION:
        raise UserError(f"{path} has index version {version}, only {INDEX_VERSION} exists; the file is damaged")
    if code not in DTYPES:
        raise UserError(f"{path} has dtype code {code}; tokens are 4 (int32) or 8 (uint16): write the store again")
    kind, num_bounds, offset = _layout(path, data, n)
    sizes = _view(data, offset, n, "<i4")
    pointers = _view(data, offset + 4 * n, n, "<i8")
    _check_pointers(path, sizes, pointers, DTYPES[code].itemsize)
    if kind == "fairseq":
        return _Index(kind, DTYPES[code], sizes, pointers, None)
    documents = _view(data, offset + 12 * n, num_bounds, "<i8")
    if num_bounds == 0 or documents[0] != 0 or documents[-1] != n or (np.diff(documents) < 0).any():
        raise UserError(f"{path} has document indices that do not rise from 0 to {n:,}; the index is damaged")
    return _Index(kind, DTYPES[code], sizes, pointers, documents)


def _layout(path: Path, data: np.ndarray, n: int) -> tuple[str, int, int]:
    """(kind, number of document indices, offset of the sizes) that explain the length of the file exactly."""
    length, head = len(data), _PREAMBLE.size
    if length == head + 12 * n:
        return "fairseq", 0, head
    if length >= head + 8:
        (d,) = struct.unpack("<Q", data[head : head + 8].tobytes())
        if length in (head + 8 + 12 * n + 8 * d, head + 8 + 13 * n + 8 * d):
            return "Megatron", d, head + 8
    raise UserError(
        f"{path} has {length:,} bytes, which fits neither a fairseq nor a Megatron index of {n:,} items; "
        "it is cut or damaged: copy it again or prepare the data again"
    )


def _view(data: np.ndarray, offset: int, count: int, dtype: str) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    return data[offset : offset + size].view(dtype)


def _check_pointers(path: Path, sizes: np.ndarray, pointers: np.ndarray, itemsize: int) -> None:
    """UserError unless every pointer is the sum of the sizes before it."""
    start = 0
    for first in range(0, len(sizes), _WINDOW):
        window = sizes[first : first + _WINDOW].astype(np.int64)
        ends = start + np.cumsum(window * itemsize)
        starts = np.concatenate([[start], ends[:-1]])
        wrong = (starts != pointers[first : first + _WINDOW]) | (window < 0)
        if wrong.any():
            item = first + int(np.argmax(wrong))
            raise UserError(
                f"{path} points item {item:,} to the wrong byte; the index is damaged or no token index: "
                "copy it again or prepare the data again"
            )
        start = int(ends[-1])


def _check_manifest(store: TokenStore, manifest: Manifest, path: Path) -> None:
    found = (store.num_tokens, store.num_items, store.num_documents, store.dtype.name)
    said = (manifest.num_tokens, manifest.num_items, manifest.num_documents, manifest.dtype)
    if found != said:
        raise UserError(
            f"{path} speaks of (tokens, items, documents, dtype) {said}, the files have {found}; "
            "they do not belong together: prepare the data again"
        )


# ------------------------------------------------------------------------------------------------ writing


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 ids, else int32."""
    return DTYPES[8] if vocab_size < UINT16_VOCAB_LIMIT else DTYPES[4]


@contextlib.contextmanager
def write_errors_are_one_line(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota and missing rights into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise UserError(
            f"{path} cannot be written ({error.strerror}); nothing was left: free space or take another folder"
        ) from None


def check_space(folder: Path, num_bytes: int) -> None:
    """UserError when the disk of `folder` has fewer than `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{folder} has {free / 1e6:,.1f} MB free, {num_bytes / 1e6:,.1f} MB are needed; "
            "free space or take another folder"
        )


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, after a rename."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Put `text` under `path`: whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with write_errors_are_one_line(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
        idx_sha = self._write_index()
        self._bin.flush()
        os.fsync(self._bin.fileno())
        manifest = Manifest(
            format_version=MANIFEST_VERSION,
            bin_sha256=self._sha.hexdigest(),
            idx_sha256=idx_sha,
            dtype=self.dtype.name,
            num_tokens=self.num_tokens,
            num_items=self.num_items,
            num_documents=self.num_documents,
            vocab_size=self.vocab_size,
            special_ids=self.special_ids,
            tokenizer_hash=self.tokenizer_hash,
            source=self.source,
        )
        with self._temporary(".json").open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        for suffix in (".bin", ".idx", ".json"):  # renames need no space, so none of them meets a full disk
            self._temporary(suffix).replace(f"{self.prefix}{suffix}")
        sync_folder(self.prefix.parent)

    def _write_index(self) -> str:
        """Write the temporary `.idx` durably and return its SHA-256."""
        sha = hashlib.sha256()
        with self._temporary(".idx").open("wb") as file:
            for part in self._index_parts():
                file.write(part)
                sha.update(part)
            file.flush()
            os.fsync(file.fileno())
        return sha.hexdigest()

    def _index_parts(self) -> Iterable[bytes]:
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        yield _PREAMBLE.pack(MAGIC, INDEX_VERSION, code, self.num_items)
        yield struct.pack("<Q", len(self._documents))
        for sizes in self._size_windows():
            yield sizes.tobytes()
        start = 0
        for sizes in self._size_windows():
            ends = start + np.cumsum(sizes.astype("<i8") * self.dtype.itemsize)
            yield np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes()
            start = int(ends[-1])
        yield np.frombuffer(self._documents, np.int64).astype("<i8").tobytes()

    def _size_windows(self) -> Iterator[np.ndarray]:
        self._sizes.seek(0)
        while chunk := self._sizes.read(4 * _WINDOW):
            yield np.frombuffer(chunk, "<i4")
