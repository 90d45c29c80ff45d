"""The files of a teacher cache: what a teacher said about masked samples, found by sample id, checked at every read.

    CACHE/manifest.json           the key (all that the records depend on, a form of logits that is not plain as
                                  well), the teacher's facts, the list of chunks
    CACHE/head.safetensors        weight and bias of the teacher's output projection (kind hidden)
    CACHE/chunk_*.safetensors     some thousand records each: R of them with N rows together

A chunk is a safetensors file of columns. Its records lie one behind the other, in the order of the run's stream:

    sample_ids, masks [R]         who the record is for: the sample's number, and which of its masks
    num_rows [R]                  its labelled rows, which are the next num_rows entries of the columns over N
    input_hashes [R] uint64       64 bits of the masked input that it answers
    crcs [R] uint32               CRC32 of (sample id, mask, rows, input hash) and of the record's rows
    ids [N, K] uint16 or int32, log_probs [N, K] float16, descending            (kind topk)
    hidden [N, D] float32, float16, or int8 with scales [N] float32             (kind hidden)

The first three are of the smallest unsigned type that fits, so that a record costs 16 to 20 bytes beside its rows: 4 K
bytes a row for topk. Its metadata {"key": ..., "tokens": ...} tie a chunk to the manifest and count the teacher's work.
Several masks of a sample lie side by side; a batch finds its own by the input hash.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from ki_ds.data.store import token_dtype
from ki_ds.errors import UserError
from ki_ds.files import is_plain_name, write_atomically

FORMAT = 1
MANIFEST = "manifest.json"
HEAD = "head.safetensors"
LOGIT_FORM = "teacher.logit_form"  # [scale, cap] in the key; not there: plain
HIDDEN_DTYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}

_INDEX = ("sample_ids", "masks", "num_rows", "input_hashes", "crcs")

Columns = dict[str, np.ndarray]


def row_columns(key: dict[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The columns over rows of a cache with this key: {name: (dtype, shape of one row)}."""
    if key["kind"] == "topk":
        shape = (key["topk"],)
        return {"ids": (token_dtype(key["num_classes"]), shape), "log_probs": (np.dtype(np.float16), shape)}
    hidden = {"hidden": (np.dtype(HIDDEN_DTYPES[key["dtype"]]), (key["hidden_size"],))}
    return hidden | ({"scales": (np.dtype(np.float32), ())} if key["dtype"] == "int8" else {})


def bytes_per_row(key: dict[str, Any]) -> int:
    """Bytes of a row in the columns over rows."""
    return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in row_columns(key).values())


# ------------------------------------------------------------------------------------------------ manifest


