"""What is random in the data: orders, turns and masks, all pure functions of (seed, epoch, number).

Shape suffixes: T tokens of one sample, U units of it (tokens or words), n masked units, N labelled positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ki_ds.errors import UserError

# One stream of random numbers for each purpose, so that none repeats another's numbers.
MASK_STREAM, ORDER_STREAM, SUBSET_STREAM = 1, 2, 3
_FEISTEL_ROUNDS = 8

Epochs = TypeVar("Epochs", int, np.ndarray)


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


# -------------------------------------------------------------------------------------------------- order


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijective scramble of uint64 (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(
    index: np.ndarray, size: int, *, seed: int, epoch: int, stream: int = ORDER_STREAM, source: int = 0
) -> np.ndarray:
    """int64 array of `index`'s shape: where each index in [0, size) goes in the epoch's permutation of a source.

    A keyed Feistel network on the smallest even number of bits that holds `size`, walked until the result is
    below `size`; constant memory, a bijection for every size, seed and epoch.
    """
    assert size > 0
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = counter_generator(stream, seed=seed, epoch=epoch, sample_id=source).random_raw(_FEISTEL_ROUNDS)
    out = np.asarray(index).astype(np.uint64)
    outside = np.ones(out.shape, bool)
    while outside.any():
        left, right = out[outside] >> shift, out[outside] & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        out[outside] = (left << shift) | right
        outside = out >= size
    return out.astype(np.int64)


def shuffled_epochs(places: np.ndarray, size: int, *, seed: int, source: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, numbers below `size`), int64, at some places of an endless stream of shuffled epochs.

    Place n is place n % size of epoch n // size; an epoch's end falls where it falls, and nothing is dropped.
    """
    epochs, numbers = np.divmod(places, size)
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        numbers[mine] = permute(numbers[mine], size, seed=seed, epoch=int(epoch), source=source)
    return epochs, numbers


def take_turns(places: np.ndarray, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(source, how many places of that source came before), int64 arrays of the shape of `places`.

    Of the first n places source i has `n * shares[i] / sum(shares)`, rounded, whatever n is.
    """
    source, before = np.zeros_like(places), np.zeros_like(places)
    open_ = np.arange(len(places))  # whose source is not yet known
    rest, total = places, sum(shares)
    for number, share in enumerate(shares):
        count = rest * share // total
        mine = (rest + 1) * share // total > count
        source[open_[mine]], before[open_[mine]] = number, count[mine]
        open_, rest = open_[~mine], (rest - count)[~mine]
        total -= share
    return source, before


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
    return int(mask_prob * size + float(_uniform(draw)))


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
    begins_U = np.arange(len(tokens_T))
    if begins_word_V is not None:
        begins_T = begins_word_V[tokens_T]
        begins_T[0] = True  # the first token begins a word in any case
        begins_U = np.flatnonzero(begins_T)
    draws = generator.random_raw(1 + len(begins_U))
    n = num_masked(len(begins_U), config.mask_prob, draws[0])
    chosen_n = np.sort(np.argpartition(draws[1:], min(n, len(begins_U) - 1))[:n])
    fate_N, choice_N = _uniform(generator.random_raw(2 * n)).reshape(2, n)
    positions_N = chosen_n
    if begins_word_V is not None:
        lengths_n = np.diff(begins_U, append=len(tokens_T))[chosen_n]
        fate_N = np.repeat(fate_N, lengths_n)
        first_n = np.cumsum(lengths_n) - lengths_n
        positions_N = np.arange(len(fate_N)) + np.repeat(begins_U[chosen_n] - first_n, lengths_n)
        choice_N = _uniform(generator.random_raw(len(fate_N)))
    new_N = np.full(len(positions_N), mask_id, np.int64)
    randomised = fate_N >= 1 - config.random_prob
    new_N[randomised] = random_ids[(choice_N[randomised] * len(random_ids)).astype(np.int64)]
    kept = fate_N < config.keep_prob
    new_N[kept] = tokens_T[positions_N[kept]]
    masked_T = tokens_T.astype(np.int64)
    masked_T[positions_N] = new_N
    return masked_T, positions_N
