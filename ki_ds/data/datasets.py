"""From the configuration to training and validation samples: sources found, checked, cut to their parts, mixed."""

import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ki_ds.config import DataConfig, SourceConfig, Task
from ki_ds.data.blocks import BlockConfig, Blocks, Interval, TokenView, select
from ki_ds.data.index_cache import IndexCache
from ki_ds.data.prepare import open_corpus
from ki_ds.data.randomness import MaskConfig
from ki_ds.data.samples import DEFAULT_BREAK_MODE, BlockDataset, Mixture, index_blocks
from ki_ds.data.store import SpecialIds, TokenStore, is_fairseq_folder, open_shards, open_store
from ki_ds.data.tokenize import (
    Files,
    former_tokenizer_hash,
    load_tokenizer,
    read_fairseq_dict,
    special_ids,
    tokenizer_files,
    tokenizer_from_fairseq,
    tokenizer_hash,
)
from ki_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# --------------------------------------------------------------------------------------------- vocabularies


@dataclass(frozen=True)
class Vocabulary:
    """What the ids of a corpus mean: a tokenizer's folder, or a fairseq dictionary (with GPT-2's folder, or None).

    `sha256` tells those that mean the same in a run from others; `names` are the hashes by which manifests and caches
    may know it, that of its corpus first. `size` counts the mask token where there is one.
    """

    sha256: str
    names: tuple[str, ...]
    size: int
    special_ids: SpecialIds
    tokenizer_dir: Path | None = None
    dictionary: Path | None = None

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer, as far as it is known."""
        if self.tokenizer_dir is None:
            return None
        if self.dictionary is not None:
            return tokenizer_from_fairseq(self.dictionary, self.tokenizer_dir)
        return load_tokenizer(self.tokenizer_dir)

    def files(self, task: Task, *, limit: int | None = None, config: str | None = None) -> Files:
        """What lies beside an exported model of a task: the tokenizer's files, and a fairseq dictionary.

        Text gets the ids that the model has seen: behind `<s>` and before `</s>` for mlm, behind `</s>` for causal.
        Arguments and errors as in `tokenizer_files`.
        """
        found = {} if self.dictionary is None else {"dict.txt": self.dictionary.read_bytes()}
        if self.tokenizer is None:
            return found
        first = self.special_ids.eos if task == "causal" else None
        return found | tokenizer_files(
            self.tokenizer, first=first, limit=limit, config=config, origin=self.tokenizer_dir
        )

    def export(self, folder: Path, task: Task) -> None:
        """Write `files` into a folder."""
        for name, content in self.files(task).items():
            (folder / name).write_bytes(content)


def dictionary_hash(path: Path) -> str:
    """SHA-256 of the symbols of a fairseq `dict.txt` in their order, its counts left out."""
    symbols, _ = read_fairseq_dict(path)
    return hashlib.sha256(json.dumps(symbols).encode()).hexdigest()


def word_beginnings(tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """bool [V]: ids that begin a word, special ids among them; the others go on with the word before them.

    By the mark that the tokenizer's decoder knows: a leading blank (byte-level BPE, SentencePiece) begins a word, a
    "##" (WordPiece) goes on with one. UserError for a tokenizer with no such mark.
    """
    kinds = _decoder_kinds(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if "ByteLevel" in kinds:
        begins = [token.startswith(("Ġ", "Ċ", "ĉ")) for token in tokens]
    elif "WordPiece" in kinds:
        begins = [not token.startswith("##") for token in tokens]
    elif "Metaspace" in kinds or "Replace" in kinds:
        begins = [token.startswith("▁") for token in tokens]
    else:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no mark for the beginning of a word; "
            "take data.whole_words=false"
        )
    begins_V = np.array(begins)
    begins_V[tokenizer.all_special_ids] = True
    return begins_V


def _decoder_kinds(decoder: dict | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_decoder_kinds, decoder.get("decoders", [])))


def check_tokenizer(folder: str, expected: str, task: Task, *, what: str) -> bool:
    """True when the tokenizer or dictionary beside a model is the corpus's, False when there is none; else UserError.

    Args:
        folder: a Hugging Face folder or hub name.
        expected: `Vocabulary.sha256` of the corpus.
        task: the run's, which says what ids it puts among the text's.
        what: what named the folder, for the error line.
    """
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    found = []
    if Path(folder, "dict.txt").is_file():
        found.append(dictionary_hash(Path(folder, "dict.txt")))
    if not Path(folder).is_dir() or any(Path(folder, file).exists() for file in files):
        found.append(tokenizer_hash(load_tokenizer(folder), masked=task == "mlm"))
    if found and expected not in found:
        raise UserError(
            f"{what}={folder} has another tokenizer ({found[-1][:12]}) than data.corpus ({expected[:12]}); take a "
            "model of the same tokenizer, or prepare the corpus with the model's"
        )
    return bool(found)


# -------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class _Corpus:
    """The token files of one path; `valid` is None where it brings no validation part."""

    train: list[TokenStore]
    valid: list[TokenStore] | None
    vocabulary: Vocabulary


def _open(path: str, data: DataConfig, task: Task) -> _Corpus:
    """UserError when the path is no corpus, or its tokenizer is not the one that it was made with."""
    folder = Path(path)
    if is_fairseq_folder(folder):
        valid = open_shards(folder / "valid", checked=True) if (folder / "valid.idx").exists() else None
        dictionary, gpt2 = folder / "dict.txt", Path(data.tokenizer) if data.tokenizer else None
        symbols, ids = read_fairseq_dict(dictionary, mask=task == "mlm")
        sha256 = dictionary_hash(dictionary)
        vocabulary = Vocabulary(sha256, (sha256,), len(symbols), ids, gpt2, dictionary)
        return _Corpus(open_shards(folder / "train", checked=True), valid, vocabulary)
    if folder.is_dir():
        prepared = open_corpus(folder)
        valid = open_shards(prepared.valid_prefix, checked=True) if prepared.valid_prefix else None
        return _tokenized(open_shards(prepared.train_prefix, checked=True), valid, prepared.tokenizer_dir, task)
    if not glob.glob(f"{glob.escape(path)}.idx") and not glob.has_magic(path):
        raise UserError(
            f"{path} is no prepared corpus, no fairseq folder (dict.txt, train.idx) and no prefix of token files; make "
            "one with tools/prepare_data.py"
        )
    stores = open_shards(path, checked=True)
    beside = stores[0].prefix.parent / "tokenizer"
    tokenizer = data.tokenizer or (str(beside) if beside.is_dir() else None)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer beside it; name its folder with data.tokenizer")
    return _tokenized(stores, None, Path(tokenizer), task)


def _tokenized(train: list[TokenStore], valid: list[TokenStore] | None, folder: Path, task: Task) -> _Corpus:
    """Stores with the tokenizer in `folder`; UserError when one was made with another."""
    tokenizer = load_tokenizer(folder)
    names: tuple[str, ...] = (tokenizer_hash(tokenizer), former_tokenizer_hash(tokenizer))
    for store in [*train, *(valid or [])]:
        if store.manifest is None:
            continue
        if store.manifest.tokenizer_hash not in names:
            raise UserError(f"{store.prefix} was made with another tokenizer than {folder}; prepare it again")
        names = tuple(sorted(names, key=store.manifest.tokenizer_hash.__ne__))
    sha256 = tokenizer_hash(tokenizer, masked=task == "mlm")
    return _Corpus(train, valid, Vocabulary(sha256, names, len(tokenizer), special_ids(tokenizer), folder))


_Part = tuple[list[TokenStore], Interval]

# ------------------------------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class Datasets:
    """What a run trains on and is measured on.

    `domains` are the names behind `Sample.domain_id`, those trained on first; `valid` has the samples of each domain
    that is measured. `hashes` (vocabulary, training and validation data) make two runs comparable; `notes` are lines
    for the user.
    """

    train: Mixture
    valid: dict[str, Mixture]
    domains: tuple[str, ...]
    trained_domains: tuple[str, ...]
    vocabulary: Vocabulary
    hashes: dict[str, str]
    notes: tuple[str, ...]

    @property
    def padded(self) -> bool:
        """Whether a row can get padding, in training or validation."""
        return any(mixture.padded for mixture in (self.train, *self.valid.values()))


def open_datasets(data: DataConfig, task: Task, *, other_index_dir: Path) -> Datasets:
    """The run's samples. What takes a pass over a corpus is done once and kept in `data.index_dir`.

    Args:
        other_index_dir: where that goes when it cannot be written beside the token files.

    Raises:
        UserError: a source is no corpus, was changed, has another vocabulary than the others or no validation part.
    """
    return _Opener(data, task, other_index_dir).open()


def open_validation(data: DataConfig, task: Task, *, other_index_dir: Path) -> tuple[dict[str, Mixture], Vocabulary]:
    """Only what a run is measured on: samples by domain, and their vocabulary. The rest as in `open_datasets`."""
    opener = _Opener(data, task, other_index_dir)
    return opener.validation(opener.valid_parts()), opener.vocabulary


def read_vocabulary(data: DataConfig, task: Task) -> Vocabulary:
    """The vocabulary of the run's first source; nothing is written. UserError where that is no corpus."""
    return _open(data.all_sources[0].path, data, task).vocabulary


