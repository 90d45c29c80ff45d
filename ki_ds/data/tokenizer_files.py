"""A tokenizer as the files of an exported model's folder: saved, read back as anyone would, and compared."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ki_ds.data.tokenize import (
    PLAIN_CLASS,
    SENTENCEPIECE_FILE,
    begin_with,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
)
from ki_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Files = dict[str, bytes]  # content by name

_SAMPLE = "The cat – sat  on\n\tthe mat, twice: 1,234 naïve words; 東京 😀 don't"


def tokenizer_files(
    tokenizer: PreTrainedTokenizerBase,
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
        _load_as_saved(folder, from_class="TokenizersBackend")  # the same by a name that older transformers know
        if not _same(made, folder, with_special_tokens=first is None):
            _load_as_saved(folder)
            if not _same(made, folder, with_special_tokens=first is None):
                raise UserError(
                    f"the tokenizer {tokenizer.name_or_path} gives other ids once it is saved; save it as a fast "
                    "tokenizer (tokenizer.json) and name that"
                )
        found = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
    found.pop("config.json", None)
    return _sentencepiece(origin) | found


def _sentencepiece(origin: Path | None) -> Files:
    """The SentencePiece model that a tokenizer was loaded from, which other programs read."""
    if origin is not None and origin.is_file():
        return {SENTENCEPIECE_FILE: origin.read_bytes()}
    beside = [origin / name for name in (SENTENCEPIECE_FILE, "spiece.model")] if origin is not None else []
    return {path.name: path.read_bytes() for path in beside if path.is_file()}


def _same(tokenizer: PreTrainedTokenizerBase, folder: Path, *, with_special_tokens: bool) -> bool:
    again = load_tokenizer(folder)
    return tokenizer_hash(again) == tokenizer_hash(tokenizer) and all(
        again(_SAMPLE, add_special_tokens=added).input_ids == tokenizer(_SAMPLE, add_special_tokens=added).input_ids
        for added in {False, with_special_tokens}
    )


def _load_as_saved(folder: Path, *, from_class: str | None = None) -> None:
    """Have the folder's tokenizer.json taken as it is, where a class of its own (or the named one) would build it."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if from_class in (None, config.get("tokenizer_class")):
        config["tokenizer_class"] = PLAIN_CLASS
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
