"""The language models: presets of Table 6, and any Hugging Face masked or causal LM. `ki_ds.models.rows` asks them."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from ki_ds.config import ModelConfig, RunConfig, Task
from ki_ds.config.paper import PRESETS
from ki_ds.data.datasets import Datasets
from ki_ds.data.store import SpecialIds
from ki_ds.errors import UserError
from ki_ds.models.rows import InheritanceModel, RowLM, Rows
from ki_ds.ranks.world import say

__all__ = [
    "DTYPES",
    "InheritanceModel",
    "RowLM",
    "Rows",
    "build_lm",
    "build_student",
    "check_vocabulary",
    "count_parameters",
    "lm_config",
    "lm_of",
    "load_lm",
    "max_positions",
    "model_folder",
    "quieten",
    "read_config",
    "rows_of",
    "weights_sha256",
]

# RoBERTa counts positions past an id that pads. No id is this one: every token of a row counts, here and in plain
# transformers, which warns of it and computes rightly.
_NO_PADDING = -1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quieten() -> None:
    """Keep warnings and bars of transformers, and of what it imports, off a command's screen."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if not torch.cuda.is_available():  # accelerate imports deepspeed, which would say that it finds no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


# --- building ---------------------------------------------------------------------------------------------------


def build_lm(
    model: ModelConfig, task: Task, *, num_classes: int, special_ids: SpecialIds, seed: int
) -> PreTrainedModel:
    """The student as a float32 Hugging Face model on the CPU, the same on every rank.

    Args:
        num_classes: ids of the tokenizer, the mask token included; a preset's embedding is padded beyond it.
        special_ids: the tokenizer's.
        seed: of the initial weights.

    Raises:
        UserError: a preset of the other task, an override that does not fit, a folder that cannot be read, or a
            vocabulary smaller than the tokenizer's.
    """
    torch.manual_seed(seed)
    if model.name not in PRESETS and model.init == "pretrained":
        lm = load_lm(model_folder(model.name), task, torch.float32, what="model.name")
    else:
        lm = lm_of(lm_config(model, task, num_classes=num_classes, special_ids=special_ids), task)
    check_vocabulary(lm, num_classes, what=f"model.name={model.name}")
    check_padding(lm, special_ids, what=f"model.name={model.name}")
    lm.config.use_cache = False
    return lm


def build_student(config: RunConfig, data: Datasets) -> InheritanceModel:
    """A run's student with its objective, float32 on the CPU, checked against the rows that it will meet.

    Raises:
        UserError: as `build_lm` and the model's checks; or rows are longer than its positions.
    """
    vocabulary = data.vocabulary
    lm = build_lm(
        config.model,
        config.task,
        num_classes=vocabulary.size,
        special_ids=vocabulary.special_ids,
        seed=config.seed,
    )
    limit = max_positions(lm)
    if limit is not None and config.data.seq_len > limit:
        raise UserError(
            f"data.seq_len={config.data.seq_len} exceeds the student's {limit} positions; "
            "lower it or take a longer model"
        )
    model = InheritanceModel(lm, num_classes=vocabulary.size, loss=config.loss, tau=config.inherit.tau)
    rows = rows_of(config, data)
    model.check(rows)
    for note in model.check_training(rows):
        say(note)
    return model


def rows_of(config: RunConfig, data: Datasets) -> Rows:
    """The rows that a run's student and teachers meet."""
    return Rows(config.task, config.data.seq_len, data.padded, config.data.packing, data.train.pad_id)


def lm_config(model: ModelConfig, task: Task, *, num_classes: int, special_ids: SpecialIds) -> PreTrainedConfig:
    """The student's architecture, without weights. Arguments and errors as in `build_lm`."""
    if model.name in PRESETS:
        return _preset_config(model, task, num_classes, special_ids)
    return read_config(model_folder(model.name), what="model.name")


