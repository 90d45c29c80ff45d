"""The `.idx` of a token store: its two layouts, told apart exactly and checked.

Both are little-endian and begin with the same 18 bytes; only the length of the file tells them apart:

    fairseq    magic 9 B, u64 version, u8 dtype, u64 n,        int32 sizes[n], int64 pointers[n]
    Megatron   magic 9 B, u64 version, u8 dtype, u64 n, u64 d, int32 sizes[n], int64 pointers[n],
               int64 document_indices[d] [, int8 modes[n]]

Sizes are in tokens, pointers in bytes of the `.bin`, document indices in items (the first is 0, the last n).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ki_ds.errors import UserError

Kind = Literal["Megatron", "fairseq"]

MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
# Formats of fairseq without a flat memory map, by how their index begins.
_OTHER_FORMATS = {
    b"TNTIDX\x00\x00": "a legacy fairseq index (TNTIDX)",
    b"HUFFIDX\x00\x00": "a Huffman-coded fairseq index",
}
# Integer types on whose codes fairseq and Megatron agree, and those that only fairseq has.
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
FAIRSEQ_DTYPES = DTYPES | {9: np.dtype("<u4"), 10: np.dtype("<u8")}
# Floating point in both, but of different widths; DeepSpeed's data analyzer means unsigned integers by them.
_FLOAT_CODES = (6, 7)
WINDOW = 1 << 20  # items handled at once, so that memory does not grow with the index

_PREAMBLE = struct.Struct("<9sQBQ")  # magic, version, dtype code, number of items


@dataclass(frozen=True)
class TokenIndex:
    """A parsed `.idx`, views into the mapped file.

    `sizes` int32 [n] in tokens; `pointers` int64 [n] in bytes; `document_indices` int64 [d] in items, None
    in a fairseq index, which has none.
    """

    kind: Kind
    dtype: np.dtype[Any]
    sizes: np.ndarray
    pointers: np.ndarray
    document_indices: np.ndarray | None

    @property
    def num_bytes(self) -> int:
        """Length of the `.bin` that this index describes."""
        if not len(self.sizes):
            return 0
        return int(self.pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize


def map_bytes(path: Path) -> np.ndarray:
    """A file as uint8 [its length], mapped read-only; UserError when it cannot be read."""
    try:
        if path.stat().st_size == 0:
            return np.empty(0, np.uint8)  # an empty file cannot be mapped
        return np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); a token store is PREFIX.bin with PREFIX.idx"
        ) from None


def read_index(path: Path, *, checked: bool = False) -> TokenIndex:
    """The index in a file; UserError for what is exactly neither layout.

    `checked` leaves out what takes time in proportion to the number of items: for a file that was read before.
    """
    data = map_bytes(path)
    code, n = _preamble(path, data)
    kind, num_bounds, offset = _layout(path, data, n)
    dtype = _token_dtype(path, code, kind)
    sizes = np.frombuffer(data, "<i4", n, offset)
    pointers = np.frombuffer(data, "<i8", n, offset + 4 * n)
    documents = None if kind == "fairseq" else np.frombuffer(data, "<i8", num_bounds, offset + 12 * n)
    if not checked:
        _check_pointers(path, sizes, pointers, dtype.itemsize)
    if not checked and documents is not None:
        _check_documents(path, documents, n)
        if any(modes.any() for modes in _windows(data[offset + 12 * n + 8 * num_bounds :])):
            raise UserError(
                f"{path} has items of another mode than text (multimodal Megatron); prepare a store of the text alone"
            )
    return TokenIndex(kind, dtype, sizes, pointers, documents)


def _preamble(path: Path, data: np.ndarray) -> tuple[int, int]:
    """(dtype code, number of items)."""
    for begin, name in _OTHER_FORMATS.items():
        if data[: len(begin)].tobytes() == begin:
            raise UserError(
                f"{path} is {name}, which is not read here; "
                "convert it: fairseq-preprocess with --dataset-impl mmap, or tools/prepare_data.py on the text"
            )
    if len(data) < _PREAMBLE.size:
        raise UserError(f"{path} has {len(data)} bytes, too few for a token index; it is cut or something else")
    magic, version, code, n = _PREAMBLE.unpack_from(data.data)
    if magic != MAGIC:
        raise UserError(f"{path} does not begin like a token index (MMIDIDX); name a Megatron or fairseq mmap store")
    if version != INDEX_VERSION:
        raise UserError(f"{path} has index version {version}, only {INDEX_VERSION} exists; the file is damaged")
    return code, n


def _layout(path: Path, data: np.ndarray, n: int) -> tuple[Kind, int, int]:
    """(kind, number of document indices, offset of the sizes) that explain the length of the file exactly."""
    length, head = len(data), _PREAMBLE.size
    if length == head + 12 * n:
        return "fairseq", 0, head
    if length >= head + 8:
        (d,) = struct.unpack_from("<Q", data.data, head)
        if length in (head + 8 + 12 * n + 8 * d, head + 8 + 13 * n + 8 * d):
            return "Megatron", d, head + 8
    raise UserError(
        f"{path} has {length:,} bytes, which fits neither a fairseq nor a Megatron index of {n:,} items; "
        "it is cut or damaged: copy it again or prepare the data again"
    )


def _token_dtype(path: Path, code: int, kind: Kind) -> np.dtype[Any]:
    dtypes = FAIRSEQ_DTYPES if kind == "fairseq" else DTYPES
    if code in _FLOAT_CODES:
        raise UserError(
            f"{path} has dtype code {code}, which is floating point in fairseq and Megatron; token ids are integers: "
            "write the store again"
        )
    if code not in dtypes:
        known = ", ".join(f"{known} ({dtype.name})" for known, dtype in dtypes.items())
        raise UserError(f"{path} has dtype code {code}; a {kind} store of tokens has {known}: write the store again")
    return dtypes[code]


def pointer_windows(sizes: Iterator[np.ndarray], itemsize: int) -> Iterator[np.ndarray]:
    """For windows of sizes the int64 byte positions where their items start and, one more, where they end."""
    start = 0
    for window in sizes:
        ends = np.cumsum(window.astype("<i8") * itemsize) + start
        yield np.concatenate([[start], ends])
        start = int(ends[-1]) if len(ends) else start


def _windows(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[first : first + WINDOW] for first in range(0, len(array), WINDOW))


def _check_pointers(path: Path, sizes: np.ndarray, pointers: np.ndarray, itemsize: int) -> None:
    """UserError unless every pointer is the sum of the sizes before it."""
    first = 0
    for starts in pointer_windows(_windows(sizes), itemsize):
        last = first + len(starts) - 1
        wrong = (starts[:-1] != pointers[first:last]) | (sizes[first:last] < 0)
        if wrong.any():
            raise UserError(
                f"{path} points item {first + int(np.argmax(wrong)):,} to the wrong byte; the index is damaged or "
                "no token index: copy it again or prepare the data again"
            )
        first = last


def _check_documents(path: Path, documents: np.ndarray, n: int) -> None:
    rises = all(
        (low <= high).all() for low, high in zip(_windows(documents[:-1]), _windows(documents[1:]), strict=True)
    )
    if len(documents) == 0 or documents[0] != 0 or documents[-1] != n or not rises:
        raise UserError(f"{path} has document indices that do not rise from 0 to {n:,}; the index is damaged")


def index_head(dtype: np.dtype[Any], *, num_items: int, num_bounds: int) -> bytes:
    """How a Megatron index begins, before its sizes; `num_bounds` is d, one more than its documents."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    return _PREAMBLE.pack(MAGIC, INDEX_VERSION, code, num_items) + struct.pack("<Q", num_bounds)
