#!/usr/bin/env python3
"""Build every masked and causal LM of transformers small, and hold what is computed of it against itself.

python tools/architectures.py --output docs/architectures.md
"""

from __future__ import annotations

import argparse
import copy
import inspect
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ki_ds.config import LossConfig, Task
from ki_ds.data.batches import Sample, collate
from ki_ds.errors import UserError
from ki_ds.models.presets import InheritanceModel, Rows, lm_of, quieten

KINDS: dict[Task, dict[str, Any]] = {
    "mlm": dict(MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "causal": dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
}
CLASSES, SEQ_LEN = 128, 24
# the first pattern that a whole name matches gives its value; a name is a whole number of the kind's own default
SIZES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_.*)?|n_words", CLASSES),
    (r"(.*_)?(topk_group|n_group|num_groups|n_groups|.*_groups)", 1),
    (r"(.*_)?rope_head_dim|rotary_dim|.*state_size|mamba_d_state|ssm_state.*|.*dt_rank", 8),
    (r"(.*_)?(head_dim|head_size|d_head|kv_channels)", 16),
    (r"(pad|unk|bos|eos|mask|cls|sep|decoder_start)_token_id|(pad|bos|eos|mask|unk)_index", -1),
    (r"(max_|n_|num_)?(position_embeddings|positions|target_positions|source_positions|ctx|seq_len)", 160),
    (r"max_position_embeddings|n_positions|max_seq_len|context_length|seq_length|model_max_length", 160),
    (r"(.*_)?(num|n)_?(hidden_)?layers?|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks", 2),
    (r"(.*_)?(num_|n_)?(attention_)?heads?(_.*)?", 2),
    (r"(.*_)?(num_|n_)(key_value|kv|q|v|k|qk)_heads(_.*)?|multi_query_group_num|.*kv_heads", 2),
    (r"index_topk", 64),  # a choice among equals is none to compare
    (r"(.*_)?top_?k(_.*)?|.*experts_per_tok(en)?|moe_k|experts_per_.*|moe_topk", 2),
    (r".*shared_experts.*|first_k_dense_replace|.*dense_layers?.*", 1),
    (r"(.*_)?(num|n|local|routed).*experts?(_.*)?", 4),
    (r"(.*_)?lora_rank|.*_rank", 16),
    (r"(.*_)?(intermediate|ffn|inner|ff|mlp|feedforward).*(size|dim|hidden.*)?|n_inner|d_ff|d_inner|dff|ffn_dim", 64),
    (r"(.*_)?(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|dim|width|attention_hidden_size)(_.*)?", 32),
]
TOKENS = {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "mask": 4, "cls": 0, "sep": 2, "decoder": 2}


# what the patterns cannot know of a kind
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
MORE: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "mimo_v2_flash": {"partial_rotary_factor": 0.5},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32, "num_feedforward_networks": 1},
    "dots1": {"layer_types": ["full_attention"] * 2},
    "esm": {"vocab_size": CLASSES, "pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": CLASSES},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MAMBA,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "codegen": {"n_head": 4},
    "xmod": {"default_language": "en_XX"},
    "perceiver": {"num_latents": 8, "d_latents": 32},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "zamba": {"layer_types": ["mamba", "hybrid"], "mamba_dt_rank": 8, "n_mamba_heads": 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"]} | MAMBA | {"n_mamba_heads": 4},
}
LARGEST = 20_000_000  # parameters of what is still small


@dataclass(frozen=True)
class Verdict:
    """What came of one kind; `difference` is of loss and gradients against the model's own, relative."""

    task: Task
    kind: str
    architecture: str
    outcome: str  # computed, refused or not built
    said: str
    difference: float | None = None


def small(kind: str, task: Task) -> Any:
    """A kind's configuration with everything that costs made small."""
    config = _shrunk(CONFIG_MAPPING[kind], MORE.get(kind, {}))
    if "is_decoder" in inspect.signature(type(config).__init__).parameters or hasattr(config, "is_decoder"):
        config.is_decoder = task == "causal"
    if hasattr(config, "causal"):
        config.causal = task == "causal"
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = True
    return config


def _shrunk(cls: Any, more: dict[str, Any]) -> Any:
    default = cls()
    changes: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in getattr(default, "sub_configs", {}):
            part = getattr(default, name)
            changes[name] = None if part is None else _shrunk(type(part), {})
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            if size is not None:
                changes[name] = _size(name, value, size)
    if "qk_rope_head_dim" in changes:  # latent attention: the other sizes of a head follow
        changes |= {"head_dim": 8, "qk_head_dim": 24}
    return cls(**changes | more)


def _size(name: str, value: int, size: int) -> int:
    if size == -1:
        return TOKENS.get(name.split("_")[0], value)
    return size if size == CLASSES else min(size, value)


def build(kind: str, task: Task) -> PreTrainedModel:
    """A kind's model, small, with weights large enough that no error can hide."""
    config = small(kind, task)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in lm_of(copy.deepcopy(config), task).parameters())
    if num_parameters > LARGEST:
        raise ValueError(f"{num_parameters / 1e6:.0f} million parameters where every size is made small")
    torch.manual_seed(0)
    lm = lm_of(config, task)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    lm.config.use_cache = False
    return lm.eval()


