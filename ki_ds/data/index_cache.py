"""What takes a pass over a corpus to find out, kept in a folder: hashes of token files, and where their samples lie.

A hash counts for as long as size, times and inode of its file are the same; a file changed less than two seconds
before it was hashed is hashed again next time, for a clock may not tell the next change from that one. Arrays are
found by what they were made of, checked by a hash of their own, and memory-mapped.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ki_ds.errors import UserError
from ki_ds.files import file_sha256, write_json

FOLDER_NAME = ".ki_ds_index"
_SETTLED_NS = 2_000_000_000

Arrays = dict[str, np.ndarray]


class IndexCache:
    """The cache in `folder`, which need not exist yet; None (or a folder that cannot be written) keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def beside(cls, path: Path, *, otherwise: Path) -> "IndexCache":
        """The cache in the folder of some token files, or in another one where theirs is read-only."""
        # root may write anywhere, and still should not where nobody is meant to
        writable = os.access(path, os.W_OK) and path.stat().st_mode & stat.S_IWUSR
        return cls(path / FOLDER_NAME if writable else otherwise)

    def knows(self, path: Path) -> bool:
        """Whether the hash of a file is at hand."""
        return self._recorded(path) is not None

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file. UserError when it cannot be read."""
        if (recorded := self._recorded(path)) is not None:
            return recorded
        try:
            before, digest = _signature(path), file_sha256(path)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); a store is PREFIX.bin with PREFIX.idx"
            ) from None
        settled = time.time_ns() - max(before["mtime_ns"], before["ctime_ns"]) > _SETTLED_NS
        if settled and self.folder is not None:
            with contextlib.suppress(OSError, UserError):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(_record(self.folder, path), {"signature": before, "sha256": digest})
        return digest

    def arrays(self, key: dict[str, Any], build: Callable[[], Arrays]) -> Arrays:
        """The arrays that `build` makes of what `key` (JSON) says; built only when they are not here, or damaged."""
        if self.folder is None:
            return build()
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        folder = self.folder / name
        if (found := _read(folder)) is not None:
            return found
        arrays = build()
        with contextlib.suppress(OSError, UserError):
            _save(folder, key, arrays)
            return _read(folder) or arrays
        return arrays

    def _recorded(self, path: Path) -> str | None:
        if self.folder is None:
            return None
        try:
            record = json.loads(_record(self.folder, path).read_text(encoding="utf-8"))
            return record["sha256"] if record["signature"] == _signature(path) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _record(folder: Path, path: Path) -> Path:
    """The file in which the hash of another file is kept."""
    return folder / f"{path.name}.{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.json"


def _signature(path: Path) -> dict[str, int]:
    of = path.stat()
    return {"bytes": of.st_size, "mtime_ns": of.st_mtime_ns, "ctime_ns": of.st_ctime_ns, "inode": of.st_ino}


def _save(folder: Path, key: dict[str, Any], arrays: Arrays) -> None:
    """Write the arrays, whole or not at all; another process may be doing the same."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        digests = {name: _digest(array) for name, array in arrays.items()}
        (partial / "key.json").write_text(json.dumps({"key": key, "sha256": digests}, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(folder: Path) -> Arrays | None:
    """The arrays of a folder, or None when it is not there, not whole or not what was written."""
    try:
        digests = json.loads((folder / "key.json").read_text(encoding="utf-8"))["sha256"]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in digests}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return arrays if all(_digest(array) == digests[name] for name, array in arrays.items()) else None


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
