"""The tokenizer and the dictionary beside a converted model, checked against its embedding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from ki_ds.convert.sources import TOKENIZER_FILES, Source
from ki_ds.data.tokenize import (
    begin_with_eos,
    load_tokenizer,
    read_fairseq_dict,
    save_tokenizer,
    tokenizer_from_fairseq,
)
from ki_ds.errors import UserError
from ki_ds.models import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LARGEST_PADDING = 1024  # rows of an embedding beyond the tokenizer's ids that can still be padding


def write_vocabulary(source: Source, folder: Path, model: PreTrainedModel, *, tokenizer: Path | None) -> list[str]:
    """Put tokenizer and dictionary into the folder; lines that say what they are.

    Args:
        tokenizer: folder of a tokenizer; GPT-2's (or RoBERTa's) vocabulary where the source has a dictionary.

    Raises:
        UserError: it cannot be loaded, or has another size than the embedding.
    """
    size = model.get_output_embeddings().weight.shape[0]
    lines = []
    if source.dictionary is not None:
        num_ids = len(read_fairseq_dict(source.dictionary, mask=source.task == "mlm")[0])
        _check_size(source, f"{source.dictionary}", num_ids, size)
        shutil.copyfile(source.dictionary, folder / "dict.txt")
        lines.append(f"dict.txt: fairseq's dictionary of {num_ids:,} ids")
    if tokenizer is not None:
        if source.tokenizer_dir is not None:
            raise UserError(f"--tokenizer={tokenizer}: {source.tokenizer_dir} has the model's own; leave it out")
        if source.dictionary is not None:  # whose size is right; with <mask>, of which a GPT knows nothing
            made = tokenizer_from_fairseq(source.dictionary, tokenizer)
        else:
            made = load_tokenizer(tokenizer)
            _check_size(source, f"--tokenizer={tokenizer}", len(made), size)
        made.model_max_length = max_positions(model) or made.model_max_length
        _save(made, folder)
    elif source.tokenizer_dir is not None:
        made = load_tokenizer(source.tokenizer_dir)
        _check_size(source, f"the tokenizer of {source.tokenizer_dir}", len(made), size)
        for name in TOKENIZER_FILES:
            if (source.tokenizer_dir / name).is_file():
                shutil.copyfile(source.tokenizer_dir / name, folder / name)
        _note_positions(folder, max_positions(model))
    else:
        return [*lines, f"no tokenizer: ids mean what {'dict.txt' if lines else 'the training data'} says"]
    lines.append(f"tokenizer of {len(made):,} ids")
    if source.task == "causal" and begin_with_eos(folder):
        lines.append(f"the tokenizer puts {made.eos_token} before a text and nothing behind it")
    if (beyond := made.backend_tokenizer.get_vocab_size() - len(made)) > 0:
        lines.append(
            f"the dictionary lacks {beyond:,} pieces of the vocabulary, for which AutoTokenizer gives ids that the "
            "model has not; ki_ds.data.tokenize.load_tokenizer gives <unk>"
        )
    if len(made) > size:
        lines.append("<mask>, the tokenizer's last id, is no id of the model")
    if size > len(made):
        lines.append(f"the embedding has {size:,} rows, padded beyond the tokenizer's {len(made):,} ids; kept as it is")
    return lines


def _note_positions(folder: Path, limit: int | None) -> None:
    """Have the copied tokenizer cut texts to the model's positions where it knows no limit of its own."""
    path = folder / "tokenizer_config.json"
    if limit is not None and path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model_max_length"] = min(limit, config.get("model_max_length") or limit)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_size(source: Source, what: str, num_ids: int, size: int) -> None:
    most = _LARGEST_PADDING if source.pads_vocabulary else 0
    if not 0 <= size - num_ids <= most:
        hint = "give its own dict.txt with --dict" if not source.pads_vocabulary else "take the model's own"
        raise UserError(f"{what} has {num_ids:,} ids, the model's embedding {size:,}; {hint}")


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer into a folder that has files already."""
    place = folder / "tokenizer"
    save_tokenizer(tokenizer, place)
    for file in place.iterdir():
        file.rename(folder / file.name)
    place.rmdir()
