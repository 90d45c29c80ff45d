"""Checkpoints of fairseq: what they hold, said in its own names, and refused where it is not exactly understood.

Key names: fairseq 0.9 has RoBERTa under `decoder.`, later ones under `encoder.`; `emb_layer_norm` became
`layernorm_embedding`, `embed_out` became `output_projection.weight`; files older than 0.9 hold q, k, v as one
`in_proj`. Options are in `args` (a Namespace) or, from 1.0 on, in `cfg["model"]`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from ki_ds.convert.safe_pickle import plain, read_checkpoint
from ki_ds.errors import UserError

PAD = 1  # of every fairseq dictionary
FIRST_POSITION = PAD + 1  # row of a position table that a row's first token takes

# Options whose other values change the function in a way that no Hugging Face model computes.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("quant_noise_pq", "quant_noise_scalar", "base_layers", "moe_freq"), (0,)),
    **dict.fromkeys(("adaptive_input", "char_inputs", "use_stable_embedding", "scale_fc"), (False,)),
    **dict.fromkeys(("scale_attn", "scale_heads", "scale_resids"), (False,)),
}
_MUST_BE_GPT = _MUST_BE | {
    "decoder_normalize_before": (True,),
    **dict.fromkeys(("no_decoder_final_norm", "layernorm_embedding", "tie_adaptive_weights"), (False,)),
    **dict.fromkeys(("tie_adaptive_proj", "character_embeddings", "decoder_learned_sinusoidal_pos"), (False,)),
    **dict.fromkeys(("adaptive_softmax_cutoff", "decoder_layers_to_keep"), ("",)),
    "activation_fn": ("gelu", "gelu_accurate", "gelu_fast", "relu", "tanh", "linear", "swish"),
}
_MUST_BE_ROBERTA = _MUST_BE | {"encoder_layers_to_keep": ("",), "activation_fn": ("gelu",)}
# Only in files with `layernorm_embedding`: before, these were no options of RoBERTa.
_MUST_BE_NEW_ROBERTA = {
    **dict.fromkeys(("layernorm_embedding", "encoder_learned_pos"), (True,)),
    **dict.fromkeys(("encoder_normalize_before", "no_token_positional_embeddings"), (False,)),
}
_MOST_POSITIONS = 2**20
# Options that no tensor shows, which may be given for a file that lacks them.
GIVEN: dict[str, type] = {"activation_fn": str, "no_scale_embedding": bool, "no_token_positional_embeddings": bool}
_TYPES: dict[type, tuple[type, ...]] = {bool: (bool, int), int: (int,), float: (int, float), str: (str,)}
_BUFFERS = re.compile(r"(version|embed_positions\._float_tensor)$")
_HEADS = re.compile(r"(?:decoder\.|encoder\.)?classification_heads\.([^.]+)\.")


@dataclass(frozen=True)
class Fairseq:
    """A checkpoint whose tensors and options were found complete and consistent.

    `weights` have fairseq's names, without `module.`, buffers and classification heads, in the file's dtypes.
    """

    path: Path
    kind: Literal["roberta", "gpt"]
    flags: dict[str, Any]
    weights: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)  # updates and losses, as far as the file has them
    notes: tuple[str, ...] = ()

    def flag(self, name: str, default: Any) -> Any:
        """An option's value; fairseq's default where the file has none. UserError when it is of another type."""
        value = self.flags.get(name)
        if value is None:
            return default
        if default is not None and type(value) not in _TYPES[type(default)]:
            raise UserError(f"{self.path}: {name}={value!r} makes no sense; get the file again")
        return value

    def known(self, name: str, default: Any) -> Any:
        """An option's value, which no tensor shows. UserError where the file has none: nothing could check a guess.

        RoBERTa's architectures all have fairseq's default.
        """
        value = self.flag(name, default)
        if self.flags.get(name) is None and not (self.kind == "roberta" and self.arch.startswith("roberta")):
            raise UserError(
                f"{self.path} does not say {name}, on which every logit hangs and which no tensor shows; give it as "
                f"the model was trained with --fairseq_option {name}=VALUE (fairseq's default is {default})"
            )
        return value

    @property
    def arch(self) -> str:
        """Name of the architecture in fairseq."""
        return str(self.flags.get("arch") or self.flags.get("_name") or "of unknown arch")

    @cached_property
    def body(self) -> str:
        """Prefix of embeddings and layers."""
        return "decoder" if self.kind == "gpt" else f"{self.top}.sentence_encoder"

    @cached_property
    def top(self) -> str:
        """Prefix of the whole model, RoBERTa's head included."""
        return "encoder" if "encoder.sentence_encoder.embed_tokens.weight" in self.weights else "decoder"

    @cached_property
    def embedding_norm(self) -> str:
        """Prefix of RoBERTa's norm of the embeddings."""
        new = f"{self.body}.layernorm_embedding"
        return new if f"{new}.weight" in self.weights else f"{self.body}.emb_layer_norm"

    @cached_property
    def output_weight(self) -> str:
        """Name of the output projection's matrix; the embedding's where a GPT shares it."""
        if self.kind == "roberta":
            return f"{self.top}.lm_head.weight"
        names = ("decoder.embed_out", "decoder.output_projection.weight")
        return next((name for name in names if name in self.weights), "decoder.embed_tokens.weight")

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.weights[f"{self.body}.embed_tokens.weight"].shape[0]

    @property
    def num_layers(self) -> int:
        """Layers, as the options say; counted in the tensors where they do not."""
        pattern = re.compile(rf"{re.escape(self.body)}\.layers\.(\d+)\.")
        counted = 1 + max((int(m[1]) for name in self.weights if (m := pattern.match(name))), default=-1)
        said = self.flag(f"{self.side}_layers", counted)
        return min(said, counted + 1)  # one that is lacking is enough to say

    @property
    def hidden_size(self) -> int:
        """Width of the layers."""
        return self.weights[f"{self.body}.layers.0.fc1.weight"].shape[1]

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layers."""
        return self.weights[f"{self.body}.layers.0.fc1.weight"].shape[0]

    @property
    def side(self) -> str:
        """What the options of the layers begin with."""
        return "decoder" if self.kind == "gpt" else "encoder"

    @property
    def num_heads(self) -> int:
        """Attention heads, which no shape shows."""
        return self.flags[f"{self.side}_attention_heads"]

    @property
    def num_positions(self) -> int:
        """Tokens that a row may have."""
        table = self.weights.get(f"{self.body}.embed_positions.weight")
        return self.said_positions if table is None else table.shape[0] - FIRST_POSITION

    @property
    def said_positions(self) -> int:
        """The same, as the options say; 0 where they do not."""
        names = ("max_target_positions",) if self.kind == "gpt" else ("max_positions",)
        return next((said for name in (*names, "tokens_per_sample") if (said := self.flag(name, 0))), 0)

    @property
    def scaled(self) -> bool:
        """Whether embeddings are multiplied by the square root of the hidden size."""
        if self.kind == "gpt":
            return not self.known("no_scale_embedding", False)
        return self.embedding_norm.endswith("layernorm_embedding") and not self.known("no_scale_embedding", True)

    @property
    def activation(self) -> str:
        """Name of the function between the feed-forward layers."""
        return self.known("activation_fn", "relu" if self.kind == "gpt" else "gelu")

    @property
    def has_sinusoids(self) -> bool:
        """Whether a GPT without a table of positions adds sinusoids, or nothing."""
        return not self.known("no_token_positional_embeddings", False)

    @property
    def ties_embeddings(self) -> bool:
        """Whether one matrix is meant to be both embedding and output projection."""
        if self.kind == "gpt":
            shared = self.output_weight == "decoder.embed_tokens.weight"
            return bool(self.flag("share_decoder_input_output_embed", shared))
        return not self.flag("untie_weights_roberta", False)


def read_fairseq(path: Path, given: Mapping[str, str] = MappingProxyType({})) -> Fairseq:
    """The RoBERTa or transformer_lm in a fairseq checkpoint, checked.

    Args:
        given: options that the file lacks.

    Raises:
        UserError: it is no such file, of another architecture, has an option that no Hugging Face model computes,
            or a tensor is missing, unexpected or of another shape.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is no fairseq checkpoint (it has no 'model'); name one, a run, or a DeepSpeed folder")
    flags = _with_given(path, _flags(path, content), given)
    sinusoids = any(str(name).endswith("embed_positions._float_tensor") for name in content["model"])
    if sinusoids and flags.get("no_token_positional_embeddings") is None:  # the module itself says it
        flags = flags | {"no_token_positional_embeddings": False}
    weights, notes = _weights(path, content["model"])
    notes += [f"not in the file, given by hand: {name}={text}" for name, text in given.items()]
    model = Fairseq(path, _kind(path, flags, weights), flags, weights, _training(content))
    _check_heads_and_sizes(model)
    _check_flags(model)
    _check_tensors(model)
    has_table = f"{model.body}.embed_positions.weight" in weights
    _ = model.scaled, model.activation, has_table or model.has_sinusoids  # refused if the file does not say them
    if (inner := model.flag("activation_dropout", 0.0)) > 0:
        notes.append(f"activation_dropout={inner} has no counterpart; only further training would notice")
    return dataclasses.replace(model, notes=tuple(notes))