def lm_of(config: PreTrainedConfig, task: Task, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A masked (mlm) or causal LM of an architecture with random weights, on the current default device."""
    return _auto(task).from_config(config, dtype=dtype)


def _auto(task: Task) -> Any:
    return AutoModelForMaskedLM if task == "mlm" else AutoModelForCausalLM


def _preset_config(
    model: ModelConfig, task: Task, num_classes: int, special_ids: SpecialIds
) -> RobertaConfig | GPT2Config:
    if model.init == "pretrained":
        raise UserError(f"model.init=pretrained needs a folder with weights, but model.name={model.name} is a preset")
    if model.name.startswith("gpt") != (task == "causal"):
        raise UserError(f"model.name={model.name} is not a model for task={task}; take a preset of that task")
    preset = PRESETS[model.name]
    hidden = model.hidden_size or preset.hidden_size
    heads = model.num_heads or preset.num_heads
    if hidden % heads:
        raise UserError(f"model.hidden_size={hidden} is not a multiple of model.num_heads={heads}; change one of them")
    layers, ffn = model.num_layers or preset.num_layers, model.ffn_size or preset.ffn_size
    rows = num_classes + (task == "mlm" and special_ids.padding is None)  # its last is no token's: see _NO_PADDING
    vocab_size = math.ceil(rows / model.vocab_multiple) * model.vocab_multiple
    if task == "causal":
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=model.num_positions,
            n_embd=hidden,
            n_layer=layers,
            n_head=heads,
            n_inner=ffn,
            activation_function="gelu",  # the erf form, as in the released code; gelu_new is the tanh form
            resid_pdrop=model.dropout,
            embd_pdrop=model.dropout,
            attn_pdrop=model.attention_dropout,
            initializer_range=model.init_std,
            bos_token_id=special_ids.bos,
            eos_token_id=special_ids.eos,
        )
    pad = _NO_PADDING if special_ids.padding is None else special_ids.padding
    return RobertaConfig(
        vocab_size=vocab_size,
        # RoBERTa's first position is pad + 1; torch takes padding's row, which is not trained, from the end where < 0
        max_position_embeddings=model.num_positions + max(pad, 0) + 1,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.attention_dropout,
        initializer_range=model.init_std,
        layer_norm_eps=1e-5,
        type_vocab_size=1,
        pad_token_id=pad,
        bos_token_id=special_ids.bos,
        eos_token_id=special_ids.eos,
    )


def read_config(folder: str, *, what: str) -> PreTrainedConfig:
    """The configuration of a Hugging Face folder or hub name. Raises UserError, naming the field `what`."""
    return _read(lambda: AutoConfig.from_pretrained(folder), what, folder)


def load_lm(folder: str, task: Task, dtype: torch.dtype, *, what: str) -> PreTrainedModel:
    """A Hugging Face masked (mlm) or causal LM with its weights, on the CPU, in `dtype`, without a cache of keys.

    Args:
        folder: a Hugging Face folder or hub name.
        what: the configuration field that named it, for the error line.

    Raises:
        UserError: it cannot be read, or it is not a model for the task.
    """
    lm, report = _read(lambda: _auto(task).from_pretrained(folder, dtype=dtype, output_loading_info=True), what, folder)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{what}={folder} lacks {len(missing)} weights of a {task} model ({missing[0]}, ...); "
            f"take a checkpoint of a {task} language model"
        )
    if lm.config.pad_token_id == _NO_PADDING:
        lm.get_input_embeddings().padding_idx = None  # torch would not train the last token's row
    lm.config.use_cache = False
    return lm


def _read(reader: Callable[[], Any], what: str, folder: str) -> Any:
    """reader(), with the many errors of a folder that is not a model turned into one line."""
    try:
        return reader()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{what}={folder} cannot be read as a model ({reason}); give a preset ({', '.join(PRESETS)}), a run of "
            "ours, or a Hugging Face folder"
        ) from None


def model_folder(path: str) -> str:
    """The Hugging Face folder inside a run (its best weights) or a checkpoint of ours; any other path is itself.

    Raises:
        UserError: the run has no weights yet.
    """
    root = Path(path)
    if (root / "run.json").exists():
        if not (root / "best" / "config.json").exists():
            raise UserError(
                f"{path} is a run without weights yet (no {root / 'best'}); let it reach its first validation"
            )
        return str(root / "best")
    if (root / "hf" / "config.json").exists():
        return str(root / "hf")
    return path


def check_vocabulary(lm: PreTrainedModel, num_classes: int, *, what: str) -> None:
    """Return silently, or raise UserError when the model has fewer output classes than the tokenizer has ids."""
    size = lm.get_output_embeddings().weight.shape[0] if lm.get_output_embeddings() is not None else 0
    if size < num_classes:
        raise UserError(f"{what} has {size} output classes for the tokenizer's {num_classes} ids; take one that fits")


def check_padding(lm: PreTrainedModel, special_ids: SpecialIds, *, what: str) -> None:
    """Return silently, or raise UserError when positions are counted past an id that is a token of the text."""
    pad = _padding_of_positions(lm)
    if pad is not None and pad >= 0 and pad != special_ids.padding and pad not in special_ids.others:
        raise UserError(
            f"{what} counts positions past token {pad}, which pads nothing in this tokenizer (pad: {special_ids.pad}); "
            "take the model's own tokenizer, or set pad_token_id in its config.json"
        )


def _padding_of_positions(lm: PreTrainedModel) -> int | None:
    """The id past which a model of RoBERTa's kind counts positions; None for all others."""
    embeddings = getattr(lm.base_model, "embeddings", None)
    if getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None) is None:
        return None
    return getattr(embeddings, "padding_idx", lm.config.pad_token_id)


def max_positions(lm: PreTrainedModel) -> int | None:
    """Tokens that a row may have; None where the architecture sets no limit (rotary or relative positions)."""
    limit = getattr(lm.config, "max_position_embeddings", None)
    pad = _padding_of_positions(lm)
    return limit if limit is None or pad is None else limit - max(pad, 0) - 1  # positions begin at pad + 1


def count_parameters(lm: PreTrainedModel) -> dict[str, int]:
    """num_parameters, and dense_parameters: those that multiply every token (embedding look-ups cost nothing).

    A tied embedding is counted once: it is the output projection's matrix. Position tables and an untied input
    embedding are looked up only. FLOPs per token are then 6 * dense_parameters for training, 2 for a forward.
    """
    total = sum(p.numel() for p in lm.parameters())
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    looked_up = {
        id(p): p.numel()
        for module in lm.modules()
        if isinstance(module, nn.Embedding) and (module is not embedding or module.weight is not head.weight)
        for p in module.parameters()
    }
    return {"num_parameters": total, "dense_parameters": total - sum(looked_up.values())}


def weights_sha256(folder: str) -> str:
    """SHA-256 over the weight files of a Hugging Face folder, names included; the identity of a teacher."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
