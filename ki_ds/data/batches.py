"""From samples to batches: order, padding, loader.

Everything random is a pure function of (seed, epoch, sample id), so that the same global batches come for any
number of ranks, workers, accumulation steps and resumes.

Shape suffixes: B samples of a micro-batch, S some of them, L padded length, T tokens of one sample, N labelled
positions, M those of some samples.
"""

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ki_ds.config import RunConfig
from ki_ds.data.randomness import permute
from ki_ds.data.samples import BlockDataset, Mixture, Sample
from ki_ds.errors import UserError

_T = TypeVar("_T")
IGNORE_INDEX = -100
PAD_MULTIPLE = 8  # lengths in eights: few distinct shapes, and tensor cores like them
VALID_SEED = 20_220_710  # of the fixed validation masks, the same in every run that is compared


@dataclass(frozen=True)
class Batch:
    """One micro-batch of tensors.

    Labels are ALIGNED with the inputs for both tasks: the model's output at a position is compared with the
    label at that position, and nobody shifts. Rows are labelled positions, ascending.
    """

    input_ids_BL: torch.Tensor  # int64
    labels_BL: torch.Tensor  # int64, -100 where there is no target
    rows_N: torch.Tensor  # int64, flat indices into B * L
    row_labels_N: torch.Tensor  # int64
    attention_mask_BL: torch.Tensor | None  # int64, 1 = token; None when nothing is padded
    sample_ids_B: torch.Tensor  # int64; -1 in a filler, see `ValidBatches`
    domain_ids_B: torch.Tensor  # int64
    num_tokens: int  # real tokens, padding not counted
    position_ids_BL: torch.Tensor | None = None  # int64; begins at 0 with each of several blocks of a row
    host: "Batch | None" = None  # the same in the host's memory, where it was moved from: to look at without a wait

    @property
    def num_rows(self) -> int:
        """Number of labelled positions."""
        return len(self.rows_N)

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each sequence, padding not counted (int64)."""
        num_sequences, width = self.input_ids_BL.shape
        if self.attention_mask_BL is not None:
            return self.attention_mask_BL.sum(1)
        if self.position_ids_BL is not None:  # packed rows are causal: every token is labelled
            return torch.bincount(self.rows_N // width, minlength=num_sequences)
        return torch.full((num_sequences,), width, device=self.rows_N.device)

    def select(self, sequences: Sequence[int] | np.ndarray) -> tuple[Self, torch.Tensor]:
        """(the batch of some of its sequences, int64 numbers of their rows among this batch's rows).

        It is the batch that `collate` would have made of their samples. For a batch in the host's memory.

        Args:
            sequences: numbers below B, ascending; at least one.
        """
        kept_S = torch.as_tensor(sequences)
        width, lengths_S = self.input_ids_BL.shape[1], self.lengths[kept_S]
        new_width = min(-(-int(lengths_S.max()) // PAD_MULTIPLE) * PAD_MULTIPLE, width)
        owner_N = self.rows_N // width
        numbers_M = torch.isin(owner_N, kept_S).nonzero()[:, 0]
        rows_M = torch.searchsorted(kept_S, owner_N[numbers_M]) * new_width + self.rows_N[numbers_M] % width
        attention_mask_SL = None
        if self.position_ids_BL is None and int(lengths_S.min()) < new_width:
            attention_mask_SL = (torch.arange(new_width) < lengths_S[:, None]).long()
        selected = replace(
            self,
            input_ids_BL=self.input_ids_BL[kept_S, :new_width],
            labels_BL=self.labels_BL[kept_S, :new_width],
            rows_N=rows_M,
            row_labels_N=self.row_labels_N[numbers_M],
            attention_mask_BL=attention_mask_SL,
            sample_ids_B=self.sample_ids_B[kept_S],
            domain_ids_B=self.domain_ids_B[kept_S],
            num_tokens=int(lengths_S.sum()),
            position_ids_BL=None if self.position_ids_BL is None else self.position_ids_BL[kept_S, :new_width],
            host=None,
        )
        return selected, numbers_M

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on a device."""
        moved = self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, host=self.host or self)

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory; torch's loader calls this."""
        return self.map(lambda values: torch.as_tensor(values).pin_memory())

    def map(self, function: Callable[[Any], Any]) -> Self:
        """The same batch with a function applied to each of its tensors (or arrays, on their way from a loader)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {name: value for name, value in values.items() if isinstance(value, torch.Tensor | np.ndarray)}
        return replace(self, **{name: function(array) for name, array in arrays.items()})


def collate(samples: list[Sample], *, pad_id: int, seq_len: int) -> Batch:
    """A batch, padded on the right to its longest sample rounded up to eights, at most `seq_len`."""
    lengths = np.array([len(s.input_ids_T) for s in samples])
    longest = int(lengths.max())
    width = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, seq_len)
    input_ids_BL = np.full((len(samples), width), pad_id, np.int64)
    for row, sample in enumerate(samples):
        input_ids_BL[row, : lengths[row]] = sample.input_ids_T
    rows_N = np.concatenate([s.positions_N + row * width for row, s in enumerate(samples)])
    row_labels_N = np.concatenate([s.labels_N for s in samples])
    labels_BL = np.full((len(samples), width), IGNORE_INDEX, np.int64)
    labels_BL.reshape(-1)[rows_N] = row_labels_N
    attention_mask_BL = position_ids_BL = None
    if samples[0].position_ids_T is not None:  # several blocks in a row; its padding counts as one more
        position_ids_BL = torch.from_numpy(np.arange(width) - lengths[:, None])
        for positions_L, sample in zip(position_ids_BL, samples, strict=True):
            positions_L[: len(sample.input_ids_T)] = torch.from_numpy(sample.position_ids_T)
    elif int(lengths.min()) < width:
        attention_mask_BL = torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
    return Batch(
        input_ids_BL=torch.from_numpy(input_ids_BL),
        labels_BL=torch.from_numpy(labels_BL),
        rows_N=torch.from_numpy(rows_N),
        row_labels_N=torch.from_numpy(row_labels_N),
        attention_mask_BL=attention_mask_BL,
        sample_ids_B=torch.tensor([s.sample_id for s in samples], dtype=torch.int64),
        domain_ids_B=torch.tensor([s.domain_id for s in samples], dtype=torch.int64),
        num_tokens=int(lengths.sum()),
        position_ids_BL=position_ids_BL,
    )


def _batch(dataset: Mixture | BlockDataset, sample_ids: np.ndarray, epochs: np.ndarray, *, seed: int) -> Batch:
    """The batch of some samples as this (seed, epochs) masks them."""
    keys = zip(sample_ids.tolist(), epochs.tolist(), strict=True)
    samples = [dataset.sample(sample_id, seed=seed, epoch=epoch) for sample_id, epoch in keys]
    return collate(samples, pad_id=dataset.pad_id, seq_len=dataset.seq_len)


# ------------------------------------------------------------------------------------------------- loaders


class _MicroBatches(Dataset[Batch | UserError]):
    """Map-style over (step * accumulation + micro step): this rank's micro-batches."""

    def __init__(self, batches: "TrainBatches") -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> Batch | UserError:
        """The micro-batch; an error comes back as a value, for torch puts a worker's traceback into its text."""
        try:
            batch = self.batches.micro_batch(index)
        except UserError as error:
            return error
        # From a process of its own as arrays: torch hands every tensor over by a file descriptor, which costs more.
        return batch if get_worker_info() is None else batch.map(torch.Tensor.numpy)


