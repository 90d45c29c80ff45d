"""From a view of token stores to samples: a block of tokens by its id, masked by (seed, epoch, id).

Shape suffixes: T tokens of one sample, N labelled positions, S samples of an epoch, V the vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from ki_ds.data.blocks import Blocks, BreakMode, LongLines, MaskConfig, find_blocks, mask_tokens, num_masked, pack_rows
from ki_ds.data.randomness import MASK_STREAM, counter_generator
from ki_ds.data.store import SpecialIds, TokenStore
from ki_ds.data.view import TokenView
from ki_ds.errors import UserError

MIN_SEQ_LEN = 8
_ID_CHECK_TOKENS = 1 << 20

Task = Literal["mlm", "causal"]
DEFAULT_BREAK_MODE: dict[str, BreakMode] = {"mlm": "complete", "causal": "none"}


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
class SampleIndex:
    """Where the samples of a view lie: its blocks and, where they are packed, int64 [S, 2] first and end block."""

    blocks: Blocks
    rows_S2: np.ndarray | None

    @classmethod
    def build(cls, view: TokenView, task: Task, config: BlockConfig) -> "SampleIndex":
        """One pass over the sizes of the view's items."""
        capacity = config.seq_len - (task == "mlm")  # `<s>` stands before an mlm block
        blocks = find_blocks(view, capacity, mode=config.break_mode, long_lines=config.long_lines)
        return cls(blocks, pack_rows(blocks.bounds_S2, config.seq_len) if config.packing else None)


