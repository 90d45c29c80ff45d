"""Tiny language models and batches for the tests of what is computed of them."""

import torch
import transformers as hf

from ki_ds.config import ModelConfig
from ki_ds.data.batches import IGNORE_INDEX, Batch
from ki_ds.data.store import SpecialIds
from ki_ds.models.presets import build_lm

SPECIAL = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=4)
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GQA = TINY | {"num_key_value_heads": 1}
ARCHITECTURES = [
    hf.RobertaConfig(vocab_size=100, **TINY),
    hf.BertConfig(vocab_size=100, **TINY),
    hf.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
    hf.OPTConfig(
        vocab_size=100, word_embed_proj_dim=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64
    ),
    hf.LlamaConfig(vocab_size=100, **GQA),
]


def auto(config):
    masked = isinstance(config, hf.RobertaConfig | hf.BertConfig | hf.DistilBertConfig)
    return hf.AutoModelForMaskedLM if masked else hf.AutoModelForCausalLM


def spread_out(lm, seed=0):
    """Larger weights than at initialisation, so that an error cannot hide."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lm.eval()


def make_batch(num_classes=100, padded=False):
    ids = torch.randint(5, num_classes, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, [1, 5]] = torch.tensor([7, 9])
    labels[1, [0, 3, 8]] = torch.tensor([11, 6, 8])
    mask = None
    if padded:
        ids[1, 10:] = SPECIAL.pad
        mask = (torch.arange(12) < torch.tensor([[12], [10]])).long()
    rows = (labels.reshape(-1) != IGNORE_INDEX).nonzero()[:, 0]
    zeros = torch.zeros(2, dtype=torch.int64)
    return Batch(ids, labels, rows, labels.reshape(-1)[rows], mask, zeros, zeros, 22 if padded else 24)


def tiny_preset(task, **changes):
    name = "roberta_base" if task == "mlm" else "gpt_124m"
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "ffn_size": 64, "num_positions": 16}
    config = ModelConfig(name=name, **(sizes | {"dropout": 0.0, "attention_dropout": 0.0} | changes))
    return build_lm(config, task, num_classes=99, special_ids=SPECIAL, seed=3)