def sha256_of(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says.

    `key` names everything that the records depend on, by field. `teacher` are its facts, as in a run's manifest.
    `chunks` are the finished ones: {file: [bytes, records, rows, tokens of the teacher's forward]}.
    """

    key: dict[str, Any]
    teacher: dict[str, Any]
    head_sha256: str | None
    chunks: dict[str, list[int]]

    @cached_property
    def key_sha256(self) -> str:
        """SHA-256 of the key."""
        return sha256_of(self.key)

    @property
    def forward_flops(self) -> float:
        """What the teacher's forward over all records has cost: 2 FLOPs a dense parameter and token."""
        return 2.0 * self.teacher["dense_parameters"] * sum(chunk[3] for chunk in self.chunks.values())

    def write(self, folder: Path) -> None:
        """Put it into the folder, whole or not at all."""
        content = {"format": FORMAT, **asdict(self), "key_sha256": self.key_sha256, "forward_flops": self.forward_flops}
        write_atomically(folder / MANIFEST, json.dumps({**content, "sha256": sha256_of(content)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder. UserError when there is none, or not as it was written."""
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(f"{folder} is no teacher cache (no {MANIFEST}); make one with tools/cache_teacher.py")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            digest, version = content.pop("sha256"), content["format"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({_short(error)}); restore it, or make the cache again") from None
        if version != FORMAT:
            raise UserError(f"{path} has format {version}, this program reads {FORMAT}; make the cache again")
        if digest != sha256_of(content):
            raise UserError(f"{path} is damaged (not its SHA-256); restore it, or make the cache again")
        if strange := [name for name in content["chunks"] if not is_plain_name(name)]:
            raise UserError(
                f"{path} names the chunk {strange[0][:100]!r}, which is no file beside it; make the cache again"
            )
        return cls(**{name: content[name] for name in ("key", "teacher", "head_sha256", "chunks")})

    def check(self, expected: dict[str, Any], *, folder: Path, fix: str) -> None:
        """UserError, ending in `fix`, for the first field of `expected` in which the key differs."""
        for name, value in expected.items():
            if name not in self.key or self.key[name] != value:
                there = _shown(self.key.get(name, "nothing"))
                raise UserError(f"{folder} was made with {name}={there}, the run has {name}={_shown(value)}; {fix}")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__


def _shown(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


# ------------------------------------------------------------------------------------------------- writing


def write_chunk(path: Path, columns: Columns, *, key_sha256: str, tokens: int) -> None:
    """Put a chunk under its name, whole or not at all, and durable.

    Args:
        columns: the index without `crcs` and the columns over rows, as in the module's docstring.
        tokens: of the teacher's forward for it.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    counts = {name: columns[name] for name in _INDEX[:3]}
    index = {name: c.astype(np.min_scalar_type(int(c.max(initial=0)))) for name, c in counts.items()}
    index["input_hashes"] = columns["input_hashes"].astype(np.uint64)
    rows = {name: np.ascontiguousarray(column) for name, column in columns.items() if name not in _INDEX}
    bounds = np.cumsum([0, *columns["num_rows"].tolist()]).tolist()
    crcs = [
        _crc(record, {name: column[bounds[r] : bounds[r + 1]] for name, column in rows.items()})
        for r, record in enumerate(zip(*(column.tolist() for column in index.values()), strict=True))
    ]
    metadata = {"cache": json.dumps({"key": key_sha256, "tokens": tokens})}
    write_atomically(path, safetensors.numpy.save({**index, "crcs": np.array(crcs, np.uint32), **rows}, metadata))


def _crc(index: Sequence[int], rows: Columns) -> int:
    """CRC32 of a record: [sample id, mask, rows, input hash], then its columns by name."""
    crc = zlib.crc32(struct.pack("<4Q", *index))
    for name in sorted(rows):
        crc = zlib.crc32(rows[name].data, crc)
    return crc


def write_head(folder: Path, content: bytes) -> str:
    """Store the teacher's head (safetensors bytes); its SHA-256."""
    write_atomically(folder / HEAD, content)
    return hashlib.sha256(content).hexdigest()


def read_head(folder: Path, sha256: str) -> bytes:
    """The bytes that `write_head` stored. UserError when they are missing or others."""
    try:
        content = (folder / HEAD).read_bytes()
    except OSError as error:
        raise UserError(f"{folder / HEAD} cannot be read ({error.strerror}); make the cache again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{folder / HEAD} is damaged (not its SHA-256); make the cache again")
    return content


# ------------------------------------------------------------------------------------------------- reading


class Chunk:
    """One chunk, memory-mapped. UserError when it is missing, cut, damaged, or of another cache."""

    def __init__(self, path: Path, manifest: Manifest, *, facts: list[int] | None = None) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:  # whose tensors are views of the mapped file; NumPy's would be copies
                metadata = json.loads(file.metadata()["cache"])
                columns = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            for column in columns.values():
                column.flags.writeable = False
            self._rows = {name: columns.pop(name) for name in row_columns(manifest.key)}
            index = [columns[name] for name in _INDEX]
            self.sample_ids, self.masks, self.num_rows, self.input_hashes, self._crcs = index
            rows = int(self.num_rows.sum(dtype=np.int64))
            # bytes, records, rows, tokens of the teacher's forward
            self.facts = [path.stat().st_size, len(self), rows, metadata["tokens"]]
            if metadata["key"] != manifest.key_sha256:
                other = metadata["key"][:12]
                raise ValueError(f"it belongs to the cache of key {other}, not to {manifest.key_sha256[:12]}")
            expected = {name: (dtype, (rows, *shape)) for name, (dtype, shape) in row_columns(manifest.key).items()}
            if (
                {name: (column.dtype, column.shape) for name, column in self._rows.items()} != expected
                or {column.shape for column in index} != {(len(self),)}
                or {column.dtype.kind for column in index} != {"u"}
            ):
                raise ValueError("its columns do not fit together")
            if facts is not None and self.facts != facts:
                raise ValueError(f"{self.facts} bytes, records, rows and tokens instead of {facts}")
        except FileNotFoundError:
            raise UserError(f"{path} is missing; {_again(path.parent)}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({_short(error)}); {_again(path.parent)}") from None
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({_short(error)}); remove it, and {_again(path.parent)}") from None

    def __len__(self) -> int:
        """Number of records."""
        return len(self.sample_ids)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.num_rows, dtype=np.int32 if self.facts[0] < 2**31 else np.int64)

    def read(self, record: int) -> Columns:
        """The rows of one record, views of the file. UserError when its CRC32 is not theirs."""
        index = [int(column[record]) for column in (self.sample_ids, self.masks, self.num_rows, self.input_hashes)]
        end = int(self._ends[record])
        rows = {name: column[end - index[2] : end] for name, column in self._rows.items()}
        crc, written = _crc(index, rows), int(self._crcs[record])
        if crc != written:
            raise UserError(
                f"{self.path}: the record of sample {index[0]} is damaged (CRC32 {crc:08x}, written {written:08x}); "
                f"remove that file, and {_again(self.path.parent)}"
            )
        return rows


def _again(folder: Path) -> str:
    return f"call tools/cache_teacher.py with --out {folder} again, which makes what is lacking"


class CacheFiles:
    """The records of some chunks, found by mask and sample id."""

    def __init__(self, chunks: Sequence[Chunk], *, num_samples: int) -> None:
        self.chunks = list(chunks)
        self._first = np.cumsum([0, *map(len, self.chunks)])
        self._numbers: dict[int, np.ndarray] = {}  # by mask, for each sample id the number of its record, or -1
        for first, chunk in zip(self._first[:-1].tolist(), self.chunks, strict=True):
            for mask in np.unique(chunk.masks).tolist():
                records = np.flatnonzero(chunk.masks == mask)
                ids = chunk.sample_ids[records]
                if int(ids.max()) >= num_samples:
                    raise UserError(f"{chunk.path} is damaged (sample {ids.max()} of {num_samples:,}); remove it")
                if mask not in self._numbers:
                    self._numbers[mask] = np.full(num_samples, -1, np.int32 if self._first[-1] < 2**31 else np.int64)
                self._numbers[mask][ids] = first + records
        self._last_mask: int | None = None

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> CacheFiles:
        """The chunks that the manifest lists. UserError when one is missing, cut or damaged."""
        chunks = [Chunk(folder / name, manifest, facts=facts) for name, facts in manifest.chunks.items()]
        return cls(chunks, num_samples=manifest.key["num_samples"])

    @property
    def num_records(self) -> int:
        """Records of all chunks."""
        return int(self._first[-1])

    @property
    def masks(self) -> list[int]:
        """The masks of which there is any record, ascending."""
        return sorted(self._numbers)

    def has(self, masks: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
        """bool [P]: for which of these masked samples there is a record."""
        present = np.zeros(len(masks), bool)
        for mask, numbers in self._numbers.items():
            mine = masks == mask
            present[mine] = numbers[sample_ids[mine]] >= 0
        return present

    def read(self, sample_id: int, input_hash: int) -> Columns:
        """The rows of the sample's record that answers this masked input.

        Raises:
            UserError: none of the sample's records does, or it is damaged.
        """
        chunk = None
        for mask in sorted(self._numbers, key=lambda mask: mask != self._last_mask):  # the one that fitted last first
            numbers = self._numbers[mask]
            number = int(numbers[sample_id]) if 0 <= sample_id < len(numbers) else -1
            if number >= 0:
                place = int(np.searchsorted(self._first, number, side="right")) - 1
                chunk, record = self.chunks[place], number - int(self._first[place])
                if int(chunk.input_hashes[record]) == input_hash:
                    self._last_mask = mask
                    return chunk.read(record)
        if chunk is None:
            raise UserError(f"the teacher cache has no record of sample {sample_id}; check the run's configuration")
        raise UserError(
            f"{chunk.path}: the record of sample {sample_id} answers another masked input than the run's "
            f"({input_hash:016x}); it is damaged, or of other data: remove that file, and {_again(chunk.path.parent)}"
        )
