"""Files that are either whole or not there: written atomically, synced, hashed, with errors of one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ki_ds.errors import UserError

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


def sync_tree(folder: Path) -> None:
    """Make all that lies in a folder durable, before it is renamed."""
    for path, _, names in os.walk(folder):
        for name in names:
            with Path(path, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(path))


def is_plain_name(text: object) -> bool:
    """Whether a text that a file holds names an entry of a folder: nothing above, below or beside it, on one line."""
    return isinstance(text, str) and text not in ("", ".", "..") and "/" not in text and text.isprintable()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put `content` under `path`, text as UTF-8: whole or not at all, and durable."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with write_errors_are_one_line(path), temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_json(path: Path, *needed: str, fix: str = "restore it, or start in another run_dir") -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, ending in `fix`, when it is missing, broken or lacks a name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        if missing := [name for name in needed if name not in content]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {fix}") from None
    return content


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically: readers see the old one or the new one."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
