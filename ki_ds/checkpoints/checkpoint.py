"""Checkpoints that are either whole or not there, and the folder of a run.

    RUN_DIR/config.yaml            resolved configuration
    RUN_DIR/run.json               manifest: status, lineage, parameters, hashes of data and teacher
    RUN_DIR/metrics.jsonl          every figure
    RUN_DIR/checkpoints/step_N/    engine/ (DeepSpeed's shards), hf/ (Hugging Face folder), state.json, manifest.json,
                                   latest and README.md (for DeepSpeed's own tools, and for people)
    RUN_DIR/checkpoints/latest     the newest one's name, written last
    RUN_DIR/best/                  Hugging Face folder with the lowest validation cross-entropy

A checkpoint is written under a temporary name, synced, hashed and renamed; `newest_intact` verifies the hashes before
anything is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from ki_ds.errors import UserError
from ki_ds.files import file_sha256, is_plain_name, read_json, sync_folder, sync_tree, write_atomically, write_json
from ki_ds.ranks.world import barrier, from_main, is_main, say

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_STEP = re.compile(r"step_\d{8,}")
_WRITER_WORDS = ("PytorchStreamWriter", "inline_container", "unexpected pos", "No space left", "File too large")


TAG = "engine"  # DeepSpeed's name for what it saves, and its folder's
_README = """# A checkpoint of ki_ds

- `hf/`: the model at this step, for transformers and what reads its folders.
- `engine/`: DeepSpeed's state, with which the run goes on. Its tag is `engine`, as `latest` says, so that DeepSpeed's
  own tools take this folder: `python zero_to_fp32.py . OUT` (ZeRO 1 to 3). What they give has `lm.` before the names
  in `hf/`, and the embedding's padding, which no sum in training counts and `hf/` leaves out.
- `state.json`, `manifest.json`: where the run was, and size and SHA-256 of every file; a changed file is not read.
"""

File = tuple[Path, Callable[[Path], object]]  # a file or folder that one rank writes, and what writes it
Hashes = dict[str, list[int | str]]  # relative name: [bytes, SHA-256]
Snapshot = Callable[[Any], Any]  # nested state -> the same as it is now, whatever training does to it later


class EngineState(Protocol):
    """What a checkpoint needs of an engine (see `ki_ds.engine.student.StudentEngine`)."""

    zero_stage: int

    def save(self, folder: Path, tag: str, snapshot: Snapshot) -> list[File]: ...
    def load(self, folder: Path, tag: str, *, saved_world: int, saved_stage: int) -> None: ...


# --- one run a folder -------------------------------------------------------------------------------------------


def keep_others_out() -> None:
    """Let nobody but the user and the group write what this process makes from now on."""
    os.umask(os.umask(0o022) | stat.S_IWOTH)


@contextlib.contextmanager
def claimed(run_dir: Path, *, what: str = "run_dir") -> Iterator[None]:
    """Hold the folder for this job while the context lasts; `what` is the field or option that names it.

    Raises:
        UserError: another job that still runs holds it, or it cannot be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{what}={run_dir} cannot be written ({error.strerror}); give another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{what}={run_dir} is in use by a job that still runs; wait for it or give another"
            ) from None
        if run_dir.stat().st_mode & stat.S_IWOTH:
            say(f"warning: {what}={run_dir} can be written by every user, whose files would be read: chmod o-w it")
        yield


