"""The model card says where a model is from, how large it is, and what was checked."""

import transformers as hf
import yaml

from ki_ds.convert.folder import model_card, sizes
from ki_ds.convert.sources import Source
from ki_ds.files import file_sha256
from tests.convert.fairseq_files import Gpt, save


def test_card(tmp_path):
    file = save(tmp_path / "model.pt", Gpt())
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=16, n_inner=20))
    parent = {
        **{"name": "small", "task": "causal", "num_parameters": 9, "step": 5, "tokens": 70, "valid_ppl": 12.5},
        **{"student_flops": 1.0, "teacher_flops": 0.0, "data": {"train_sha256": "d" * 64}, "weights_sha256": "e" * 64},
        **{"inherit": {"schedule": "none"}, "teachers": [], "started_from": None},
    }
    teacher = {"path": "runs/small", "weights_sha256": "e" * 64, "num_parameters": 9, "lineage": parent}
    record = parent | {"name": "large", "teachers": [teacher]}
    facts = {"max_update": 40, "lr": [0.1]}
    source = Source(
        "fairseq's gpt", "causal", (file,), lambda dtype: model, facts=facts, lineage=record, notes=("left",)
    )
    card = model_card(
        "mine", source, model, dtype="fp16", license_name="mit", vocabulary=["no tokenizer"], checks=["differ by 1e-6"]
    )
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    for words in (
        "# mine",
        f"`model.pt` SHA-256 `{file_sha256(file)}`",
        "- hidden size: 8",
        "- feed-forward size: 20",
        "- output projection: tied",
        "- weights: fp16",
        "- max update: 40",
        "taught by small (causal, 9 parameters)",
        "- left",
        "- differ by 1e-6",
    ):
        assert words in text, words


def test_sizes_of_an_untied_model():
    config = hf.RobertaConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.tie_word_embeddings = False
    found = sizes(hf.RobertaForMaskedLM(config))
    assert found["output projection"] == "of its own"
    assert found["vocabulary"] == 30
    assert found["positions"] == 510


def test_nothing_known_is_said():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2))
    source = Source("x", "mlm", (), lambda dtype: model)
    card = model_card("m", source, model, dtype="fp32", license_name="other", vocabulary=[], checks=[])
    assert "- nothing is known" in card
    assert "fill-mask" in card
    assert "Lineage" not in card
