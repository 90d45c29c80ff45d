"""Keyed random numbers and orders: pure functions of (seed, epoch, number), in constant memory."""

import numpy as np

# One stream of random numbers for each purpose, so that none repeats another's numbers.
MASK_STREAM, ORDER_STREAM, SUBSET_STREAM = 1, 2, 3
_FEISTEL_ROUNDS = 8


def counter_generator(stream: int, *, seed: int, epoch: int, sample_id: int = 0) -> np.random.Philox:
    """A Philox generator for one (stream, seed, epoch, sample id).

    The four numbers are the key and the upper words of the counter, so two different ones never share a
    number. Only `random_raw` is to be used: NumPy promises raw streams, not the distributions made of them.
    """
    key = np.array([seed, epoch], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, sample_id, stream], np.uint64))


def uniform(raw: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) out of uint64, by the upper 53 bits."""
    return (raw >> np.uint64(11)) * 2.0**-53


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
