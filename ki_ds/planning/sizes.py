"""How large a model is before it exists: parameters, and the activations of a micro-batch. Nothing is allocated.

Parameters are counted on torch's meta device. Activations are what autograd would keep for the backward pass: the
model's own forward is run with fake tensors (shapes without contents) at one and at two layers; layers are alike.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedConfig

from ki_ds.config import ModelConfig, Task
from ki_ds.data.store import SpecialIds
from ki_ds.errors import UserError
from ki_ds.models.presets import (
    PRESETS,
    check_vocabulary,
    count_parameters,
    lm_config,
    lm_of,
    model_folder,
    read_config,
)
from ki_ds.teachers.cache_files import MANIFEST, Manifest

_DROPOUTS = ("attention_probs_dropout_prob", "hidden_dropout_prob", "attn_pdrop", "resid_pdrop", "embd_pdrop")


@dataclass(frozen=True)
class Size:
    """A model's size in numbers of elements.

    Args:
        num_parameters: all weights, a tied one once.
        dense_parameters: those that multiply every token: FLOPs are 6 (training) or 2 (forward) of them a token.
        largest_parameter: elements of the largest weight.
        num_layers: transformer layers.
        hidden_size: D.
        num_heads: attention heads.
        ffn_size: width of the feed-forward layers.
        vocab_size: output classes, padding included.
        tied: the output projection is the input embedding.
        head_bias: the output projection has a bias.
    """

    num_parameters: int
    dense_parameters: int
    largest_parameter: int
    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_size: int
    vocab_size: int
    tied: bool = True
    head_bias: bool = False


@functools.cache
def size_of(model: ModelConfig, task: Task, num_classes: int) -> Size:
    """The size of a student; of a preset from its numbers, of a folder from its config.json.

    Args:
        num_classes: ids of the tokenizer; a preset's embedding is padded beyond them.

    Raises:
        UserError: as `ki_ds.models.presets.build_lm`, or the folder is not on this machine.
    """
    return _size(architecture(model, task, num_classes), task, num_classes, f"model.name={model.name}")


def size_of_teacher(path: str, task: Task, num_classes: int, *, what: str = "teacher.path") -> Size:
    """The size of a teacher that is there: a run, checkpoint or Hugging Face folder, or a teacher cache.

    Of a cache only parameters, hidden size and classes are known, and all that is needed.

    Raises:
        UserError: there is no such folder, or it holds no model for the task.
    """
    if (Path(path) / MANIFEST).is_file() and not (Path(path) / "hf").exists() and _is_cache(Path(path)):
        manifest = Manifest.read(Path(path))
        parameters = {name: manifest.teacher[name] for name in ("num_parameters", "dense_parameters")}
        hidden = manifest.key.get("hidden_size", 0)
        return Size(
            **parameters,
            largest_parameter=0,
            num_layers=0,
            hidden_size=hidden,
            num_heads=0,
            ffn_size=0,
            vocab_size=num_classes,
        )
    folder = model_folder(path)
    _check_present(folder, what)
    return _size(read_config(folder, what=what), task, num_classes, f"{what}={path}")


def architecture(model: ModelConfig, task: Task, num_classes: int) -> PreTrainedConfig:
    """The student's configuration as Hugging Face has it. Errors as in `size_of`."""
    if model.name not in PRESETS:
        _check_present(model_folder(model.name), "model.name")
    # the ids of special tokens shift no size but RoBERTa's position table, which begins behind the padding's id 1
    specials = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=num_classes - 1)
    return lm_config(model, task, num_classes=num_classes, special_ids=specials)


def _is_cache(folder: Path) -> bool:
    return '"key_sha256"' in (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")


def _check_present(folder: str, what: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{what}={folder} is no model on this machine (no config.json there), and a plan downloads nothing; make "
            f"or fetch it first, or plan with a preset ({', '.join(PRESETS)})"
        )


def _size(config: PreTrainedConfig, task: Task, num_classes: int, what: str) -> Size:
    with torch.device("meta"):
        lm = lm_of(config, task)
    check_vocabulary(lm, num_classes, what=what)
    head = lm.get_output_embeddings()
    ffn = next((value for name in ("intermediate_size", "n_inner") if (value := getattr(config, name, None))), None)
    return Size(
        **count_parameters(lm),
        largest_parameter=max(p.numel() for p in lm.parameters()),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        ffn_size=ffn or 4 * config.hidden_size,
        vocab_size=head.weight.shape[0],
        tied=head.weight is lm.get_input_embeddings().weight,
        head_bias=head.bias is not None,
    )


# --- activations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes that the backward pass of one micro-batch needs, of the body (the head and the loss are not in it).

    With activation checkpointing a layer keeps its input alone, and one layer at a time is computed again.
    """

    outside: int  # kept by the embeddings and whatever is in no layer
    layer: int  # kept by one layer
    layer_input: int
    num_layers: int

    def kept(self, *, checkpointing: bool) -> int:
        """What lies there when the forward pass is over."""
        return self.outside + self.num_layers * (self.layer_input if checkpointing else self.layer)

    def recomputed(self, *, checkpointing: bool) -> int:
        """What one layer's second forward adds in the backward pass."""
        return self.layer if checkpointing else 0


@functools.cache
def activations(
    model: ModelConfig,
    task: Task,
    num_classes: int,
    *,
    batch: int,
    length: int,
    dtype: torch.dtype,
    on_gpu: bool,
    padded: bool,
) -> Activations:
    """The activations of a training forward over `batch` sequences of `length` tokens in `dtype`.

    On a GPU attention is a fused kernel, which keeps no scores, and a dropout keeps a byte an element; PyTorch's CPU
    kernels know no attention dropout (so that scores are kept) and keep a dropout's mask in the dtype.

    Args:
        padded: rows can be shorter than the micro-batch's longest, so that attention gets a mask.
    """
    config = architecture(model, task, num_classes)
    one, two = (_saved_bytes(_with_layers(config, n, on_gpu), task, batch, length, dtype, padded) for n in (1, 2))
    elements, dropout = batch * length * config.hidden_size, _dropout(config)
    layer, outside = two - one, 2 * one - two
    if on_gpu and dropout:  # left out of what was run: two masks a layer and one behind the embeddings
        layer, outside = layer + 2 * elements, outside + elements
    return Activations(outside, layer, elements * dtype.itemsize, config.num_hidden_layers)


def _dropout(config: PreTrainedConfig) -> float:
    return max(float(getattr(config, name, 0.0) or 0.0) for name in ("hidden_dropout_prob", "resid_pdrop"))


def _with_layers(config: PreTrainedConfig, num_layers: int, on_gpu: bool) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = num_layers
    for name in _DROPOUTS if on_gpu else ():
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def _saved_bytes(
    config: PreTrainedConfig, task: Task, batch: int, length: int, dtype: torch.dtype, padded: bool
) -> int:
    """Bytes of the distinct tensors, weights excepted, that autograd keeps of a forward through the body."""
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # holds it too, so that no address comes again
        return tensor

    with FakeTensorMode():
        lm = lm_of(config, task, dtype).train()
        weights = {p.untyped_storage()._cdata for p in (*lm.parameters(), *lm.buffers())}
        ids = torch.zeros(batch, length, dtype=torch.int64)
        given = {"attention_mask": torch.ones_like(ids)} if padded else {}
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = lm.base_model(input_ids=ids, use_cache=False, **given)
        keep(output.last_hidden_state)
        return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)
