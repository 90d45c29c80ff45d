import dataclasses

import pytest
import torch
import transformers as hf

from ki_ds.config import ModelConfig
from ki_ds.config.paper import PRESETS
from ki_ds.convert.folder import cut, unpadded
from ki_ds.data.store import SpecialIds
from ki_ds.errors import UserError
from ki_ds.models.presets import (
    build_lm,
    count_parameters,
    lm_config,
    load_lm,
    max_positions,
    model_folder,
)
from tests.lms import SPECIAL, TINY, tiny_preset

TABLE_6 = {  # millions of parameters
    **{"roberta_medium": 74, "roberta_base": 125, "roberta_base_plus": 211, "roberta_large": 355},
    **{"gpt_73m": 73, "gpt_124m": 124, "gpt_209m": 209, "gpt_354m": 354, "gpt_773m": 773, "gpt_1b": 1068},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_table_6(name):
    task = "causal" if name.startswith("gpt") else "mlm"
    with torch.device("meta"):
        lm = build_lm(ModelConfig(name=name), task, num_classes=50265, special_ids=SPECIAL, seed=1)
    counts = count_parameters(lm)
    if name in TABLE_6:
        assert counts["num_parameters"] == pytest.approx(TABLE_6[name] * 1e6, rel=0.01)
    assert 0.98 < counts["dense_parameters"] / counts["num_parameters"] < 1
    assert max_positions(lm) == 512


def test_initial_weights_are_a_function_of_the_seed():
    first, second = tiny_preset("mlm").state_dict(), tiny_preset("mlm").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "task", "words"),
    [
        ({"name": "gpt_73m"}, "mlm", "not a model for task=mlm"),
        ({"num_heads": 7}, "mlm", "not a multiple of model.num_heads=7"),
        ({"init": "pretrained"}, "mlm", "is a preset"),
        ({"name": "no/such_folder"}, "mlm", "model.name=no/such_folder cannot be read"),
    ],
)
def test_bad_models_are_one_line(changes, task, words):
    config = dataclasses.replace(ModelConfig(), **changes)
    with pytest.raises(UserError, match=words):
        build_lm(config, task, num_classes=99, special_ids=SPECIAL, seed=1)


def test_a_folder_is_a_starting_point_or_an_architecture(tmp_path):
    lm = tiny_preset("causal")
    lm.save_pretrained(tmp_path / "hf")
    config = ModelConfig(name=str(tmp_path / "hf"), init="pretrained")
    loaded = build_lm(config, "causal", num_classes=99, special_ids=SPECIAL, seed=9).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in lm.state_dict().items())
    config = dataclasses.replace(config, init="random")
    fresh = build_lm(config, "causal", num_classes=99, special_ids=SPECIAL, seed=9).state_dict()
    assert not torch.equal(lm.state_dict()["transformer.wte.weight"], fresh["transformer.wte.weight"])
    with pytest.raises(UserError, match="128 output classes for the tokenizer's 129 ids"):
        build_lm(config, "causal", num_classes=129, special_ids=SPECIAL, seed=9)


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    hf.GPT2Model(
        hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=1, tie_word_embeddings=False)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lm_head"):
        load_lm(str(tmp_path), "causal", torch.float32, what="teacher.path")


def test_model_folder_finds_the_weights_of_a_run(tmp_path):
    assert model_folder(str(tmp_path)) == str(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="without weights yet"):
        model_folder(str(tmp_path))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    assert model_folder(str(tmp_path)) == str(tmp_path / "best")


class TestTokensAreNoPadding:
    """RoBERTa counts positions past the id that pads, which must be no token of the text."""

    WITHOUT = (SpecialIds(bos=0, eos=2, mask=4), SpecialIds(bos=0, eos=2, pad=2, mask=4))

    @pytest.mark.parametrize("ids", WITHOUT, ids=["no pad", "pad is eos"])
    @pytest.mark.parametrize("num_classes", [100, 128])
    def test_every_token_of_a_preset_has_a_position_of_its_own(self, ids, num_classes, tmp_path):
        shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_size": 16, "num_positions": 24, "dropout": 0}
        config = ModelConfig(name="roberta_base", attention_dropout=0, **shape)
        lm = build_lm(config, "mlm", num_classes=num_classes, special_ids=ids, seed=0).eval()
        assert max_positions(lm) == 24
        assert lm.get_input_embeddings().num_embeddings > num_classes  # no token's row is the one without gradient
        exported = unpadded(lm, num_classes, dtype=torch.float32)
        exported.save_pretrained(tmp_path, state_dict=cut(lm.state_dict(), exported))
        again = hf.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
        rows = torch.tensor([[0, 1, 2, 1, 2, 3] * 4, list(range(24))])
        with torch.no_grad():
            expected = lm(input_ids=rows, position_ids=torch.arange(24).expand(2, -1)).logits[..., :num_classes]
            assert torch.equal(again(input_ids=rows).logits, expected)
        start = build_lm(
            ModelConfig(name=str(tmp_path), init="pretrained"), "mlm", num_classes=num_classes, special_ids=ids, seed=0
        )
        assert max_positions(start) == 24
        start(input_ids=torch.full((1, 4), num_classes - 1)).logits[..., 0].sum().backward()
        assert start.get_input_embeddings().weight.grad[num_classes - 1].abs().sum() > 0

    def test_a_preset_with_padding_is_as_it_was(self):
        ids = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=4)
        config = lm_config(ModelConfig(name="roberta_base"), "mlm", num_classes=50_265, special_ids=ids)
        assert (config.pad_token_id, config.max_position_embeddings, config.vocab_size) == (1, 514, 50_304)

    def test_another_models_padding_is_one_line(self, tmp_path):
        hf.RobertaForMaskedLM(hf.RobertaConfig(vocab_size=100, **TINY | {"pad_token_id": 1})).save_pretrained(tmp_path)
        for init in ("pretrained", "random"):
            model = ModelConfig(name=str(tmp_path), init=init)
            build_lm(model, "mlm", num_classes=99, special_ids=SpecialIds(bos=0, pad=1, eos=2, mask=4), seed=0)
            build_lm(model, "mlm", num_classes=99, special_ids=SpecialIds(bos=0, eos=2, mask=4, others=(1,)), seed=0)
            for ids in self.WITHOUT:
                with pytest.raises(UserError, match="counts positions past token 1, which pads nothing in this tok"):
                    build_lm(model, "mlm", num_classes=99, special_ids=ids, seed=0)
