"""Pure functions under the samples: where blocks begin and end, and how they are masked.

Shape suffixes: T tokens of one sample, U units of it (tokens or words), N labelled positions, S blocks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from ki_ds.data.randomness import uniform
from ki_ds.data.view import Items, TokenView
from ki_ds.errors import UserError

BreakMode = Literal["complete", "complete_doc", "eos", "none", "none_doc"]
LongLines = Literal["split", "drop"]
Epochs = TypeVar("Epochs", int, np.ndarray)

# ------------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a view lie, in its tokens: int64 [S, 2], first and end; and what became of long lines."""

    bounds_S2: np.ndarray
    num_long_lines: int  # longer than a block: split, or dropped
    num_dropped_tokens: int


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
        return Blocks(np.stack([starts, np.minimum(starts + capacity, view.num_tokens)], axis=1), 0, 0)
    windows = _Counted(view.windows(), capacity)
    if mode == "none_doc":
        bounds = list(_pieces(_documents(windows), capacity))
        return Blocks(_stacked(bounds), 0, 0)
    if mode == "eos":
        bounds = list(_pieces(windows, None if long_lines == "drop" else capacity))
    else:
        by_document = mode == "complete_doc"
        bounds = list(_packed(windows, capacity, by_document=by_document, split=long_lines == "split"))
    bounds_S2 = _stacked(bounds)
    fits = bounds_S2[:, 1] - bounds_S2[:, 0] <= capacity
    dropped = int((bounds_S2[:, 1] - bounds_S2[:, 0])[~fits].sum())
    return Blocks(bounds_S2[fits], windows.num_long, dropped)


def _stacked(bounds: list[np.ndarray]) -> np.ndarray:
    bounds_S2 = np.concatenate([np.zeros((0, 2), np.int64), *bounds])
    return bounds_S2[bounds_S2[:, 1] > bounds_S2[:, 0]]


class _Counted:
    """Windows of items, counting those longer than `capacity` as they pass."""

    def __init__(self, windows: Iterable[Items], capacity: int) -> None:
        self._windows, self._capacity, self.num_long = windows, capacity, 0

    def __iter__(self) -> Iterator[Items]:
        before = 0
        for items in self._windows:
            self.num_long += int((np.diff(items.ends_I, prepend=before) > self._capacity).sum())
            before = int(items.ends_I[-1])
            yield items


def _documents(windows: Iterable[Items]) -> Iterator[Items]:
    """Documents as if each were one item; the last window's end is an end in any case."""
    last = None
    for items in windows:
        if items.is_last_I.any():
            yield Items(items.ends_I[items.is_last_I], items.is_last_I[items.is_last_I])
        last = items
    if last is not None and not last.is_last_I[-1]:
        yield Items(last.ends_I[-1:], np.ones(1, bool))


def _pieces(windows: Iterable[Items], capacity: int | None) -> Iterator[np.ndarray]:
    """[pieces, 2]: every item, cut where it is longer than `capacity`."""
    before = 0
    for items in windows:
        ends = items.ends_I if capacity is None else _with_cuts(items.ends_I, before, capacity)
        yield np.stack([np.concatenate([[before], ends[:-1]]), ends], axis=1)
        before = int(items.ends_I[-1])


