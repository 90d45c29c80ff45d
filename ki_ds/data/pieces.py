"""Tokenized text in numbered files, each whole or not there: an interrupted preparation goes on after the last.

A piece is what a fixed stretch of the raw text gives, so that the files alone say how far the work is.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np

from ki_ds.data.processes import StoppedError
from ki_ds.errors import UserError
from ki_ds.files import write_atomically, write_errors_are_one_line


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Parts of documents as ids; T tokens in I items (lines) of P parts, a part being mostly a whole document."""

    tokens: np.ndarray  # [T] uint16 or int32
    item_sizes: np.ndarray  # int32 [I], in tokens
    part_items: np.ndarray  # int64 [P], number of items
    part_characters: np.ndarray  # int64 [P], of clean text
    starts: np.ndarray  # bool [P], whether the part begins its document
    ends: np.ndarray  # bool [P], whether it ends it
    draws: np.ndarray  # float64 [P] in [0, 1), a hash of the raw text
    digests: np.ndarray  # uint64 [P, 2], a hash of the clean text; [0, 2] where none was asked for

    @classmethod
    def joined(cls, pieces: Sequence["Piece"]) -> Self:
        """One piece of several, in order."""
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in pieces]) for f in fields(cls)})


class PieceFolder:
    """The pieces finished so far, in the files 000000.npz, 000001.npz, … of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with write_errors_are_one_line(folder):
            folder.mkdir(exist_ok=True)
        for left in folder.glob("*.tmp"):
            left.unlink()
        self._num_pieces = len(list(folder.glob("*.npz")))

    def __len__(self) -> int:
        return self._num_pieces

    def append(self, piece: Piece) -> None:
        """Write the next piece durably; StoppedError on a full disk."""
        content = io.BytesIO()
        np.savez(content, **vars(piece))
        with work_stays(self.folder.parent):
            write_atomically(self._path(len(self)), content.getvalue())
        self._num_pieces += 1

    def __iter__(self) -> Iterator[Piece]:
        for number in range(len(self)):
            yield Piece(**self._read(number, [f.name for f in fields(Piece)]))

    def column(self, name: str) -> Iterator[np.ndarray]:
        """One field of every piece, read alone."""
        for number in range(len(self)):
            yield self._read(number, [name])[name]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def _read(self, number: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        try:
            with np.load(self._path(number), allow_pickle=False) as file:
                return {name: file[name] for name in names}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{self._path(number)} is damaged ({error}); remove {self.folder.parent} and call again"
            ) from None


@contextlib.contextmanager
def work_stays(work: Path) -> Iterator[None]:
    """Turn a failure to write into a StoppedError that says where the work done so far stays."""
    try:
        yield
    except UserError as error:
        raise StoppedError(
            f"{str(error).partition(';')[0]}; what is done stays in {work}: free space and call again, or remove it"
        ) from None
