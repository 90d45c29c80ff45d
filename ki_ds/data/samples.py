"""From blocks of tokens to samples, by (seed, epoch, id), of one corpus or of several as one endless stream.

Shape suffixes: T tokens of one sample, N labelled positions, S blocks, R rows, V the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ki_ds.config import Task
from ki_ds.data.blocks import BlockConfig, Blocks, BreakMode, LongLines, TokenView, find_blocks, pack_rows
from ki_ds.data.randomness import (
    MASK_STREAM,
    MaskConfig,
    counter_generator,
    mask_tokens,
    num_masked,
    shuffled_epochs,
    take_turns,
)
from ki_ds.data.store import SpecialIds, TokenStore
from ki_ds.errors import UserError

MIN_SEQ_LEN = 8
DEFAULT_BREAK_MODE: dict[Task, BreakMode] = {"mlm": "complete", "causal": "none"}
_ID_CHECK_TOKENS = 1 << 20
_SHARES = 1 << 20  # weights are rounded to whole numbers that sum up to about this


@dataclass(frozen=True)
class Sample:
    """One row: `input_ids_T`, and at `positions_N` of it the targets `labels_N`; all int64 arrays.

    `position_ids_T` is given where several blocks share the row: it begins at 0 with each.
    """

    sample_id: int
    input_ids_T: np.ndarray
    positions_N: np.ndarray
    labels_N: np.ndarray
    domain_id: int = 0
    position_ids_T: np.ndarray | None = None


def index_blocks(view: TokenView, task: Task, config: BlockConfig) -> Blocks:
    """The blocks and rows of a view, by one pass over the sizes of its items."""
    capacity = config.seq_len - (task == "mlm")  # `<s>` stands before an mlm block
    blocks = find_blocks(view, capacity, mode=config.break_mode, long_lines=config.long_lines)
    return replace(blocks, rows_R2=pack_rows(blocks.bounds_S2, config.seq_len)) if config.packing else blocks


class BlockDataset:
    """The samples of one view.

    "mlm": `<s>` and a block, masked. "causal": a block's inputs are its tokens moved by one, behind the token before
    the block where blocks are a fixed cut ("none"), else behind `</s>`, which also opens the view.

    Vocabulary size and special ids come from the store's manifest where they are not given (a fairseq or foreign
    Megatron store has none). `begins_word_V` (bool [V]) is needed for whole-word masks. `pad_id` fills up a batch: it
    is `</s>` where the vocabulary has no padding (GPT-2).
    """

    def __init__(
        self,
        source: TokenView | TokenStore,
        *,
        task: Task,
        seq_len: int,
        break_mode: BreakMode | None = None,
        long_lines: LongLines = "split",
        packing: bool = False,
        vocab_size: int | None = None,
        special_ids: SpecialIds | None = None,
        masking: MaskConfig | None = None,
        begins_word_V: np.ndarray | None = None,
        blocks: Blocks | None = None,
        domain_id: int = 0,
    ) -> None:
        self.view = source if isinstance(source, TokenView) else TokenView([source])
        self.task = task
        self.seq_len = seq_len
        mode = break_mode or DEFAULT_BREAK_MODE[task]
        self.config = BlockConfig(seq_len=seq_len, break_mode=mode, long_lines=long_lines, packing=packing)
        self.masking = masking or MaskConfig()
        self.domain_id = domain_id
        self.vocab_size, self.special_ids = _vocabulary(self.view, vocab_size, special_ids)
        self._begins_word_V = begins_word_V if self.masking.whole_words else None
        self._check()
        assert self.special_ids.eos is not None
        self._eos_id = self.special_ids.eos
        self.pad_id = self._eos_id if self.special_ids.pad is None else self.special_ids.pad
        self.blocks = blocks or index_blocks(self.view, task, self.config)
        if not len(self):
            raise UserError(
                f"{self.view.name}: no line fits into data.seq_len={seq_len}; raise it, or data.long_lines=split"
            )

    def __len__(self) -> int:
        """The number of samples of an epoch."""
        return len(self.blocks.bounds_S2 if self.blocks.rows_R2 is None else self.blocks.rows_R2)

    @cached_property
    def padded(self) -> bool:
        """Whether a row can get padding: whether some sample is shorter than `seq_len`, and they are not packed."""
        bounds_S2, full = self.blocks.bounds_S2, self.seq_len - (self.task == "mlm")
        parts = (bounds_S2[first : first + _ID_CHECK_TOKENS] for first in range(0, len(bounds_S2), _ID_CHECK_TOKENS))
        return not self.config.packing and any((np.diff(part) != full).any() for part in parts)

    @property
    def num_tokens(self) -> int:
        """Tokens of the view that are in some sample."""
        return self.view.num_tokens - self.blocks.num_dropped_tokens

    def sample(self, sample_id: int, *, seed: int, epoch: int, key: int | None = None) -> Sample:
        """The sample `sample_id` as this (seed, epoch) masks it; causal samples depend on neither.

        `key` is the number that names the sample among those of other datasets, and keys its mask.
        """
        key = sample_id if key is None else key
        blocks = [self._read(block) for block in range(*self._block_range(sample_id))]
        if self.task == "causal":
            return self._causal(blocks, key)
        ((_, tokens),) = blocks
        mask_id, bos_id = self.special_ids.mask, self.special_ids.bos
        assert mask_id is not None
        tokens_T = _behind(self._eos_id if bos_id is None else bos_id, tokens)
        masked_T, positions_N = mask_tokens(
            tokens_T,
            self._mask_generator(seed, epoch, key),
            config=self.masking,
            mask_id=mask_id,
            random_ids=self._random_ids,
            begins_word_V=self._begins_word_V,
        )
        return Sample(key, masked_T, positions_N, tokens_T[positions_N], self.domain_id)

    def size(self, sample_id: int) -> int:
        """T, the number of tokens of a sample."""
        first, last = self._block_range(sample_id)
        return int(np.diff(self.blocks.bounds_S2[first:last]).sum()) + (self.task == "mlm")

    def num_rows(self, sample_id: int, *, seed: int, epoch: int, key: int | None = None) -> int:
        """Number of labelled positions of a sample; without reading a token, but for whole-word masks."""
        if self.task == "causal":
            return self.size(sample_id)
        if self._begins_word_V is not None:
            return len(self.sample(sample_id, seed=seed, epoch=epoch, key=key).labels_N)
        generator = self._mask_generator(seed, epoch, sample_id if key is None else key)
        return num_masked(self.size(sample_id), self.masking.mask_prob, generator.random_raw(1)[0])

    def _mask_generator(self, seed: int, epoch: int, key: int) -> np.random.Philox:
        return counter_generator(MASK_STREAM, seed=seed, epoch=self.masking.variant(epoch), sample_id=key)

    def _block_range(self, sample_id: int) -> tuple[int, int]:
        """First and end block of a sample."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        if self.blocks.rows_R2 is None:
            return sample_id, sample_id + 1
        first, last = self.blocks.rows_R2[sample_id].tolist()
        return first, last

    def _read(self, block: int) -> tuple[int, np.ndarray]:
        """(first token's place in the view, tokens) of a block."""
        first, last = self.blocks.bounds_S2[block].tolist()
        tokens = self.view.read(first, last)
        self._check_ids(tokens)
        return first, tokens

    def _causal(self, blocks: list[tuple[int, np.ndarray]], key: int) -> Sample:
        inputs = []
        for first, tokens in blocks:
            goes_on = self.config.break_mode == "none" and first > 0
            inputs.append(_behind(self.view.read(first - 1, first)[0] if goes_on else self._eos_id, tokens[:-1]))
        labels_T = np.concatenate([tokens for _, tokens in blocks]).astype(np.int64)
        positions_T = np.concatenate([np.arange(len(part)) for part in inputs]) if self.config.packing else None
        return Sample(key, np.concatenate(inputs), np.arange(len(labels_T)), labels_T, self.domain_id, positions_T)

    @cached_property
    def _random_ids(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids.all_ids)

    def _check(self) -> None:
        """UserError for what would go wrong at some later step."""
        name = self.view.name
        if self.seq_len < MIN_SEQ_LEN:
            raise UserError(f"data.seq_len={self.seq_len} is below {MIN_SEQ_LEN}; take e.g. 512")
        if self.view.num_tokens < self.seq_len:
            raise UserError(
                f"{name} has {self.view.num_tokens} tokens, less than one block of data.seq_len={self.seq_len}; "
                "bring more text or lower it"
            )
        if self.special_ids.eos is None:
            raise UserError(f"the tokenizer of {name} has no eos token; take one that has it")
        if self.task == "mlm" and self.special_ids.mask is None:
            raise UserError(
                f"the tokenizer of {name} has no mask token, which task=mlm needs; "
                "take task=causal or a tokenizer with <mask>"
            )
        if self.masking.whole_words and self._begins_word_V is None:
            raise UserError(f"whole-word masks of {name} need to know which ids begin a word; name its tokenizer")
        if max(self.special_ids.all_ids) >= self.vocab_size:
            raise UserError(
                f"special id {max(self.special_ids.all_ids)} lies outside the vocabulary of "
                f"{self.vocab_size:,}; count the mask token in vocab_size"
            )
        if self.config.packing and (self.task == "mlm" or self.config.break_mode in ("none", "complete")):
            raise UserError(
                f"data.packing has no meaning for task={self.task} with data.break_mode={self.config.break_mode}; "
                "leave it out, or take task=causal with complete_doc, none_doc or eos"
            )
        # A look at both ends now; every block is looked at when it is read.
        end = self.view.num_tokens
        for first in (0, max(end - _ID_CHECK_TOKENS, 0)):
            self._check_ids(self.view.read(first, min(first + _ID_CHECK_TOKENS, end)))

    def _check_ids(self, tokens: np.ndarray) -> None:
        lowest, highest = tokens.min(initial=0), tokens.max(initial=0)
        if lowest < 0 or highest >= self.vocab_size:
            raise UserError(
                f"{self.view.name} has token id {lowest if lowest < 0 else highest}, the vocabulary ends at "
                f"{self.vocab_size - 1}; take the tokenizer that the data was prepared with"
            )


