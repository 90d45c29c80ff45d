"""Hugging Face folders start a student and teach as they are; --from_hf says what one is and how."""

import pytest
import torch
import transformers as hf
import yaml

from ki_ds import config as configuration
from ki_ds.config import ModelConfig, TeacherConfig
from ki_ds.convert.folder import describe
from ki_ds.data.store import SpecialIds
from ki_ds.data.tokenize import load_tokenizer
from ki_ds.errors import UserError
from ki_ds.models.presets import Rows, build_lm
from ki_ds.teachers.factory import make_teacher
from tests.lms import ARCHITECTURES, auto

SPECIAL = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=4)


@pytest.fixture(params=ARCHITECTURES, ids=lambda config: config.model_type)
def folder(request, tmp_path):
    """(task, folder) of a randomly initialised model, as somebody else has saved it."""
    kind = auto(request.param)
    kind.from_config(request.param).save_pretrained(tmp_path / "hf")
    return ("mlm" if kind is hf.AutoModelForMaskedLM else "causal"), tmp_path / "hf"


def test_every_architecture_starts_and_teaches_from_the_lines_that_are_printed(folder, tmp_path):
    task, path = folder
    lines = describe(path)
    split = lines.index("# as a teacher")
    student, teacher = (yaml.safe_load("\n".join(part)) for part in (lines[lines.index("") : split], lines[split:]))
    assert student["task"] == teacher["task"] == task
    model = ModelConfig(**student["model"])
    lm = build_lm(model, task, num_classes=100, special_ids=SPECIAL, seed=0)
    expected = auto(lm.config).from_pretrained(path).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in lm.state_dict().items())
    facts = {"tokenizer_sha256": "0" * 64, "num_classes": 100, "device": torch.device("cpu")}
    _, found = make_teacher(TeacherConfig(**teacher["teacher"]), Rows(task, 16), **facts)
    assert found.num_parameters == sum(p.numel() for p in lm.parameters())
    for number, part in enumerate((student, teacher | {"inherit": {"schedule": "linear", "steps": 1}})):
        written = tmp_path / f"{number}.yaml"
        written.write_text(yaml.safe_dump(part | {"run_dir": "x", "data": {"corpus": "y"}}))
        configuration.load(written)  # the lines are a configuration's


def test_what_is_said(base, tmp_path):
    lines = describe(base / "mlm_teacher")
    assert "architecture: RobertaForMaskedLM" in lines
    assert "vocabulary: 320" in lines
    assert any(line.startswith("tokenizer: 320 ids, SHA-256") for line in lines)
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    assert "tokenizer: none; of its vocabulary only the size will be checked" in describe(tmp_path)


SMALL = {"vocab_size": 90, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (None, "is no folder"),
        (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL)), "no masked or causal language model"),
        (lambda: hf.BertLMHeadModel(hf.BertConfig(**SMALL)), "sees the tokens that it is to predict"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, words):
    if make is not None:
        make().save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=words) as caught:
        describe(tmp_path / "hf")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_model(base, tmp_path):
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    load_tokenizer(base / "mlm_teacher" / "best").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 30 output classes for the tokenizer's 320 ids"):
        describe(tmp_path)
