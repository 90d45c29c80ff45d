"""Several corpora as one endless stream of samples, each tagged with its domain.

Without weights every token of every corpus comes once an epoch, all shuffled together. With weights each corpus runs
through epochs of its own, and the corpora take turns so that after any number of samples each has had its share to
within one. Both are pure functions of (seed, place), in constant memory.
"""

from collections.abc import Sequence

import numpy as np

from ki_ds.data.randomness import permute
from ki_ds.data.samples import BlockDataset, Sample
from ki_ds.errors import UserError

_SHARES = 1 << 20  # weights are rounded to whole numbers that sum up to about this


def stream_samples(first: int, last: int, size: int, *, seed: int, source: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, sample ids), int64: places first..last-1 of the endless stream of shuffled epochs.

    Place n is place n % size of epoch n // size; an epoch's end falls where it falls, and nothing is dropped.
    """
    return _shuffled(np.arange(first, last), size, seed=seed, source=source)


def _shuffled(places: np.ndarray, size: int, *, seed: int, source: int) -> tuple[np.ndarray, np.ndarray]:
    epochs, inside = np.divmod(places, size)
    ids = np.empty_like(inside)
    for epoch in np.unique(epochs):
        ids[epochs == epoch] = permute(inside[epochs == epoch], size, seed=seed, epoch=int(epoch), source=source)
    return epochs, ids


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


class Mixture:
    """Datasets of one task, vocabulary and length, their samples numbered one behind the other.

    Args:
        datasets: at least one.
        weights: a positive share of the training tokens for each; None takes every token once an epoch.
    """

    def __init__(self, datasets: Sequence[BlockDataset], weights: Sequence[float] | None = None) -> None:
        first = datasets[0]
        for other in datasets[1:]:
            if (other.vocab_size, other.special_ids) != (first.vocab_size, first.special_ids):
                raise UserError(
                    f"{first.view.name} and {other.view.name} have different vocabularies; prepare both alike"
                )
        self.datasets = list(datasets)
        self._first_ids = np.cumsum([0, *map(len, datasets)])
        self.shares = None if weights is None else _sample_shares(datasets, weights)
        self.task, self.seq_len, self.pad_id = first.task, first.seq_len, first.pad_id
        self.vocab_size, self.special_ids = first.vocab_size, first.special_ids

    @property
    def padded(self) -> bool:
        """Whether a row can get padding."""
        return any(dataset.padded for dataset in self.datasets)

    def __len__(self) -> int:
        """Number of different samples."""
        return int(self._first_ids[-1])

    def stream(self, first: int, last: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, sample ids), int64: places first..last-1 of the endless training stream."""
        if self.shares is None:
            return stream_samples(first, last, len(self), seed=seed)
        source, before = take_turns(np.arange(first, last), self.shares)
        epochs, ids = np.empty_like(source), np.empty_like(source)
        for number, dataset in enumerate(self.datasets):
            mine = source == number
            epochs[mine], ids[mine] = _shuffled(before[mine], len(dataset), seed=seed, source=number)
        return epochs, ids + self._first_ids[source]

    def sample(self, sample_id: int, *, seed: int, epoch: int) -> Sample:
        """The sample as this (seed, epoch) masks it."""
        number, local = self._locate(sample_id)
        return self.datasets[number].sample(local, seed=seed, epoch=epoch, key=sample_id)

    def num_rows(self, sample_id: int, *, seed: int, epoch: int) -> int:
        """Number of labelled positions of a sample."""
        number, local = self._locate(sample_id)
        return self.datasets[number].num_rows(local, seed=seed, epoch=epoch, key=sample_id)

    def domain_ids(self, sample_ids: np.ndarray) -> np.ndarray:
        """The domains of some samples, int64 of the same shape."""
        numbers = np.searchsorted(self._first_ids, sample_ids, side="right") - 1
        return np.array([dataset.domain_id for dataset in self.datasets])[numbers]

    def _locate(self, sample_id: int) -> tuple[int, int]:
        """(dataset, its own number of the sample)."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        number = int(np.searchsorted(self._first_ids, sample_id, side="right")) - 1
        return number, sample_id - int(self._first_ids[number])


def _sample_shares(datasets: Sequence[BlockDataset], weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of samples that gives tokens in the ratio of the weights."""
    if min(weights) <= 0:
        raise UserError(f"data.sources have the weights {list(weights)}; each must be positive")
    rates = np.array([w * len(d) / d.num_tokens for w, d in zip(weights, datasets, strict=True)])
    return [max(1, int(share)) for share in np.rint(rates / rates.sum() * _SHARES)]
