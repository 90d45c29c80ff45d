"""From a configuration to data sets: every kind of source, its parts, its validation, and what is refused."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ki_ds.config import DataConfig, SourceConfig
from ki_ds.data import datasets as module
from ki_ds.data.datasets import check_tokenizer, dictionary_hash, open_datasets, word_beginnings
from ki_ds.data.index_cache import FOLDER_NAME
from ki_ds.data.prepare import open_corpus
from ki_ds.data.store import Manifest
from ki_ds.data.tokenize import former_tokenizer_hash, load_tokenizer
from ki_ds.errors import UserError
from tests.tiny import tiny_corpus

RELEASED = Path(os.environ.get("KI_DS_SHARED", Path(__file__).parents[3] / "shared")) / "fairseq/data-bin"
GPT2 = RELEASED.parents[1] / "data/tok/gpt2"
released = pytest.mark.skipif(not RELEASED.is_dir(), reason="released fairseq files (KI_DS_SHARED) are not there")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two corpora of one tokenizer, `wb` and `cs`, and one of another."""
    base = tmp_path_factory.mktemp("datasets")
    tiny_corpus(base / "wb")
    tiny_corpus(base / "cs", seed=5, num_documents=80, tokenizer=base / "wb" / "tokenizer")
    tiny_corpus(base / "other", vocab_size=300)
    return base


def opened(base, task="mlm", **data):
    return open_datasets(DataConfig(**{"seq_len": 32} | data), task, other_index_dir=base / "index")


def sources(base, *entries):
    return [SourceConfig(str(base / name), **settings) for name, settings in entries]


def tokens_of(dataset):
    """The text of a data set, sample by sample."""
    text = []
    for i in range(len(dataset)):
        sample = dataset.sample(i, seed=0, epoch=0)
        ids = sample.input_ids_T.copy()
        ids[sample.positions_N] = sample.labels_N
        text.append(ids[1:].tolist())
    return text


