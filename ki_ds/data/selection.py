"""Which documents of a corpus are kept, and which of them are for validation, decided before any store is written."""

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ki_ds.data.pieces import PieceFolder
from ki_ds.errors import UserError

DROPPED, TRAIN, VALID = range(3)
_BUCKET_DOCUMENTS = 1 << 20


def destinations(pieces: PieceFolder, *, valid_fraction: float, drop_duplicates: bool) -> np.ndarray:
    """uint8 [num_documents]: DROPPED, TRAIN or VALID.

    A document is for validation when its draw falls below `valid_fraction`; where that chooses none, the one with
    the lowest draw is. Of documents with one digest the first is kept. Takes 3 bytes a document, and to find
    duplicates 80 MB more at most. UserError when one of the stores would be left without documents.
    """
    num_documents = sum(int(starts.sum()) for starts in pieces.column("starts"))
    kept = np.ones(num_documents, bool)
    if drop_duplicates:
        kept = first_occurrences(lambda: _document_digests(pieces), num_documents)
    valid = np.zeros(num_documents, bool)
    first, lowest, lowest_draw = 0, 0, 2.0
    for draws, starts in zip(pieces.column("draws"), pieces.column("starts"), strict=True):
        own = draws[starts]  # a document's draw is that of its first part
        block = slice(first, first + len(own))
        valid[block] = (own < valid_fraction) & kept[block]
        masked = np.where(kept[block], own, 2.0)
        if len(own) and masked.min() < lowest_draw:
            lowest, lowest_draw = first + int(masked.argmin()), float(masked.min())
        first = block.stop
    if valid_fraction > 0 and num_documents and not valid.any():
        valid[lowest] = True
    if not (kept & ~valid).any():
        raise UserError(
            "too few documents to split off some for validation; put blank lines between documents, bring "
            "more text, or say valid_fraction=0"
        )
    return np.where(kept, np.where(valid, VALID, TRAIN), DROPPED).astype(np.uint8)


def _document_digests(pieces: PieceFolder) -> Iterator[np.ndarray]:
    """uint64 [n, 2] blocks, a row a document; one in parts has the digest of its parts' digests."""
    parts: list[bytes] = []  # of a document that goes on
    columns = (pieces.column(name) for name in ("digests", "starts", "ends"))
    for digests, starts, ends in zip(*columns, strict=True):
        whole = starts & ends
        if whole.all():
            yield digests
            continue
        rows = []
        for digest, is_whole, end in zip(digests, whole, ends, strict=True):
            if is_whole:
                rows.append(digest)
                continue
            parts.append(digest.tobytes())
            if end:
                rows.append(np.frombuffer(hashlib.blake2b(b"".join(parts), digest_size=16).digest(), np.uint64))
                parts = []
        yield np.array(rows, np.uint64).reshape(-1, 2)


def first_occurrences(blocks: Callable[[], Iterable[np.ndarray]], num_documents: int) -> np.ndarray:
    """bool [num_documents]: whether no document before has the same digest (uint64 [n, 2] blocks, read repeatedly).

    Digests are compared in buckets by value, so that memory is 1 byte a document plus that of one bucket, 66 bytes
    (measured) for each of its million documents or so.
    """
    kept = np.ones(num_documents, bool)
    num_buckets = 1 + num_documents // _BUCKET_DOCUMENTS
    for bucket in range(num_buckets):
        digests, numbers, first = [], [], 0
        for block in blocks():
            mine = np.flatnonzero(block[:, 0] % np.uint64(num_buckets) == bucket)
            digests.append(block[mine])
            numbers.append(first + mine)
            first += len(block)
        high, low = np.concatenate(digests or [np.empty((0, 2), np.uint64)]).T
        order = np.lexsort((low, high))  # stable: equal digests stay in the order of the documents
        repeated = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
        kept[np.concatenate(numbers or [np.empty(0, np.int64)])[order[1:][repeated]]] = False
    return kept
