"""Tokenizers: trained, loaded, compared."""

import json
import os
from pathlib import Path

import pytest

from ki_ds.data.corpora import Document
from ki_ds.data.store import SpecialIds
from ki_ds.data.tokenize import (
    load_tokenizer,
    read_fairseq_dict,
    save_tokenizer,
    special_ids,
    tokenizer_hash,
    train_tokenizer,
)
from ki_ds.errors import UserError

SHARED = Path(os.environ.get("KI_DS_SHARED", Path(__file__).parents[3] / "shared"))
shared = pytest.mark.skipif(not (SHARED / "data/tok").is_dir(), reason="vocabularies (KI_DS_SHARED) are not there")
TEXT = Document(("The cat – sat on the mat, twice.", "Then the cat sat on the hat."), "d")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok") / "tokenizer"
    return folder, train_tokenizer([TEXT] * 4, 280, out_dir=folder)


class TestTraining:
    def test_ids_and_template_are_robertas(self, trained):
        _, tokenizer = trained
        assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 4]
        assert special_ids(tokenizer) == SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=4)
        assert len(tokenizer) == 280
        ids = tokenizer("the cat").input_ids
        assert (ids[0], ids[-1]) == (0, 2)
        assert tokenizer("a <mask>").input_ids[-2] == 4

    @pytest.mark.parametrize("text", ["The cat", " two  blanks ", "naïve – 猫\tx", "<mas k>"])
    def test_every_text_comes_back(self, trained, text):
        _, tokenizer = trained
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text

    def test_training_is_repeatable_and_auto_tokenizer_loads_it(self, trained, tmp_path):
        from transformers import AutoTokenizer

        folder, tokenizer = trained
        again = train_tokenizer([TEXT] * 4, 280, out_dir=tmp_path / "t")
        assert (tmp_path / "t/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
        assert AutoTokenizer.from_pretrained(folder)("the").input_ids == tokenizer("the").input_ids

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"vocab_size": 260}, "vocab_size=260 is below 261"), ({"kind": "words"}, "kind='words'")],
    )
    def test_bad_settings(self, tmp_path, settings, message):
        with pytest.raises(UserError, match=message):
            train_tokenizer([TEXT], **{"vocab_size": 280, "out_dir": tmp_path / "t"} | settings)

    def test_no_overwriting(self, trained):
        with pytest.raises(UserError, match="exists already"):
            train_tokenizer([TEXT], 280, out_dir=trained[0])

    def test_a_failed_save_leaves_nothing(self, tmp_path):
        class Full:
            def save_pretrained(self, folder):
                folder.mkdir()
                raise Exception("File too large (os error 27)")  # as the tokenizers library says it

        with pytest.raises(UserError, match="free space"):
            save_tokenizer(Full(), tmp_path / "t")
        assert list(tmp_path.iterdir()) == []


class TestLoading:
    @shared
    def test_gpt2_has_neither_mask_nor_padding(self):
        tokenizer = load_tokenizer(SHARED / "data/tok/gpt2")
        assert len(tokenizer) == 50_257
        assert special_ids(tokenizer) == SpecialIds(bos=50_256, eos=50_256, unk=50_256)
        assert tokenizer("Hello world").input_ids == [15496, 995]

    @shared
    def test_roberta(self):
        tokenizer = load_tokenizer(str(SHARED / "data/tok/roberta"))
        assert len(tokenizer) == 50_265
        assert special_ids(tokenizer) == SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=50_264)
        assert tokenizer("Hello world").input_ids == [0, 31414, 232, 2]
        assert tokenizer_hash(tokenizer) != tokenizer_hash(load_tokenizer(SHARED / "data/tok/gpt2"))

    def test_missing_folder_and_folder_of_something_else(self, tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            load_tokenizer(tmp_path / "no")
        with pytest.raises(UserError, match="no tokenizer can be loaded"):
            load_tokenizer(tmp_path)
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        (tmp_path / "vocab.json").write_text("{")
        with pytest.raises(UserError, match="no tokenizer can be loaded"):
            load_tokenizer(tmp_path)

    def test_bert_names_stand_for_bos_and_eos(self, tmp_path):
        from transformers import BertTokenizer

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        assert special_ids(tokenizer) == SpecialIds(bos=2, pad=0, eos=3, unk=1, mask=4)


class TestHash:
    @pytest.mark.parametrize("change", ["swap", "merges", "special"])
    def test_what_changes_the_meaning_of_ids_changes_the_hash(self, trained, tmp_path, change):
        folder, tokenizer = trained
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        data = json.loads((tmp_path / "tokenizer.json").read_text())
        vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
        if change == "swap":
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        elif change == "merges":
            merges[0], merges[1] = merges[1], merges[0]
        else:
            config = json.loads((tmp_path / "tokenizer_config.json").read_text())
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<unk>"}))
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        assert tokenizer_hash(load_tokenizer(tmp_path)) != tokenizer_hash(tokenizer)

    def test_where_it_was_loaded_from_does_not(self, trained, tmp_path):
        _, tokenizer = trained
        tokenizer.save_pretrained(tmp_path / "copy")
        assert tokenizer_hash(load_tokenizer(tmp_path / "copy")) == tokenizer_hash(tokenizer)


class TestFairseqDict:
    def test_ids_follow_the_lines(self, tmp_path):
        (tmp_path / "dict.txt").write_text("13 850\na b 7\nmadeupword0000 0\n")
        symbols, specials = read_fairseq_dict(tmp_path / "dict.txt")
        assert symbols == ["<s>", "<pad>", "</s>", "<unk>", "13", "a b", "madeupword0000", "<mask>"]
        assert specials == SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=7)

    @shared
    def test_the_released_dictionary(self):
        symbols, specials = read_fairseq_dict(SHARED / "fairseq/data-bin/dict.txt")
        assert (len(symbols), specials.mask) == (4129, 4128)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"13 850\n\n", "line 2"),
            (b"13\n", "line 1"),
            (b"13 x\n", "line 1"),
            (b"", "line 1"),
            (b"13 1\n13 2\n", "'13' twice"),
            (b"\xff 1\n", "no readable"),
        ],
    )
    def test_malformed(self, tmp_path, content, message):
        (tmp_path / "dict.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_fairseq_dict(tmp_path / "dict.txt")
        with pytest.raises(UserError, match="no readable"):
            read_fairseq_dict(tmp_path / "other.txt")