class TestSources:
    def test_a_corpus_folder_is_one_source(self, base):
        data = opened(base, corpus=str(base / "wb"))
        assert data.domains == data.trained_domains == ("wb",)
        assert list(data.valid) == ["wb"]
        info = open_corpus(base / "wb").info
        assert sum(map(len, tokens_of(data.train))) == info["counts"]["train"]["tokens"]
        assert sum(map(len, tokens_of(data.valid["wb"]))) == info["counts"]["valid"]["tokens"]
        manifest = json.loads((base / "wb/train.json").read_text())
        assert data.hashes["train_sha256"] == manifest["bin_sha256"]
        assert data.hashes["tokenizer_sha256"] == info["tokenizer_hash"]

    def test_several_sources_are_several_domains(self, base):
        entries = [("wb", {"domain": "books"}), ("cs", {}), ("wb", {"domain": "books", "half": "A"})]
        data = opened(base, sources=sources(base, *entries), valid={"books": str(base / "wb"), "cs": str(base / "cs")})
        assert data.domains == ("books", "cs")
        assert {d.domain_id for d in data.train.datasets} == {0, 1}
        assert list(data.valid) == ["books", "cs"]
        assert len(data.train) == sum(map(len, data.train.datasets))

    def test_parts_of_a_source(self, base):
        whole = opened(base, corpus=str(base / "wb"), break_mode="eos").train
        halves = [opened(base, sources=sources(base, ("wb", {"half": h})), break_mode="eos") for h in "AB"]
        lines = [sorted(map(tuple, tokens_of(half.train))) for half in halves]
        assert sorted(lines[0] + lines[1]) == sorted(map(tuple, tokens_of(whole)))
        assert len({half.hashes["train_sha256"] for half in halves}) == 2
        quarter = opened(base, sources=sources(base, ("wb", {"half": "A", "fraction": 0.5})), break_mode="eos")
        few = opened(base, sources=sources(base, ("wb", {"half": "A", "max_tokens": 200})), break_mode="eos")
        totals = [data.train.datasets[0].num_tokens for data in (halves[0], quarter, few)]
        assert totals[1] == pytest.approx(totals[0] / 2, abs=32)
        assert abs(totals[2] - 200) < 32

    def test_a_prefix_and_a_glob_are_read_with_a_tokenizer(self, base, tmp_path):
        for name, source in (("part_2", "wb"), ("part_10", "cs")):
            for suffix in (".bin", ".idx"):
                shutil.copy(base / source / f"train{suffix}", tmp_path / f"{name}{suffix}")
        tokenizer = str(base / "wb/tokenizer")
        with pytest.raises(UserError, match=r"has no tokenizer beside it; name its folder with data\.tokenizer"):
            opened(base, corpus=str(tmp_path / "part_2"))
        with pytest.raises(UserError, match=r"no validation part; give data\.valid_fraction"):
            opened(base, corpus=str(tmp_path / "part_2"), tokenizer=tokenizer)
        data = opened(base, corpus=str(tmp_path / "part_*"), tokenizer=tokenizer, valid_fraction=0.1)
        expected = [token for name in ("wb", "cs") for token in open_tokens(base / name)]
        found = tokens_of(
            opened(base, corpus=str(tmp_path / "part_*"), tokenizer=tokenizer, valid={"x": str(base / "wb")}).train
        )
        assert [token for block in found for token in block] == expected
        shares = [d.datasets[0].num_tokens / len(expected) for d in (data.train, data.valid["part_*"])]
        assert shares == pytest.approx([0.9, 0.1], abs=0.01)
        apart = opened(
            base, corpus=str(tmp_path / "part_2"), tokenizer=tokenizer, valid={"x": str(tmp_path / "part_10")}
        )
        assert apart.valid["x"].datasets[0].num_tokens == len(open_tokens(base / "cs"))
        assert (apart.domains, apart.trained_domains) == (("part_2", "x"), ("part_2",))

    @released
    @pytest.mark.parametrize("task", ["mlm", "causal"])
    def test_a_released_folder_as_it_is(self, task, tmp_path):
        config = DataConfig(corpus=str(RELEASED), seq_len=128)
        data = open_datasets(config, task, other_index_dir=tmp_path)
        assert data.vocabulary.size == (4129 if task == "mlm" else 4128)
        assert data.vocabulary.tokenizer is None
        assert data.hashes["tokenizer_sha256"] == dictionary_hash(RELEASED / "dict.txt")
        assert data.train.datasets[0].view.num_tokens == 135_496
        data.vocabulary.export(tmp_path, task)
        assert dictionary_hash(tmp_path / "dict.txt") == data.vocabulary.sha256

    @released
    def test_a_released_folder_with_gpt2_gets_words_and_a_tokenizer(self, tmp_path):
        config = DataConfig(corpus=str(RELEASED), seq_len=128, tokenizer=str(GPT2), whole_words=True)
        data = open_datasets(config, "mlm", other_index_dir=tmp_path / "index")
        assert data.hashes["tokenizer_sha256"] == dictionary_hash(RELEASED / "dict.txt")
        data.vocabulary.export(tmp_path, "mlm")
        tokenizer = load_tokenizer(tmp_path)
        assert len(tokenizer) == 4129
        store = data.train.datasets[0].view.stores[0]
        lines = [line for i in range(60) if 3 not in (line := store.item(i).tolist())]  # 3: not in this small dict
        assert len(lines) > 5
        for line in lines:
            assert tokenizer(tokenizer.decode(line[:-1]), add_special_tokens=False).input_ids == line[:-1]
        sample = data.train.sample(0, seed=0, epoch=0)
        begins = data.train.datasets[0]._begins_word_V
        whole = sample.input_ids_T.copy()
        whole[sample.positions_N] = sample.labels_N
        labelled = set(sample.positions_N.tolist())
        going_on = [t for t in range(1, len(whole)) if not begins[whole[t]]]
        assert going_on
        assert all((t in labelled) == (t - 1 in labelled) for t in going_on)

    def test_shards_of_a_fairseq_folder(self, tmp_path):
        for name, lines in (("train", [[5, 6, 2], [2]]), ("train1", [[7, 8, 9, 2]] * 9), ("valid", [[4] * 9 + [2]])):
            write_fairseq(tmp_path / name, lines)
        (tmp_path / "dict.txt").write_text("".join(f"{i} 1\n" for i in range(10)))
        data = opened(tmp_path, "causal", corpus=str(tmp_path), seq_len=8, break_mode="none_doc")
        inputs = [data.train.sample(i, seed=0, epoch=0).labels_N.tolist() for i in range(len(data.train))]
        assert inputs[0] == [5, 6, 2, 2]  # up to the blank line, which ends its document
        assert data.train.datasets[0].view.num_tokens == 4 + 36
        assert data.vocabulary.special_ids.mask is None


def open_tokens(folder):
    return np.fromfile(folder / "train.bin", np.uint16).tolist()


def write_fairseq(prefix, lines):
    """A fairseq mmap store, byte by byte."""
    sizes = np.array([len(line) for line in lines], "<i4")
    pointers = ((np.cumsum(sizes) - sizes) * 2).astype("<i8")
    head = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([8]) + len(lines).to_bytes(8, "little")
    prefix.with_suffix(".idx").write_bytes(head + sizes.tobytes() + pointers.tobytes())
    prefix.with_suffix(".bin").write_bytes(np.array([i for line in lines for i in line], "<u2").tobytes())