class _Opener:
    """Opens each corpus once and remembers what all of them share."""

    def __init__(self, data: DataConfig, task: Task, other_index_dir: Path) -> None:
        self.data, self.task, self.other_index_dir = data, task, other_index_dir
        self.trained_domains = tuple(dict.fromkeys(source.name for source in data.all_sources))
        self.domains = tuple(dict.fromkeys([*self.trained_domains, *(data.valid or {})]))
        self.corpora: dict[str, _Corpus] = {}
        self.digests: dict[Path, str] = {}
        self.notes: list[str] = []

    def open(self) -> Datasets:
        sources = self.data.all_sources
        train_parts = [(self._corpus(source.path).train, self._trained_interval(source)) for source in sources]
        valid_parts = self.valid_parts()
        self._check_options()
        weights = [source.weight for source in sources if source.weight is not None]
        datasets = [self._dataset(s.name, *part) for s, part in zip(sources, train_parts, strict=True)]
        train, valid = Mixture(datasets, weights or None), self.validation(valid_parts)
        hashes = {
            "tokenizer_sha256": self.vocabulary.names[0],
            "train_sha256": self._joint_hash(train_parts),
            "valid_sha256": self._joint_hash([part for parts in valid_parts.values() for part in parts]),
        }
        notes = tuple(self.notes)
        return Datasets(train, valid, self.domains, self.trained_domains, self.vocabulary, hashes, notes)

    def validation(self, parts_of: dict[str, list[_Part]]) -> dict[str, Mixture]:
        """The samples of each domain that is measured."""
        return {
            domain: Mixture([self._dataset(domain, *part, valid=True) for part in parts])
            for domain, parts in parts_of.items()
        }

    def _corpus(self, path: str) -> _Corpus:
        if path not in self.corpora:
            corpus = _open(path, self.data, self.task)
            for store in [*corpus.train, *(corpus.valid or [])]:
                self._verify(store)
            first = next(iter(self.corpora.items()), None)
            if first is not None and first[1].vocabulary.sha256 != corpus.vocabulary.sha256:
                raise UserError(f"{first[0]} and {path} have different tokenizers; prepare both with one")
            self.corpora[path] = corpus
        return self.corpora[path]

    @property
    def vocabulary(self) -> Vocabulary:
        return next(iter(self.corpora.values())).vocabulary

    @cached_property
    def _word_beginnings(self) -> np.ndarray | None:
        if not self.data.whole_words:
            return None
        if self.vocabulary.tokenizer is None:
            raise UserError("data.whole_words=true needs the text of the ids; name GPT-2's folder with data.tokenizer")
        return word_beginnings(self.vocabulary.tokenizer)

    def _check_options(self) -> None:
        """UserError for an option that no corpus has a use for, and for text that is trained on and measured."""
        data, corpora = self.data, self.corpora.values()
        given = None if data.tokenizer is None else Path(data.tokenizer)
        if given is not None and all(corpus.vocabulary.tokenizer_dir != given for corpus in corpora):
            raise UserError(f"data.tokenizer={given} has no meaning: every corpus has its own; leave it out")
        if data.valid_fraction and all(corpus.valid is not None for corpus in corpora):
            raise UserError(
                f"data.valid_fraction={data.valid_fraction} has no meaning: every corpus has a validation part; "
                "leave it out"
            )
        for domain, path in (data.valid or {}).items():
            if self._corpus(path).valid is None and path in [source.path for source in data.all_sources]:
                raise UserError(
                    f"data.valid.{domain}={path} is trained on and has no validation part; give other text, or "
                    "data.valid_fraction instead"
                )

    def _held_out(self, path: str) -> float:
        """Share of a training part, at its end, that is kept for validation."""
        return self.data.valid_fraction if self.data.valid is None and self._corpus(path).valid is None else 0.0

    def _trained_interval(self, source: SourceConfig) -> Interval:
        first, last = {None: (0.0, 1.0), "A": (0.0, 0.5), "B": (0.5, 1.0)}[source.half]
        last = first + (last - first) * source.fraction
        kept = 1 - self._held_out(source.path)
        return Interval(first * kept, last * kept, source.max_tokens)

    def valid_parts(self) -> dict[str, list[_Part]]:
        """By domain, what it is measured on."""
        parts: dict[str, list[_Part]] = {}
        if self.data.valid is not None:
            for domain, path in self.data.valid.items():
                corpus = self._corpus(path)
                parts[domain] = [(corpus.train if corpus.valid is None else corpus.valid, Interval())]
            return parts
        for domain, path in dict.fromkeys((source.name, source.path) for source in self.data.all_sources):
            corpus, held_out = self._corpus(path), self._held_out(path)
            if corpus.valid is None and not held_out:
                raise UserError(
                    f"{path} has no validation part; give data.valid_fraction, or data.valid, or prepare it with one"
                )
            part = (corpus.train, Interval(1 - held_out, 1.0)) if corpus.valid is None else (corpus.valid, Interval())
            parts.setdefault(domain, []).append(part)
        return parts

    def _dataset(self, domain: str, stores: list[TokenStore], part: Interval, *, valid: bool = False) -> BlockDataset:
        data, cache = self.data, self._cache(stores[0])
        config = BlockConfig(
            seq_len=data.seq_len,
            break_mode=DEFAULT_BREAK_MODE[self.task] if data.break_mode == "auto" else data.break_mode,
            long_lines=data.long_lines,
            packing=data.packing,
        )
        key = {"format": 1, "files": self._hashes(stores), "interval": asdict(part), "seed": data.subset_seed}
        runs = None
        if part != Interval():
            runs = cache.arrays(key, lambda: {"runs": select(stores, part, seed=data.subset_seed).runs_R2})["runs"]
        view = TokenView(stores, runs)
        blocks = _cached_blocks(view, self.task, config, cache=cache, key=key)
        if blocks.num_long_lines:
            fate = f"dropped ({blocks.num_dropped_tokens:,} tokens)" if blocks.num_dropped_tokens else "split"
            self.notes.append(
                f"{view.name}: {blocks.num_long_lines:,} of {view.num_items:,} {'validation' if valid else 'training'} "
                f"lines are longer than a block of data.seq_len={data.seq_len} and were {fate}"
            )
        return BlockDataset(
            view,
            task=self.task,
            **asdict(config),
            vocab_size=self.vocabulary.size,
            special_ids=self.vocabulary.special_ids,
            masking=MaskConfig(
                mask_prob=data.mask_probability,
                keep_prob=data.keep_probability,
                random_prob=data.random_probability,
                whole_words=data.whole_words,
                num_variants=0 if valid else data.mask_variants,
            ),
            begins_word_V=self._word_beginnings,
            blocks=blocks,
            domain_id=self.domains.index(domain),
        )

    # -- hashes

    def _cache(self, store: TokenStore) -> IndexCache:
        if self.data.index_dir is not None:
            return IndexCache(Path(self.data.index_dir))
        return IndexCache.beside(store.prefix.parent, otherwise=self.other_index_dir)

    def _verify(self, store: TokenStore) -> None:
        """UserError when a store is malformed, or not what its manifest says."""
        cache = self._cache(store)
        if not cache.knows(store.paths[1]):
            open_store(store.prefix)  # with every check
        self.digests |= {path: cache.sha256(path) for path in store.paths}
        store.verify(self.digests.__getitem__)

    def _hashes(self, stores: list[TokenStore]) -> list[str]:
        return [self.digests[path] for store in stores for path in store.paths]

    def _joint_hash(self, parts: Sequence[_Part]) -> str:
        """One hash of some parts; that of the `.bin` where they are just one whole store."""
        if len(parts) == 1 and len(parts[0][0]) == 1 and parts[0][1] == Interval():
            return self._hashes(parts[0][0])[0]
        content = [(self._hashes(stores), asdict(interval)) for stores, interval in parts]
        return hashlib.sha256(json.dumps([content, self.data.subset_seed]).encode()).hexdigest()


def _cached_blocks(
    view: TokenView, task: Task, config: BlockConfig, *, cache: IndexCache, key: dict[str, Any]
) -> Blocks:
    if config.break_mode == "none":  # needs no pass over the corpus
        return index_blocks(view, task, config)

    def build() -> dict[str, np.ndarray]:
        blocks = index_blocks(view, task, config)
        counts = np.array([blocks.num_long_lines, blocks.num_dropped_tokens])
        rows = {} if blocks.rows_R2 is None else {"rows": blocks.rows_R2}
        return {"bounds": blocks.bounds_S2, "counts": counts, **rows}

    arrays = cache.arrays({**key, "task": task, "blocks": asdict(config)}, build)
    num_long, num_dropped = arrays["counts"].tolist()
    return Blocks(arrays["bounds"], num_long, num_dropped, arrays.get("rows"))