def _received(batch: Batch | UserError) -> Batch:
    if isinstance(batch, UserError):
        raise batch
    return batch.map(torch.as_tensor)


def _leave_signals_to_the_rank(_worker: int) -> None:
    """Launchers signal whole process trees, and Ctrl-C a whole group: the loader ends when its rank does."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class TrainBatches:
    """Iterates over steps start_step..num_steps-1 (without end if `num_steps` is None), each a list of this
    rank's micro-batches, `accumulation_steps` of them.

    The global batch of step t is the same set of masked samples for every split into ranks, micro-batches and
    workers: places t*G..(t+1)*G-1 of its stream. To resume, give the first step that is still to do.
    Each iteration begins at start_step again.
    """

    dataset: Mixture
    _: KW_ONLY
    seed: int
    micro_batch_size: int
    global_batch_size: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    start_step: int = 0
    num_steps: int | None = None
    pin_memory: bool = False
    accumulation_steps: int = field(init=False)

    def __post_init__(self) -> None:
        per_micro_step = self.micro_batch_size * self.world_size
        if min(self.micro_batch_size, self.global_batch_size) < 1 or self.global_batch_size % per_micro_step:
            raise UserError(
                f"global_batch_size={self.global_batch_size} is no multiple of "
                f"micro_batch_size={self.micro_batch_size} x {self.world_size} ranks; change one of them"
            )
        if self.seed < 0:
            raise UserError(f"seed={self.seed} is negative; take one from 0 on")
        assert 0 <= self.rank < self.world_size
        self.accumulation_steps = self.global_batch_size // per_micro_step

    @classmethod
    def of_run(
        cls, config: RunConfig, dataset: Mixture, *, steps: range, rank: int, world_size: int, pin_memory: bool
    ) -> Self:
        """One rank's micro-batches of some steps of a run."""
        return cls(
            dataset,
            seed=config.seed,
            micro_batch_size=config.train.micro_batch_size,
            global_batch_size=config.train.global_batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=config.data.num_workers,
            start_step=steps.start,
            num_steps=steps.stop,
            pin_memory=pin_memory,
        )

    def micro_batch(self, index: int) -> Batch:
        """This rank's part of a micro step; those of all ranks together are a contiguous part of the stream."""
        first = (index * self.world_size + self.rank) * self.micro_batch_size
        epochs, ids = self.dataset.stream(first, first + self.micro_batch_size, seed=self.seed)
        return _batch(self.dataset, ids, epochs, seed=self.seed)

    def __iter__(self) -> Iterator[list[Batch]]:
        first = self.start_step * self.accumulation_steps
        indices: Any = itertools.count(first)
        if self.num_steps is not None:
            indices = range(first, self.num_steps * self.accumulation_steps)
        loader = DataLoader(
            _MicroBatches(self),
            batch_size=None,
            sampler=indices,
            num_workers=self.num_workers,
            prefetch_factor=2 if self.num_workers else None,
            pin_memory=self.pin_memory,
            worker_init_fn=_leave_signals_to_the_rank,
            # The loader draws a seed; from torch's own generator it would move the dropout of a resumed run.
            generator=torch.Generator(),
        )
        micro_batches = iter(loader)
        try:
            while step := list(itertools.islice(micro_batches, self.accumulation_steps)):
                yield [_received(batch) for batch in step]
        finally:
            # Ends the workers at once; left to the garbage collector after an error they take 5 seconds.
            del micro_batches

    def __len__(self) -> int:
        """Number of steps of an iteration."""
        if self.num_steps is None:
            raise TypeError("this stream of batches has no end")
        return max(self.num_steps - self.start_step, 0)

    def num_rows(self, step: int) -> int:
        """Labelled positions of the whole global batch of a step, all ranks together, without tokens."""
        first = step * self.global_batch_size
        epochs, ids = self.dataset.stream(first, first + self.global_batch_size, seed=self.seed)
        keys = zip(ids.tolist(), epochs.tolist(), strict=True)
        return sum(self.dataset.num_rows(sample_id, seed=self.seed, epoch=epoch) for sample_id, epoch in keys)