# --- what the file holds ----------------------------------------------------------------------------------------


def _flags(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    try:
        args, cfg = plain(content.get("args")), plain(content.get("cfg"))
    except RecursionError:
        raise UserError(f"{path} has options that contain themselves; get it again") from None
    if isinstance(args, dict) and args:
        return args
    if isinstance(cfg, dict) and isinstance(cfg.get("model"), dict):
        groups = {name: group for name, group in cfg.items() if isinstance(group, dict)}
        merged = {key: value for group in groups.values() for key, value in group.items()}
        names = {name: groups[name]["_name"] for name in ("task", "criterion") if "_name" in groups.get(name, {})}
        return merged | cfg["model"] | names
    raise UserError(f"{path} has neither args nor cfg['model']: heads and scaling cannot be known; get a whole file")


def _with_given(path: Path, flags: dict[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The file's options and those that it lacks and was given."""
    truth = {"true": True, "false": False}
    for name, text in given.items():
        if flags.get(name) is not None:
            raise UserError(f"--fairseq_option {name}={text}: {path} says {name}={flags[name]}; leave it out")
        if name not in GIVEN or (GIVEN[name] is bool and text.lower() not in truth):
            values = "true or false" if GIVEN.get(name) is bool else "its value"
            known = ", ".join(GIVEN)
            raise UserError(f"--fairseq_option {name}={text} cannot be given; give {values} of one of {known}")
        flags = flags | {name: truth[text.lower()] if GIVEN[name] is bool else text}
    return flags


def _weights(path: Path, state: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """(weights by name, lines about what was left out); q, k and v apart."""
    weights: dict[str, Tensor] = {}
    heads = set()
    for full_name, tensor in state.items():
        name = str(full_name).removeprefix("module.")
        if (match := _HEADS.match(name)) is not None:
            heads.add(match[1])
            continue
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{path}: {full_name} is {what}, not a tensor of real numbers; get the file again")
        if name == "decoder.version" and float(tensor.reshape(-1)[0]) <= 2:
            raise UserError(
                f"{path}: decoder.version={float(tensor.reshape(-1)[0]):g} has no final norm; cannot convert"
            )
        if _BUFFERS.search(name):
            continue
        if (part := re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", name)) is not None and len(tensor) % 3 == 0:
            for letter, third in zip("qkv", tensor.detach().chunk(3), strict=True):
                weights[f"{part[1]}.{letter}_proj.{part[2]}"] = third
            continue
        weights[name] = tensor.detach()
    left_out = f"left out: the classification heads {', '.join(sorted(heads))}"
    return weights, [left_out] if heads else []


def _kind(path: Path, flags: dict[str, Any], weights: dict[str, Tensor]) -> Literal["roberta", "gpt"]:
    if any(name.endswith("coder.sentence_encoder.embed_tokens.weight") for name in weights):
        return "roberta"
    if "decoder.embed_tokens.weight" in weights and not any(name.startswith("encoder.") for name in weights):
        return "gpt"
    for flag in ("adaptive_input", "character_embeddings"):  # these replace embed_tokens.weight
        if flags.get(flag):
            raise UserError(f"{path} has {flag}={flags[flag]}, which no Hugging Face model computes; cannot convert")
    arch = flags.get("arch") or flags.get("_name")
    raise UserError(f"{path} is of arch={arch}, neither a RoBERTa nor a transformer_lm with a vocabulary of embeddings")


def _training(content: dict[str, Any]) -> dict[str, Any]:
    """What the file says about its training, under plain names."""
    history, extra = plain(content.get("optimizer_history")), plain(content.get("extra_state"))
    found: dict[str, Any] = {}
    if isinstance(history, list) and history and isinstance(history[-1], dict):
        found |= {key: history[-1].get(key) for key in ("num_updates", "optimizer_name", "criterion_name")}
    if isinstance(extra, dict):
        iterator = extra.get("train_iterator")
        found["epoch"] = iterator.get("epoch") if isinstance(iterator, dict) else None
        found["best"] = extra.get("best")
    return {key: value for key, value in found.items() if isinstance(value, str | int | float)}


# --- what is checked --------------------------------------------------------------------------------------------


def _check_heads_and_sizes(model: Fairseq) -> None:
    path, heads_flag = model.path, f"{model.side}_attention_heads"
    heads = model.flags.get(heads_flag)
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise UserError(f"{path}: {heads_flag}={heads}, and no shape shows the number of attention heads")
    name = f"{model.body}.layers.0.fc1.weight"
    if (tensor := model.weights.get(name)) is None or tensor.dim() != 2 or not model.ffn_size or not model.hidden_size:
        raise UserError(f"{path} lacks the matrix {name}; get the file again")
    embedding = model.weights[f"{model.body}.embed_tokens.weight"]
    if embedding.dim() != 2 or model.vocab_size <= FIRST_POSITION:
        raise UserError(f"{path}: {model.body}.embed_tokens.weight is {list(embedding.shape)}, no vocabulary")
    for flag, size in (("embed_dim", model.hidden_size), ("ffn_embed_dim", model.ffn_size)):
        if (said := model.flag(f"{model.side}_{flag}", size)) != size:
            raise UserError(f"{path}: {model.side}_{flag}={said}, but the tensors have {size}; get a whole file")
    if model.hidden_size % heads:
        raise UserError(f"{path}: {heads_flag}={heads} does not divide the hidden size {model.hidden_size}")


def _check_flags(model: Fairseq) -> None:
    path, roberta, positions = model.path, model.kind == "roberta", f"{model.body}.embed_positions.weight"
    rules = dict(_MUST_BE_ROBERTA if roberta else _MUST_BE_GPT)
    if roberta and f"{model.body}.emb_layer_norm.weight" not in model.weights:
        rules |= _MUST_BE_NEW_ROBERTA
    for flag, allowed in rules.items():
        value = model.flags.get(flag)
        if value is not None and value not in allowed:
            raise UserError(f"{path} has {flag}={value}, which no Hugging Face model computes; cannot convert")
    if roberta and f"{model.body}.layer_norm.weight" in model.weights:
        raise UserError(f"{path} is pre-norm (encoder_normalize_before=True), RoBERTa is post-norm; cannot convert")
    if not roberta:
        _check_positions_and_output(model)
    if not 0 < model.num_positions <= _MOST_POSITIONS:
        raise UserError(f"{path} has {model.num_positions} positions (max_target_positions); get a whole file")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= model.flag(name, 0.0) <= 1:
            raise UserError(f"{path}: {name}={model.flags[name]} is no probability; get the file again")
    if not roberta and model.hidden_size < 4:
        raise UserError(f"{path} has a hidden size of {model.hidden_size}, too small for sinusoids; cannot convert")
    if positions in model.weights and model.said_positions not in (0, model.num_positions):
        raise UserError(
            f"{path}: {positions} has {model.num_positions + FIRST_POSITION} rows, but {model.said_positions} "
            f"positions need {model.said_positions + FIRST_POSITION}; get a whole file"
        )


def _check_positions_and_output(model: Fairseq) -> None:
    """That a GPT's tensors are those of its options."""
    path, embedding, own = model.path, "decoder.embed_tokens.weight", model.output_weight
    has_table = "decoder.embed_positions.weight" in model.weights
    learned = model.flag("decoder_learned_pos", has_table) and not model.flag("no_token_positional_embeddings", False)
    if learned != has_table:
        raise UserError(
            f"{path} {'has' if has_table else 'lacks'} decoder.embed_positions.weight with decoder_learned_pos="
            f"{model.flags.get('decoder_learned_pos')}; get a whole file"
        )
    shared = model.flag("share_decoder_input_output_embed", None)
    if shared is False and own == embedding:
        raise UserError(f"{path} lacks decoder.embed_out with share_decoder_input_output_embed=False")
    if shared and own == "decoder.embed_out":
        raise UserError(f"{path} has decoder.embed_out with share_decoder_input_output_embed=True")
    if shared and not torch.equal(model.weights[own], model.weights[embedding]):
        raise UserError(f"{path}: {own} is not the embedding, with share_decoder_input_output_embed=True")
    size = model.flag("output_dictionary_size", -1)
    if 0 < size != model.vocab_size:
        raise UserError(f"{path} has output_dictionary_size={size} and {model.vocab_size} embeddings; cannot convert")


def expected_shapes(model: Fairseq) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a model of these sizes and options has."""
    body, top, V, D, F = model.body, model.top, model.vocab_size, model.hidden_size, model.ffn_size
    shapes: dict[str, tuple[int, ...]] = {}

    def add(prefix: str, *shape: int) -> None:
        shapes[f"{prefix}.weight"], shapes[f"{prefix}.bias"] = shape, shape[:1]

    for layer in (f"{body}.layers.{i}" for i in range(model.num_layers)):
        for letter in ("q", "k", "v", "out"):
            add(f"{layer}.self_attn.{letter}_proj", D, D)
        add(f"{layer}.self_attn_layer_norm", D)
        add(f"{layer}.fc1", F, D)
        add(f"{layer}.fc2", D, F)
        add(f"{layer}.final_layer_norm", D)
    if model.kind == "roberta":
        shapes[f"{body}.embed_tokens.weight"] = shapes[f"{top}.lm_head.weight"] = (V, D)
        shapes[f"{top}.lm_head.bias"] = (V,)
        shapes[f"{body}.embed_positions.weight"] = (model.num_positions + FIRST_POSITION, D)
        add(model.embedding_norm, D)
        add(f"{top}.lm_head.dense", D, D)
        add(f"{top}.lm_head.layer_norm", D)
        return shapes
    add("decoder.layer_norm", D)
    d_in = model.flag("decoder_input_dim", model.weights["decoder.embed_tokens.weight"].shape[1])
    d_out = model.flag("decoder_output_dim", D)
    shapes["decoder.embed_tokens.weight"], shapes[model.output_weight] = (V, d_in), (V, d_out)
    if d_in != D:
        shapes["decoder.project_in_dim.weight"] = (D, d_in)
    if d_out != D:
        shapes["decoder.project_out_dim.weight"] = (d_out, D)
    if "decoder.embed_positions.weight" in model.weights:
        shapes["decoder.embed_positions.weight"] = (model.num_positions + FIRST_POSITION, D)
    return shapes


def _check_tensors(model: Fairseq) -> None:
    expected, found = expected_shapes(model), model.weights
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{model.path} lacks {name} {list(shape)}; get a whole file")
        if tuple(found[name].shape) != shape:
            raise UserError(f"{model.path}: {name} is {list(found[name].shape)}, not {list(shape)}; get the file again")
    for name in found.keys() - expected.keys():
        raise UserError(
            f"{model.path} has {name} {list(found[name].shape)}, which {model.arch} has not; cannot convert"
        )
