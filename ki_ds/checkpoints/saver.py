"""Checkpoints written at once, or in the background while training goes on.

Of a save in the background the loop does what needs collectives and copies the state into the host's memory. A thread
of every rank then writes, syncs and hashes the rank's own files; when all ranks have, rank 0's thread commits them.
Saving at once is the same without copies and threads. Either way all ranks learn of an error on any of them.
"""

from __future__ import annotations

import copy
import itertools
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ki_ds.checkpoints import checkpoint
from ki_ds.checkpoints.checkpoint import EngineState, File, Hashes, Snapshot
from ki_ds.errors import UserError, common_to_all_ranks
from ki_ds.ranks.world import Notes, all_sum, is_main, rank, world_size

_CPU = torch.device("cpu")


class HostCopies:
    """Called with nested state, gives a copy of it that has its tensors in the host's memory.

    Tensors that share a storage share its copy, over all calls: weights that go into two files are copied once.
    """

    def __init__(self) -> None:
        self._memo: dict[int, Any] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._copied: list[Tensor] = []  # alive, so that no other tensor or storage takes the place of one

    def __call__(self, state: Any) -> Any:
        for tensor in _tensors(state):
            if id(tensor) not in self._memo:
                self._memo[id(tensor)] = self._copy(tensor)
                self._copied.append(tensor)
        return copy.deepcopy(state, self._memo)

    def _copy(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = torch.UntypedStorage(storage.nbytes()).copy_(storage)
        copied = torch.empty(0, dtype=tensor.dtype)
        copied.set_(self._storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=False)
        vars(copied).update(copy.deepcopy(vars(tensor), self._memo))
        return copied.requires_grad_(tensor.requires_grad)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


def as_it_is(state: Any) -> Any:
    """The snapshot of a save that ends before training goes on."""
    return state


@dataclass
class _Save:
    """One checkpoint on its way to the disk, on one rank. `failure` is what it came to, once it is over."""

    name: str
    temporary: Path
    files: list[File]
    state: dict[str, Any]
    commit: Callable[[Path, dict[str, Any], Hashes], Path]
    failure: Exception | None = None
    thread: threading.Thread | None = None

    def run(self) -> None:
        """Write this rank's part, and have rank 0 commit all of them. Runs no collective."""
        try:
            self._run()
        except Exception as error:
            self.failure = error

    def _run(self) -> None:
        notes = Notes(self.name)
        hashes, failure = self._trying(lambda: checkpoint.write_part(self.temporary, self.files))
        told = notes.to_main((hashes, self._line(failure)))
        line = next((line for _, line in told if line), None)
        if is_main():
            if line is None:
                whole = {name: found for part, _ in told for name, found in part.items()}
                _, failure = self._trying(lambda: self.commit(self.temporary, self.state, whole))
                line = self._line(failure)
            if line is not None:
                shutil.rmtree(self.temporary, ignore_errors=True)
        line = notes.from_main(line)
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        if line is not None:
            with common_to_all_ranks():
                raise UserError(line)

    def _trying(self, work: Callable[[], Any]) -> tuple[Any, Exception | None]:
        try:
            with checkpoint.naming_a_full_disk(self.temporary.parent.parent):
                return work(), None
        except Exception as error:
            return None, error

    def _line(self, failure: Exception | None) -> str | None:
        """What the other ranks are told of it."""
        if failure is None:
            return None
        if isinstance(failure, UserError):
            return str(failure)
        return f"rank {rank()} could not write {self.temporary} ({failure!r}); the checkpoint before is untouched"


class Saver:
    """A run's checkpoints, of which one at most is on its way; a context that waits for it at its end.

    Args:
        root: RUN_DIR/checkpoints, on a file system that all ranks share.
        keep, keep_every: as `checkpoint.commit`.
        in_background: let training go on while a checkpoint is written.
        device: of the reductions by which ranks agree.
        about_to_wait: called before the loop waits for a save in the background.
    """

    _numbers = itertools.count()  # of all saves of this process, the same on every rank

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        in_background: bool = False,
        device: torch.device = _CPU,
        about_to_wait: Callable[[], None] = lambda: None,
    ):
        self._root, self._in_background, self._device = root, in_background, device
        self._about_to_wait = about_to_wait
        self._commit = lambda temporary, state, hashes: checkpoint.commit(
            temporary, state, hashes, keep=keep, keep_every=keep_every
        )
        self._save: _Save | None = None

    def save(
        self,
        step: int,
        engine: EngineState,
        state: dict[str, Any],
        export: Callable[[Snapshot], Callable[[Path], None] | None],
        *,
        at_once: bool = False,
    ) -> None:
        """Save checkpoint `step`, when the one before is there; only begun in the background. Called by all ranks.

        Args:
            state: the loop's own state, as JSON.
            export: called by all ranks; what it returns on rank 0 writes the Hugging Face folder.
            at_once: save before it returns, even if others are saved in the background.

        Raises:
            UserError: this one (at once), or the one before, could not be written.
        """
        self.wait()
        in_background = self._in_background and not at_once
        snapshot = HostCopies() if in_background else as_it_is
        temporary = checkpoint.begin(self._root, step)
        files = engine.save(temporary, checkpoint.TAG, snapshot)
        if (write_export := export(snapshot)) is not None:
            files.append((temporary / "hf", write_export))
        saved_by = {"step": step, "world_size": world_size(), "zero_stage": engine.zero_stage}
        name = f"save_{next(self._numbers)}"
        self._save = _Save(name, temporary, files, {**snapshot(state), **saved_by}, self._commit)
        if in_background:
            self._save.thread = threading.Thread(target=self._save.run, name=name, daemon=True)
            self._save.thread.start()
        else:
            self._save.run()
            self.wait()

    def look(self) -> None:
        """Raise what a save in the background has met with, if that is known. Called by all ranks; no waiting."""
        if self._save is None or self._save.thread is None:
            return
        over = torch.tensor(float(not self._save.thread.is_alive()), device=self._device)
        if all_sum(over).item():  # on one rank, so that the others are about to hear of it
            self.wait()

    def wait(self) -> None:
        """Wait until no save is on its way. Raises UserError, the same on all ranks, when it could not be written."""
        save, self._save = self._save, None
        if save is None:
            return
        if save.thread is not None:
            self._about_to_wait()
            save.thread.join()
        if save.failure is not None:
            raise save.failure

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait, unless ranks were lost (a RuntimeError of the connection) or somebody is in a hurry (Ctrl-C)."""
        if error is None:
            self.wait()
        elif isinstance(error, Exception) and not (isinstance(error, RuntimeError) and world_size() > 1):
            try:
                self.wait()
            except UserError as failure:
                if is_main():
                    print(f"error: {failure}", file=sys.stderr, flush=True)