class TestIndex:
    def test_a_second_start_makes_no_pass_over_the_corpus(self, base, monkeypatch):
        settings = {"sources": sources(base, ("wb", {"half": "B"}), ("cs", {})), "index_dir": str(base / "kept")}
        first = opened(base, **settings)
        monkeypatch.setattr(module, "index_blocks", lambda *_: pytest.fail("a pass over the corpus"))
        monkeypatch.setattr(module, "select", lambda *_, **__: pytest.fail("a pass over the corpus"))
        second = opened(base, **settings)
        assert tokens_of(second.train) == tokens_of(first.train)
        assert second.hashes == first.hashes
        assert not (base / "kept" / FOLDER_NAME).exists()

    def test_lines_that_are_too_long_are_told(self, base):
        split = opened(base, corpus=str(base / "wb"), seq_len=8)
        assert any("training lines are longer" in note and "were split" in note for note in split.notes)
        dropped = opened(base, corpus=str(base / "wb"), seq_len=22, long_lines="drop")
        assert any("were dropped" in note for note in dropped.notes)
        assert opened(base, corpus=str(base / "wb"), seq_len=128).notes == ()

    def test_whole_words_follow_the_tokenizer(self, base):
        data = opened(base, corpus=str(base / "wb"), whole_words=True)
        begins = word_beginnings(load_tokenizer(base / "wb/tokenizer"))
        going_on = 0
        for number in range(20):
            sample = data.train.sample(number, seed=0, epoch=0)
            text = sample.input_ids_T.copy()
            text[sample.positions_N] = sample.labels_N
            labelled = set(sample.positions_N.tolist())
            inside = [t for t in range(1, len(text)) if not begins[text[t]]]
            going_on += len(inside)
            assert all((t in labelled) == (t - 1 in labelled) for t in inside)
        assert going_on > 50


def with_former_hash(corpus):
    """The corpus as versions before the present hash of tokenizers wrote it; that hash."""
    former = former_tokenizer_hash(load_tokenizer(corpus / "tokenizer"))
    for path in (corpus / "train.json", corpus / "valid.json"):
        path.write_text(dataclasses.replace(Manifest.read(path), tokenizer_hash=former).to_json())
    return former


