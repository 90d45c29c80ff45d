"""The tokenizer and the dictionary beside a converted model, checked against its embedding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from ki_ds.convert.sources import Source
from ki_ds.convert.unpadded import LARGEST_PADDING, num_classes_of
from ki_ds.data.tokenize import load_tokenizer, read_fairseq_dict, tokenizer_from_fairseq
from ki_ds.data.tokenizer_files import Files, tokenizer_files
from ki_ds.errors import UserError
from ki_ds.models.presets import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Beside:
    """What lies beside a model: files, the ids that they give it, the id that pads, and lines that say so."""

    num_ids: int
    pad: int | None
    files: Files
    lines: list[str]


def beside_model(source: Source, model: PreTrainedModel, *, tokenizer: Path | None) -> Beside:
    """The vocabulary of a model, whose embedding may have rows beyond it.

    Args:
        tokenizer: folder of a tokenizer; GPT-2's (or RoBERTa's) vocabulary where the source has a dictionary.

    Raises:
        UserError: it cannot be loaded, or has another size than the embedding.
    """
    size = num_classes_of(model)
    num_ids, pad = source.num_ids or size, model.config.pad_token_id
    files: Files = {}
    lines = []
    if source.dictionary is not None:
        symbols, ids = read_fairseq_dict(source.dictionary, mask=source.task == "mlm")
        num_ids, pad = len(symbols), ids.pad
        _check_size(source, f"{source.dictionary}", num_ids, size)
        files["dict.txt"] = source.dictionary.read_bytes()
        lines.append(f"dict.txt: fairseq's dictionary of {num_ids:,} ids")
    made = _tokenizer(source, tokenizer, size)
    if made is None:
        lines.append(f"no tokenizer: ids mean what {'dict.txt' if lines else 'the training data'} says")
    else:
        num_ids, pad = len(made) if source.dictionary is None else num_ids, made.pad_token_id
        lines += tokenizer_lines(made, num_ids)
        first = _first(source, made)
        config = model.config.to_json_string()
        origin = tokenizer or source.tokenizer_dir
        files |= tokenizer_files(made, first=first, limit=max_positions(model), config=config, origin=origin)
        if first is not None and made("a").input_ids[-1:] == [made.eos_token_id]:
            token = made.convert_ids_to_tokens(first)
            lines.append(f"the tokenizer puts {token} before a text and nothing behind it")
    if size > num_ids:
        lines.append(f"left out: the embedding's {size - num_ids:,} rows of padding beyond {num_ids:,} ids")
    return Beside(num_ids, pad, files, lines)


def _tokenizer(source: Source, given: Path | None, size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was given, or is the model's own, if it fits."""
    if given is not None and source.tokenizer_dir is not None:
        raise UserError(f"--tokenizer={given}: {source.tokenizer_dir} has the model's own; leave it out")
    if given is not None and source.dictionary is not None:  # whose size is right
        return tokenizer_from_fairseq(source.dictionary, given)
    folder = given or source.tokenizer_dir
    if folder is None:
        return None
    made = load_tokenizer(folder)
    what = f"--tokenizer={given}" if given is not None else f"the tokenizer of {folder}"
    beyond = source.dictionary is not None and source.task == "causal"  # <mask>, of which a GPT knows nothing
    _check_size(source, what, len(made) - beyond, size)
    return made


def _first(source: Source, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that has to stand before a text; None where the tokenizer is right as it is."""
    if source.task == "causal" and source.first is None and tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]:
        return tokenizer.eos_token_id
    return source.first


def tokenizer_lines(made: PreTrainedTokenizerBase, num_ids: int) -> list[str]:
    """What is to be said of a tokenizer beside a model of `num_ids` ids."""
    lines = [f"tokenizer of {len(made):,} ids"]
    if (beyond := made.backend_tokenizer.get_vocab_size() - len(made)) > 0:
        lines.append(
            f"the dictionary lacks {beyond:,} pieces of the vocabulary, for which AutoTokenizer gives ids that the "
            "model has not; ki_ds.data.tokenize.load_tokenizer gives <unk>"
        )
    if len(made) > num_ids:
        lines.append("<mask>, the tokenizer's last id, is no id of the model")
    return lines


def _check_size(source: Source, what: str, num_ids: int, size: int) -> None:
    most = LARGEST_PADDING if source.pads_vocabulary else 0
    if not 0 <= size - num_ids <= most:
        hint = "give its own dict.txt with --dict" if not source.pads_vocabulary else "take the model's own"
        raise UserError(f"{what} has {num_ids:,} ids, the model's embedding {size:,}; {hint}")