class BlockDataset:
    """The samples of one view.

    "mlm": `<s>` and a block, masked. "causal": a block's inputs are its tokens moved by one, behind the token before
    the block where blocks are a fixed cut ("none"), else behind `</s>`, which also opens the view.

    Vocabulary size and special ids come from the store's manifest where they are not given (a fairseq or foreign
    Megatron store has none). `begins_word_V` (bool [V]) is needed for whole-word masks.
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
        index: SampleIndex | None = None,
        domain_id: int = 0,
    ) -> None:
        self.view = source if isinstance(source, TokenView) else TokenView([source])
        self.task = task
        self.seq_len = seq_len
        mode = break_mode or DEFAULT_BREAK_MODE[task]
        self.blocks = BlockConfig(seq_len=seq_len, break_mode=mode, long_lines=long_lines, packing=packing)
        self.masking = masking or MaskConfig()
        self.domain_id = domain_id
        self.vocab_size, self.special_ids = _vocabulary(self.view, vocab_size, special_ids)
        self._begins_word_V = begins_word_V if self.masking.whole_words else None
        self._check()
        self.index = index or SampleIndex.build(self.view, task, self.blocks)
        if not len(self):
            raise UserError(
                f"{self.view.name}: no line fits into data.seq_len={seq_len}; raise it, or data.long_lines=split"
            )

    def __len__(self) -> int:
        """S, the number of samples of an epoch."""
        rows_S2 = self.index.rows_S2
        return len(self.index.blocks.bounds_S2 if rows_S2 is None else rows_S2)

    @property
    def pad_id(self) -> int:
        """What fills up a batch; `</s>` where the vocabulary has no padding (GPT-2)."""
        pad = self.special_ids.pad
        return pad if pad is not None else self._eos_id

    @cached_property
    def padded(self) -> bool:
        """Whether a row can get padding: whether some sample is shorter than `seq_len`, and they are not packed."""
        bounds_S2, full = self.index.blocks.bounds_S2, self.seq_len - (self.task == "mlm")
        parts = (bounds_S2[first : first + _ID_CHECK_TOKENS] for first in range(0, len(bounds_S2), _ID_CHECK_TOKENS))
        return self.index.rows_S2 is None and any((np.diff(part) != full).any() for part in parts)

    @property
    def num_tokens(self) -> int:
        """Tokens of the view that are in some sample."""
        return self.view.num_tokens - self.index.blocks.num_dropped_tokens

    def sample(self, sample_id: int, *, seed: int, epoch: int, key: int | None = None) -> Sample:
        """The sample `sample_id` as this (seed, epoch) masks it; causal samples depend on neither.

        `key` is the number that names the sample among those of other datasets, and keys its mask.
        """
        key = sample_id if key is None else key
        if self.task == "causal":
            return self._causal(sample_id, key)
        tokens_T = self._mlm_block(sample_id)
        masked_T, positions_N = mask_tokens(
            tokens_T,
            counter_generator(MASK_STREAM, seed=seed, epoch=self.masking.variant(epoch), sample_id=key),
            config=self.masking,
            mask_id=self._mask_id,
            random_ids=self._random_ids,
            begins_word_V=self._begins_word_V,
        )
        return Sample(key, masked_T, positions_N, tokens_T[positions_N], self.domain_id)

    def size(self, sample_id: int) -> int:
        """T, the number of tokens of a sample."""
        first, last = self._block_range(sample_id)
        bounds = self.index.blocks.bounds_S2[first:last]
        return int((bounds[:, 1] - bounds[:, 0]).sum()) + (self.task == "mlm")

    def num_rows(self, sample_id: int, *, seed: int, epoch: int, key: int | None = None) -> int:
        """Number of labelled positions of a sample; without reading a token, but for whole-word masks."""
        if self.task == "causal":
            return self.size(sample_id)
        if self._begins_word_V is not None:
            return len(self.sample(sample_id, seed=seed, epoch=epoch, key=key).labels_N)
        key = sample_id if key is None else key
        generator = counter_generator(MASK_STREAM, seed=seed, epoch=self.masking.variant(epoch), sample_id=key)
        return num_masked(self.size(sample_id), self.masking.mask_prob, generator.random_raw(1)[0])

    def _block_range(self, sample_id: int) -> tuple[int, int]:
        """First and end block of a sample."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        if self.index.rows_S2 is None:
            return sample_id, sample_id + 1
        first, last = self.index.rows_S2[sample_id].tolist()
        return first, last

    def _read(self, block: int) -> tuple[int, np.ndarray]:
        """(first token's place in the view, tokens) of a block."""
        first, last = self.index.blocks.bounds_S2[block].tolist()
        tokens = self.view.read(first, last)
        if tokens.max(initial=0) >= self.vocab_size or tokens.min(initial=0) < 0:
            raise UserError(self._foreign_id(tokens))
        return first, tokens

    def _mlm_block(self, sample_id: int) -> np.ndarray:
        """int64 [T]: `<s>` and the block."""
        _, tokens = self._read(self._block_range(sample_id)[0])
        block = np.empty(len(tokens) + 1, np.int64)
        block[0] = self.special_ids.bos if self.special_ids.bos is not None else self._eos_id
        block[1:] = tokens
        return block

    def _causal(self, sample_id: int, key: int) -> Sample:
        inputs, labels = [], []
        for block in range(*self._block_range(sample_id)):
            first, tokens = self._read(block)
            inputs.append(np.empty(len(tokens), np.int64))
            goes_on = self.blocks.break_mode == "none" and first > 0
            inputs[-1][0] = self.view.read(first - 1, first)[0] if goes_on else self._eos_id
            inputs[-1][1:] = tokens[:-1]
            labels.append(tokens)
        positions_T = np.concatenate([np.arange(len(part)) for part in inputs]) if self.blocks.packing else None
        labels_T = np.concatenate(labels).astype(np.int64)
        return Sample(key, np.concatenate(inputs), np.arange(len(labels_T)), labels_T, self.domain_id, positions_T)

    @property
    def _eos_id(self) -> int:
        assert self.special_ids.eos is not None
        return self.special_ids.eos

    @property
    def _mask_id(self) -> int:
        assert self.special_ids.mask is not None
        return self.special_ids.mask

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
        if self.blocks.packing and (self.task == "mlm" or self.blocks.break_mode in ("none", "complete")):
            raise UserError(
                f"data.packing has no meaning for task={self.task} with data.break_mode={self.blocks.break_mode}; "
                "leave it out, or take task=causal with complete_doc, none_doc or eos"
            )
        # A look at both ends now; every block is looked at when it is read.
        end = self.view.num_tokens
        for first in (0, max(end - _ID_CHECK_TOKENS, 0)):
            part = self.view.read(first, min(first + _ID_CHECK_TOKENS, end))
            if part.max() >= self.vocab_size or part.min() < 0:
                raise UserError(self._foreign_id(part))

    def _foreign_id(self, tokens: np.ndarray) -> str:
        worst = tokens.min() if tokens.min() < 0 else tokens.max()
        return (
            f"{self.view.name} has token id {worst}, the vocabulary ends at {self.vocab_size - 1}; "
            "take the tokenizer that the data was prepared with"
        )


def _vocabulary(view: TokenView, vocab_size: int | None, special_ids: SpecialIds | None) -> tuple[int, SpecialIds]:
    manifest = view.stores[0].manifest
    if manifest is None and (vocab_size is None or special_ids is None):
        raise UserError(f"{view.name} has no manifest that tells its vocabulary; name its tokenizer or dictionary")
    if vocab_size is None:
        assert manifest is not None
        vocab_size = manifest.vocab_size
    elif manifest is not None and manifest.vocab_size > vocab_size:
        raise UserError(
            f"{view.name} was prepared with {manifest.vocab_size:,} ids, the vocabulary has {vocab_size:,}; "
            "take the tokenizer that the data was prepared with"
        )
    if special_ids is None:
        assert manifest is not None
        special_ids = manifest.special_ids
    return vocab_size, special_ids