def _with_cuts(ends: np.ndarray, before: int, capacity: int) -> np.ndarray:
    """Ends of items, with the cuts inside items longer than `capacity`; ascending."""
    sizes = np.diff(ends, prepend=before)
    num_cuts = np.maximum((sizes - 1) // capacity, 0)
    if not num_cuts.any():
        return ends
    starts = np.repeat(ends - sizes, num_cuts)
    rank = np.arange(len(starts)) - np.repeat(np.cumsum(num_cuts) - num_cuts, num_cuts)
    return np.sort(np.concatenate([ends, starts + (rank + 1) * capacity]))


def _packed(windows: Iterable[Items], capacity: int, *, by_document: bool, split: bool) -> Iterator[np.ndarray]:
    """[blocks, 2]: items packed greedily; an item longer than `capacity` is cut, or a block of its own."""
    pending = np.zeros(1, np.int64)  # where a block may end, from the start of the open block on
    breaks = np.zeros(0, np.int64)  # where it must
    for items in windows:
        before = int(pending[-1])
        pending = np.concatenate([pending, _with_cuts(items.ends_I, before, capacity) if split else items.ends_I])
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
    """int64 [rows, 2], first and end block of rows of at most `capacity` tokens, neighbours packed greedily."""
    ends = np.concatenate([[0], np.cumsum(bounds_S2[:, 1] - bounds_S2[:, 0])])
    closed = np.append(_greedy(ends, capacity, np.zeros(0, np.int64)), len(ends) - 1)
    rows = np.stack([closed[:-1], closed[1:]], axis=1)
    return rows[rows[:, 1] > rows[:, 0]]


# -------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How many positions are labelled, and what becomes of them (RoBERTa's 15%, 80/10/10).

    With `whole_words` the numbers count words, whose tokens share one fate. `num_variants` masks of a sample take
    turns over the epochs; 0 makes new ones every epoch.
    """

    mask_prob: float = 0.15
    keep_prob: float = 0.1
    random_prob: float = 0.1
    whole_words: bool = False
    num_variants: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.mask_prob < 1:
            raise UserError(f"mask_prob={self.mask_prob} is not between 0 and 1; take e.g. 0.15")
        if min(self.keep_prob, self.random_prob) < 0 or self.keep_prob + self.random_prob > 1:
            raise UserError(
                f"keep_prob={self.keep_prob} and random_prob={self.random_prob} must be at least 0 and sum up "
                "to at most 1; take e.g. 0.1 and 0.1"
            )
        if self.num_variants < 0:
            raise UserError(f"num_variants={self.num_variants} is negative; 0 makes new masks every epoch")

    def variant(self, epoch: Epochs) -> Epochs:
        """Which of a sample's masks an epoch (or each of an array of them) uses."""
        return epoch % self.num_variants if self.num_variants else epoch


def num_masked(size: int, mask_prob: float, draw: np.ndarray) -> int:
    """n = int(mask_prob * size + u) for the raw draw of one u in [0, 1)."""
    return int(mask_prob * size + float(uniform(draw)))


def mask_tokens(
    tokens_T: np.ndarray,
    generator: np.random.Philox,
    *,
    config: MaskConfig,
    mask_id: int,
    random_ids: np.ndarray,
    begins_word_V: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(masked copy int64 [T], ascending labelled positions int64 [N]).

    n units without replacement, `<s>` and `</s>` included; each of them is kept with `keep_prob`, becomes uniform
    ids of `random_ids` with `random_prob`, and `mask_id` otherwise. A unit is a token or, with
    `begins_word_V` (bool [V], which ids begin a word), a word.
    """
    begins_U = None if begins_word_V is None else _word_begins(tokens_T, begins_word_V)
    num_units = len(tokens_T) if begins_U is None else len(begins_U)
    draws = generator.random_raw(1 + num_units)
    n = num_masked(num_units, config.mask_prob, draws[0])
    chosen_n = np.sort(np.argpartition(draws[1:], min(n, num_units - 1))[:n])
    fate_N, choice_N = uniform(generator.random_raw(2 * n)).reshape(2, n)
    positions_N = chosen_n
    if begins_U is not None:
        lengths_n = np.diff(begins_U, append=len(tokens_T))[chosen_n]
        fate_N = np.repeat(fate_N, lengths_n)
        first_n = np.cumsum(lengths_n) - lengths_n
        positions_N = np.arange(len(fate_N)) + np.repeat(begins_U[chosen_n] - first_n, lengths_n)
        choice_N = uniform(generator.random_raw(len(fate_N)))
    new_N = np.full(len(positions_N), mask_id, np.int64)
    randomised = fate_N >= 1 - config.random_prob
    new_N[randomised] = random_ids[(choice_N[randomised] * len(random_ids)).astype(np.int64)]
    kept = fate_N < config.keep_prob
    new_N[kept] = tokens_T[positions_N[kept]]
    masked_T = tokens_T.astype(np.int64)
    masked_T[positions_N] = new_N
    return masked_T, positions_N


def _word_begins(tokens_T: np.ndarray, begins_word_V: np.ndarray) -> np.ndarray:
    """int64 [U]: where words begin; the first token always begins one."""
    begins_T = begins_word_V[tokens_T]
    begins_T[0] = True
    return np.flatnonzero(begins_T)
