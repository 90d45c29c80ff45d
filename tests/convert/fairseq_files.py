"""Checkpoints as fairseq writes them, from models built of torch's own transformer layers, which give the answer."""

import argparse
import contextlib
import math
import sys
import types

import torch
from torch import nn

PAD = 1


def randomised(module, seed):
    """Every parameter drawn anew, norms included, so that no mistake can hide behind ones and zeros."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.2)
            if parameter.dim() == 1:
                parameter.add_(0.5)
    return module.double().eval()


class Roberta(nn.Module):
    """fairseq's RoBERTa, of torch.nn parts, in float64."""

    def __init__(self, vocab_size=101, size=24, layers=2, heads=3, ffn=40, positions=20, *, untied=False, seed=0):
        super().__init__()
        self.heads, self.positions = heads, positions
        self.embed = nn.Embedding(vocab_size, size)
        self.places = nn.Embedding(positions + 2, size)
        self.norm, self.head_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.layers = nn.ModuleList(layer(size, heads, ffn, "gelu", norm_first=False) for _ in range(layers))
        self.dense, self.out = nn.Linear(size, size), nn.Linear(size, vocab_size)
        randomised(self, seed)
        if not untied:
            self.out.weight = self.embed.weight

    def logits(self, ids):
        padding = ids == PAD
        x = self.norm(self.embed(ids) + self.places((~padding).cumsum(1) * ~padding + PAD))
        for block in self.layers:
            x = block(x, src_key_padding_mask=padding)
        return self.out(self.head_norm(nn.functional.gelu(self.dense(x))))

    def state(self, style="0.9"):
        """The state dict by the names of fairseq 0.9, 1.0, or of the first published files (0.8)."""
        top, norm = ("encoder", "layernorm_embedding") if style == "1.0" else ("decoder", "emb_layer_norm")
        body = f"{top}.sentence_encoder"
        state = {f"{body}.embed_tokens.weight": self.embed.weight, f"{body}.embed_positions.weight": self.places.weight}
        named(state, f"{body}.{norm}", self.norm)
        for i, block in enumerate(self.layers):
            add_layer(state, f"{body}.layers.{i}", block, joint=style == "0.8")
        if style == "1.0":
            state[f"{body}.version"] = torch.tensor([3.0])
        named(state, f"{top}.lm_head", self.out)
        named(state, f"{top}.lm_head.dense", self.dense)
        named(state, f"{top}.lm_head.layer_norm", self.head_norm)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def flags(self, **changes):
        flags = {"arch": "roberta_base", "task": "masked_lm", "criterion": "masked_lm", "activation_fn": "gelu"}
        flags |= {"encoder_layers": len(self.layers), "encoder_attention_heads": self.heads, "dropout": 0.1}
        flags |= {"encoder_embed_dim": self.embed.embedding_dim, "max_positions": self.positions, "data": "/x/data-bin"}
        flags |= {"encoder_ffn_embed_dim": self.layers[0].linear1.out_features, "tokens_per_sample": self.positions}
        return flags | changes


