"""Tokenizer and dictionary beside a converted model: of the right size, or refused in one line."""

import json

import pytest
import transformers as hf
from tokenizers import pre_tokenizers

from ki_ds.convert.folder import beside_model
from ki_ds.convert.sources import Source
from ki_ds.data.corpora import Document
from ki_ds.data.tokenize import load_tokenizer, train_tokenizer
from ki_ds.errors import UserError


def model_of(vocab_size):
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=1, n_positions=16))


def write_vocabulary(found_source, folder, model, *, tokenizer):
    """The lines about a vocabulary whose files were written into a folder."""
    beside = beside_model(found_source, model, tokenizer=tokenizer)
    for name, content in beside.files.items():
        (folder / name).write_bytes(content)
    return beside.lines


def source(task="mlm", **changed):
    return Source(what="x", task=task, files=(), model=lambda dtype: None, **({"pads_vocabulary": False} | changed))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary") / "tokenizer"
    train_tokenizer([Document("one", ["the cat sees a dog"] * 3)], 265, out_dir=folder)
    return folder


@pytest.fixture
def gpt2(tmp_path):
    """GPT-2's byte-level vocabulary, cut short, and a dictionary of it: four letters and one made-up word."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "th", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    dictionary = tmp_path / "dict.txt"
    ids = [*range(256), 256]
    dictionary.write_text("".join(f"{i} {1000 - i}\n" for i in ids) + "madeupword0000 0\n")
    return folder, dictionary, 4 + len(ids) + 1


def test_a_plain_tokenizer_of_the_right_size(tokenizer, tmp_path):
    size = len(load_tokenizer(tokenizer))
    lines = write_vocabulary(source(), tmp_path, model_of(size), tokenizer=tokenizer)
    assert lines == [f"tokenizer of {size} ids"]
    assert load_tokenizer(tmp_path).model_max_length == 16
    for other in (size - 1, size + 1):
        with pytest.raises(
            UserError, match=rf"--tokenizer=.* has {size} ids, the model's embedding {other}; give its own"
        ):
            write_vocabulary(source(), tmp_path, model_of(other), tokenizer=tokenizer)


def test_a_padded_embedding_is_cut_to_the_tokenizer(tokenizer, tmp_path):
    size = len(load_tokenizer(tokenizer))
    ours = source(pads_vocabulary=True, tokenizer_dir=tokenizer)
    lines = write_vocabulary(ours, tmp_path, model_of(320), tokenizer=None)
    assert lines[1] == f"left out: the embedding's {320 - size} rows of padding beyond {size} ids"
    assert beside_model(ours, model_of(320), tokenizer=None).num_ids == size
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    for other in (size - 1, size + 2000):
        with pytest.raises(UserError, match="the model's embedding"):
            write_vocabulary(ours, tmp_path, model_of(other), tokenizer=None)
    with pytest.raises(UserError, match="has the model's own; leave it out"):
        write_vocabulary(ours, tmp_path, model_of(320), tokenizer=tokenizer)


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_a_dictionary_with_gpt2s_vocabulary(gpt2, tmp_path, task):
    folder, dictionary, num_symbols = gpt2
    size = num_symbols + (task == "mlm")
    made = tmp_path / "out"
    made.mkdir()
    lines = write_vocabulary(source(task, dictionary=dictionary), made, model_of(size), tokenizer=folder)
    assert lines[0] == f"dict.txt: fairseq's dictionary of {size} ids"
    assert ("<mask>, the tokenizer's last id, is no id of the model" in lines) is (task == "causal")
    assert (made / "dict.txt").read_bytes() == dictionary.read_bytes()
    ids = load_tokenizer(made)("the")["input_ids"]
    assert (ids[0], ids[-1] == 2) == ((0, True) if task == "mlm" else (2, False))
    assert max(ids) < size
    with pytest.raises(UserError, match=rf"dict\.txt has {size} ids, the model's embedding {size + 1}"):
        write_vocabulary(source(task, dictionary=dictionary), made, model_of(size + 1), tokenizer=None)


def test_pieces_that_the_dictionary_lacks_are_said(gpt2, tmp_path):
    folder, dictionary, num_symbols = gpt2
    dictionary.write_text("".join(line + "\n" for line in dictionary.read_text().splitlines() if line != "256 744"))
    made = tmp_path / "out"
    made.mkdir()
    lines = write_vocabulary(source(dictionary=dictionary), made, model_of(num_symbols), tokenizer=folder)
    assert any("dictionary lacks 2 pieces" in line for line in lines)


def test_no_tokenizer(gpt2, tmp_path):
    assert write_vocabulary(source(), tmp_path, model_of(9), tokenizer=None)[-1].startswith("no tokenizer")
    with pytest.raises(UserError, match="does not exist"):
        write_vocabulary(source(), tmp_path, model_of(9), tokenizer=tmp_path / "nothing")
    with pytest.raises(UserError, match="no readable fairseq dictionary"):
        write_vocabulary(source(dictionary=tmp_path / "no.txt"), tmp_path, model_of(9), tokenizer=None)
