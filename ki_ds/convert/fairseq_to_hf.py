"""fairseq's weights under the names of Hugging Face: RoBERTa as it is, GPT with scale and projections folded in."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from ki_ds.convert.fairseq import FIRST_POSITION, PAD, Fairseq

BOS, EOS = 0, 2
# fairseq's name: Hugging Face's of the same function; gelu is the erf form in both.
ACTIVATIONS = {
    **{"gelu": "gelu", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"},
    **{"relu": "relu", "tanh": "tanh", "linear": "linear", "swish": "silu"},
}


def to_hf(source: Fairseq, dtype: torch.dtype) -> PreTrainedModel:
    """The same function as a Hugging Face model on the CPU in `dtype` (float32 or float64), in eval mode."""
    roberta = source.kind == "roberta"
    state = (_roberta_state if roberta else _gpt_state)(source, dtype)
    output = "lm_head.decoder.weight" if roberta else "lm_head.weight"
    embedding = "roberta.embeddings.word_embeddings.weight" if roberta else "transformer.wte.weight"
    tied = source.ties_embeddings and torch.equal(state[output], state[embedding])
    kind: Any = RobertaForMaskedLM if roberta else GPT2LMHeadModel
    model, report = kind.from_pretrained(
        None, config=config_of(source, tied=tied), state_dict=state, dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def config_of(source: Fairseq, *, tied: bool) -> PreTrainedConfig:
    """Hugging Face's configuration; dropout as in fairseq's training."""
    dropout, attention_dropout = (float(source.flag(name, 0.1)) for name in ("dropout", "attention_dropout"))
    if source.kind == "roberta":
        return RobertaConfig(
            vocab_size=source.vocab_size,
            max_position_embeddings=source.num_positions + FIRST_POSITION,
            hidden_size=source.hidden_size,
            num_hidden_layers=source.num_layers,
            num_attention_heads=source.num_heads,
            intermediate_size=source.ffn_size,
            hidden_act="gelu",
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=attention_dropout,
            layer_norm_eps=1e-5,
            type_vocab_size=1,
            tie_word_embeddings=tied,
            bos_token_id=BOS,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    return GPT2Config(
        vocab_size=source.vocab_size,
        n_positions=source.num_positions,
        n_embd=source.hidden_size,
        n_layer=source.num_layers,
        n_head=source.num_heads,
        n_inner=source.ffn_size,
        activation_function=ACTIVATIONS[source.activation],
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=attention_dropout,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=first_token(source),
        pad_token_id=PAD,
        eos_token_id=EOS,
    )


def first_token(source: Fairseq) -> int | None:
    """Id of the token that a GPT's texts begin behind; None for RoBERTa."""
    if source.kind == "roberta":
        return None
    # without add_bos_token a text is only ever preceded by the </s> of the one before
    return BOS if source.flag("add_bos_token", False) else EOS


def _roberta_state(source: Fairseq, dtype: torch.dtype) -> dict[str, Tensor]:
    body, head = source.body, f"{source.top}.lm_head"
    state = {
        "roberta.embeddings.word_embeddings.weight": _embedding(source, dtype),
        "roberta.embeddings.position_embeddings.weight": source.weights[f"{body}.embed_positions.weight"].to(dtype),
        "roberta.embeddings.token_type_embeddings.weight": torch.zeros(1, source.hidden_size, dtype=dtype),
        "lm_head.decoder.weight": source.weights[f"{head}.weight"].to(dtype),
        "lm_head.decoder.bias": source.weights[f"{head}.bias"].to(dtype),
        "lm_head.bias": source.weights[f"{head}.bias"].to(dtype),
    }
    names = {
        "roberta.embeddings.LayerNorm": source.embedding_norm,
        "lm_head.dense": f"{head}.dense",
        "lm_head.layer_norm": f"{head}.layer_norm",
    }
    for i in range(source.num_layers):
        ours, theirs = f"roberta.encoder.layer.{i}", f"{body}.layers.{i}"
        names |= {
            f"{ours}.attention.self.query": f"{theirs}.self_attn.q_proj",
            f"{ours}.attention.self.key": f"{theirs}.self_attn.k_proj",
            f"{ours}.attention.self.value": f"{theirs}.self_attn.v_proj",
            f"{ours}.attention.output.dense": f"{theirs}.self_attn.out_proj",
            f"{ours}.attention.output.LayerNorm": f"{theirs}.self_attn_layer_norm",
            f"{ours}.intermediate.dense": f"{theirs}.fc1",
            f"{ours}.output.dense": f"{theirs}.fc2",
            f"{ours}.output.LayerNorm": f"{theirs}.final_layer_norm",
        }
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            state[f"{ours}.{part}"] = source.weights[f"{theirs}.{part}"].to(dtype)
    return state


def _gpt_state(source: Fairseq, dtype: torch.dtype) -> dict[str, Tensor]:
    weights = source.weights
    output = weights[source.output_weight]
    if (projection := weights.get("decoder.project_out_dim.weight")) is not None:
        output = output.double() @ projection.double()
    state = {
        "transformer.wte.weight": _embedding(source, dtype),
        "transformer.wpe.weight": _positions(source).to(dtype),
        "transformer.ln_f.weight": weights["decoder.layer_norm.weight"].to(dtype),
        "transformer.ln_f.bias": weights["decoder.layer_norm.bias"].to(dtype),
        "lm_head.weight": output.to(dtype),
    }
    for i in range(source.num_layers):
        ours, theirs = f"transformer.h.{i}", f"decoder.layers.{i}"
        for part in ("weight", "bias"):
            qkv = torch.cat([weights[f"{theirs}.self_attn.{letter}_proj.{part}"] for letter in "qkv"])
            for name, tensor in (
                ("ln_1", weights[f"{theirs}.self_attn_layer_norm.{part}"]),
                ("attn.c_attn", qkv),
                ("attn.c_proj", weights[f"{theirs}.self_attn.out_proj.{part}"]),
                ("ln_2", weights[f"{theirs}.final_layer_norm.{part}"]),
                ("mlp.c_fc", weights[f"{theirs}.fc1.{part}"]),
                ("mlp.c_proj", weights[f"{theirs}.fc2.{part}"]),
            ):
                state[f"{ours}.{name}.{part}"] = tensor.to(dtype).T if tensor.dim() == 2 else tensor.to(dtype)
    return state


def _embedding(source: Fairseq, dtype: torch.dtype) -> Tensor:
    """The embedding with fairseq's scale and input projection in it."""
    embedding = source.weights[f"{source.body}.embed_tokens.weight"]
    if (projection := source.weights.get("decoder.project_in_dim.weight")) is not None:
        embedding = embedding.double() @ projection.double().T
    if source.scaled:
        embedding = embedding.double() * math.sqrt(source.hidden_size)
    return embedding.to(dtype)


def _positions(source: Fairseq) -> Tensor:
    """A GPT's table of positions; without one in the file its sinusoids, in float32 as fairseq computes them."""
    if (table := source.weights.get("decoder.embed_positions.weight")) is not None:
        return table[FIRST_POSITION:]
    if not source.has_sinusoids:
        return torch.zeros(source.num_positions, source.hidden_size)
    half = source.hidden_size // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10_000) / (half - 1)))
    positions = torch.arange(FIRST_POSITION, source.num_positions + FIRST_POSITION, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos(), torch.zeros(len(angles), source.hidden_size % 2)], dim=1)
