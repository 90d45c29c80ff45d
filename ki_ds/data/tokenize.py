"""Tokenizers: train one, load any of Hugging Face's, tell two apart by a hash, and put one beside an exported model."""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ki_ds.data.store import SpecialIds
from ki_ds.errors import UserError
from ki_ds.files import sync_folder, sync_tree, write_atomically, write_errors_are_one_line

if TYPE_CHECKING:  # transformers takes seconds to import, which worker processes need not pay
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
Files = dict[str, bytes]  # content by name
TokenizerKind = Literal["bytebpe", "unigram", "sp_bpe"]
SENTENCEPIECE_FILE = "tokenizer.model"
# Without one of these AutoTokenizer takes a model's folder for that of an empty vocabulary.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model")

PLAIN_CLASS = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is

# RoBERTa's names of bos, pad, eos, unk and mask; the first four have its ids, the mask comes right after them.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MASK = SPECIAL_TOKENS[-1]
_OVERWRITE = " #fairseq:overwrite"
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
_MAX_SENTENCEPIECE_CHARACTERS = 200_000_000
_SAMPLE = "The cat – sat  on\n\tthe mat, twice: 1,234 naïve words; 東京 😀 don't"


def train_tokenizer(
    documents: Iterable[Sequence[str]],
    vocab_size: int,
    kind: TokenizerKind = "bytebpe",
    *,
    out_dir: str | os.PathLike[str],
) -> "PreTrainedTokenizerBase":
    """A tokenizer trained on the lines of documents, saved as a folder that `AutoTokenizer.from_pretrained` loads.

    Byte-level BPE ("bytebpe") or SentencePiece ("unigram", "sp_bpe"; the folder then holds its tokenizer.model as
    well) with `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` 4 and the 256 bytes next; it puts `<s>` before and
    `</s>` behind a text. A small corpus may give fewer than `vocab_size` ids.
    UserError: vocab_size has no room for the bytes or does not fit the text, or the folder exists.
    """
    if kind not in get_args(TokenizerKind):
        raise UserError(f"kind={kind!r} of tokenizer is not trained here; take {', '.join(get_args(TokenizerKind))}")
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size={vocab_size} is below {MIN_VOCAB_SIZE} (bytes, special tokens); raise it")
    out, files = Path(out_dir), dict[str, bytes]()
    if out.exists():
        raise UserError(f"{out} exists already; remove it or take another folder")
    if kind == "bytebpe":
        backend = _train_byte_bpe(documents, vocab_size)
    else:
        from ki_ds.data.sentencepieces import backend_from_sentencepiece, train_sentencepiece

        lines = up_to(itertools.chain.from_iterable(documents), _MAX_SENTENCEPIECE_CHARACTERS, len)
        model_type: Literal["unigram", "bpe"] = "unigram" if kind == "unigram" else "bpe"
        model = train_sentencepiece(lines, vocab_size, model_type, special_tokens=SPECIAL_TOKENS)
        backend, _ = backend_from_sentencepiece(model, f"the model trained for {out}")
        files[SENTENCEPIECE_FILE] = model
    from ki_ds.data.roberta_tokenizers import roberta_tokenizer

    save_tokenizer(roberta_tokenizer(backend, SPECIAL_TOKENS), out, files)
    return load_tokenizer(out)


def up_to(items: Iterable[Item], limit: int, size: Callable[[Item], int]) -> Iterator[Item]:
    """The items until their sizes add up to the limit, the one that reaches it included."""
    for item in items:
        yield item
        limit -= size(item)
        if limit <= 0:
            return


