"""Pure functions under the batches: keyed random numbers, the order of samples, blocks, masks.

Shape suffixes: T tokens of one sample, N labelled positions, S samples of an epoch.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ki_ds.data.store import TokenStore
from ki_ds.errors import UserError

# One stream of random numbers for each purpose, so that none repeats another's numbers.
MASK_STREAM, ORDER_STREAM = 1, 2
_FEISTEL_ROUNDS = 8
_BLOCK_WINDOW = 1 << 20  # items handled at once, so that memory does not grow with the corpus

BreakMode = Literal["complete", "complete_doc"]

# ------------------------------------------------------------------------------------------------- random


def counter_generator(stream: int, *, seed: int, epoch: int, sample_id: int = 0) -> np.random.Philox:
    """A Philox generator for one (stream, seed, epoch, sample id).

    The four numbers are the key and the upper words of the counter, so two different ones never share a
    number. Only `random_raw` is to be used: NumPy promises raw streams, not the distributions made of them.
    """
    key = np.array([seed, epoch], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, sample_id, stream], np.uint64))


def _uniform(raw: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) out of uint64, by the upper 53 bits."""
    return (raw >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijective scramble of uint64 (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """int64 array of `index`'s shape: where each index in [0, size) goes in this epoch's permutation.

    A keyed Feistel network on the smallest even number of bits that holds `size`, walked until the result is
    below `size`; constant memory, a bijection for every size, seed and epoch.
    """
    assert size > 0
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = counter_generator(ORDER_STREAM, seed=seed, epoch=epoch).random_raw(_FEISTEL_ROUNDS)
    out = np.asarray(index).astype(np.uint64)
    outside = np.ones(out.shape, bool)
    while outside.any():
        left, right = out[outside] >> shift, out[outside] & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        out[outside] = (left << shift) | right
        outside = out >= size
    return out.astype(np.int64)


# ------------------------------------------------------------------------------------------------- blocks


def complete_block_starts(
    store: TokenStore, capacity: int, *, break_mode: BreakMode = "complete"
) -> tuple[np.ndarray, int]:
    """(int64 [S + 1] positions in `store.tokens` where blocks start, with the end; number of split items).

    Whole items are packed greedily into blocks of at most `capacity` tokens; a longer item is first cut into
    pieces of `capacity`. "complete_doc" also ends a block where a document ends. Every token is in one block.
    """
    breaks = store.document_ends() if break_mode == "complete_doc" else None
    pending = np.zeros(1, np.int64)  # where a block may end, from the start of the open block on
    starts, num_split = [np.zeros(1, np.int64)], 0
    for first in range(0, store.num_items, _BLOCK_WINDOW):
        ends = store.item_ends(first, min(first + _BLOCK_WINDOW, store.num_items))
        sizes = store.sizes[first : first + _BLOCK_WINDOW].astype(np.int64)
        num_split += int((sizes > capacity).sum())
        pending = np.concatenate([pending, _piece_ends(ends, sizes, capacity)])
        closed = _greedy(pending, capacity, breaks)
        starts.append(pending[closed])
        pending = pending[closed[-1] :] if len(closed) else pending
    if pending[-1] > pending[0]:
        starts.append(pending[-1:])
    return np.concatenate(starts), num_split


def _piece_ends(ends: np.ndarray, sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Ends of items, with the cuts inside items longer than `capacity`; ascending."""
    num_cuts = np.maximum((sizes - 1) // capacity, 0)
    if not num_cuts.any():
        return ends
    starts = np.repeat(ends - sizes, num_cuts)
    rank = np.arange(len(starts)) - np.repeat(np.cumsum(num_cuts) - num_cuts, num_cuts)
    return np.sort(np.concatenate([ends, starts + (rank + 1) * capacity]))


def _greedy(pending: np.ndarray, capacity: int, breaks: np.ndarray | None) -> np.ndarray:
    """Indices into `pending` where blocks end that nothing after `pending` can lengthen."""
    limit = pending + capacity
    if breaks is not None and len(breaks):
        following = np.searchsorted(breaks, pending, side="right")
        limit = np.minimum(limit, breaks[np.minimum(following, len(breaks) - 1)])
    jumps = (np.searchsorted(pending, limit, side="right") - 1).tolist()
    last, here, closed = len(pending) - 1, 0, []
    while jumps[here] not in (here, last):
        here = jumps[here]
        closed.append(here)
    return np.array(closed, np.int64)


# -------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How many positions are labelled, and what becomes of them (RoBERTa's 15%, 80/10/10)."""

    mask_prob: float = 0.15
    keep_prob: float = 0.1
    random_prob: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.mask_prob < 1:
            raise UserError(f"mask_prob={self.mask_prob} is not between 0 and 1; take e.g. 0.15")
        if min(self.keep_prob, self.random_prob) < 0 or self.keep_prob + self.random_prob > 1:
            raise UserError(
                f"keep_prob={self.keep_prob} and random_prob={self.random_prob} must be at least 0 and sum up "
                "to at most 1; take e.g. 0.1 and 0.1"
            )


def num_masked(size: int, mask_prob: float, draw: np.ndarray) -> int:
    """n = int(mask_prob * size + u) for the raw draw of one u in [0, 1)."""
    return int(mask_prob * size + float(_uniform(draw)))


def mask_tokens(
    tokens_T: np.ndarray,
    generator: np.random.Philox,
    *,
    config: MaskConfig,
    mask_id: int,
    random_ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(masked copy int64 [T], ascending labelled positions int64 [N]).

    n positions without replacement out of all T, `<s>` and `</s>` included; each of them is kept with
    `keep_prob`, becomes a uniform id of `random_ids` with `random_prob`, and `mask_id` otherwise.
    """
    size = len(tokens_T)
    draws = generator.random_raw(1 + size)
    n = num_masked(size, config.mask_prob, draws[0])
    positions_N = np.sort(np.argpartition(draws[1:], min(n, size - 1))[:n])
    fate_N, choice_N = _uniform(generator.random_raw(2 * n)).reshape(2, n)
    new_N = np.full(n, mask_id, np.int64)
    randomised = fate_N >= 1 - config.random_prob
    new_N[randomised] = random_ids[(choice_N[randomised] * len(random_ids)).astype(np.int64)]
    kept = fate_N < config.keep_prob
    new_N[kept] = tokens_T[positions_N[kept]]
    masked_T = tokens_T.astype(np.int64)
    masked_T[positions_N] = new_N
    return masked_T, positions_N
