"""Random text of any size, in the shape of prose: ids of a vocabulary, lengths of lines, documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ki_ds.data.store import SpecialIds
from ki_ds.data.token_index import INDEX_VERSION, MAGIC, WINDOW, pointer_windows
from ki_ds.files import check_space

NUM_SYMBOLS, VOCAB_SIZE = 50_260, 50_265  # of dict.txt; with <s>, <pad>, </s>, <unk> and <mask>
SPECIAL_IDS = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=VOCAB_SIZE - 1)
SEED = 1
MEDIAN_LINE, SPREAD_OF_LINES, MAX_LINE = 30, 0.9, 500  # tokens: log-normal, as lines of prose are
LINES_A_DOCUMENT = 90


def write_text(folder: Path, num_tokens: int, *, split: str = "train", vocab_size: int = VOCAB_SIZE) -> None:
    """A fairseq split of random text, `split`.bin and `split`.idx, with the dict.txt that belongs to it.

    Ids have two bytes: of a larger vocabulary the first 65,536 occur.
    """
    num_symbols = vocab_size - (VOCAB_SIZE - NUM_SYMBOLS)
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, 3 * num_tokens)
    random = np.random.default_rng(SEED)
    num_lines = max(num_tokens // 45, 2)  # 45 is the mean of these lengths
    sizes = np.exp(random.normal(np.log(MEDIAN_LINE), SPREAD_OF_LINES, num_lines)).astype("<i4")
    sizes = np.clip(sizes, 2, MAX_LINE)
    sizes[::LINES_A_DOCUMENT] = 1  # a blank line: a lone </s>
    with (folder / f"{split}.bin").open("wb") as file:
        for first in range(0, num_lines, WINDOW):
            ends = np.cumsum(sizes[first : first + WINDOW], dtype=np.int64)
            tokens = random.integers(4, min(vocab_size - 1, 1 << 16), int(ends[-1]), np.uint16)
            tokens[ends - 1] = SPECIAL_IDS.eos
            file.write(tokens.astype("<u2").tobytes())
    with (folder / f"{split}.idx").open("wb") as file:
        file.write(MAGIC + INDEX_VERSION.to_bytes(8, "little") + b"\x08" + num_lines.to_bytes(8, "little"))
        file.write(sizes.tobytes())
        for starts in pointer_windows((sizes[i : i + WINDOW] for i in range(0, num_lines, WINDOW)), 2):
            file.write(starts[:-1].astype("<i8").tobytes())
    (folder / "dict.txt").write_text("".join(f"{i} {num_symbols - i}\n" for i in range(num_symbols)), encoding="utf-8")


def write_splits(folder: Path, num_tokens: int, *, vocab_size: int = VOCAB_SIZE) -> None:
    """A train split of `num_tokens` and a valid split of a tenth of it."""
    write_text(folder, num_tokens, vocab_size=vocab_size)
    write_text(folder, num_tokens // 10, split="valid", vocab_size=vocab_size)
