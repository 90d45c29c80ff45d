"""Converted models compute what torch's own transformer layers compute from the same weights."""

import itertools

import pytest
import torch

from ki_ds.convert.fairseq import read_fairseq
from ki_ds.convert.fairseq_to_hf import to_hf
from tests.convert.fairseq_files import PAD, Gpt, Roberta, rows, save


def worst(model, path, dtype=torch.float64):
    """Largest difference between the converted file's logits and the model's own, padding left out."""
    ids = rows(model)
    converted = to_hf(read_fairseq(path), dtype)
    with torch.no_grad():
        found = converted(input_ids=ids, attention_mask=(ids != PAD).long()).logits
        return float((found - model.logits(ids))[ids != PAD].abs().max()), converted


def as_saved(model):
    """The model with the rounding of a float32 file."""
    return model.float().double()


@pytest.mark.parametrize("style", ["0.8", "0.9", "1.0"])
@pytest.mark.parametrize("untied", [False, True])
def test_roberta(tmp_path, style, untied):
    model = as_saved(Roberta(untied=untied))
    path = save(tmp_path / "model.pt", model, style=style, untie_weights_roberta=untied)
    difference, converted = worst(model, path)
    assert difference < 1e-10
    assert converted.config.tie_word_embeddings is not untied
    tied = converted.get_output_embeddings().weight is converted.get_input_embeddings().weight
    assert tied is not untied
    assert worst(model, path, torch.float32)[0] < 1e-4


def test_roberta_with_scaled_embeddings_is_untied(tmp_path):
    model = as_saved(Roberta())
    path = save(tmp_path / "model.pt", model, style="1.0", no_scale_embedding=False)
    with torch.no_grad():
        model.out.weight = torch.nn.Parameter(model.embed.weight.clone())
        model.embed.weight.mul_(24**0.5)
    difference, converted = worst(model, path)
    assert difference < 1e-10
    assert not converted.config.tie_word_embeddings


@pytest.mark.parametrize("size", [24, 27])
@pytest.mark.parametrize(("learned", "scaled", "tied"), itertools.product([False, True], repeat=3))
def test_gpt_with_every_combination_of_flags(tmp_path, learned, scaled, tied, size):
    model = as_saved(Gpt(size=size, learned=learned, scaled=scaled, tied=tied))
    for style in ("0.9", "1.0"):
        difference, converted = worst(model, save(tmp_path / style, model, style=style))
        assert difference < 1e-10
        assert converted.config.tie_word_embeddings is (tied and not scaled)
        assert converted.config.bos_token_id == converted.config.eos_token_id == 2
    assert worst(model, tmp_path / "0.9", torch.float32)[0] < 1e-4


@pytest.mark.parametrize("vocab_size", [4129, 101, 5])
def test_any_vocabulary(tmp_path, vocab_size):
    for model in (Roberta(vocab_size), Gpt(vocab_size)):
        assert worst(as_saved(model), save(tmp_path / "model.pt", model))[0] < 1e-10


@pytest.mark.parametrize("activation", ["relu", "gelu_accurate"])
def test_activations_of_gpt(tmp_path, activation):
    model = as_saved(Gpt(activation=activation))
    assert worst(model, save(tmp_path / "model.pt", model))[0] < 1e-10


@pytest.mark.parametrize(
    "kind",
    [
        {"d_in": 12},
        {"d_out": 12},
        {"d_in": 12, "d_out": 12, "tied": True},
        {"places": False},
        {"layers": 3, "heads": 8, "ffn": 17, "positions": 33},
    ],
)
def test_projections_and_other_shapes_of_gpt(tmp_path, kind):
    model = as_saved(Gpt(**kind))
    difference, converted = worst(model, save(tmp_path / "model.pt", model))
    assert difference < 1e-10
    assert not converted.config.tie_word_embeddings


@pytest.mark.parametrize("cfg", ["dict", "namespace", "omegaconf"])
def test_options_of_fairseq_1(tmp_path, cfg):
    for model in (Roberta(), Gpt(learned=True, scaled=False, tied=True)):
        model = as_saved(model)
        assert worst(model, save(tmp_path / "model.pt", model, style="1.0", cfg=cfg))[0] < 1e-10


@pytest.mark.parametrize("legacy", [False, True])
def test_half_precision_and_both_serialisations(tmp_path, legacy):
    for model in (Roberta(), Gpt()):
        model = model.half().double()
        assert worst(model, save(tmp_path / "model.pt", model, half=True, legacy=legacy))[0] < 1e-10


def test_wrapped_and_with_classification_heads(tmp_path):
    model = as_saved(Roberta())
    state = {f"module.{name}": tensor for name, tensor in model.state().items()}
    for part in ("dense.weight", "dense.bias", "out_proj.weight"):
        state[f"module.classification_heads.mnli.{part}"] = torch.zeros(3)
    path = save(tmp_path / "model.pt", model, state=state)
    assert worst(model, path)[0] < 1e-10
    assert read_fairseq(path).notes == ("left out: the classification heads mnli",)
