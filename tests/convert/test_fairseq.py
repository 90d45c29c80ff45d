"""fairseq's files: what varies is understood or named in one line, and so is what is missing or too much."""

import contextlib

import pytest
import torch

from ki_ds.convert.fairseq import expected_shapes, read_fairseq
from ki_ds.convert.fairseq_to_hf import to_hf
from ki_ds.errors import UserError
from tests.convert.fairseq_files import PAD, Gpt, Roberta, rows, save

MODELS = {"roberta": Roberta, "gpt": Gpt}


def refused(path, words):
    with pytest.raises(UserError, match=words) as caught:
        read_fairseq(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("kind", "flag", "value"),
    [
        ("gpt", "activation_fn", "swiglu"),
        ("gpt", "decoder_normalize_before", False),
        ("gpt", "no_decoder_final_norm", True),
        ("gpt", "layernorm_embedding", True),
        ("gpt", "adaptive_softmax_cutoff", "2000,4000"),
        ("gpt", "adaptive_input", True),
        ("gpt", "tie_adaptive_weights", True),
        ("gpt", "character_embeddings", True),
        ("gpt", "decoder_layers_to_keep", "0,1"),
        ("gpt", "quant_noise_pq", 0.1),
        ("gpt", "quant_noise_scalar", 0.5),
        ("gpt", "scale_heads", True),
        ("gpt", "base_layers", 1),
        ("gpt", "output_dictionary_size", 50),
        ("gpt", "decoder_embed_dim", 48),
        ("gpt", "decoder_ffn_embed_dim", 41),
        ("gpt", "decoder_attention_heads", 5),
        ("gpt", "decoder_attention_heads", None),
        ("gpt", "decoder_attention_heads", 0),
        ("gpt", "decoder_learned_pos", True),
        ("gpt", "share_decoder_input_output_embed", True),
        ("gpt", "max_target_positions", 0),
        ("roberta", "activation_fn", "relu"),
        ("roberta", "encoder_layers_to_keep", "0"),
        ("roberta", "encoder_attention_heads", None),
        ("roberta", "quant_noise_pq", 0.1),
    ],
)
def test_a_flag_that_does_not_fit_is_named(tmp_path, kind, flag, value):
    refused(save(tmp_path / "model.pt", MODELS[kind](), **{flag: value}), f"{flag}|sinusoids" if value == 0 else flag)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("encoder_normalize_before", True),
        ("layernorm_embedding", False),
        ("encoder_learned_pos", False),
        ("no_token_positional_embeddings", True),
    ],
)
def test_flags_that_only_new_robertas_have(tmp_path, flag, value):
    refused(save(tmp_path / "new.pt", Roberta(), style="1.0", **{flag: value}), f"{flag}={value}")
    read_fairseq(save(tmp_path / "old.pt", Roberta(), **{flag: value}))  # there it meant something else, or nothing


@pytest.mark.parametrize(
    "flags",
    [
        {"decoder_layerdrop": 0.2, "quant_noise_pq_block_size": 8, "activation_dropout": 0.1},
        {"adaptive_softmax_cutoff": None, "decoder_layers_to_keep": None, "quant_noise_pq": 0.0},
        {"future_target": False, "dropout": None},
    ],
)
def test_flags_of_training_are_no_hindrance(tmp_path, flags):
    model = read_fairseq(save(tmp_path / "model.pt", Gpt(), **flags))
    assert any("activation_dropout=0.1" in note for note in model.notes) is ("activation_dropout" in flags)


@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_is_needed_and_its_shape_checked(tmp_path, kind):
    model = MODELS[kind](learned=True) if kind == "gpt" else MODELS[kind]()
    whole = model.state()
    expected = expected_shapes(read_fairseq(save(tmp_path / "whole.pt", model)))
    for name in expected:
        lacking = {other: tensor for other, tensor in whole.items() if other != name}
        refused(
            save(tmp_path / "model.pt", model, state=lacking),
            "is of arch" if "embed_tokens" in name else f"lacks.*{name}",
        )
    for name, shape in expected.items():
        wrong = whole | {name: torch.zeros(*shape[:-1], shape[-1] + 1)}
        words = "the tensors have" if name.endswith("layers.0.fc1.weight") else rf"{name} is \["
        refused(save(tmp_path / "model.pt", model, state=wrong), words)
    for name in ("decoder.layers.1.fc3.weight", "decoder.layers.7.fc1.weight", "decoder.quant_noise.weight"):
        refused(save(tmp_path / "model.pt", model, state=whole | {name: torch.zeros(2, 3)}), rf"has {name} \[2, 3\]")


