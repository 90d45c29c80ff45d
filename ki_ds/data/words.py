"""Which ids of a tokenizer begin a word, for whole-word masks."""

import json
from typing import TYPE_CHECKING

import numpy as np

from ki_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
