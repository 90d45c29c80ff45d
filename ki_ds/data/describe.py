"""What a token store is, in words: kind, counts, hashes, a piece of its text."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ki_ds.data.store import TokenStore, open_store, verify_store
from ki_ds.data.tokenize import load_tokenizer, read_fairseq_dict, tokenizer_hash
from ki_ds.errors import UserError

Decoder = Callable[[Sequence[int]], str]
_CHECK_WINDOW = 1 << 22


def describe_store(
    prefix: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    num_samples: int = 3,
    verify: bool = True,
) -> list[str]:
    """Lines about a store; UserError when it is malformed, changed since it was written, or has foreign ids.

    Text is shown where the vocabulary is known: `tokenizer`, or the folder "tokenizer" or the fairseq
    "dict.txt" beside the store. For a fairseq store `tokenizer` is what the symbols of dict.txt are ids of
    (GPT-2); without it the symbols themselves are shown.
    """
    store = open_store(prefix)
    lines = [
        f"{store.prefix}: {store.kind} token store, {store.dtype.name}",
        f"items      {store.num_items:,}",
        f"tokens     {store.num_tokens:,}",
        f"documents  {store.num_documents:,}",
    ]
    if store.manifest is not None:
        lines.append(f"vocabulary {store.manifest.vocab_size:,}, tokenizer {store.manifest.tokenizer_hash}")
    if verify:
        manifest = verify_store(prefix)
        lines.append("hashes     " + ("both files match the manifest" if manifest else "no manifest to check with"))
    decoder, vocab_size = _decoder(store, tokenizer)
    if vocab_size is not None:
        _check_ids(store, vocab_size)
    if decoder is not None:
        indices = np.linspace(0, store.num_items - 1, min(num_samples, store.num_items)).astype(int)
        lines += [f"item {i:,}: {decoder(store.item(i).tolist())[:200]}" for i in np.unique(indices)]
    return lines


def _decoder(store: TokenStore, tokenizer: str | os.PathLike[str] | None) -> tuple[Decoder | None, int | None]:
    """(how ids become text, size of the vocabulary), as far as known."""
    beside = store.prefix.parent
    if store.kind == "fairseq":
        if not (beside / "dict.txt").exists():
            return None, None
        return _fairseq_decoder(beside / "dict.txt", tokenizer)
    if tokenizer is None and not (beside / "tokenizer").is_dir():
        return None, store.manifest.vocab_size if store.manifest else None
    loaded = load_tokenizer(tokenizer if tokenizer is not None else beside / "tokenizer")
    if store.manifest is not None and store.manifest.tokenizer_hash not in (None, tokenizer_hash(loaded)):
        raise UserError(
            f"{loaded.name_or_path} is not the tokenizer that {store.prefix} was written with (their hashes "
            "differ); name the right one"
        )
    return lambda ids: str(loaded.decode(ids)), len(loaded)


def _fairseq_decoder(path: Path, tokenizer: str | os.PathLike[str] | None) -> tuple[Decoder, int]:
    symbols, specials = read_fairseq_dict(path)
    named = set(specials.all_ids)
    if tokenizer is None:
        return lambda ids: " ".join(symbols[i] for i in ids), len(symbols)
    loaded = load_tokenizer(tokenizer)

    def decode(ids: Sequence[int]) -> str:
        inner = [int(symbols[i]) for i in ids if i not in named and symbols[i].isdecimal()]
        return str(loaded.decode(inner))

    return decode, len(symbols)


def _check_ids(store: TokenStore, vocab_size: int) -> None:
    """UserError when any id of the store lies outside the vocabulary."""
    for first in range(0, store.num_tokens, _CHECK_WINDOW):
        window = store.tokens[first : first + _CHECK_WINDOW]
        if window.max() >= vocab_size or window.min() < 0:
            wrong = first + int(np.argmax((window >= vocab_size) | (window < 0)))
            raise UserError(
                f"{store.prefix} has id {store.tokens[wrong]} at token {wrong:,}, the vocabulary ends at "
                f"{vocab_size - 1}; it belongs to another tokenizer or dictionary"
            )
