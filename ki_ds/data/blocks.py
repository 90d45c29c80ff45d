"""Which items of which token stores are read, as one sequence, and where the blocks of that sequence lie.

Shape suffixes: R runs of neighbouring items, M documents, I items of a window, S blocks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ki_ds.data.randomness import SUBSET_STREAM, permute
from ki_ds.data.store import TokenStore
from ki_ds.data.token_index import WINDOW

BreakMode = Literal["complete", "complete_doc", "eos", "none", "none_doc"]
LongLines = Literal["split", "drop"]

# -------------------------------------------------------------------------------------------------- views


class Items(NamedTuple):
    """Some items in a row: where each begins and ends in the view's tokens, and whether a document ends with it."""

    starts_I: np.ndarray  # int64
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
        starts_R, ends_R = (_token_starts(stores, runs_R2[:, side]) for side in (0, 1))
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
        """All items in order, some at a time, so that memory does not grow with the corpus."""
        before = 0
        for number, store in enumerate(self.stores):
            runs_R2 = self.runs_R2[self._store_R == number] - self._first_items[number]
            ends_R = np.cumsum(runs_R2[:, 1] - runs_R2[:, 0])  # of the runs, in the items taken of this store
            num_items, documents = int(ends_R[-1]) if len(ends_R) else 0, store.document_indices
            for first in range(0, num_items, WINDOW):
                place_I = np.arange(first, min(first + WINDOW, num_items))
                run_I = np.searchsorted(ends_R, place_I, side="right")
                item_I = runs_R2[run_I, 1] - (ends_R[run_I] - place_I)
                ends_I = before + np.cumsum(store.sizes[item_I], dtype=np.int64)
                is_last_I = documents[np.searchsorted(documents, item_I + 1)] == item_I + 1
                yield Items(ends_I - store.sizes[item_I], ends_I, is_last_I)
                before = int(ends_I[-1])


def select(stores: Sequence[TokenStore], interval: Interval, *, seed: int) -> TokenView:
    """The items whose first token falls into the interval when the documents are put in a random order.

    So documents stay whole, but for the two at the bounds, of which whole lines are taken; a number of tokens is
    met to within one line. What was chosen is read in the order of the files.
    """
    if interval == Interval():
        return TokenView(stores)
    first_items = _first_items(stores)
    bounds = [first + store.document_indices for first, store in zip(first_items, stores, strict=False)]
    documents_M2 = np.concatenate([np.stack([ends[:-1], ends[1:]], axis=1) for ends in bounds])
    documents_M2 = documents_M2[documents_M2[:, 1] > documents_M2[:, 0]]
    starts_M, ends_M = (_token_starts(stores, documents_M2[:, side]) for side in (0, 1))
    num_documents = len(documents_M2)
    order_M = permute(np.arange(num_documents), num_documents, seed=seed, epoch=0, stream=SUBSET_STREAM)
    after_M = np.cumsum((ends_M - starts_M)[order_M])
    before_M = after_M - (ends_M - starts_M)[order_M]
    first, last = interval.bounds(int(after_M[-1]))
    whole_M = (before_M >= first) & (after_M <= last)
    runs = [documents_M2[order_M[whole_M]]]
    for place in np.flatnonzero(~whole_M & (after_M > first) & (before_M < last)):
        item, end = documents_M2[order_M[place]].tolist()
        starts = _token_starts(stores, np.arange(item, end)) - starts_M[order_M[place]] + before_M[place]
        runs.append(item + np.searchsorted(starts, [[first, last]]))
    return TokenView(stores, _joined(np.concatenate(runs), first_items))


def _first_items(stores: Sequence[TokenStore]) -> np.ndarray:
    """int64 [stores + 1]: the number of each store's first item, and of all items."""
    return np.cumsum([0, *(store.num_items for store in stores)])


def _token_starts(stores: Sequence[TokenStore], items: np.ndarray) -> np.ndarray:
    """int64 positions of the first tokens of items, both numbered through all stores; the end counts as an item."""
    first_items, first_token = _first_items(stores), 0
    out = np.full(len(items), sum(store.num_tokens for store in stores), np.int64)
    for number, store in enumerate(stores):
        mine = (items >= first_items[number]) & (items < first_items[number + 1])
        out[mine] = first_token + store.item_starts(items[mine] - first_items[number])
        first_token += store.num_tokens
    return out


def _joined(runs_R2: np.ndarray, first_items: np.ndarray) -> np.ndarray:
    """The runs in order, neighbours made one unless a store begins between them, empty ones left out."""
    runs_R2 = runs_R2[runs_R2[:, 1] > runs_R2[:, 0]]
    runs_R2 = runs_R2[np.argsort(runs_R2[:, 0])]
    begins_R = np.ones(len(runs_R2), bool)
    begins_R[1:] = (runs_R2[1:, 0] != runs_R2[:-1, 1]) | np.isin(runs_R2[1:, 0], first_items)
    ends_R = np.append(begins_R[1:], True)
    return np.stack([runs_R2[begins_R, 0], runs_R2[ends_R, 1]], axis=1)


# ------------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """How a view becomes rows of at most `seq_len` tokens; see `find_blocks` for the modes.

    `packing` (causal, with a mode whose blocks may be short) puts neighbouring blocks into one row, where none sees
    another.
    """

    seq_len: int
    break_mode: BreakMode
    long_lines: LongLines = "split"
    packing: bool = False


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a view lie, in its tokens: int64 [S, 2], first and end; and what became of long lines.

    `rows_R2` (int64 [R, 2], first and end block of each row) is None where every block is a row.
    """

    bounds_S2: np.ndarray
    num_long_lines: int = 0  # longer than a block: split, or dropped
    num_dropped_tokens: int = 0
    rows_R2: np.ndarray | None = None


