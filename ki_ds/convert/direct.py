"""fairseq's forward pass in a few lines of plain torch: the yardstick of every conversion, written without it.

Legend: B rows, L positions, D hidden size, H heads, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ki_ds.convert.fairseq import Fairseq

_PADDING = 1


def logits(source: Fairseq, ids_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [B, L, V] that fairseq's model in eval mode gives in `dtype`; those at padding mean nothing."""
    return (_roberta if source.kind == "roberta" else _gpt)(_Weights(source, dtype), ids_BL)


class _Weights:
    """Tensors of a checkpoint by fairseq's names, cast one at a time."""

    def __init__(self, source: Fairseq, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.source.weights[name].to(self.dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return centred * scale * self[f"{name}.weight"] + self[f"{name}.bias"]

    def attention(self, x_BLD: Tensor, name: str, hidden_BLL: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        H = self.source.num_heads
        q, k, v = (self.linear(x_BLD, f"{name}.{p}_proj").view(B, L, H, D // H).transpose(1, 2) for p in "qkv")
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(D // H)
        mixed = scores.masked_fill(hidden_BLL[:, None], -torch.inf).softmax(-1) @ v
        return self.linear(mixed.transpose(1, 2).reshape(B, L, D), f"{name}.out_proj")


def _activation(x: Tensor, name: str) -> Tensor:
    if name in ("gelu_accurate", "gelu_fast"):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return {"relu": torch.relu, "tanh": torch.tanh, "linear": lambda x: x, "swish": functional.silu}[name](x)


def _positions(ids_BL: Tensor) -> Tensor:
    """Number of each token in its row, padding not counted, from the first row behind padding's own."""
    kept = ids_BL != _PADDING
    return kept.cumsum(1) * kept + _PADDING


def _roberta(w: _Weights, ids_BL: Tensor) -> Tensor:
    body, head = w.source.body, f"{w.source.top}.lm_head"
    padding = ids_BL == _PADDING
    x = w[f"{body}.embed_tokens.weight"][ids_BL]
    if w.source.scaled:
        x = x * math.sqrt(x.shape[-1])
    x = w.norm(x + w[f"{body}.embed_positions.weight"][_positions(ids_BL)], w.source.embedding_norm)
    hidden = padding[:, None, :].expand(-1, ids_BL.shape[1], -1)
    for name in (f"{body}.layers.{i}" for i in range(w.source.num_layers)):
        x = w.norm(x + w.attention(x, f"{name}.self_attn", hidden), f"{name}.self_attn_layer_norm")
        inner = _activation(w.linear(x, f"{name}.fc1"), "gelu")
        x = w.norm(x + w.linear(inner, f"{name}.fc2"), f"{name}.final_layer_norm")
    x = w.norm(_activation(w.linear(x, f"{head}.dense"), "gelu"), f"{head}.layer_norm")
    return x @ w[f"{head}.weight"].T + w[f"{head}.bias"]


def _gpt(w: _Weights, ids_BL: Tensor) -> Tensor:
    source, L = w.source, ids_BL.shape[1]
    x = w["decoder.embed_tokens.weight"][ids_BL]
    if source.scaled:
        x = x * math.sqrt(source.hidden_size)
    if "decoder.project_in_dim.weight" in source.weights:
        x = x @ w["decoder.project_in_dim.weight"].T
    positions_BL = _positions(ids_BL)
    if "decoder.embed_positions.weight" in source.weights:
        x = x + w["decoder.embed_positions.weight"][positions_BL]
    elif source.has_sinusoids:
        x = x + _sinusoids(positions_BL, source.hidden_size).to(w.dtype)
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1).expand(len(ids_BL), L, L)
    for name in (f"decoder.layers.{i}" for i in range(source.num_layers)):
        x = x + w.attention(w.norm(x, f"{name}.self_attn_layer_norm"), f"{name}.self_attn", hidden)
        inner = w.linear(w.norm(x, f"{name}.final_layer_norm"), f"{name}.fc1")
        x = x + w.linear(_activation(inner, source.activation), f"{name}.fc2")
    x = w.norm(x, "decoder.layer_norm")
    if "decoder.project_out_dim.weight" in source.weights:
        x = x @ w["decoder.project_out_dim.weight"].T
    return x @ w[source.output_weight].T


def _sinusoids(positions_BL: Tensor, size: int) -> Tensor:
    """sin in the first half, cos in the second, of position / 10,000^(i / (size // 2 - 1)), in float32."""
    step = torch.tensor(-math.log(10_000) / (size // 2 - 1))
    angles = positions_BL.float()[..., None] * (torch.arange(size // 2) * step).exp()
    table = torch.cat([angles.sin(), angles.cos()], -1)
    return functional.pad(table, (0, size % 2))
