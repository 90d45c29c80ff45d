"""Duplicates and the split, against plain Python."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_ds.data import selection
from ki_ds.data.pieces import PieceFolder
from ki_ds.data.selection import DROPPED, TRAIN, VALID, destinations, first_occurrences
from ki_ds.errors import UserError
from tests.data.test_pieces import piece


@given(
    digests=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2))), cut=st.integers(0, 9), bucket=st.integers(1, 9)
)
def test_first_occurrences(digests, cut, bucket):
    rows = np.array(digests, np.uint64).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_BUCKET_DOCUMENTS", bucket)
        kept = first_occurrences(lambda: [rows[:cut], rows[cut:]], len(rows))
    assert kept.tolist() == [digest not in digests[:i] for i, digest in enumerate(digests)]


@pytest.fixture
def pieces(tmp_path):
    """Two pieces: documents 0, 1 (its second part in the next piece), 2, and a copy of 0 with the lowest draw."""
    first, second = piece(1, 2), piece(3, 4, 5, seed=1)
    first.ends[1] = False
    second.starts[0] = False
    first.draws[:] = [0.6, 0.5]
    second.draws[:] = [0.01, 0.9, 0.001]
    second.digests[2] = first.digests[0]
    folder = PieceFolder(tmp_path)
    folder.append(first)
    folder.append(second)
    return folder


@pytest.mark.parametrize(
    ("fraction", "drop", "expected"),
    [
        (0, False, [TRAIN] * 4),
        (0, True, [TRAIN, TRAIN, TRAIN, DROPPED]),
        (0.55, False, [TRAIN, VALID, TRAIN, VALID]),
        (0.55, True, [TRAIN, VALID, TRAIN, DROPPED]),
        (1e-6, False, [TRAIN, TRAIN, TRAIN, VALID]),  # the lowest draw
        (1e-6, True, [TRAIN, VALID, TRAIN, DROPPED]),  # the lowest among the kept
    ],
)
def test_destinations(pieces, fraction, drop, expected):
    assert destinations(pieces, valid_fraction=fraction, drop_duplicates=drop).tolist() == expected


def test_documents_in_parts_are_equal_when_all_their_parts_are(tmp_path):
    folder = PieceFolder(tmp_path)
    for last in (0, 0, 1):
        parts = piece(1, 2)
        parts.ends[0] = parts.starts[1] = False
        parts.digests[1] += np.uint64(last)
        folder.append(parts)
    assert destinations(folder, valid_fraction=0, drop_duplicates=True).tolist() == [TRAIN, DROPPED, TRAIN]


@pytest.mark.parametrize("fraction", [1e-6, 0.999])
def test_too_few_documents(tmp_path, fraction):
    folder = PieceFolder(tmp_path)
    folder.append(piece(3))
    with pytest.raises(UserError, match="too few documents"):
        destinations(folder, valid_fraction=fraction, drop_duplicates=False)


def test_memory_is_a_byte_a_document_and_one_bucket(monkeypatch):
    monkeypatch.setattr(selection, "_BUCKET_DOCUMENTS", 10_000)
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 2**63, (1000, 2)).astype(np.uint64) for _ in range(200)]
    tracemalloc.start()
    kept = first_occurrences(lambda: iter(blocks), 200_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.all()
    assert peak < 200_000 + 10_000 * 100