def in_use(run_dir: Path) -> bool:
    """Whether a job that still runs holds the folder."""
    try:
        with (run_dir / ".lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextlib.contextmanager
def naming_a_full_disk(run_dir: Path) -> Iterator[None]:
    """What the system says when a file cannot be written becomes a UserError, on the rank that it happens to.

    PyTorch's and safetensors' writers say it in errors of their own.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in _CANNOT_WRITE
        if not full and not any(word in str(error) for word in _WRITER_WORDS):
            raise
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0]
        raise UserError(
            f"run_dir={run_dir} cannot be written ({reason}); the checkpoint before is untouched: make room, and start "
            "it again to go on from there"
        ) from None


# --- saving -----------------------------------------------------------------------------------------------------
# `saver.Saver` calls `begin`, then `write_part` on every rank, then `commit` on rank 0.


def begin(root: Path, step: int) -> Path:
    """A new temporary folder for checkpoint `step`; those that killed jobs have left go. Called by all ranks.

    Args:
        root: RUN_DIR/checkpoints, on a file system that all ranks share.
    """
    temporary = root / f".step_{step:08d}.tmp"
    if is_main():
        for left in root.glob(".step_*"):
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
        sync_folder(root.parent)
    barrier()
    return temporary


def write_part(temporary: Path, files: list[File]) -> Hashes:
    """Write this rank's files, sync them to disk, and hash them. `files` is emptied, so that their memory is freed."""
    hashes: Hashes = {}
    while files:
        path, write = files.pop(0)
        write(path)
        hashes |= _sync_and_hash(temporary, [path] if path.is_file() else path.rglob("*"))
    return hashes


def commit(temporary: Path, state: dict[str, Any], hashes: Hashes, *, keep: int, keep_every: int | None = None) -> Path:
    """Make what all ranks have written the newest checkpoint and return its folder. Called by rank 0 alone.

    Args:
        temporary: the folder that `begin` has made.
        state: the loop's own state, as JSON.
        hashes: of all ranks' files; what else lies in the folder is hashed here.
        keep: newest checkpoints that stay; older ones are removed once this one is whole,
        keep_every: but for those at multiples of so many steps.
    """
    root, name = temporary.parent, temporary.stem.removeprefix(".")
    final = root / name
    write_json(temporary / "state.json", state)
    (temporary / "latest").write_text(TAG, encoding="utf-8")
    (temporary / "README.md").write_text(_README, encoding="utf-8")
    others = (path for path in temporary.rglob("*") if str(path.relative_to(temporary)) not in hashes)
    hashes = hashes | _sync_and_hash(temporary, others)
    write_json(temporary / "manifest.json", {"files": dict(sorted(hashes.items()))})
    for folder in (temporary, *filter(Path.is_dir, temporary.rglob("*"))):
        sync_folder(folder)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    sync_folder(root)
    write_atomically(root / "latest", name + "\n")
    for redone in [other for other in _names(root) if _step(other) > _step(name)]:
        shutil.rmtree(root / redone)  # of a part of the run that was damaged and is done again
    for old in _names(root)[:-keep]:
        if not keep_every or _step(old) % keep_every:
            shutil.rmtree(root / old)
    return final


def _sync_and_hash(folder: Path, paths: Iterable[Path]) -> Hashes:
    hashes: Hashes = {}
    for path in sorted(p for p in paths if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        hashes[str(path.relative_to(folder))] = [path.stat().st_size, file_sha256(path)]
    return hashes


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Replace a folder by what `write` puts into a new one, so that it is never half-written. All ranks call this."""
    temporary, old = _beside(folder)
    if is_main():
        clear_folder(folder)
    barrier()
    write(temporary)
    barrier()
    if is_main():
        sync_tree(temporary)
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    barrier()


def restore_folder(folder: Path) -> None:
    """Put back what a job that died between the two renames of `replace_folder` had moved aside."""
    _, old = _beside(folder)
    if old.exists() and not folder.exists():
        os.rename(old, folder)
        sync_folder(folder.parent)


def clear_folder(folder: Path) -> None:
    """As `restore_folder`, and remove what else such a job has left. Only for whoever holds the run's folder."""
    restore_folder(folder)
    for left in _beside(folder):
        shutil.rmtree(left, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """The names of the new folder, before it takes the old one's place, and of the old one after that."""
    return folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")


# --- loading ----------------------------------------------------------------------------------------------------


def _names(root: Path) -> list[str]:
    """Checkpoints by step, oldest first; unfinished ones have another name and are not among them."""
    names = [path.name for path in root.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(names, key=_step)


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))


def steps(root: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    return list(map(_step, _names(root)))


def damage(folder: Path) -> str | None:
    """None for an intact checkpoint, else what is wrong with it. Reads every byte, unpickles none."""
    try:
        files = read_json(folder / "manifest.json", "files")["files"]
        listed = [(name, size, digest) for name, (size, digest) in files.items()]
    except (ValueError, TypeError, AttributeError):
        return "no readable manifest"
    for name, size, digest in listed:
        if not all(map(is_plain_name, name.split("/"))):
            return f"its manifest names {name!r}, which is no file in it"
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        if file_sha256(path) != digest:
            return f"{name} has changed"
    return None


def newest_intact(root: Path) -> Path | None:
    """The newest intact checkpoint; None when the run has none yet. Called by all ranks, which agree.

    Raises:
        UserError: there are checkpoints, but none is intact: never a silent start from scratch.
    """

    def find() -> tuple[str | None, list[str]]:
        broken: list[str] = []
        for name in reversed(_names(root)):
            if (what := damage(root / name)) is None:
                return name, broken
            broken.append(f"{name} ({what})")
        return None, broken

    name, broken = from_main(find() if is_main() else (None, []))
    if broken and name is None:
        raise UserError(
            f"{root} holds no intact checkpoint: {', '.join(broken)}; restore one, or start in another run_dir"
        )
    if broken:
        say(f"warning: {', '.join(broken)} is damaged; going on from {name}")
    return None if name is None else root / name


def load(folder: Path, engine: EngineState) -> dict[str, Any]:
    """Restore the engine from a checkpoint and return the loop's state. Called by all ranks.

    Raises:
        UserError: the engine cannot go on from it.
    """
    state = read_json(folder / "state.json")
    saved_stage = state.get("zero_stage", engine.zero_stage)
    engine.load(folder, TAG, saved_world=state["world_size"], saved_stage=saved_stage)
    return state
