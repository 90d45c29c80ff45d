"""Tokenizers of RoBERTa's form; among them GPT-2's byte-level BPE with the ids of a fairseq dictionary."""

import json
import os
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ki_ds.data.store import SpecialIds
from ki_ds.errors import UserError


def roberta_tokenizer(
    backend: Tokenizer,
    special_tokens: Sequence[str],
    kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast,
    **settings: Any,
) -> PreTrainedTokenizerFast:
    """A fast tokenizer of some kind with `<s>` before and `</s>` behind a text; tokens are bos, pad, eos, unk, mask."""
    bos, pad, eos, unk, mask = special_tokens
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(token, backend.token_to_id(token)) for token in (bos, eos)],
    )
    return kind(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        cls_token=bos,
        sep_token=eos,
        pad_token=pad,
        unk_token=unk,
        mask_token=AddedToken(mask, lstrip=True, special=True),
        clean_up_tokenization_spaces=False,
        **settings,
    )


class DictionaryTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that answers `<unk>` for what its dictionary lacks.

    A tokenizer.json can name no two pieces by one id, and pieces that the dictionary lacks are still steps of the
    merges to others. So they have the ids from `dictionary_size` on inside the tokenizers library, and outside of
    it none: here they become `<unk>`. AutoTokenizer knows the folder as a plain fast tokenizer, which shows such
    ids where the dictionary is not complete; RoBERTa's is.
    """

    # Without an __init__ of its own: transformers would take that for a model's, and build the backend anew.
    @property
    def dictionary_size(self) -> int:
        """Number of ids, special ones included."""
        return int(self.init_kwargs["dictionary_size"])

    def __len__(self) -> int:
        return self.dictionary_size

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self.dictionary_size

    def get_vocab(self) -> dict[str, int]:
        """Ids of the dictionary by token."""
        return {token: i for token, i in super().get_vocab().items() if i < self.dictionary_size}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **settings: Any) -> Any:
        """Save as a folder that `load_tokenizer` and AutoTokenizer load."""
        files = super().save_pretrained(save_directory, *args, **settings)
        path = Path(save_directory) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "dictionary_size": self.dictionary_size}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return files

    def _known(self, i: int) -> int:
        return i if i < self.dictionary_size else int(self.unk_token_id)

    def _convert_encoding(self, *args: Any, **settings: Any) -> Any:
        fields, encodings = super()._convert_encoding(*args, **settings)
        fields["input_ids"] = [[self._known(i) for i in ids] for ids in fields["input_ids"]]
        return fields, encodings

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        return self._known(super()._convert_token_to_id_with_added_voc(token))


def tokenizer_with_dictionary(
    symbols: Sequence[str], special_ids: SpecialIds, gpt2: PreTrainedTokenizerBase, *, name: str
) -> PreTrainedTokenizerFast:
    """A `DictionaryTokenizer` with GPT-2's merges whose ids are the places of `symbols`.

    `symbols` and `special_ids` are those of `read_fairseq_dict`, the mask's among them. Symbols that are no GPT-2 id
    (madeupword0000) keep their id and come from no text; of one that is there twice, text gets the last. UserError
    that names the dictionary: it holds no GPT-2 ids, or `gpt2` is no byte-level BPE.
    """
    backend = getattr(gpt2, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    if model.get("type") != "BPE":
        raise UserError(f"the tokenizer that {name} numbers must be GPT-2's byte-level BPE; name its folder")
    pieces = {str(i): piece for piece, i in model["vocab"].items()}
    roles = {i: symbols[i] for i in special_ids.all_ids}
    literal = {symbol for symbol in symbols if symbol not in pieces and symbol not in roles.values()}
    if literal & model["vocab"].keys() or not pieces.keys() & set(symbols):
        raise UserError(f"{name} does not list GPT-2 ids; name the dict.txt of data encoded with GPT-2's BPE")
    tokens = _distinct([pieces.get(symbol, symbol) for symbol in symbols], roles)
    known = set(tokens)
    absent = [piece for piece in sorted(model["vocab"], key=model["vocab"].__getitem__) if piece not in known]
    ids = {token: i for i, token in enumerate([*tokens, *absent])}
    own = Tokenizer(models.BPE(ids, [tuple(merge) for merge in model["merges"]]))
    assert backend is not None
    own.pre_tokenizer, own.decoder = backend.pre_tokenizer, backend.decoder
    tokens_of_roles = [roles[i] for i in astuple(special_ids)[:5]]
    return roberta_tokenizer(own, tokens_of_roles, DictionaryTokenizer, dictionary_size=len(symbols))


def _distinct(tokens: list[str], roles: dict[int, str]) -> list[str]:
    """The tokens, each once: those with a role and the last of equal ones keep their name, others get their id's."""
    owners = {token: i for i, token in enumerate(tokens)} | {token: i for i, token in roles.items()}
    return [token if owners[token] == i else f"{token}#overwritten{i}" for i, token in enumerate(tokens)]