def test_missing_unexpected_and_misshapen_tensors_are_named_with_their_shape(tmp_path):
    model = Gpt()
    whole, name = model.state(), "decoder.layers.1.fc2.bias"
    lacking = {other: tensor for other, tensor in whole.items() if other != name}
    refused(save(tmp_path / "a.pt", model, state=lacking), r"lacks decoder\.layers\.1\.fc2\.bias \[24\]")
    refused(save(tmp_path / "b.pt", model, state=whole | {name: torch.zeros(3)}), r"fc2\.bias is \[3\], not \[24\]")
    more = whole | {"decoder.layers.1.attn_ln.weight": torch.zeros(3)}
    refused(
        save(tmp_path / "c.pt", model, state=more), r"has decoder\.layers\.1\.attn_ln\.weight \[3\], which .*gpt has"
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"decoder.version": torch.tensor([2.0])}, "decoder.version=2 has no final norm"),
        ({"encoder.embed_tokens.weight": torch.zeros(9, 9)}, "arch=transformer_lm_gpt, neither a RoBERTa nor"),
        ({"decoder.layer_norm.weight": torch.zeros(24, dtype=torch.int64)}, "is torch.int64, not a tensor of real"),
        ({"decoder.output_projection.weight": torch.zeros(101, 24)}, "has decoder.output_projection.weight"),
    ],
)
def test_other_models_under_gpts_names(tmp_path, more, words):
    model = Gpt()
    state = model.state()
    path = tmp_path / "model.pt"
    torch.save({"args": None, "cfg": {"model": model.flags()}, "model": state | more}, path)
    refused(path, words)


def test_prenorm_roberta(tmp_path):
    model = Roberta()
    more = {f"decoder.sentence_encoder.layer_norm.{part}": torch.zeros(24) for part in ("weight", "bias")}
    refused(save(tmp_path / "x.pt", model, state=model.state() | more), r"pre-norm \(encoder_normalize_before=True\)")


@pytest.mark.parametrize("number", [0, 1, 3])
def test_number_of_layers_must_agree(tmp_path, number):
    refused(save(tmp_path / "x.pt", Gpt(), decoder_layers=number), r"lacks decoder.layers.2|has decoder.layers.[01]")


def test_number_of_positions_must_agree(tmp_path):
    refused(save(tmp_path / "x.pt", Roberta(), max_positions=512), "has 22 rows, but 512 positions need 514")
    refused(
        save(tmp_path / "y.pt", Gpt(learned=True), max_target_positions=32), "has 22 rows, but 32 positions need 34"
    )
    assert (
        read_fairseq(save(tmp_path / "z.pt", Gpt(), max_target_positions=None, tokens_per_sample=48)).num_positions
        == 48
    )


def test_tied_output_that_is_not(tmp_path):
    model = Gpt(tied=True)
    state = model.state("1.0")
    state["decoder.output_projection.weight"] += 1
    refused(save(tmp_path / "x.pt", model, state=state), "output_projection.weight is not the embedding")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"args": None, "model": {}}, r"neither args nor cfg\['model'\]"),
        ({"args": None, "cfg": {"model": None}, "model": {}}, r"neither args nor cfg\['model'\]"),
        ({"model": None}, "no fairseq checkpoint"),
        ([1, 2], "no fairseq checkpoint"),
        (torch.zeros(3), "no fairseq checkpoint"),
        ({"args": {"arch": "bart_large"}, "model": {"encoder.x": torch.zeros(1)}}, "arch=bart_large"),
        ({"args": {"arch": "x"}, "model": {"decoder.embed_tokens.weight": 3}}, "is int, not a tensor"),
        ({"args": {"arch": "x"}, "model": {"decoder.embed_tokens.weight": torch.zeros(3)}}, "decoder_attention_heads"),
    ],
)
def test_other_files_of_torch(tmp_path, content, words):
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", words)


