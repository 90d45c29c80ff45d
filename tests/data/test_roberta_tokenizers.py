"""GPT-2's BPE with the ids of a dictionary, against the plain way: GPT-2's ids, looked up one by one."""

import itertools
import random

import pytest
from transformers import AutoTokenizer

from ki_ds.data.roberta_tokenizers import DictionaryTokenizer, tokenizer_with_dictionary
from ki_ds.data.store import SpecialIds
from ki_ds.data.tokenize import (
    load_tokenizer,
    read_fairseq_dict,
    save_tokenizer,
    special_ids,
    tokenizer_from_fairseq,
    tokenizer_hash,
    train_tokenizer,
)
from ki_ds.errors import UserError

WORDS = ["the", "there", "then", "cat", "cats", "scattered", "thecat", "on", "once", "–", "héros", "猫", "  "]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """(folder of a small byte-level BPE tokenizer in GPT-2's place, it)."""
    folder = tmp_path_factory.mktemp("gpt2") / "t"
    lines = [" ".join(random.Random(i).choices(WORDS, k=9)) for i in range(60)]
    return folder, train_tokenizer([lines], 330, out_dir=folder)


def texts():
    return [" ".join(random.Random(i).choices(WORDS, k=6)) for i in range(100, 200)]


def write_dictionary(path, gpt2, share, seed=0):
    """A dict.txt of some of the ids that the texts have, shuffled, between two pads."""
    used = sorted({i for text in texts() for i in gpt2(text, add_special_tokens=False).input_ids})
    chosen = random.Random(seed).sample(used, int(len(used) * share))
    path.write_text("".join(f"{symbol} 7\n" for symbol in ["madeupword0000", *chosen, "madeupword0001"]))
    return path


@pytest.mark.parametrize("share", [1.0, 0.7, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_ids_are_looked_up_in_the_dictionary(gpt2, tmp_path, share, seed):
    path = write_dictionary(tmp_path / "dict.txt", gpt2[1], share, seed)
    tokenizer = tokenizer_from_fairseq(path, gpt2[0])
    symbols, specials = read_fairseq_dict(path)
    places = {symbol: i for i, symbol in enumerate(symbols)}
    expected = [[places.get(str(i), 3) for i in gpt2[1](t, add_special_tokens=False).input_ids] for t in texts()]
    assert tokenizer(texts(), add_special_tokens=False).input_ids == expected
    assert any(3 in ids for ids in expected) == (share < 1)
    assert (len(tokenizer), tokenizer.vocab_size, len(tokenizer.get_vocab())) == (len(symbols),) * 3
    assert special_ids(tokenizer) == specials
    assert tokenizer(texts()[0]).input_ids == [0, *expected[0], 2]
    assert tokenizer("a<mask>").input_ids[-2:] == [len(symbols) - 1, 2]
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(texts()[0])) == expected[0]
    for text, ids in itertools.islice(zip(texts(), expected, strict=True), 20):
        if 3 not in ids:
            assert tokenizer.decode(ids) == text


def test_overwritten_symbols_have_the_ids_of_their_last_lines(gpt2, tmp_path):
    path = write_dictionary(tmp_path / "dict.txt", gpt2[1], 1.0)
    lines = path.read_text().splitlines()
    flag = "#fairseq:overwrite"
    again = [f"<unk> 9 {flag}", f"<s> 9 {flag}", f"</s> 9 {flag}", *lines, f"{lines[3]} {flag}", "<mask> 0", "mw 0"]
    path.write_text("\n".join(again))
    symbols, specials = read_fairseq_dict(path)
    places = {symbol: i for i, symbol in enumerate(symbols)}  # of equal symbols the last
    tokenizer = tokenizer_from_fairseq(path, gpt2[0])
    expected = [[places[str(i)] for i in gpt2[1](t, add_special_tokens=False).input_ids] for t in texts()]
    assert tokenizer(texts()).input_ids == [[0, *ids, 2] for ids in expected]
    assert any(len(symbols) - 3 in ids for ids in expected)
    assert special_ids(tokenizer) == specials == SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=len(symbols) - 2)
    assert len(tokenizer) == len(tokenizer.get_vocab()) == len(symbols)
    assert tokenizer("a<mask>").input_ids[-2:] == [len(symbols) - 2, 2]
    save_tokenizer(tokenizer, tmp_path / "t")
    assert load_tokenizer(tmp_path / "t")(texts()).input_ids == tokenizer(texts()).input_ids


def test_saved_and_loaded_it_is_the_same(gpt2, tmp_path):
    path = write_dictionary(tmp_path / "dict.txt", gpt2[1], 0.5)
    tokenizer = tokenizer_from_fairseq(path, gpt2[0])
    save_tokenizer(tokenizer, tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert isinstance(again, DictionaryTokenizer)
    assert again(texts()).input_ids == tokenizer(texts()).input_ids
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    save_tokenizer(again, tmp_path / "u")
    assert (tmp_path / "u/tokenizer.json").read_bytes() == (tmp_path / "t/tokenizer.json").read_bytes()
    # AutoTokenizer knows the folder too; what the dictionary lacks has ids behind its end there
    plain = AutoTokenizer.from_pretrained(tmp_path / "t")(texts()).input_ids
    assert [[i if i < len(tokenizer) else 3 for i in ids] for ids in plain] == tokenizer(texts()).input_ids


@pytest.mark.parametrize("content", ["hello 3\nworld 2\n", "999999 1\n", "7 3\ne 1\n"])
def test_dictionaries_of_something_else(gpt2, tmp_path, content):
    (tmp_path / "dict.txt").write_text(content)
    with pytest.raises(UserError, match=r"dict\.txt does not list GPT-2 ids"):
        tokenizer_from_fairseq(tmp_path / "dict.txt", gpt2[0])


def test_a_tokenizer_that_is_no_bpe(gpt2):
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "7", "<mask>"]
    with pytest.raises(UserError, match="must be GPT-2's byte-level BPE"):
        tokenizer_with_dictionary(symbols, SpecialIds(), object(), name="d")  # type: ignore
