"""The yardstick itself: against torch's own layers, and against what the paper's released code computed."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ki_ds.convert.direct import logits
from ki_ds.convert.fairseq import read_fairseq
from ki_ds.convert.fairseq_to_hf import to_hf
from tests.convert.fairseq_files import PAD, Gpt, Roberta, rows, save

RELEASED = Path(os.environ.get("KI_DS_SHARED", Path(__file__).parents[3] / "shared")) / "fairseq"
released = pytest.mark.skipif(not RELEASED.is_dir(), reason="released fairseq files (KI_DS_SHARED) are not there")


@pytest.mark.parametrize(
    "model",
    [
        *(Roberta(untied=untied) for untied in (False, True)),
        *(Gpt(learned=learned, scaled=not learned, tied=learned) for learned in (False, True)),
        *(Gpt(activation=name) for name in ("relu", "gelu_accurate", "swish", "tanh")),
        *(Gpt(size=27, d_in=12, d_out=15), Gpt(places=False)),
    ],
)
def test_direct_evaluation_is_that_of_torchs_layers(tmp_path, model):
    model = model.float().double()
    ids = rows(model)
    model.requires_grad_(False)
    for style in ("0.9", "1.0"):
        found = logits(read_fairseq(save(tmp_path / style, model, style=style)), ids, torch.float64)
        assert float((found - model.logits(ids))[ids != PAD].abs().max()) < 1e-10


@released
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_roberta_of_the_released_code(name):
    reference = load_file(RELEASED / "reference.safetensors")
    ids, labelled = reference["mlm.input_ids"], reference["mlm.labels"] != PAD
    source = read_fairseq(RELEASED / f"roberta_{name}.pt")
    model = to_hf(source, torch.float32)
    with torch.no_grad():
        converted = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
    for found in (logits(source, ids, torch.float32), converted):
        assert float((found[labelled] - reference[f"{name}.masked_logits"]).abs().max()) < 1e-4
        if name == "student":
            assert float((found[0, ::16] - reference["student.logits_seq0"]).abs().max()) < 1e-4


@released
@pytest.mark.parametrize(("name", "key"), [("sinusoidal_scaled_untied", "gptA"), ("learned_unscaled_tied", "gptB")])
def test_gpt_of_the_released_code(name, key):
    reference = load_file(RELEASED / "reference.safetensors")
    ids = reference[f"{key}.input_ids"]
    source = read_fairseq(RELEASED / f"gpt_{name}.pt")
    with torch.no_grad():
        converted = to_hf(source, torch.float32)(input_ids=ids).logits
    for found in (logits(source, ids, torch.float32), converted):
        assert float((found[:2, ::4] - reference[f"{key}.logits"]).abs().max()) < 1e-4