def judge(kind: str, task: Task) -> Verdict:
    """What comes of a kind: as a student's and a teacher's model, on a padded batch."""
    architecture = KINDS[task][kind]
    try:
        lm = build(kind, task)
        reference = copy.deepcopy(lm)
        with torch.no_grad():
            copy.deepcopy(lm)(input_ids=torch.arange(5, 13)[None])
    except Exception as error:  # whatever a configuration that nobody has tried can raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Verdict(task, kind, architecture, "not built", reason[:140])
    try:
        model = InheritanceModel(lm, num_classes=CLASSES, loss=LossConfig(), tau=1.0).eval()
        model.check(Rows(task, SEQ_LEN))
        model.check_training(Rows(task, SEQ_LEN))
    except UserError as error:
        return Verdict(task, kind, architecture, "refused", str(error))
    except Exception as error:
        return Verdict(task, kind, architecture, "failed", f"{type(error).__name__}: {error}"[:140])
    try:
        difference = compare(model, reference, task)
    except Exception as error:
        return Verdict(task, kind, architecture, "failed", f"{type(error).__name__}: {error}"[:140])
    return Verdict(task, kind, architecture, "computed" if difference < 1e-4 else "failed", _form(model), difference)


def _form(model: InheritanceModel) -> str:
    form, said = model.form, []
    if form.scale != 1.0:
        said.append(f"scale {form.scale:.6g}")
    if form.cap is not None:
        said.append(f"soft cap {form.cap:.6g}")
    if model._bias_name is not None:
        said.append(f"bias {model._bias_name}")
    if model.adds_loss:
        said.append("a loss of its own")
    return ", ".join(said)


def compare(model: InheritanceModel, reference: PreTrainedModel, task: Task) -> float:
    """The largest relative difference of loss and gradients between a padded batch and the reference's lone rows."""
    draw = np.random.default_rng(0)
    samples = []
    for number, length in enumerate((SEQ_LEN, 15)):
        ids = draw.integers(5, CLASSES, length)
        positions = np.arange(length) if task == "causal" else np.unique(draw.integers(0, length, 5))
        labels = draw.integers(5, CLASSES, len(positions))
        if task == "mlm":
            ids[positions[::2]] = TOKENS["mask"]
        samples.append(Sample(number, ids, positions, labels))
    if model.lm.config.model_type == "reformer":  # which has gradients in this mode alone; it has no dropout here
        model.train()
        reference.train()
    loss_sum = model(collate(samples, pad_id=TOKENS["pad"], seq_len=SEQ_LEN))[0].loss_sum
    expected: Tensor = torch.zeros(())
    for sample in samples:
        logits = reference(input_ids=torch.from_numpy(sample.input_ids_T)[None]).logits[0, sample.positions_N, :CLASSES]
        targets = torch.from_numpy(sample.labels_N)
        expected = expected + torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    loss_sum.backward()
    expected.backward()
    found = {name: p.grad for name, p in model.lm.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    worst = max(float((found.get(name, torch.zeros(())) - grad).abs().max()) for name, grad in wanted.items())
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    return max(abs(float(loss_sum - expected)) / abs(float(expected)), worst / largest)


def page(verdicts: Sequence[Verdict]) -> str:
    """The page as Markdown."""
    lines = [
        "# Architectures",
        "",
        f"Every masked and causal language model of transformers {transformers.__version__}, built small with random "
        "weights and held",
        "against itself: the loss and all gradients of a padded batch against those of the model's own logits of each "
        "row alone.",
        "Made by `python tools/architectures.py --output docs/architectures.md` (a few minutes on one core, seed 0).",
        "",
        "| task | computed | refused | not built |",
        "|---|---|---|---|",
    ]
    for task in KINDS:
        counts = Counter(v.outcome for v in verdicts if v.task == task)
        lines.append(f"| {task} | {counts['computed']} | {counts['refused']} | {counts['not built']} |")
    for task in KINDS:
        lines += ["", f"## {task}", "", "| kind | class | verdict | difference |", "|---|---|---|---|"]
        for v in sorted((v for v in verdicts if v.task == task), key=lambda v: v.kind):
            said = v.outcome + (f": {v.said}" if v.said else "")
            difference = "" if v.difference is None else f"{v.difference:.0e}"
            lines.append(f"| {v.kind} | {v.architecture} | {said.replace('|', '/')} | {difference} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge the kinds that are named, or all, and print or write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="of transformers, as llama; none: all")
    parser.add_argument("--task", choices=tuple(KINDS), help="one of the two tasks alone")
    parser.add_argument("--output", type=Path, help="write the page there")
    options = parser.parse_args(arguments)
    quieten()
    warnings.filterwarnings("ignore")
    tasks: list[Task] = [options.task] if options.task else list(KINDS)
    verdicts = []
    chosen = [(t, kind) for t in tasks for kind in KINDS[t] if kind in options.kinds or not options.kinds]
    for task, kind in chosen:
        verdicts.append(judge(kind, task))
        found = verdicts[-1]
        difference = "" if found.difference is None else f" {found.difference:.0e}"
        print(f"{task:6} {kind:24} {found.outcome}{difference} {found.said}", flush=True)
    if options.output:
        options.output.write_text(page(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()
