"""What token stores are, in words or as JSON: kind, counts, lengths, hashes, a piece of their text."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ki_ds.data.blocks import TokenView
from ki_ds.data.prepare import open_corpus
from ki_ds.data.store import Manifest, TokenStore, is_fairseq_folder, open_shards, store_prefix
from ki_ds.data.tokenize import former_tokenizer_hash, load_tokenizer, read_fairseq_dict, tokenizer_hash
from ki_ds.errors import UserError

Decoder = Callable[[Sequence[int]], str]
LONG_LINE = 511  # tokens: what a block of 512 holds behind its <s>
_CHECK_WINDOW = 1 << 22
_SAMPLE_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """What is known of one split, all of its shards together.

    Lengths are tokens per item (a line of the text) and None without any item; `num_verified` of `num_shards`
    match the hashes in their manifests, None where hashes were not compared; `samples` are (item, text).
    """

    prefix: str
    kind: str
    dtype: str
    num_shards: int
    num_items: int
    num_tokens: int
    num_documents: int
    min_length: int | None
    median_length: float | None
    max_length: int | None
    num_long_items: int
    vocab_size: int | None
    tokenizer_hash: str | None
    num_verified: int | None
    samples: tuple[tuple[int, str], ...]

    def lines(self) -> list[str]:
        """The facts to be read by people."""
        shards = "" if self.num_shards == 1 else f", {self.num_shards} shards"
        lines = [
            f"{self.prefix}: {self.kind} token store, {self.dtype}{shards}",
            f"items      {self.num_items:,}",
            f"tokens     {self.num_tokens:,}",
            f"documents  {self.num_documents:,}",
        ]
        if self.num_items:
            lines.append(
                f"lengths    {self.min_length:,} to {self.max_length:,} tokens a line, median "
                f"{self.median_length:,.6g}; longer than {LONG_LINE}: {self.num_long_items:,}"
            )
        if self.vocab_size is not None:
            tokenizer = f", tokenizer {self.tokenizer_hash}" if self.tokenizer_hash else ""
            lines.append(f"vocabulary {self.vocab_size:,}{tokenizer}")
        if self.num_verified is not None:
            outcome = f"{self.num_verified} of {self.num_shards} shards match their manifests, the others have none"
            if self.num_verified == 0:
                outcome = "no manifest to check with"
            elif self.num_verified == self.num_shards:
                outcome = "both files match the manifest" if shards == "" else "all files match their manifests"
            lines.append(f"hashes     {outcome}")
        return lines + [f"item {item:,}: {text}" for item, text in self.samples]

    def to_dict(self) -> dict[str, Any]:
        """The facts for JSON."""
        return asdict(self) | {"samples": [{"item": item, "text": text} for item, text in self.samples]}


def inspect(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    num_samples: int = 3,
    verify: bool = True,
) -> list[StoreFacts]:
    """Facts about a prefix, a glob of prefixes, or each split of a folder (a prepared corpus or fairseq's).

    UserError when a store is malformed, changed since it was written, has foreign ids or is not what the
    folder's corpus.json says. Text is shown where the vocabulary is known: `tokenizer`, or the folder
    "tokenizer" or the fairseq "dict.txt" beside the store; else the ids. For a fairseq store `tokenizer` is
    what the symbols of dict.txt are ids of (GPT-2); without it the symbols themselves are shown.
    """
    if num_samples < 0:
        raise UserError(f"num_samples={num_samples} is negative; take 0 or more")
    found = []
    for prefix, counts in _splits(path):
        facts = _facts(prefix, tokenizer, num_samples=num_samples, verify=verify)
        told = {"documents": facts.num_documents, "items": facts.num_items, "tokens": facts.num_tokens}
        if counts is not None and counts != told:
            raise UserError(f"{prefix.parent}/corpus.json tells {counts} of {prefix.name}, the files have {told}")
        found.append(facts)
    return found


def _splits(path: str | os.PathLike[str]) -> list[tuple[Path, dict[str, int] | None]]:
    """(prefix, counts that corpus.json tells) of each split."""
    folder = Path(path)
    if not folder.is_dir() or Path(f"{store_prefix(path)}.idx").exists():
        return [(store_prefix(path), None)]
    if (folder / "corpus.json").exists():
        counts = open_corpus(folder).info.get("counts")
        if not isinstance(counts, dict) or not counts:
            raise UserError(f"{folder}/corpus.json tells no counts; prepare the corpus again")
        return [(folder / name, counts[name]) for name in counts]
    if is_fairseq_folder(folder):
        # train1, train2, … are shards of train
        names = {file.stem.rstrip("0123456789") or file.stem for file in folder.glob("*.idx")}
        return [(folder / name, None) for name in sorted(names)]
    raise UserError(
        f"{folder} is neither a prepared corpus (corpus.json) nor fairseq data (dict.txt, train.idx); "
        "name the prefix of a store in it"
    )


def _facts(prefix: Path, tokenizer: str | os.PathLike[str] | None, *, num_samples: int, verify: bool) -> StoreFacts:
    stores = open_shards(prefix)
    view, first = TokenView(stores), stores[0]
    num_verified = sum(store.verify() is not None for store in stores) if verify else None
    manifest = next((store.manifest for store in stores if store.manifest is not None), None)
    decoder, vocab_size = _decoder(first, manifest, tokenizer)
    for store in stores:
        _check_ids(store, vocab_size)
    sizes = np.concatenate([store.sizes for store in stores])
    ends = np.cumsum(sizes, dtype=np.int64)
    shown = np.unique(np.linspace(0, len(sizes) - 1, min(num_samples, len(sizes))).astype(int)).tolist()
    texts = [decoder(view.read(ends[i] - sizes[i], ends[i]).tolist())[:_SAMPLE_CHARACTERS] for i in shown]
    return StoreFacts(
        prefix=str(prefix),
        kind=first.kind,
        dtype=first.dtype.name,
        num_shards=len(stores),
        num_items=view.num_items,
        num_tokens=view.num_tokens,
        num_documents=sum(store.num_documents for store in stores),
        min_length=int(sizes.min()) if len(sizes) else None,
        median_length=float(np.median(sizes)) if len(sizes) else None,
        max_length=int(sizes.max()) if len(sizes) else None,
        num_long_items=int((sizes > LONG_LINE).sum()),
        vocab_size=vocab_size,
        tokenizer_hash=manifest.tokenizer_hash if manifest else None,
        num_verified=num_verified,
        samples=tuple(zip(shown, texts, strict=True)),
    )


def _decoder(
    store: TokenStore, manifest: Manifest | None, tokenizer: str | os.PathLike[str] | None
) -> tuple[Decoder, int | None]:
    """(how ids become text, size of the vocabulary where it is known)."""
    beside = store.prefix.parent
    if store.kind == "fairseq" and (beside / "dict.txt").exists():
        return _fairseq_decoder(beside / "dict.txt", tokenizer)
    if store.kind == "fairseq" or (tokenizer is None and not (beside / "tokenizer").is_dir()):
        return lambda ids: " ".join(map(str, ids)), manifest.vocab_size if manifest else None
    loaded = load_tokenizer(tokenizer if tokenizer is not None else beside / "tokenizer")
    known = (None, tokenizer_hash(loaded), former_tokenizer_hash(loaded))
    if manifest is not None and manifest.tokenizer_hash not in known:
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
        if max(inner, default=0) >= len(loaded):
            raise UserError(
                f"{path} has the symbol {max(inner)}, the tokenizer {loaded.name_or_path} ends at "
                f"{len(loaded) - 1}; name the tokenizer whose ids are its symbols"
            )
        return str(loaded.decode(inner))

    return decode, len(symbols)


def _check_ids(store: TokenStore, vocab_size: int | None) -> None:
    """UserError when any id of the store lies outside the vocabulary, or is negative where none is known."""
    limit = vocab_size if vocab_size is not None else 1 << 63
    for first in range(0, store.num_tokens, _CHECK_WINDOW):
        window = store.tokens[first : first + _CHECK_WINDOW]
        if int(window.max()) >= limit or int(window.min()) < 0:
            wrong = next(i for i, token in enumerate(window.tolist()) if not 0 <= token < limit)
            end = f"the vocabulary ends at {limit - 1}" if vocab_size is not None else "ids begin at 0"
            raise UserError(
                f"{store.prefix} has id {window[wrong]} at token {first + wrong:,}, {end}; "
                "it belongs to another tokenizer or dictionary"
            )
