"""What a run asks its teacher: which masked samples, in which order, and everything that they depend on.

A masked sample is a pair (mask, sample id): the mask is the epoch, or the epoch's variant with `data.mask_variants`,
and 0 for causal. Its input hash is 64 bits of exactly what the teacher is asked: ids, positions and labels.

Shape suffixes: B samples of a micro-batch, L padded length, P places of the stream, S samples of an epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ki_ds.config import RunConfig
from ki_ds.data.batches import Batch, collate
from ki_ds.data.datasets import Datasets
from ki_ds.data.samples import Mixture
from ki_ds.errors import UserError

_BLOCK = 1 << 20  # places of the stream that are looked at together
_MASK_FIELDS = ("mask_probability", "keep_probability", "random_probability", "whole_words", "mask_variants")


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The masked samples at some places of a run's stream.

    `key` (JSON) holds what they depend on; two runs of equal keys mask every sample alike. `tau` is the temperature
    that is asked for. `steps` are the updates whose samples are meant, each `global_batch_size` places of the stream;
    where `domain_ids` are given, only the samples of these domains are.
    """

    train: Mixture
    seed: int
    key: dict[str, Any]
    tau: float
    steps: range
    global_batch_size: int
    micro_batch_size: int
    domain_ids: frozenset[int] | None = None
    vocabulary_names: tuple[str, ...] = ()  # other hashes by which a cache may know the key's vocabulary

    @classmethod
    def of_run(cls, config: RunConfig, data: Datasets, *, steps: range) -> Questions:
        """The questions of some of a run's updates."""
        return cls(
            train=data.train,
            seed=config.seed,
            key=sample_key(config, data),
            tau=config.inherit.tau,
            steps=steps,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            vocabulary_names=data.vocabulary.names,
        )

    def of_epochs(self, num_epochs: int) -> Questions:
        """Those of the first epochs, rounded up to whole updates. UserError for weighted sources."""
        if self.train.shares is not None:
            raise UserError(
                f"--epochs {num_epochs}: weighted sources have epochs of different lengths; give --steps instead"
            )
        return replace(self, steps=range(-(-num_epochs * len(self.train) // self.global_batch_size)))

    def of_domains(self, domain_ids: frozenset[int] | None) -> Questions:
        """Those about samples of some domains; None is all of them."""
        return replace(self, domain_ids=domain_ids)

    @property
    def places(self) -> range:
        """Places of the stream."""
        return range(self.steps.start * self.global_batch_size, self.steps.stop * self.global_batch_size)

    def masks(self, epochs: np.ndarray) -> np.ndarray:
        """The masks of some epochs, int64."""
        return np.zeros_like(epochs) if self.train.task == "causal" else self.train.datasets[0].masking.variant(epochs)

    def _asked(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(places, masks, sample ids) of the places from `first` to `last`, whose samples are of `domain_ids`."""
        places = np.arange(first, last)
        epochs, ids = self.train.stream(first, last, seed=self.seed)
        if self.domain_ids is not None:
            chosen = np.isin(self.train.domain_ids(ids), sorted(self.domain_ids))
            places, epochs, ids = places[chosen], epochs[chosen], ids[chosen]
        return places, self.masks(epochs), ids

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(places, masks, sample ids), int64 [P] each, block by block in the stream's order."""
        for first in self.places[::_BLOCK]:
            yield self._asked(first, min(first + _BLOCK, self.places.stop))

    def micro_batch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Batch]:
        """(places, masks, sample ids, batch) of the stream's micro-batch of that number.

        Whatever the ranks, these are the run's own micro-batches (or of each the samples of `domain_ids`, at least
        one), so that a teacher computes on equal shapes.
        """
        places, masks, ids = self._asked(number * self.micro_batch_size, (number + 1) * self.micro_batch_size)
        return places, masks, ids, self._batch(zip(masks.tolist(), ids.tolist(), strict=True))

    def one(self, mask: int, sample_id: int) -> Batch:
        """A batch of one masked sample."""
        return self._batch([(mask, sample_id)])

    def _batch(self, masked_samples: Iterable[tuple[int, int]]) -> Batch:
        samples = [self.train.sample(i, seed=self.seed, epoch=mask) for mask, i in masked_samples]
        return collate(samples, pad_id=self.train.pad_id, seq_len=self.train.seq_len)


def sample_key(config: RunConfig, data: Datasets) -> dict[str, Any]:
    """Everything that a run's masked samples depend on, by the names of its configuration.

    The weights of sources are not among it: they choose which samples are asked about, and alter none.
    """
    settings = config.data
    parts = [
        {k: v for k, v in asdict(s).items() if k in ("half", "fraction", "max_tokens")} for s in settings.all_sources
    ]
    key = {
        "task": config.task,
        "data.seq_len": settings.seq_len,
        "data.break_mode": data.train.datasets[0].config.break_mode,
        "data.long_lines": settings.long_lines,
        "data.packing": settings.packing,
        "data.sources": parts,
        "data.valid_fraction": settings.valid_fraction,
        "data.subset_seed": settings.subset_seed,
    }
    if config.task == "mlm":
        key |= {f"data.{name}": getattr(settings, name) for name in _MASK_FIELDS} | {"seed": config.seed}
    return key | {
        "vocabulary_sha256": data.vocabulary.names[0],
        "num_classes": data.vocabulary.size,
        "train_sha256": data.hashes["train_sha256"],
        "num_samples": len(data.train),
    }


def input_hashes(batch: Batch) -> list[int]:
    """For each sample of a batch 64 bits of its ids, positions and labels; padding and neighbours do not count.

    Waits for the device.
    """
    ids_BL, rows_N, labels_N = (t.cpu().numpy() for t in (batch.input_ids_BL, batch.rows_N, batch.row_labels_N))
    position_ids_BL = None if batch.position_ids_BL is None else batch.position_ids_BL.cpu().numpy()
    width = ids_BL.shape[1]
    bounds = row_bounds(batch)
    hashes = []
    for number, length in enumerate(batch.lengths.tolist()):
        rows = slice(bounds[number], bounds[number + 1])
        digest = hashlib.blake2b(np.array([length, rows.stop - rows.start]).data, digest_size=8)
        digest.update(ids_BL[number, :length].data)
        digest.update((rows_N[rows] - number * width).data)
        digest.update(np.ascontiguousarray(labels_N[rows]).data)
        if position_ids_BL is not None:
            digest.update(position_ids_BL[number, :length].data)
        hashes.append(int.from_bytes(digest.digest(), "little"))
    return hashes


def row_bounds(batch: Batch) -> list[int]:
    """B + 1 numbers: where the labelled rows of each sample begin in `rows_N`, and their end."""
    width = batch.input_ids_BL.shape[1]
    starts = np.arange(batch.input_ids_BL.shape[0] + 1) * width
    return np.searchsorted(batch.rows_N.cpu().numpy(), starts).tolist()
