"""Pieces: whole or not there, read as they were written."""

from dataclasses import fields

import numpy as np
import pytest

from ki_ds.data.pieces import Piece, PieceFolder, work_stays
from ki_ds.data.processes import StoppedError
from ki_ds.errors import UserError


def piece(*sizes, seed=0):
    """A piece of one-part documents of one item each."""
    rng = np.random.default_rng(seed)
    n = len(sizes)
    return Piece(
        tokens=rng.integers(0, 1000, sum(sizes)).astype(np.uint16),
        item_sizes=np.array(sizes, np.int32),
        part_items=np.ones(n, np.int64),
        part_characters=np.array(sizes, np.int64),
        starts=np.ones(n, bool),
        ends=np.ones(n, bool),
        draws=rng.random(n),
        digests=rng.integers(0, 2**63, (n, 2)).astype(np.uint64),
    )


def same(one, other):
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(Piece))


def test_they_are_read_as_they_were_written_by_another_call_too(tmp_path):
    written = [piece(3, 4), piece(), piece(5, seed=1)]
    folder = PieceFolder(tmp_path / "p")
    for one in written:
        folder.append(one)
    again = PieceFolder(tmp_path / "p")
    assert len(again) == 3
    assert all(same(a, b) for a, b in zip(again, written, strict=True))
    assert [sizes.tolist() for sizes in again.column("item_sizes")] == [[3, 4], [], [5]]
    assert next(iter(again)).tokens.dtype == np.uint16


def test_joining():
    joined = Piece.joined([piece(3, 4), piece(5, seed=1)])
    assert joined.item_sizes.tolist() == [3, 4, 5]
    assert joined.tokens[7:].tolist() == piece(5, seed=1).tokens.tolist()
    assert joined.digests.shape == (3, 2)


def test_what_a_kill_left_of_one_is_none(tmp_path):
    (tmp_path / "000000.tmp").write_bytes(b"half")
    folder = PieceFolder(tmp_path)
    assert len(folder) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "else"])
def test_a_damaged_one_is_one_line(tmp_path, damage):
    folder = PieceFolder(tmp_path)
    folder.append(piece(*[9] * 50))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes({"cut": data[:-30], "flip": data, "else": b"x"}[damage])
    with pytest.raises(UserError, match=r"000000\.npz is damaged") as caught:
        list(folder)
    assert "\n" not in str(caught.value)


def test_a_failure_to_write_says_where_the_work_stays(tmp_path):
    with (
        pytest.raises(StoppedError, match=f"^no space; what is done stays in {tmp_path}: free space"),
        work_stays(tmp_path),
    ):
        raise UserError("no space; nothing was left")
