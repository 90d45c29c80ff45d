"""Tokenizers: train one, load any of Hugging Face's, and tell two of them apart by a hash."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ki_ds.data.corpora import Document
from ki_ds.data.store import SpecialIds, write_errors_are_one_line
from ki_ds.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import, which worker processes need not pay
    from transformers import PreTrainedTokenizerBase

TokenizerKind = Literal["bytebpe"]

# RoBERTa's names, and its first four ids; the mask comes right after them, before the bytes.
BOS, PAD, EOS, UNK, MASK = SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(
    documents: Iterable[Document],
    vocab_size: int,
    kind: TokenizerKind = "bytebpe",
    *,
    out_dir: str | os.PathLike[str],
    min_frequency: int = 2,
) -> "PreTrainedTokenizerBase":
    """A tokenizer trained on the documents, saved as a folder that `AutoTokenizer.from_pretrained` loads.

    Byte-level BPE with `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` 4 and the 256 bytes next; it puts
    `<s>` before and `</s>` behind a text. A small corpus may give fewer than `vocab_size` ids.
    UserError: vocab_size has no room for the bytes, or the folder exists.
    """
    if kind != "bytebpe":
        raise UserError(f"kind={kind!r} of tokenizer is not trained here; take 'bytebpe'")
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size={vocab_size} is below {MIN_VOCAB_SIZE} (bytes, special tokens); raise it")
    out = Path(out_dir)
    if out.exists():
        raise UserError(f"{out} exists already; remove it or take another folder")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS[:-1], AddedToken(MASK, lstrip=True, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((list(document.lines) for document in documents), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        pair=f"{BOS} $A {EOS} {EOS} $B {EOS}",
        special_tokens=[(token, backend.token_to_id(token)) for token in (BOS, EOS)],
    )
    return _save(backend, out)


def _save(backend: Tokenizer, out: Path) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        cls_token=BOS,
        sep_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        mask_token=AddedToken(MASK, lstrip=True, special=True),
        clean_up_tokenization_spaces=False,
    )
    save_tokenizer(tokenizer, out)
    return load_tokenizer(out)


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save a tokenizer as a folder: whole or not at all. UserError on a full disk."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with write_errors_are_one_line(folder), _os_errors_of_rust():
            tokenizer.save_pretrained(temporary)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _os_errors_of_rust() -> Iterator[None]:
    """Turn the bare exceptions of the tokenizers library, "File too large (os error 27)", into OSErrors."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def load_tokenizer(name_or_folder: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """The Hugging Face tokenizer of a folder or hub name; a folder may hold just vocab.json and merges.txt.

    UserError: nothing is there, it does not load, or it is not of the fast kind.
    """
    name, folder = os.fspath(name_or_folder), Path(name_or_folder)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise UserError(f"tokenizer folder {name} does not exist; name a folder or a model of the hub")
    try:
        if (folder / "merges.txt").exists() and not (folder / "tokenizer.json").exists():
            tokenizer = _from_vocab_and_merges(folder)
        else:
            tokenizer = _loader(folder).from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"no tokenizer can be loaded from {name} ({reason}); name its folder") from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"the tokenizer of {name} has no fast version; save it as tokenizer.json first")
    return tokenizer


def _loader(folder: Path) -> Any:
    """The class that loads a tokenizer: AutoTokenizer, but for folders it would load with its plainest class.

    AutoTokenizer imports torch, which costs seconds and 200 MB that preparing data has no use for.
    """
    config = folder / "tokenizer_config.json"
    if config.exists() and not (folder / "config.json").exists():
        named = json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class")
        if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _from_vocab_and_merges(folder: Path) -> Any:
    """RoBERTa's tokenizer if the vocabulary has its mask, else GPT-2's."""
    from transformers import GPT2Tokenizer, RobertaTokenizer

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    kind = RobertaTokenizer if MASK in vocabulary and BOS in vocabulary else GPT2Tokenizer
    return kind.from_pretrained(str(folder))


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> SpecialIds:
    """The ids with a role; BERT's `[CLS]` and `[SEP]` stand for bos and eos. UserError without any eos."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if eos is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path} has no eos or sep token; take one that has it")
    named = {bos, eos, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id}
    return SpecialIds(
        bos=bos,
        pad=tokenizer.pad_token_id,
        eos=eos,
        unk=tokenizer.unk_token_id,
        mask=tokenizer.mask_token_id,
        others=tuple(sorted(set(tokenizer.all_special_ids) - named)),
    )


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of vocabulary, merges (or piece scores) and special ids: equal when the ids mean the same."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    canonical = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "merges": model.get("merges"),
        "pieces": model["vocab"] if isinstance(model["vocab"], list) else None,
        "special_ids": asdict(special_ids(tokenizer)),
    }
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def read_fairseq_dict(path: str | os.PathLike[str]) -> tuple[list[str], SpecialIds]:
    """(symbol of each id, special ids) of a fairseq `dict.txt`; the mask, which the file lacks, is last.

    A line is `symbol count`, split at the last blank. UserError with the line that is not.
    """
    symbols = list(SPECIAL_TOKENS[:4])
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable fairseq dictionary ({error}); name dict.txt") from None
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        symbol, _, count = line.removesuffix(" #fairseq:overwrite").rpartition(" ")
        if not symbol or not count.isdecimal():
            raise UserError(f"{path} line {number} is not 'symbol count' ({line[:40]!r}); mend or fetch it again")
        symbols.append(symbol)
    if len(set(symbols)) != len(symbols):
        twice = next(symbol for i, symbol in enumerate(symbols) if symbol in symbols[:i])
        raise UserError(f"{path} has the symbol {twice!r} twice; fetch it again")
    symbols.append(MASK)
    return symbols, SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=len(symbols) - 1)