@pytest.mark.parametrize("kind", MODELS)
def test_senseless_flags_are_one_line_or_without_effect(tmp_path, kind):
    model = MODELS[kind](layers=1)
    content = {"args": None, "model": model.state(), "cfg": {"model": model.flags()}}
    for name in model.flags():
        for value in (None, "x", "", [], {}, -1, 0, 1, True, False, 1e30, float("nan"), 10**12, (1, 2)):
            torch.save(content | {"cfg": {"model": model.flags() | {name: value}}}, tmp_path / "x.pt")
            with contextlib.suppress(UserError):
                to_hf(read_fairseq(tmp_path / "x.pt"), torch.float32)


def test_what_is_known_of_the_training(tmp_path):
    model = read_fairseq(save(tmp_path / "x.pt", Gpt(), cfg="dict"))
    assert model.training == {
        "num_updates": 60,
        "optimizer_name": "FairseqAdam",
        "criterion_name": "Loss",
        "epoch": 2,
        "best": 5.0,
    }
    assert (model.arch, model.flags["task"], model.flags["max_update"]) == (
        "transformer_lm_gpt",
        "language_modeling",
        100,
    )


# --- options that no tensor shows -------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [False, "dict"])
@pytest.mark.parametrize(
    ("model", "flag", "default"),
    [
        (Gpt(), "activation_fn", "relu"),
        (Gpt(), "no_scale_embedding", False),
        (Gpt(places=False), "no_token_positional_embeddings", False),
        (Roberta(), "activation_fn", "gelu"),
    ],
)
def test_what_no_tensor_shows_is_not_guessed(tmp_path, model, flag, default, cfg):
    """The yardstick would repeat the guess, so that nothing noticed."""
    flags = {"arch": "somebodys_own"} if isinstance(model, Roberta) else {}
    lacking = save(tmp_path / "x.pt", model, cfg=cfg, **flags, **{flag: None})
    refused(lacking, rf"does not say {flag}, .*--fairseq_option {flag}=VALUE \(fairseq's default is {default}\)")
    said = model.flags()[flag]
    given = read_fairseq(lacking, {flag: str(said)})
    assert given.flags[flag] == said
    assert f"not in the file, given by hand: {flag}={said}" in given.notes
    ids = rows(model)
    with torch.no_grad():
        found = to_hf(given, torch.float64)(input_ids=ids, attention_mask=(ids != PAD).long()).logits
        assert float((found - model.float().double().logits(ids))[ids != PAD].abs().max()) < 1e-10


def test_what_robertas_architectures_or_a_module_say_is_no_guess(tmp_path):
    flags = {"activation_fn": None, "no_scale_embedding": None}
    assert not read_fairseq(save(tmp_path / "a.pt", Roberta(), style="1.0", **flags)).scaled
    assert read_fairseq(save(tmp_path / "b.pt", Gpt(), no_token_positional_embeddings=None)).has_sinusoids
    learned = Gpt(learned=True)
    read_fairseq(save(tmp_path / "c.pt", learned, no_token_positional_embeddings=None))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"activation_fn": "relu"}, r"activation_fn=relu: .* says activation_fn=gelu; leave it out"),
        ({"dropout": "0.1"}, r"dropout=0\.1 cannot be given|says dropout"),
        ({"no_scale_embedding": "perhaps"}, "give true or false of one of activation_fn, no_scale_embedding"),
        ({"activation_fn": "swiglu"}, "activation_fn=swiglu"),
    ],
)
def test_what_cannot_be_given(tmp_path, given, words):
    lacking = {} if given == {"activation_fn": "relu"} else dict.fromkeys(given)
    with pytest.raises(UserError, match=words):
        read_fairseq(save(tmp_path / "x.pt", Gpt(), **lacking), given)