def find_blocks(view: TokenView, capacity: int, *, mode: BreakMode, long_lines: LongLines = "split") -> Blocks:
    """The blocks of at most `capacity` tokens of a view; but for dropped lines, every token is in exactly one.

    - complete: whole lines, packed greedily; complete_doc also ends a block where a document ends.
    - eos: every line is a block.
    - none: a fixed cut, whatever stands there; none_doc begins anew where a document begins.

    A line longer than a block (for none_doc there is none) is cut into pieces of `capacity`, or with "drop" left out
    as the released code does.
    """
    if mode == "none":
        starts = np.arange(0, view.num_tokens, capacity)
        return Blocks(np.stack([starts, np.minimum(starts + capacity, view.num_tokens)], axis=1))
    num_long = 0

    def lines() -> Iterator[Items]:
        nonlocal num_long
        for items in view.windows():
            num_long += int((items.ends_I - items.starts_I > capacity).sum())
            yield items

    split = capacity if long_lines == "split" else None
    if mode == "none_doc":
        parts = _pieces(_documents(view.windows()), capacity)
    elif mode == "eos":
        parts = _pieces(lines(), split)
    else:
        parts = _packed(lines(), capacity, split, by_document=mode == "complete_doc")
    bounds_S2 = np.concatenate([np.zeros((0, 2), np.int64), *parts])
    sizes_S = bounds_S2[:, 1] - bounds_S2[:, 0]
    fits_S = sizes_S <= capacity
    return Blocks(bounds_S2[fits_S & (sizes_S > 0)], num_long, int(sizes_S[~fits_S].sum()))


def _documents(windows: Iterable[Items]) -> Iterator[Items]:
    """Documents as if each were one item; the last window's end is an end in any case."""
    start, end = np.zeros(1, np.int64), 0
    for items in windows:
        ends = items.ends_I[items.is_last_I]
        if len(ends):
            yield Items(np.concatenate([start, ends[:-1]]), ends, np.ones(len(ends), bool))
            start = ends[-1:]
        end = int(items.ends_I[-1])
    if end > start[0]:
        yield Items(start, np.array([end]), np.ones(1, bool))


def _pieces(windows: Iterable[Items], split: int | None) -> Iterator[np.ndarray]:
    """[pieces, 2]: every item, cut where it is longer than `split`."""
    for items in windows:
        ends = _with_cuts(items, split)
        yield np.stack([np.concatenate([items.starts_I[:1], ends[:-1]]), ends], axis=1)


def _with_cuts(items: Items, split: int | None) -> np.ndarray:
    """Ends of items, with the cuts inside items longer than `split`; ascending."""
    if split is None:
        return items.ends_I
    num_cuts = np.maximum((items.ends_I - items.starts_I - 1) // split, 0)
    if not num_cuts.any():
        return items.ends_I
    starts = np.repeat(items.starts_I, num_cuts)
    rank = np.arange(len(starts)) - np.repeat(np.cumsum(num_cuts) - num_cuts, num_cuts)
    return np.sort(np.concatenate([items.ends_I, starts + (rank + 1) * split]))


def _packed(windows: Iterable[Items], capacity: int, split: int | None, *, by_document: bool) -> Iterator[np.ndarray]:
    """[blocks, 2]: items packed greedily; one longer than `capacity` is cut by `split`, or a block of its own."""
    pending = np.zeros(1, np.int64)  # where a block may end, from the start of the open block on
    breaks = np.zeros(0, np.int64)  # where it must
    for items in windows:
        pending = np.concatenate([pending, _with_cuts(items, split)])
        if by_document:
            breaks = np.concatenate([breaks[breaks > pending[0]], items.ends_I[items.is_last_I]])
        closed = _greedy(pending, capacity, breaks)
        yield np.stack([pending[closed[:-1]], pending[closed[1:]]], axis=1)
        pending = pending[closed[-1] :]
    yield np.array([[pending[0], pending[-1]]])


def _greedy(pending: np.ndarray, capacity: int, breaks: np.ndarray) -> np.ndarray:
    """Indices into `pending` where blocks begin and end that nothing after `pending` can lengthen; the first is 0."""
    limit = pending + capacity
    if len(breaks):
        following = np.searchsorted(breaks, pending, side="right")
        limit = np.minimum(limit, np.append(breaks, limit[-1])[following])
    farthest = np.searchsorted(pending, limit, side="right") - 1
    last = len(pending) - 1
    # an item that is too long for a block is one nevertheless
    jumps = np.maximum(farthest, np.minimum(np.arange(last + 1) + 1, last)).tolist()
    closed = [0]
    while jumps[closed[-1]] != last:
        closed.append(jumps[closed[-1]])
    return np.array(closed, np.int64)


def pack_rows(bounds_S2: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [R, 2], first and end block of rows of at most `capacity` tokens, neighbours packed greedily."""
    ends = np.concatenate([[0], np.cumsum(bounds_S2[:, 1] - bounds_S2[:, 0])])
    closed = np.append(_greedy(ends, capacity, np.zeros(0, np.int64)), len(ends) - 1)
    rows_R2 = np.stack([closed[:-1], closed[1:]], axis=1)
    return rows_R2[rows_R2[:, 1] > rows_R2[:, 0]]