def _behind(first: int, tokens: np.ndarray) -> np.ndarray:
    """int64: an id and the tokens behind it."""
    return np.concatenate([[first], tokens], dtype=np.int64, casting="unsafe")


def _vocabulary(view: TokenView, vocab_size: int | None, special_ids: SpecialIds | None) -> tuple[int, SpecialIds]:
    manifest = view.stores[0].manifest
    if manifest is None:
        if vocab_size is None or special_ids is None:
            raise UserError(f"{view.name} has no manifest that tells its vocabulary; name its tokenizer or dictionary")
        return vocab_size, special_ids
    if vocab_size is not None and manifest.vocab_size > vocab_size:
        raise UserError(
            f"{view.name} was prepared with {manifest.vocab_size:,} ids, the vocabulary has {vocab_size:,}; "
            "take the tokenizer that the data was prepared with"
        )
    return vocab_size or manifest.vocab_size, special_ids or manifest.special_ids


class Mixture:
    """Datasets of one task, vocabulary and length, their samples numbered one behind the other.

    Without weights every token of every dataset comes once an epoch, all shuffled together. With weights, the shares
    of the training tokens, each dataset runs through epochs of its own, and they take turns so that after any number
    of samples each has had its share to within one. Both are pure functions of (seed, place), in constant memory.
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
        places = np.arange(first, last)
        if self.shares is None:
            return shuffled_epochs(places, len(self), seed=seed)
        source, before = take_turns(places, self.shares)
        epochs, ids = np.empty_like(source), np.empty_like(source)
        for number, dataset in enumerate(self.datasets):
            mine = source == number
            epochs[mine], ids[mine] = shuffled_epochs(before[mine], len(dataset), seed=seed, source=number)
        return epochs, ids + self._first_ids[source]

    def sample(self, sample_id: int, *, seed: int, epoch: int) -> Sample:
        """The sample as this (seed, epoch) masks it."""
        dataset, number = self._locate(sample_id)
        return dataset.sample(number, seed=seed, epoch=epoch, key=sample_id)

    def num_rows(self, sample_id: int, *, seed: int, epoch: int) -> int:
        """Number of labelled positions of a sample."""
        dataset, number = self._locate(sample_id)
        return dataset.num_rows(number, seed=seed, epoch=epoch, key=sample_id)

    def domain_ids(self, sample_ids: np.ndarray) -> np.ndarray:
        """The domains of some samples, int64 of the same shape."""
        numbers = np.searchsorted(self._first_ids, sample_ids, side="right") - 1
        return np.array([dataset.domain_id for dataset in self.datasets])[numbers]

    def _locate(self, sample_id: int) -> tuple[BlockDataset, int]:
        """(dataset, its own number of the sample)."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        number = int(np.searchsorted(self._first_ids, sample_id, side="right")) - 1
        return self.datasets[number], sample_id - int(self._first_ids[number])


def _sample_shares(datasets: Sequence[BlockDataset], weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of samples that gives tokens in the ratio of the weights."""
    if min(weights) <= 0:
        raise UserError(f"data.sources have the weights {list(weights)}; each must be positive")
    rates = np.array([w * len(d) / d.num_tokens for w, d in zip(weights, datasets, strict=True)])
    return [max(1, int(share)) for share in np.rint(rates / rates.sum() * _SHARES)]
