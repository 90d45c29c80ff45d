"""Which items of which token stores are read, as one sequence: shards in a row, or some of their documents.

Shape suffixes: R runs of neighbouring items, M documents, I items of a window.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ki_ds.data.randomness import SUBSET_STREAM, permute
from ki_ds.data.store import TokenStore

_WINDOW = 1 << 20  # items handled at once, so that memory does not grow with the corpus


class Items(NamedTuple):
    """Some items in a row: where each ends in the view's tokens, and whether a document ends there."""

    ends_I: np.ndarray  # int64
    is_last_I: np.ndarray  # bool


@dataclass(frozen=True)
class Interval:
    """A stretch of a corpus whose documents are in a random order: shares of its tokens, then at most a number.

    Under one seed, disjoint intervals share no line, and an interval inside another has lines of it alone.
    """

    first: float = 0.0
    last: float = 1.0
    max_tokens: int | None = None

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return (self.first, self.last, self.max_tokens) == (0.0, 1.0, None)

    def bounds(self, num_tokens: int) -> tuple[int, int]:
        """[first, last) in tokens of a corpus of `num_tokens`."""
        first, last = round(self.first * num_tokens), round(self.last * num_tokens)
        return first, last if self.max_tokens is None else min(last, first + self.max_tokens)


class TokenView:
    """Runs of items of some stores, read as one sequence of `num_tokens` tokens in `num_items` items.

    `runs_R2` (int64 [R, 2]) holds the first item and the end of each run, ascending; items are numbered through
    all stores, and no run goes from one store into the next. None takes every item.
    """

    def __init__(self, stores: Sequence[TokenStore], runs_R2: np.ndarray | None = None) -> None:
        self.stores = list(stores)
        self._first_items = _first_items(stores)
        if runs_R2 is None:
            runs_R2 = np.stack([self._first_items[:-1], self._first_items[1:]], axis=1)
        self.runs_R2 = runs_R2
        self._store_R = np.searchsorted(self._first_items[1:], runs_R2[:, 0], side="right")
        starts_R, ends_R = (token_starts(stores, runs_R2[:, side]) for side in (0, 1))
        first_tokens = np.cumsum([0, *(store.num_tokens for store in stores)])
        self._file_starts_R = starts_R - first_tokens[self._store_R]
        self._starts = np.concatenate([[0], np.cumsum(ends_R - starts_R)])  # of the runs, in the view's tokens
        self.num_tokens = int(self._starts[-1])
        self.num_items = int((runs_R2[:, 1] - runs_R2[:, 0]).sum())

    @property
    def name(self) -> str:
        """What a message calls it."""
        return str(self.stores[0].prefix)

    def read(self, first: int, last: int) -> np.ndarray:
        """Tokens first..last-1 in the stores' dtype; a view of the file where they lie in one run."""
        run = int(np.searchsorted(self._starts, first, side="right")) - 1
        parts = []
        while first < last:
            end = min(last, int(self._starts[run + 1]))
            offset = int(self._file_starts_R[run] - self._starts[run])
            parts.append(self.stores[self._store_R[run]].tokens[first + offset : end + offset])
            first, run = end, run + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else self.stores[0].tokens[:0]

    def windows(self) -> Iterator[Items]:
        """All items in order, some at a time."""
        before = 0
        for items_I, store in self._item_numbers():
            ends_I = before + np.cumsum(store.sizes[items_I], dtype=np.int64)
            before = int(ends_I[-1])
            documents = store.document_indices
            yield Items(ends_I, documents[np.searchsorted(documents, items_I + 1)] == items_I + 1)

    def _item_numbers(self) -> Iterator[tuple[np.ndarray, TokenStore]]:
        """(item numbers within a store, the store), at most a window of them at a time."""
        for number, store in enumerate(self.stores):
            runs_R2 = self.runs_R2[self._store_R == number] - self._first_items[number]
            ends_R = np.cumsum(runs_R2[:, 1] - runs_R2[:, 0])  # of the runs, in the items taken of this store
            for first in range(0, int(ends_R[-1]) if len(ends_R) else 0, _WINDOW):
                place_I = np.arange(first, min(first + _WINDOW, int(ends_R[-1])))
                run_I = np.searchsorted(ends_R, place_I, side="right")
                yield runs_R2[run_I, 1] - (ends_R[run_I] - place_I), store


def select(stores: Sequence[TokenStore], interval: Interval, *, seed: int) -> TokenView:
    """The items whose first token falls into the interval when the documents are put in a random order.

    So documents stay whole, but for the two at the bounds, of which whole lines are taken; a number of tokens is
    met to within one line. What was chosen is read in the order of the files.
    """
    if interval.is_all:
        return TokenView(stores)
    documents_M2 = _documents(stores)
    starts_M, ends_M = (token_starts(stores, documents_M2[:, side]) for side in (0, 1))
    num_documents = len(documents_M2)
    order_M = permute(np.arange(num_documents), num_documents, seed=seed, epoch=0, stream=SUBSET_STREAM)
    after_M = np.cumsum((ends_M - starts_M)[order_M])
    before_M = after_M - (ends_M - starts_M)[order_M]
    first, last = interval.bounds(int(after_M[-1]))
    whole_M = (before_M >= first) & (after_M <= last)
    runs = [documents_M2[order_M[whole_M]]]
    for place in np.flatnonzero(~whole_M & (after_M > first) & (before_M < last)):
        item, end = documents_M2[order_M[place]].tolist()
        starts = token_starts(stores, np.arange(item, end)) - starts_M[order_M[place]] + before_M[place]
        runs.append(item + np.searchsorted(starts, [[first, last]]))
    return TokenView(stores, _joined(np.concatenate(runs), _first_items(stores)))


def token_starts(stores: Sequence[TokenStore], items: np.ndarray) -> np.ndarray:
    """int64 positions of the first tokens of items, both numbered through all stores; the end counts as an item."""
    first_items = _first_items(stores)
    out = np.full(len(items), sum(store.num_tokens for store in stores), np.int64)
    first_token = 0
    for number, store in enumerate(stores):
        mine = (items >= first_items[number]) & (items < first_items[number + 1])
        out[mine] = first_token + store.item_starts(items[mine] - first_items[number])
        first_token += store.num_tokens
    return out


def _first_items(stores: Sequence[TokenStore]) -> np.ndarray:
    return np.cumsum([0, *(store.num_items for store in stores)])


def _documents(stores: Sequence[TokenStore]) -> np.ndarray:
    """int64 [M, 2]: first item and end of every document that has items."""
    bounds = [
        first + np.stack([store.document_indices[:-1], store.document_indices[1:]], axis=1)
        for first, store in zip(_first_items(stores), stores, strict=False)
    ]
    documents_M2 = np.concatenate(bounds)
    return documents_M2[documents_M2[:, 1] > documents_M2[:, 0]]


def _joined(runs_R2: np.ndarray, first_items: np.ndarray) -> np.ndarray:
    """The runs in order, neighbours made one unless a store begins between them, empty ones left out."""
    runs_R2 = runs_R2[runs_R2[:, 1] > runs_R2[:, 0]]
    runs_R2 = runs_R2[np.argsort(runs_R2[:, 0])]
    begins_R = np.ones(len(runs_R2), bool)
    begins_R[1:] = (runs_R2[1:, 0] != runs_R2[:-1, 1]) | np.isin(runs_R2[1:, 0], first_items)
    ends_R = np.append(begins_R[1:], True)
    return np.stack([runs_R2[begins_R, 0], runs_R2[ends_R, 1]], axis=1)