def set_token(folder, **tokens):
    """Change special tokens in the configuration of a tokenizer; None takes one away."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | tokens
    path.write_text(json.dumps({name: token for name, token in config.items() if token is not None}))


class TestTokenizers:
    def test_corpora_with_the_former_hash_stay_what_they_were(self, base, tmp_path):
        shutil.copytree(base / "wb", tmp_path / "wb")
        former = with_former_hash(tmp_path / "wb")
        data, now = opened(base, corpus=str(tmp_path / "wb")), opened(base, corpus=str(base / "wb"))
        assert data.hashes["tokenizer_sha256"] == former != now.hashes["tokenizer_sha256"]
        assert (data.vocabulary.sha256, data.vocabulary.special_ids) == (
            now.vocabulary.sha256,
            now.vocabulary.special_ids,
        )
        assert tokens_of(data.train) == tokens_of(now.train)
        mixed = opened(base, sources=[SourceConfig(str(tmp_path / "wb")), SourceConfig(str(base / "cs"))])
        assert len(mixed.train) > len(data.train)

    @pytest.mark.parametrize("task", ["mlm", "causal"])
    def test_padding_parts_no_corpora_and_no_models(self, base, tmp_path, task):
        for name, pad in (("none", None), ("eos", "</s>")):
            shutil.copytree(base / "cs", tmp_path / name)
            set_token(tmp_path / name / "tokenizer", pad_token=pad)
        paths = [base / "wb", tmp_path / "none", tmp_path / "eos"]
        data = opened(base, task=task, sources=[SourceConfig(str(path)) for path in paths])
        assert len(data.train.datasets) == 3
        for path in paths:
            assert check_tokenizer(str(path / "tokenizer"), data.vocabulary.sha256, task, what="model")

    def test_another_mask_is_another_tokenizer_for_masks_alone(self, base, tmp_path):
        shutil.copytree(base / "wb/tokenizer", tmp_path / "t")
        set_token(tmp_path / "t", mask_token="<pad>")
        causal, mlm = (opened(base, task=task, corpus=str(base / "wb")).vocabulary.sha256 for task in ("causal", "mlm"))
        assert check_tokenizer(str(tmp_path / "t"), causal, "causal", what="model")
        with pytest.raises(UserError, match="has another tokenizer"):
            check_tokenizer(str(tmp_path / "t"), mlm, "mlm", what="model")

    @pytest.mark.parametrize(
        "change", [{"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Whitespace"}}]
    )
    def test_other_ids_of_a_text_are_refused(self, base, tmp_path, change):
        shutil.copytree(base / "wb/tokenizer", tmp_path / "t")
        path = tmp_path / "t/tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        sha256 = opened(base, corpus=str(base / "wb")).vocabulary.sha256
        with pytest.raises(UserError, match="has another tokenizer"):
            check_tokenizer(str(tmp_path / "t"), sha256, "mlm", what="model")


class TestRefused:
    def test_no_corpus(self, base):
        with pytest.raises(UserError, match="is no prepared corpus, no fairseq folder"):
            opened(base, corpus=str(base / "nothing"))

    def test_another_tokenizer(self, base):
        with pytest.raises(UserError, match="have different tokenizers"):
            opened(base, sources=sources(base, ("wb", {}), ("other", {})))

    @pytest.mark.parametrize("file", ["train.bin", "valid.bin", "train.idx"])
    def test_a_change_of_equal_length(self, base, tmp_path, file):
        shutil.copytree(base / "wb", tmp_path / "wb")
        opened(base, corpus=str(tmp_path / "wb"))
        data = bytearray((tmp_path / "wb" / file).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "wb" / file).write_bytes(data)
        with pytest.raises(UserError, match=r"the file was changed|damaged"):
            opened(base, corpus=str(tmp_path / "wb"))

    def test_a_tokenizer_that_was_exchanged(self, base, tmp_path):
        shutil.copytree(base / "wb", tmp_path / "wb")
        shutil.rmtree(tmp_path / "wb/tokenizer")
        shutil.copytree(base / "other/tokenizer", tmp_path / "wb/tokenizer")
        with pytest.raises(UserError, match="was made with another tokenizer"):
            opened(base, corpus=str(tmp_path / "wb"))

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"tokenizer": "other/tokenizer"}, "every corpus has its own"),
            ({"valid_fraction": 0.1}, "every corpus has a validation part"),
        ],
    )
    def test_options_that_no_corpus_has_a_use_for(self, base, option, message):
        option = {name: str(base / value) if name == "tokenizer" else value for name, value in option.items()}
        with pytest.raises(UserError, match=f"has no meaning: {message}"):
            opened(base, corpus=str(base / "wb"), **option)

    def test_text_that_is_trained_on_is_not_measured(self, base, tmp_path):
        for suffix in (".bin", ".idx"):
            shutil.copy(base / f"wb/train{suffix}", tmp_path / f"part{suffix}")
        path = str(tmp_path / "part")
        with pytest.raises(UserError, match=r"data\.valid\.x=.* is trained on and has no validation part"):
            opened(base, corpus=path, tokenizer=str(base / "wb/tokenizer"), valid={"x": path})

    @released
    def test_whole_words_of_a_dictionary_without_a_tokenizer(self, tmp_path):
        with pytest.raises(UserError, match=r"name GPT-2's folder with data\.tokenizer"):
            open_datasets(DataConfig(corpus=str(RELEASED), whole_words=True), "mlm", other_index_dir=tmp_path)


TEXT = ["the teacher teaches the taught student", "the student teaches nobody", "teachable teachers taught there"] * 9


def trained(kind):
    """A tokenizer of a kind, with `<s>` as its only special token."""
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=266, special_tokens=["<s>"], initial_alphabet=alphabet)
    elif kind == "pieces":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=40, special_tokens=["<s>"], unk_token="<s>")
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<s>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece() if kind == "wordpiece" else None
        trainer = trainers.WordPieceTrainer(vocab_size=32, special_tokens=["<s>"])
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<s>")


@pytest.mark.parametrize("kind", ["bytes", "pieces", "wordpiece"])
def test_words_of_a_text_are_those_between_blanks(kind):
    tokenizer = trained(kind)
    begins = word_beginnings(tokenizer)
    assert begins.shape == (len(tokenizer),)
    assert begins[tokenizer.bos_token_id]
    for text in TEXT[:3]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        starts = [i for i, token in enumerate(ids) if begins[token] or i == 0]
        words = [tokenizer.decode(ids[a:b]).strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert words == text.split()
        assert len(ids) > len(words)  # some words have several tokens, else nothing was tested


def test_a_tokenizer_without_a_mark_is_refused():
    with pytest.raises(UserError, match="no mark for the beginning of a word"):
        word_beginnings(trained("none"))
