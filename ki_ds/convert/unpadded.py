"""A model without the output classes beyond its tokenizer's ids: in plain softmax they would take probability.

Training, teachers and perplexities leave padding out of every sum (`num_classes`), so that its rows are never
measured; whoever takes the exported model sums over all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ki_ds.errors import UserError

LARGEST_PADDING = 1024  # rows of an embedding beyond the tokenizer's ids that can still be padding


def num_classes_of(lm: PreTrainedModel) -> int:
    """Output classes of a language model, padding included."""
    return lm.get_output_embeddings().weight.shape[0]


def unpadded(lm: PreTrainedModel, num_ids: int, *, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture of `lm` with the output classes of `num_ids` ids, without weights (on the meta device).

    It has configurations of its own, and `cut` gives the weights that belong into it.

    Raises:
        UserError: the architecture has other tensors then, or no place for what pads.
    """
    config = copy.deepcopy(lm.config)
    config.get_text_config().vocab_size = num_ids
    if config.pad_token_id is not None and config.pad_token_id >= num_ids:
        config.pad_token_id = None
    with torch.device("meta"):
        made = type(lm)._from_config(config, dtype=dtype)
    made.generation_config = copy.deepcopy(lm.generation_config) if lm.can_generate() else None
    before, after = ({name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (lm, made))
    padded = num_classes_of(lm)
    for name in sorted(before.keys() | after.keys()):
        expected = tuple(num_ids if size == padded else size for size in before.get(name, ()))
        if after.get(name) not in (before.get(name), expected):
            raise UserError(
                f"{type(lm).__name__} with {num_ids:,} output classes instead of {padded:,} has another {name}; take a "
                "model whose embedding has the tokenizer's ids"
            )
    return made


def cut(state: Mapping[str, Tensor], made: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of `state` that belong into a model that `unpadded` made: views, tied ones still tied."""
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    return {name: tensor[tuple(map(slice, shapes[name]))] for name, tensor in state.items()}


def begin_with(lm: PreTrainedModel, first: int, *, eos: int | None, pad: int | None) -> None:
    """Have a causal model's configurations say what a text begins behind, ends with, and is filled up with."""
    ids: dict[str, Any] = {"bos_token_id": first, "eos_token_id": first if eos is None else eos}
    for config in (lm.config, lm.config.get_text_config()):
        if isinstance(config.eos_token_id, list) and ids["eos_token_id"] in config.eos_token_id:
            ids["eos_token_id"] = config.eos_token_id
        config.bos_token_id, config.eos_token_id = first, ids["eos_token_id"]
    if lm.generation_config is None:
        return
    ids["pad_token_id"] = eos if pad is None else pad
    lm.generation_config.update(**ids, _from_model_config=False)
    try:
        lm.generation_config.validate(strict=True)
    except ValueError:  # options that contradict each other, which it could not be saved with
        lm.generation_config = GenerationConfig(**ids)


def readable_alike(folder: Path) -> None:
    """Let those read the weights who can read the other files: safetensors lets nobody but the owner."""
    mode = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)