def with_next(batches: Iterable[_T]) -> Iterator[tuple[_T, _T | None]]:
    """Each element with the one behind it, None behind the last."""
    iterator = iter(batches)
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        yield current, following
        current = following


@dataclass
class ValidBatches:
    """This rank's validation micro-batches, the same samples with the same masks each time.

    `num_variants` masks every mlm sample that often, each time differently, which steadies the perplexity of a
    small set. `max_samples` takes that many samples, a fixed random choice. The batches do not depend on
    `world_size`; they go round the ranks. Every rank gets equally many (collectives of ZeRO-3 need that): what
    is missing is filled with a batch without any label, sample ids -1 and num_tokens 0.
    """

    dataset: Mixture | BlockDataset
    _: KW_ONLY
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    max_samples: int | None = None
    num_variants: int = 1
    seed: int = VALID_SEED

    def __post_init__(self) -> None:
        if min(self.micro_batch_size, self.num_variants) < 1 or (self.max_samples is not None and self.max_samples < 1):
            raise UserError(
                f"validation with micro_batch_size={self.micro_batch_size}, num_variants={self.num_variants}, "
                f"max_samples={self.max_samples}: each must be at least 1"
            )
        assert 0 <= self.rank < self.world_size
        if self.dataset.task == "causal":
            self.num_variants = 1
        size = len(self.dataset)
        self._ids = np.arange(size)
        if self.max_samples is not None and self.max_samples < size:
            self._ids = np.sort(permute(self._ids[: self.max_samples], size, seed=self.seed, epoch=0))
        self.num_samples = len(self._ids) * self.num_variants  # of all ranks together
        self._num_batches = -(-self.num_samples // self.micro_batch_size)

    def __len__(self) -> int:
        """Number of batches of each rank."""
        return -(-self._num_batches // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self.rank, len(self) * self.world_size, self.world_size):
            yield self._batch(index) if index < self._num_batches else _filler(self._batch(0))

    def _batch(self, index: int) -> Batch:
        places = np.arange(index * self.micro_batch_size, (index + 1) * self.micro_batch_size)
        variants, order = np.divmod(places[places < self.num_samples], len(self._ids))
        return _batch(self.dataset, self._ids[order], variants, seed=self.seed)


def _filler(batch: Batch) -> Batch:
    """The batch without its labels: a forward for company that adds nothing to any sum."""
    return replace(
        batch,
        labels_BL=torch.full_like(batch.labels_BL, IGNORE_INDEX),
        rows_N=batch.rows_N[:0],
        row_labels_N=batch.row_labels_N[:0],
        sample_ids_B=torch.full_like(batch.sample_ids_B, -1),
        num_tokens=0,
    )
