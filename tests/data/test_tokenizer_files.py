"""Tokenizers beside exported models: their files and nothing else, the same ids, and a beginning that was trained."""

import json
import shutil

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ki_ds.data import tokenize as module
from ki_ds.data.tokenize import load_tokenizer, tokenizer_files, tokenizer_hash, train_tokenizer
from ki_ds.errors import UserError
from tests.data.test_sentencepieces import made_up_lines
from tests.data.test_sentencepieces import trained as trained_sentencepiece


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "tokenizer"
    train_tokenizer([["the cat sees a dog in the garden"]] * 3, 280, out_dir=folder)
    return folder


def written(folder, files, config=None):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if config is not None:
        config.save_pretrained(folder)
    return folder


def begins_with_bos(eos="</s>", **roles):
    """A tokenizer of Llama's kind: `<s>` before a text, nothing behind it, and no cls."""
    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{c: i for i, c in enumerate("abĠ", 2)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, **roles)


def test_a_models_folder_gives_its_tokenizer_alone(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "model")
    hf.GPT2Config(vocab_size=280).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"another model's")
    (folder / "pytorch_model.bin").write_bytes(b"another model's")
    (folder / "onnx").mkdir()
    files = tokenizer_files(load_tokenizer(folder), limit=32, origin=folder)
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json"}
    again = hf.AutoTokenizer.from_pretrained(written(tmp_path / "out", files, hf.RobertaConfig()))
    assert again.model_max_length == 32
    assert again("the cat").input_ids == load_tokenizer(trained)("the cat").input_ids
    assert load_tokenizer(folder).model_max_length > 32


def test_a_sentencepiece_model_alone(tmp_path):
    (tmp_path / "spm.model").write_bytes(trained_sentencepiece())
    line = made_up_lines(1)[0]
    theirs = load_tokenizer(tmp_path / "spm.model")
    files = tokenizer_files(theirs, origin=tmp_path / "spm.model")
    assert files["tokenizer.model"] == (tmp_path / "spm.model").read_bytes()
    again = hf.AutoTokenizer.from_pretrained(written(tmp_path / "out", files, hf.GPT2Config()))
    assert (tokenizer_hash(again), again(line).input_ids) == (tokenizer_hash(theirs), theirs(line).input_ids)


def test_a_text_begins_with_what_training_showed(tmp_path):
    theirs = begins_with_bos()
    assert theirs("ab").input_ids == [0, 2, 3]
    again = hf.AutoTokenizer.from_pretrained(written(tmp_path / "out", tokenizer_files(theirs, first=1)))
    assert again("ab").input_ids == [1, 2, 3]
    assert (again.bos_token_id, again.eos_token_id) == (1, 1)
    assert tokenizer_hash(again) == tokenizer_hash(theirs)
    same = written(tmp_path / "same", tokenizer_files(theirs, first=0))
    assert load_tokenizer(same)("ab").input_ids == [0, 2, 3]
    assert load_tokenizer(same).bos_token_id == 0


def test_gpt2s_kind_stays_as_it_is(tmp_path):
    theirs = hf.GPT2Tokenizer(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[])
    again = hf.AutoTokenizer.from_pretrained(written(tmp_path / "out", tokenizer_files(theirs, first=2)))
    assert again("ab").input_ids == [0, 1]
    assert again.bos_token_id == again.eos_token_id == 2


def test_a_class_that_would_build_it_anew(trained, tmp_path):
    """What AutoTokenizer reads by another name is saved as a plain fast tokenizer."""
    theirs = load_tokenizer(trained)
    config = json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    files = tokenizer_files(theirs, config=config)
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "config.json" not in files


def test_a_tokenizer_that_comes_back_as_another_is_one_line(trained, monkeypatch):
    monkeypatch.setattr(module, "load_tokenizer", lambda _: begins_with_bos())
    with pytest.raises(UserError, match="gives other ids once it is saved; save it as a fast") as caught:
        tokenizer_files(load_tokenizer(trained))
    assert "\n" not in str(caught.value)