class Gpt(nn.Module):
    """fairseq's transformer_lm, of torch.nn parts, in float64."""

    def __init__(self, vocab_size=101, size=24, layers=2, heads=3, ffn=40, positions=20, *, learned=False, scaled=True,
                 tied=False, activation="gelu", d_in=None, d_out=None, places=True, seed=0):  # fmt: skip
        super().__init__()
        d_in, d_out = d_in or size, d_out or size
        self.heads, self.size, self.positions, self.activation = heads, size, positions, activation
        self.learned, self.scaled, self.tied, self.has_places = learned, scaled, tied, places
        self.embed, self.places = nn.Embedding(vocab_size, d_in), nn.Embedding(positions + 2, size)
        self.project_in = nn.Linear(d_in, size, bias=False) if d_in != size else nn.Identity()
        self.project_out = nn.Linear(size, d_out, bias=False) if d_out != size else nn.Identity()
        function = {"gelu_accurate": nn.GELU("tanh"), "swish": nn.SiLU(), "tanh": nn.Tanh()}.get(activation, activation)
        self.layers = nn.ModuleList(layer(size, heads, ffn, function, norm_first=True) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(size), nn.Linear(d_out, vocab_size, bias=False)
        randomised(self, seed)
        if tied:
            self.out.weight = self.embed.weight

    def logits(self, ids):
        length = ids.shape[1]
        x = self.project_in(self.embed(ids) * (math.sqrt(self.size) if self.scaled else 1))
        if self.has_places:
            x = x + (self.places.weight if self.learned else self.sinusoids())[2 : 2 + length]
        mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
        for block in self.layers:
            x = block(x, src_mask=mask)
        return self.out(self.project_out(self.norm(x)))

    def sinusoids(self):
        """The table that fairseq computes in float32 when a model starts."""
        half = self.size // 2
        step = torch.exp(torch.arange(half, dtype=torch.float) * -(math.log(10000) / (half - 1)))
        angles = torch.arange(self.positions + 2, dtype=torch.float).unsqueeze(1) * step.unsqueeze(0)
        table = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        return nn.functional.pad(table, (0, self.size % 2)).double()

    def state(self, style="0.9"):
        state = {"decoder.version": torch.tensor([3.0]), "decoder.embed_tokens.weight": self.embed.weight}
        if self.learned:
            state["decoder.embed_positions.weight"] = self.places.weight
        elif self.has_places:
            state["decoder.embed_positions._float_tensor"] = torch.zeros(1)
        for name in ("project_in", "project_out"):
            if isinstance(getattr(self, name), nn.Linear):
                state[f"decoder.{name}_dim.weight"] = getattr(self, name).weight
        for i, block in enumerate(self.layers):
            add_layer(state, f"decoder.layers.{i}", block)
        named(state, "decoder.layer_norm", self.norm)
        if style == "1.0":
            state["decoder.output_projection.weight"] = self.out.weight
        elif not self.tied:
            state["decoder.embed_out"] = self.out.weight
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def flags(self, **changes):
        flags = {"arch": "transformer_lm_gpt", "task": "language_modeling", "activation_fn": self.activation}
        flags |= {
            "decoder_layers": len(self.layers),
            "decoder_attention_heads": self.heads,
            "decoder_embed_dim": self.size,
        }
        flags |= {"decoder_ffn_embed_dim": self.layers[0].linear1.out_features, "max_target_positions": self.positions}
        flags |= {"decoder_learned_pos": self.learned, "no_scale_embedding": not self.scaled, "add_bos_token": False}
        flags |= {"share_decoder_input_output_embed": self.tied, "no_token_positional_embeddings": not self.has_places}
        flags |= {"decoder_input_dim": self.embed.embedding_dim, "decoder_output_dim": self.out.in_features}
        flags |= {"decoder_normalize_before": True, "no_decoder_final_norm": False, "adaptive_softmax_cutoff": None}
        flags |= {"adaptive_input": False, "character_embeddings": False, "layernorm_embedding": False}
        return flags | {"output_dictionary_size": -1, "criterion": "cross_entropy"} | changes


def layer(size, heads, ffn, activation, *, norm_first):
    return nn.TransformerEncoderLayer(
        size, heads, ffn, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )


def named(state, prefix, module):
    for part in ("weight", "bias"):
        state[f"{prefix}.{part}"] = getattr(module, part)


def add_layer(state, prefix, block, *, joint=False):
    attention = block.self_attn
    for part in ("weight", "bias"):
        whole = getattr(attention, f"in_proj_{part}")
        if joint:
            state[f"{prefix}.self_attn.in_proj_{part}"] = whole
        else:
            for letter, third in zip("qkv", whole.chunk(3), strict=True):
                state[f"{prefix}.self_attn.{letter}_proj.{part}"] = third
    named(state, f"{prefix}.self_attn.out_proj", attention.out_proj)
    for name, module in (
        ("self_attn_layer_norm", block.norm1),
        ("fc1", block.linear1),
        ("fc2", block.linear2),
        ("final_layer_norm", block.norm2),
    ):
        named(state, f"{prefix}.{name}", module)


@contextlib.contextmanager
def fake_modules(**classes):
    """Modules by dotted name with classes that torch.save can name; gone afterwards, as fairseq will be."""
    names = {name.replace("__", ".") for name in classes}
    parents = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
    before = {name: sys.modules[name] for name in parents if name in sys.modules}
    for name in sorted(parents):
        sys.modules[name] = types.ModuleType(name)
    made = {}
    for name, members in classes.items():
        module = sys.modules[name.replace("__", ".")]
        for member in members:
            made[member] = type(member, (), {"__module__": module.__name__})
            setattr(module, member, made[member])
    try:
        yield made
    finally:
        for name in parents:
            del sys.modules[name]
        sys.modules.update(before)


def save(path, model, *, style="0.9", legacy=False, half=False, state=None, cfg=False, more=None, **flags):
    """Write a model as a fairseq checkpoint with optimizer state and meters.

    cfg: options as fairseq 1.0 keeps them: "dict", "namespace", or "omegaconf" (a pickled DictConfig); else args.
    """
    state = model.state(style) if state is None else state
    state = {name: t.to(torch.float16 if half else torch.float32) for name, t in state.items()}
    options = model.flags(**flags)
    with fake_modules(
        fairseq__meters=["AverageMeter", "TimeMeter"],
        omegaconf__dictconfig=["DictConfig"],
        omegaconf__nodes=["AnyNode"],
    ) as made:
        meter = made["AverageMeter"]()
        meter.__dict__.update(val=torch.tensor(3.0), sum=9.0, count=3)
        content = {
            "args": argparse.Namespace(**options),
            "model": state,
            "optimizer_history": [{"num_updates": 60, "optimizer_name": "FairseqAdam", "criterion_name": "Loss"}],
            "extra_state": {"train_iterator": {"epoch": 2}, "best": 5.0, "train_meters": {"loss": meter}},
            "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        }
        if cfg:
            content["args"], content["cfg"] = None, _cfg(options, cfg, made)
        content |= more or {}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def _cfg(options, kind, made):
    options = {("_name" if name == "arch" else name): value for name, value in options.items()}
    groups = {"_name": None, "common": {"seed": 1}, "optimization": {"lr": [0.1], "max_update": 100}, "model": options}
    groups |= {"task": {"_name": options.pop("task"), "tokens_per_sample": 20}, "criterion": options.pop("criterion")}
    if kind == "namespace":
        groups["model"] = argparse.Namespace(**options)
    if kind != "omegaconf":
        return groups

    def container(mapping):
        made_container = made["DictConfig"]()
        made_container.__dict__["_content"] = {
            name: container(value) if isinstance(value, dict) else node(value) for name, value in mapping.items()
        }
        made_container.__dict__["_metadata"] = made_container  # refers to itself, as parents do
        return made_container

    def node(value):
        made_node = made["AnyNode"]()
        made_node.__dict__["_val"] = value
        return made_node

    return container(groups)


def rows(model, seed=0):
    """Ids [3, positions]: a full row and two that end in padding."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, model.embed.num_embeddings, (3, model.positions), generator=draw)
    ids[1, model.positions // 2 :] = PAD
    ids[2, 1:] = PAD
    return ids