def _train_byte_bpe(documents: Iterable[Sequence[str]], vocab_size: int) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS[:-1], AddedToken(MASK, lstrip=True, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(map(list, documents), trainer)
    return backend


def save_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", folder: Path, files: Mapping[str, bytes] = MappingProxyType({})
) -> None:
    """Save a tokenizer, with further files beside it, as a folder: whole or not at all. UserError on a full disk."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with write_errors_are_one_line(folder), _os_errors_of_rust():
            tokenizer.save_pretrained(temporary)
            for name, content in files.items():
                (temporary / name).write_bytes(content)
            sync_tree(temporary)
        temporary.replace(folder)
        sync_folder(folder.parent)
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
    """The Hugging Face tokenizer of a folder or hub name, or that of a SentencePiece model.

    A folder may hold just vocab.json and merges.txt, or just one SentencePiece `.model`, which can also be named
    itself. UserError: nothing is there, it does not load, it is not of the fast kind, or a SentencePiece model
    cannot be reproduced exactly.
    """
    name, folder = os.fspath(name_or_folder), Path(name_or_folder)
    is_file = folder.is_file() and folder.suffix == ".model"
    if not folder.is_dir() and not is_file and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise UserError(f"tokenizer folder {name} does not exist; name a folder or a model of the hub")
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise UserError(f"no tokenizer can be loaded from {name} ({', '.join(_TOKENIZER_FILES)} are absent)")
    lone = [] if (folder / "tokenizer.json").exists() else sorted(folder.glob("*.model"))
    try:
        if is_file or (len(lone) == 1 and not (folder / "tokenizer_config.json").exists()):
            tokenizer = _from_sentencepiece(folder if is_file else lone[0])
        else:
            tokenizer = _loader(folder).from_pretrained(name)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"no tokenizer can be loaded from {name} ({reason}); name its folder") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"the tokenizer of {name} has no fast version; save it as tokenizer.json first")
    backend.no_truncation()  # a tokenizer.json can hold how it was last called
    backend.no_padding()
    return tokenizer


def _from_sentencepiece(path: Path) -> Any:
    """A tokenizer with the ids of a SentencePiece model; like the model itself it adds no special tokens."""
    from transformers import PreTrainedTokenizerFast

    from ki_ds.data.sentencepieces import backend_from_sentencepiece

    backend, roles = backend_from_sentencepiece(path.read_bytes(), str(path))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, name_or_path=str(path), clean_up_tokenization_spaces=False, **roles
    )


def _loader(folder: Path) -> Any:
    """The class that loads a tokenizer: AutoTokenizer where no other is known to be right.

    AutoTokenizer imports torch, which costs seconds and 200 MB that preparing data has no use for. Of a vocabulary and
    merges alone, with RoBERTa's mask or without it, it knows no class.
    """
    import transformers

    if (folder / "merges.txt").exists() and not (folder / "tokenizer.json").exists():
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        is_roberta = {MASK, SPECIAL_TOKENS[0]} <= vocabulary.keys()
        return transformers.RobertaTokenizer if is_roberta else transformers.GPT2Tokenizer
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "dictionary_size" in config:
        from ki_ds.data.roberta_tokenizers import DictionaryTokenizer

        return DictionaryTokenizer
    plain = config.get("tokenizer_class") in ("TokenizersBackend", PLAIN_CLASS)
    if plain and not (folder / "config.json").exists():
        return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> SpecialIds:
    """The ids with a role; BERT's `[CLS]` and `[SEP]` stand for bos and eos. UserError without any eos.

    A bos that is eos (see `begin_with`) leaves its place to cls as well.
    """
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    bos, cls = tokenizer.bos_token_id, tokenizer.cls_token_id
    bos = cls if bos is None or (bos == eos and cls is not None) else bos
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


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase", *, masked: bool = False) -> str:
    """SHA-256 of what a tokenizer makes of the text of a corpus: equal when every text gets the same ids.

    Vocabulary, merges or scores, normalizer, pre-tokenizer and added tokens count, and the ids that a run puts among a
    text's: the end of a line, with `masked` its beginning and the mask as well. What stands around a text given alone,
    padding, limits, the way back to text and the form of the files do not.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    ids, normalizer = special_ids(tokenizer), _steps(backend["normalizer"], "normalizers")
    cutting = [
        {name: value for name, value in step.items() if name != "trim_offsets"}
        for step in _steps(backend["pre_tokenizer"], "pretokenizers")
    ]
    canonical = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "model": _model_facts(backend["model"], cutting),
        "normalizer": normalizer,
        "pre_tokenizer": cutting,
        # special ones are mere text within a corpus
        "added": [
            token if normalizer else {**token, "normalized": False}
            for token in backend["added_tokens"]
            if not token["special"]
        ],
        "eos": ids.eos,
        **({"bos": ids.eos if ids.bos is None else ids.bos, "mask": ids.mask} if masked else {}),
    }
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The parts of a sequence of sequences, in order."""
    if part is None:
        return []
    return [step for each in part[inner] for step in _steps(each, inner)] if part["type"] == "Sequence" else [part]


def _model_facts(model: dict[str, Any], cutting: list[dict[str, Any]]) -> dict[str, Any]:
    """What a model does beside its vocabulary; settings that change nothing are left out."""
    kept = {name: value for name, value in model.items() if value not in (None, "", False, 0) or name == "unk_id"}
    if isinstance(model["vocab"], dict):
        del kept["vocab"]
        every_byte = set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys()
        if every_byte and any(step["type"] == "ByteLevel" for step in cutting):  # nothing is unknown
            kept = {name: value for name, value in kept.items() if name not in ("unk_token", "fuse_unk")}
    return kept


def former_tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The hash that manifests and caches of earlier versions hold: of vocabulary, merges and all special ids."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    canonical = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "merges": model.get("merges"),
        "pieces": model["vocab"] if isinstance(model["vocab"], list) else None,
        "special_ids": asdict(special_ids(tokenizer)),
    }
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def read_fairseq_dict(path: str | os.PathLike[str], *, mask: bool = True) -> tuple[list[str], SpecialIds]:
    """(symbol of each id, special ids) of a fairseq `dict.txt`, read as fairseq's `Dictionary` reads it.

    A line is `symbol count`, split at the last blank, or `symbol count #fairseq:overwrite` for a symbol that is there
    already: text gets the id of its last line then, while the ids with a role stay the first four. The mask is what
    the masked task adds: the last id, or that of a line `<mask>`; without `mask` nothing is added. UserError with the
    line that is neither, or has a symbol again.
    """
    symbols, places = list(SPECIAL_TOKENS[:4]), {symbol: i for i, symbol in enumerate(SPECIAL_TOKENS[:4])}
    try:
        with Path(path).open(encoding="utf-8") as file:
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable fairseq dictionary ({error}); name dict.txt") from None
    for number, line in enumerate(lines, 1):
        content = line.rstrip()
        entry = content.removesuffix(_OVERWRITE)
        symbol, blank, count = entry.rpartition(" ")
        if not blank or not _is_integer(count):
            raise UserError(f"{path} line {number} is not 'symbol count' ({line[:40]!r}); mend or fetch it again")
        if symbol in places and entry == content:
            raise UserError(
                f"{path} has the symbol {symbol!r} twice (line {number}); fetch it again, or end the line with "
                f"'{_OVERWRITE}', which is how fairseq 0.9 read it"
            )
        places[symbol] = len(symbols)
        symbols.append(symbol)
    if mask and MASK not in places:
        places[MASK] = len(symbols)
        symbols.append(MASK)
    return symbols, SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=places[MASK] if mask else None)


def _is_integer(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def tokenizer_from_fairseq(
    dict_path: str | os.PathLike[str], gpt2: str | os.PathLike[str]
) -> "PreTrainedTokenizerBase":
    """A fast tokenizer with the ids of a fairseq dictionary over GPT-2's BPE, whose folder `gpt2` is.

    Ids are those of `read_fairseq_dict`; GPT-2 symbols that the dictionary lacks become `<unk>`. UserError: see
    `read_fairseq_dict`, `load_tokenizer`; or the dictionary does not list GPT-2 ids.
    """
    from ki_ds.data.roberta_tokenizers import tokenizer_with_dictionary

    symbols, ids = read_fairseq_dict(dict_path)
    return tokenizer_with_dictionary(symbols, ids, load_tokenizer(gpt2), name=str(dict_path))


# ------------------------------------------------------------------------------------ beside exported models


def tokenizer_files(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    first: int | None = None,
    limit: int | None = None,
    config: str | None = None,
    origin: Path | None = None,
) -> Files:
    """The files of a tokenizer that lies beside a model, from which it was read back and found the same.

    Args:
        first: id of the token that is to stand before a text, with nothing behind it; None leaves both as they are.
        limit: positions of the model, to which `truncation=True` cuts.
        config: the model's config.json, by which AutoTokenizer chooses its class.
        origin: folder of the tokenizer; a SentencePiece model in it comes along.

    Raises:
        UserError: what was read back gives other ids.
    """
    made = copy.deepcopy(tokenizer)
    if limit is not None:
        made.model_max_length = min(limit, made.model_max_length)
    with tempfile.TemporaryDirectory(prefix="ki_ds_tokenizer_") as place:
        folder = Path(place, "tokenizer")
        save_tokenizer(made, folder)
        if config is not None:
            (folder / "config.json").write_text(config, encoding="utf-8")
        if first is not None:
            begin_with(folder, first)
        _take_as_saved(folder, from_class="TokenizersBackend")  # the same by a name that older transformers know
        if not _same(made, folder, with_special_tokens=first is None):
            _take_as_saved(folder)
            if not _same(made, folder, with_special_tokens=first is None):
                raise UserError(
                    f"the tokenizer {tokenizer.name_or_path} gives other ids once it is saved; save it as a fast "
                    "tokenizer (tokenizer.json) and name that"
                )
        saved = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != "config.json"]
        files = {path.name: path.read_bytes() for path in saved}
    if origin is not None and origin.is_file():
        return {SENTENCEPIECE_FILE: origin.read_bytes()} | files
    beside = [] if origin is None else [origin / name for name in (SENTENCEPIECE_FILE, "spiece.model")]
    return {path.name: path.read_bytes() for path in beside if path.is_file()} | files


def _same(tokenizer: "PreTrainedTokenizerBase", folder: Path, *, with_special_tokens: bool) -> bool:
    again = load_tokenizer(folder)
    return tokenizer_hash(again) == tokenizer_hash(tokenizer) and all(
        again(_SAMPLE, add_special_tokens=added).input_ids == tokenizer(_SAMPLE, add_special_tokens=added).input_ids
        for added in {False, with_special_tokens}
    )


def begin_with(folder: Path, first: int) -> bool:
    """Have the tokenizer in a folder put the token `first` before a text; True where that was a change.

    Causal models are trained on lines that follow `</s>` and end with it. A tokenizer of RoBERTa's kind would begin a
    prompt with `<s>`, which they have never seen, and end it, so that they go on with another text.
    No ids change. It is bos from then on, for programs that begin with that by themselves, and what was bos is cls.
    """
    tokenizer = load_tokenizer(folder)
    around = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    if around in (plain, [first, *plain]) and tokenizer.bos_token_id in (None, first):
        return False
    token = tokenizer.convert_ids_to_tokens(first)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, first)]
    )
    if tokenizer.bos_token_id not in (None, first) and tokenizer.cls_token_id in (None, tokenizer.bos_token_id):
        tokenizer.cls_token, tokenizer.bos_token = tokenizer.bos_token, token
    tokenizer.save_pretrained(folder)
    _take_as_saved(folder, without=("add_bos_token", "add_eos_token"))  # a class of its own would put its tokens back
    return True


def _take_as_saved(folder: Path, *, from_class: str | None = None, without: Collection[str] = ()) -> None:
    """Have the folder's tokenizer.json taken as it is, where a class of its own (or the named one) would build it."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if from_class in (None, config.get("tokenizer_class")):
        kept = {name: value for name, value in config.items() if name not in without}
        write_atomically(path, json.dumps(kept | {"tokenizer_class": PLAIN_CLASS}, indent=2, sort_keys=True) + "\n")
