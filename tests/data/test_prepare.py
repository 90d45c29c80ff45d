"""Corpus folders: the same for any number of workers, whole or not there, split by documents."""

import contextlib
import itertools
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from backports import zstd
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ki_ds.data import corpora, prepare
from ki_ds.data.prepare import TokenizerSpec, build_store, open_corpus
from ki_ds.data.processes import StoppedError
from ki_ds.data.store import open_store
from ki_ds.data.tokenize import former_tokenizer_hash, load_tokenizer, tokenizer_hash
from ki_ds.errors import UserError
from tests import forked

ROOT = Path(__file__).parents[2]
SPEC = TokenizerSpec(vocab_size=300)
WORDS = ["tea", "water", "cup", "green", "black", "hot", "–", "Leaf", "of", "the"]


def write_text(folder, *, num_documents=60, seed=0):
    """One text file of random documents; their lines."""
    rng = np.random.default_rng(seed)
    documents = [
        [" ".join(rng.choice(WORDS, rng.integers(1, 20))) + f" {i}." for _ in range(rng.integers(1, 6))]
        for i in range(num_documents)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("\n\n".join("\n".join(lines) for lines in documents))
    return folder / "text.txt", documents


def write_dump(path, text, *, num_pages):
    """A MediaWiki dump of pages that are numbered and say the same."""
    pages = "".join(
        f"<page><title>{i}</title><ns>0</ns><id>{i}</id><revision><id>{i}</id><timestamp>2016-01-01T00:00:00Z"
        f"</timestamp><text>{text}</text></revision></page>"
        for i in range(num_pages)
    )
    path.write_text(f"<mediawiki><siteinfo></siteinfo>{pages}</mediawiki>")
    return path


def build(source, out, tokenizer=SPEC, **settings):
    return build_store([source], tokenizer, out, **{"num_workers": 1, "show_progress": False, **settings})


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def file_size_limit(num_bytes):
    """A disk on which no file gets larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    source, documents = write_text(folder)
    return source, documents, build(source, folder / "corpus")


class TestResult:
    def test_every_line_is_an_item_that_ends_with_eos_and_nothing_is_lost(self, prepared):
        _, documents, corpus = prepared
        tokenizer = load_tokenizer(corpus.tokenizer_dir)
        found = []
        for prefix in (corpus.train_prefix, corpus.valid_prefix):
            store = open_store(prefix)
            assert all(store.item(i)[-1] == 2 for i in range(store.num_items))
            lines = [tokenizer.decode(store.item(i)[:-1].tolist()) for i in range(store.num_items)]
            bounds = store.document_indices.tolist()
            found += [lines[a:b] for a, b in itertools.pairwise(bounds)]
        assert sorted(found) == sorted(documents)

    def test_the_manifests_tell_what_was_done(self, prepared):
        source, documents, corpus = prepared
        counts = corpus.info["counts"]
        assert counts["train"]["documents"] + counts["valid"]["documents"] == len(documents)
        assert corpus.info["num_characters"] == sum(len(line) for lines in documents for line in lines)
        for name, prefix in (("train", corpus.train_prefix), ("valid", corpus.valid_prefix)):
            manifest = open_store(prefix).verify()
            assert manifest.tokenizer_hash == tokenizer_hash(load_tokenizer(corpus.tokenizer_dir))
            assert manifest.vocab_size == corpus.info["vocab_size"] == 300
            assert manifest.special_ids.mask == 4
            assert manifest.source["split"] == name
            assert manifest.source["files"][0]["name"] == source.name
            assert manifest.num_tokens == counts[name]["tokens"] == open_store(prefix).num_tokens

    def test_called_again_it_finds_what_an_earlier_version_made(self, prepared, tmp_path):
        source, _, corpus = prepared
        tokenizer = corpus.tokenizer_dir
        made = build(source, tmp_path / "c", tokenizer=tokenizer)
        former = former_tokenizer_hash(load_tokenizer(tokenizer))
        info = made.info | {"inputs": made.info["inputs"] | {"tokenizer": former}}
        (tmp_path / "c/corpus.json").write_text(json.dumps(info))
        before = contents(tmp_path / "c")
        build(source, tmp_path / "c", tokenizer=tokenizer)
        assert contents(tmp_path / "c") == before

    def test_two_workers_write_the_same_bytes(self, prepared, tmp_path, monkeypatch):
        source, _, corpus = prepared
        monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 200)
        build(source, tmp_path / "c", num_workers=2)
        assert contents(tmp_path / "c") == contents(corpus.folder)

    def test_parts_of_long_documents_write_the_same_training_store(self, prepared, tmp_path, monkeypatch):
        source, _, _ = prepared
        whole = build(source, tmp_path / "whole", valid_fraction=0)
        monkeypatch.setattr(corpora, "MAX_PART_CHARACTERS", 20)
        monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 30)
        parts = build(source, tmp_path / "parts", valid_fraction=0)
        assert whole.valid_prefix is None
        assert contents(whole.folder) == contents(parts.folder)

    def test_names_of_special_tokens_in_a_text_stay_text(self, prepared, tmp_path):
        (tmp_path / "in.txt").write_text("tea </s> <mask> <s>cup\n\nwater")
        corpus = build(tmp_path / "in.txt", tmp_path / "c", prepared[2].tokenizer_dir, valid_fraction=0)
        store = open_store(corpus.train_prefix)
        assert [store.item(i).tolist().index(2) + 1 for i in (0, 1)] == store.sizes.tolist()
        assert set(store.tokens.tolist()) & set(range(5)) == {2}
        decoded = load_tokenizer(corpus.tokenizer_dir).decode(store.item(0)[:-1].tolist())
        assert decoded == "tea </s> <mask> <s>cup"

    def test_a_given_tokenizer_is_copied_beside_the_data(self, prepared, tmp_path):
        source, _, corpus = prepared
        again = build(source, tmp_path / "c", tokenizer=corpus.tokenizer_dir)
        assert (again.folder / "train.bin").read_bytes() == (corpus.folder / "train.bin").read_bytes()
        assert load_tokenizer(again.tokenizer_dir).mask_token_id == 4

    def test_two_processes_write_the_same_bytes_of_a_dump(self, prepared, tmp_path, monkeypatch):
        source = write_dump(tmp_path / "a.xml", "[[Tea]] is a [[drink|beverage]].", num_pages=60)
        one = build(source, tmp_path / "one", prepared[2].tokenizer_dir)
        monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 300)
        two = build(source, tmp_path / "two", prepared[2].tokenizer_dir, num_workers=2)
        assert contents(one.folder) == contents(two.folder)
        store = open_store(one.train_prefix)
        assert load_tokenizer(one.tokenizer_dir).decode(store.item(0)[:-1].tolist()) == "Tea is a beverage."

    def test_tables_and_packed_text_make_the_same_stores(self, prepared, tmp_path):
        source, documents, corpus = prepared
        texts = ["\n".join(lines) for lines in documents]
        pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet")
        (tmp_path / "a.txt.zst").write_bytes(zstd.compress(source.read_bytes()))
        for path in (tmp_path / "a.parquet", tmp_path / "a.txt.zst"):
            made = build(path, tmp_path / f"c{path.suffix}", corpus.tokenizer_dir, text_key="body", valid_fraction=0)
            store = open_store(made.train_prefix)
            lines = [store.item(i).tolist() for i in range(store.num_items)]
            tokenizer = load_tokenizer(corpus.tokenizer_dir)
            assert [tokenizer.decode(ids[:-1]) for ids in lines] == [line for d in documents for line in d]

    @pytest.mark.parametrize("kind", ["unigram", "sp_bpe"])
    def test_a_sentencepiece_tokenizer_is_trained_and_loses_nothing(self, prepared, tmp_path, kind):
        source, documents, _ = prepared
        size = 300 if kind == "unigram" else 320
        spec = TokenizerSpec(vocab_size=size, kind=kind)
        corpus = build(source, tmp_path / "c", spec, valid_fraction=0)
        assert (corpus.tokenizer_dir / "tokenizer.model").exists()
        tokenizer, store = load_tokenizer(corpus.tokenizer_dir), open_store(corpus.train_prefix)
        lines = [tokenizer.decode(store.item(i)[:-1].tolist()) for i in range(store.num_items)]
        assert lines == [line for lines in documents for line in lines]
        assert build(source, tmp_path / "c", spec, valid_fraction=0).info == corpus.info
        with pytest.raises(UserError, match="was prepared with other tokenizer"):
            build(source, tmp_path / "c", valid_fraction=0)

    @pytest.mark.parametrize("suffix", ["txt", "xml"])  # in this process, in worker processes
    def test_ids_of_a_fairseq_dictionary(self, prepared, tmp_path, suffix):
        _, _, corpus = prepared
        gpt2 = load_tokenizer(corpus.tokenizer_dir)
        text = "hot tea, green cup"
        ids = gpt2(text, add_special_tokens=False).input_ids
        (tmp_path / "dict.txt").write_text("".join(f"{i} 1\n" for i in dict.fromkeys(ids[1:])))
        places = {i: place for place, i in enumerate(dict.fromkeys(ids[1:]), 4)}
        source = tmp_path / f"a.{suffix}"
        if suffix == "xml":
            write_dump(source, text, num_pages=9)
        else:
            source.write_text("\n\n".join([text] * 9))
        settings = {"fairseq_dict": tmp_path / "dict.txt", "num_workers": 2 if suffix == "xml" else 1}
        made = build(source, tmp_path / "c", corpus.tokenizer_dir, **settings)
        store = open_store(made.train_prefix)
        assert store.item(0).tolist() == [*(places.get(i, 3) for i in ids), 2]
        assert 3 in store.item(0)
        assert made.info["vocab_size"] == store.manifest.vocab_size == len(places) + 5
        assert tokenizer_hash(load_tokenizer(made.tokenizer_dir)) == made.info["tokenizer_hash"]

    def test_a_tokenizer_without_eos_is_refused_before_any_work(self, prepared, tmp_path):
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, []))).save_pretrained(tmp_path / "t")
        with pytest.raises(UserError, match="has no eos or sep token"):
            build(prepared[0], tmp_path / "c", tmp_path / "t")
        assert [p.name for p in tmp_path.iterdir()] == ["t"]

    def test_a_tokenizer_whose_ids_have_holes(self, prepared, tmp_path):
        backend = Tokenizer(models.BPE({"</s>": 0, "t": 1, "e": 90}, []))
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "t")
        with pytest.raises(UserError, match="the tokenizer gives id 90 with 3 tokens"):
            build(prepared[0], tmp_path / "c", tmp_path / "t")

    def test_training_a_tokenizer_on_the_first_characters_only(self, prepared, tmp_path):
        source, _, corpus = prepared
        spec = TokenizerSpec(vocab_size=300, max_characters=10)
        small = build(source, tmp_path / "c", tokenizer=spec)
        assert small.info["vocab_size"] < corpus.info["vocab_size"]
        assert small.info["num_characters"] == corpus.info["num_characters"]


class TestSplit:
    @pytest.mark.parametrize(("fraction", "low", "high"), [(1 / 200, 3, 20), (0.2, 340, 460)])
    def test_its_share_and_its_seed(self, tmp_path, fraction, low, high):
        source, _ = write_text(tmp_path / "in", num_documents=2000)
        chosen = []
        for seed in (0, 1):
            corpus = build(source, tmp_path / str(seed), valid_fraction=fraction, seed=seed)
            assert low <= corpus.info["counts"]["valid"]["documents"] <= high
            chosen.append((corpus.folder / "valid.bin").read_bytes())
        assert chosen[0] != chosen[1]

    @pytest.mark.parametrize("num_documents", [2, 3, 9])
    def test_a_small_corpus_gives_exactly_one_document(self, tmp_path, num_documents):
        source, documents = write_text(tmp_path / "in", num_documents=num_documents)
        corpus = build(source, tmp_path / "c", valid_fraction=1e-9)
        assert corpus.info["counts"]["valid"]["documents"] == 1
        assert corpus.info["counts"]["train"]["documents"] == num_documents - 1
        assert sum(c["items"] for c in corpus.info["counts"].values()) == sum(map(len, documents))

    def test_it_does_not_depend_on_the_order_or_the_names_of_files(self, tmp_path):
        source, documents = write_text(tmp_path / "in")
        (tmp_path / "turned.txt").write_text("\n\n".join("\n".join(lines) for lines in reversed(documents)))
        tokenizer = build(source, tmp_path / "a").tokenizer_dir
        texts = []
        for name, path in (("b", source), ("c", tmp_path / "turned.txt")):
            store = open_store(build(path, tmp_path / name, tokenizer, valid_fraction=0.2).valid_prefix)
            texts.append(sorted(store.item(i).tolist() for i in range(store.num_items)))
        assert texts[0] == texts[1]

    @pytest.mark.parametrize("fraction", [1 / 200, 0.9999999])
    def test_one_document_cannot_be_split(self, tmp_path, fraction):
        source, _ = write_text(tmp_path / "in", num_documents=1)
        with pytest.raises(UserError, match="too few documents"):
            build(source, tmp_path / "c", valid_fraction=fraction)
        assert [p.name for p in tmp_path.iterdir()] == ["in"]


class TestAgain:
    def test_the_same_inputs_find_it_finished(self, prepared, monkeypatch):
        source, _, corpus = prepared
        before = {path: path.stat().st_mtime_ns for path in corpus.folder.rglob("*")}
        monkeypatch.setattr(prepare, "_work_folder", lambda *_, **__: pytest.fail("it was done again"))
        assert build(source, corpus.folder).info == corpus.info
        assert before == {path: path.stat().st_mtime_ns for path in corpus.folder.rglob("*")}

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"seed": 1}, "seed"),
            ({"valid_fraction": 0.1}, "valid_fraction"),
            ({"tokenizer": TokenizerSpec(vocab_size=299)}, "tokenizer"),
        ],
    )
    def test_other_inputs_are_refused(self, prepared, settings, named):
        source, _, corpus = prepared
        with pytest.raises(UserError, match=f"was prepared with other {named}; remove it"):
            build(source, corpus.folder, **settings)

    def test_other_text_and_other_things_are_refused(self, prepared, tmp_path):
        _, _, corpus = prepared
        other, _ = write_text(tmp_path / "in", seed=1)
        with pytest.raises(UserError, match="was prepared with other files"):
            build(other, corpus.folder)
        with pytest.raises(UserError, match="is no prepared corpus"):
            build(other, tmp_path / "in")

    def test_open_corpus(self, prepared, tmp_path):
        _, _, corpus = prepared
        assert open_corpus(corpus.folder).train_prefix == corpus.folder / "train"
        with pytest.raises(UserError, match="is no prepared corpus"):
            open_corpus(tmp_path)
        (tmp_path / "corpus.json").write_text(json.dumps(corpus.info | {"format_version": 7}))
        with pytest.raises(UserError, match="format version 7"):
            open_corpus(tmp_path)


class TestNothingHalfWritten:
    def test_a_bad_source_in_the_middle(self, prepared, tmp_path):
        source, _, corpus = prepared
        (tmp_path / "in").mkdir()
        shutil.copy(source, tmp_path / "in/a.txt")
        (tmp_path / "in/b.jsonl").write_text('{"text": "fine"}\n{"text"')
        for workers in (1, 2):
            with pytest.raises(UserError, match=r"b\.jsonl line 2 is not JSON"):
                build(tmp_path / "in", tmp_path / "c", tokenizer=corpus.tokenizer_dir, num_workers=workers)
        assert [p.name for p in tmp_path.iterdir()] == ["in"]

    @pytest.mark.parametrize("limit", [300, 3000])  # in the request, in the tokenizer
    def test_a_full_disk_before_any_text_is_tokenized(self, prepared, tmp_path, limit):
        source, _ = write_text(tmp_path / "in", num_documents=800)
        with file_size_limit(limit), pytest.raises(UserError, match=r"cannot be written .*free space") as caught:
            build(source, tmp_path / "c", prepared[2].tokenizer_dir)
        assert "\n" not in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["in"]

    @pytest.mark.parametrize("limit", [30_000, 100_000])  # in the first pieces, in the stores
    def test_after_a_full_disk_it_goes_on(self, prepared, tmp_path, monkeypatch, limit):
        monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 20_000)
        monkeypatch.setattr(prepare, "PIECE_CHUNKS", 1)
        source, _ = write_text(tmp_path / "in", num_documents=2000)
        tokenizer = prepared[2].tokenizer_dir
        with file_size_limit(limit), pytest.raises(StoppedError, match=r"cannot be written .*what is done stays"):
            build(source, tmp_path / "c", tokenizer)
        assert not (tmp_path / "c").exists()
        done = build(source, tmp_path / "c", tokenizer)
        assert contents(done.folder) == contents(build(source, tmp_path / "whole", tokenizer).folder)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "in", "whole"]

    def test_a_place_that_cannot_be_written(self, prepared):
        with pytest.raises(UserError, match="cannot be written"):
            build(prepared[0], prepared[0] / "inside/c", prepared[2].tokenizer_dir)

    def test_two_preparations_of_one_folder(self, prepared, tmp_path, monkeypatch):
        source, _, _ = prepared
        inner = []

        def provide(*args):
            with pytest.raises(UserError, match="is being prepared by another process"):
                build(source, tmp_path / "c")
            inner.append(True)
            return original(*args)

        original = prepare._provide_tokenizer
        monkeypatch.setattr(prepare, "_provide_tokenizer", provide)
        build(source, tmp_path / "c")
        assert inner == [True]

    @pytest.mark.parametrize(
        "settings", [{"valid_fraction": 1.0}, {"valid_fraction": -0.1}, {"seed": -1}, {"pad_vocab_to": 0}]
    )
    def test_bad_settings(self, prepared, tmp_path, settings):
        name, value = next(iter(settings.items()))
        with pytest.raises(UserError, match=f"{name}={value}"):
            build(prepared[0], tmp_path / "c", **{name: value})


class TestDuplicates:
    def duplicated(self, folder, *, copies):
        """60 documents, then `copies` of the first ten that differ from them in blanks only."""
        source, documents = write_text(folder)
        again = ["\n".join(f"  {line} " for line in lines) for lines in documents[:10]] * copies
        source.write_text("\n\n".join([source.read_text(), *again]))
        return source, documents

    @pytest.mark.parametrize("workers", [1, 2])
    def test_what_is_left_is_what_was_there_without_them(self, prepared, tmp_path, monkeypatch, workers):
        monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 300)
        monkeypatch.setattr(prepare, "PIECE_CHUNKS", 2)
        source, documents = self.duplicated(tmp_path / "in", copies=2)
        tokenizer = prepared[2].tokenizer_dir
        corpus = build(source, tmp_path / "c", tokenizer, drop_duplicates=True, num_workers=workers)
        assert corpus.info["num_duplicates"] == 20
        assert corpus.info["num_characters"] == sum(len(line) for lines in documents for line in lines)
        for name in ("train.bin", "train.idx", "valid.bin", "valid.idx"):
            assert (corpus.folder / name).read_bytes() == (prepared[2].folder / name).read_bytes()
        everything = build(source, tmp_path / "all", tokenizer)
        assert "num_duplicates" not in everything.info
        assert sum(c["documents"] for c in everything.info["counts"].values()) == 80

    def test_documents_in_parts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(corpora, "MAX_PART_CHARACTERS", 20)
        monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 30)
        monkeypatch.setattr(prepare, "PIECE_CHUNKS", 1)
        (tmp_path / "a.txt").write_text("\n".join(["tea and water"] * 9) + "\n\n" + "\n".join(["tea and water"] * 8))
        (tmp_path / "b.txt").write_text("\n".join(["tea and water"] * 9) + "\n\ncup")
        corpus = build(tmp_path / "*.txt", tmp_path / "c", drop_duplicates=True, valid_fraction=0)
        assert corpus.info["num_duplicates"] == 1
        assert corpus.info["counts"]["train"] | {"tokens": 0} == {"documents": 3, "items": 18, "tokens": 0}

    def test_it_belongs_to_the_inputs(self, prepared):
        source, _, corpus = prepared
        with pytest.raises(UserError, match="was prepared with other drop_duplicates"):
            build(source, corpus.folder, drop_duplicates=True)


def test_a_padded_vocabulary_is_noted_and_changes_no_id(prepared, tmp_path):
    source, _, corpus = prepared
    padded = build(source, tmp_path / "c", pad_vocab_to=128)
    assert (padded.info["vocab_size"], padded.info["padded_vocab_size"]) == (300, 384)
    assert (padded.folder / "train.bin").read_bytes() == (corpus.folder / "train.bin").read_bytes()
    assert open_store(padded.train_prefix).manifest.vocab_size == 300
    assert "padded_vocab_size" not in corpus.info


# A preparation in small pieces that kills itself: at the n-th call of one of these functions, before or after it.
KILLED = """
import os, signal, sys
from ki_ds.data import pieces, prepare
from ki_ds.data.prepare import TokenizerSpec, build_store
source, out, workers, where, count, after = sys.argv[1:]
prepare.CHUNK_CHARACTERS, prepare.PIECE_CHUNKS = 2000, 1
owner, name = {"piece": (pieces.PieceFolder, "append"), "train": (prepare, "train_tokenizer"),
               "select": (prepare, "destinations"), "store": (prepare.StoreWriter, "add_items"),
               "info": (prepare, "write_atomically"), "none": (prepare, "open_corpus")}[where]
original, calls = getattr(owner, name), []
def killing(*args, **settings):
    calls.append(1)
    if where != "none" and len(calls) == int(count) and after == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **settings)
    if where != "none" and len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, killing)
build_store([source], TokenizerSpec(vocab_size=300), out, num_workers=int(workers), drop_duplicates=True)
"""


class TestGoingOn:
    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        """A source with duplicates, and its corpus made in one go."""
        folder = tmp_path_factory.mktemp("whole")
        source, _ = TestDuplicates().duplicated(folder / "in", copies=30)
        self.call(source, folder / "c", "none")
        return source, contents(folder / "c")

    def call(self, source, out, where, *, count=1, after=0, workers=1):
        command = [sys.executable, "-c", KILLED, source, out, workers, where, count, after]
        return forked.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)

    @pytest.mark.parametrize(
        ("kills", "pieces_done"),
        [
            ([("train", 1, 0)], 0),
            ([("piece", 3, 1), ("piece", 2, 0), ("select", 1, 0)], 4),
            ([("store", 40, 1), ("info", 1, 0)], None),
            ([("info", 2, 1)], None),
        ],
    )
    def test_a_killed_preparation_goes_on_and_ends_the_same_to_the_byte(self, whole, tmp_path, kills, pieces_done):
        source, expected = whole
        done = []
        for where, count, after in kills:
            assert self.call(source, tmp_path / "c", where, count=count, after=after).returncode == -signal.SIGKILL
            assert [p.name for p in tmp_path.iterdir()] == [".c.partial"]
            done.append(len(list((tmp_path / ".c.partial/pieces").glob("*.npz"))))
        assert done == sorted(done)
        if pieces_done is not None:
            assert pieces_done in done
        finished = self.call(source, tmp_path / "c", "none")
        assert finished.returncode == 0, finished.stderr
        assert f"going on after {done[-1]} pieces" in finished.stderr
        assert contents(tmp_path / "c") == expected
        assert [p.name for p in tmp_path.iterdir()] == ["c"]

    def test_replaced_characters_before_an_interruption_are_counted(self, prepared, tmp_path, monkeypatch):
        monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 20)
        monkeypatch.setattr(prepare, "PIECE_CHUNKS", 1)
        (tmp_path / "a.txt").write_bytes(b"tea and \xff water\n\n" * 9)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "destinations", interrupt)
            with pytest.raises(KeyboardInterrupt):
                build(tmp_path / "a.txt", tmp_path / "c", prepared[2].tokenizer_dir)
        assert list((tmp_path / ".c.partial/pieces").iterdir())
        done = build(tmp_path / "a.txt", tmp_path / "c", prepared[2].tokenizer_dir)
        assert done.info["replaced_characters"] == {"a.txt": 9}

    def test_finished_pieces_are_not_tokenized_again(self, prepared, tmp_path, monkeypatch):
        monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 500)
        monkeypatch.setattr(prepare, "PIECE_CHUNKS", 2)
        source, _, corpus = prepared
        tokenized = []

        def counting(chunk, **settings):
            tokenized.extend(document.id for document in chunk)
            if len(tokenized) > 30 and not hindered:
                hindered.append(True)
                raise KeyboardInterrupt
            return original(chunk, **settings)

        original, hindered = prepare._tokenize, []
        monkeypatch.setattr(prepare, "_tokenize", counting)
        with pytest.raises(KeyboardInterrupt):
            build(source, tmp_path / "c")
        pieces = len(list((tmp_path / ".c.partial/pieces").glob("*.npz")))
        first, tokenized = list(tokenized), []
        assert build(source, tmp_path / "c").info == corpus.info
        assert pieces > 1
        assert len(set(first) & set(tokenized)) <= 2 * 10  # the documents of one piece
        assert len(tokenized) < 40
        assert contents(tmp_path / "c") == contents(corpus.folder)

    def test_other_inputs_start_anew_and_say_so(self, whole, prepared, tmp_path, capsys):
        assert self.call(whole[0], tmp_path / "c", "piece", count=3).returncode == -signal.SIGKILL
        build(prepared[0], tmp_path / "c", show_progress=True)
        said = capsys.readouterr().err
        assert "unfinished work with other cutting, drop_duplicates, files; starting anew" in said
        assert contents(tmp_path / "c") == contents(prepared[2].folder)
        assert [p.name for p in tmp_path.iterdir()] == ["c"]

    def test_a_damaged_piece_is_noticed(self, prepared, tmp_path):
        source, _, _ = prepared
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "destinations", interrupt)
            with pytest.raises(KeyboardInterrupt):
                build(source, tmp_path / "c")
        (piece,) = (tmp_path / ".c.partial/pieces").glob("*.npz")
        data = bytearray(piece.read_bytes())
        data[len(data) // 2] ^= 1
        piece.write_bytes(data)
        with pytest.raises(UserError, match=r"000000\.npz is damaged .*remove"):
            build(source, tmp_path / "c")

    @pytest.mark.parametrize("suffix", ["txt", "xml"])  # threads, processes
    def test_ctrl_c_ends_everything_at_once_without_a_traceback(self, prepared, tmp_path, suffix):
        source = tmp_path / f"in.{suffix}"
        if suffix == "xml":
            write_dump(source, "[[tea]] and water. " * 200, num_pages=4000)
        else:
            source.write_text("tea and water\n\n" * 3_000_000)
        args = ["--input", source, "--out", tmp_path / "c", "--tokenizer", prepared[2].tokenizer_dir]
        process = subprocess.Popen(
            [sys.executable, ROOT / "tools/prepare_data.py", *args, "--num_workers", "2"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=listen_to_ctrl_c,
        )
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".c.partial/pieces")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(1.5)  # workers are starting or at work
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        started = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert time.monotonic() - started < 10
        assert err.splitlines()[-1] == "interrupted; call it again to go on"
        assert "Traceback" not in err
        while running_in_group(process.pid):  # the standard library's own helper may take a moment
            assert time.monotonic() - started < 10
            time.sleep(0.02)


def listen_to_ctrl_c():
    """A shell's background jobs, and so their tests, start with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def running_in_group(group):
    """Processes of a process group, without those that have ended and wait to be reaped."""
    running = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, found = path.read_text().rpartition(")")[2].split()[:3]
            running += [path.parent.name] if state != "Z" and int(found) == group else []
    return running


def interrupt(*_, **__):
    raise KeyboardInterrupt


class TestCommand:
    @pytest.fixture
    def command(self, monkeypatch, capsys):
        def run(*args):
            monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args)])
            code = runpy.run_path(str(ROOT / "tools/prepare_data.py"))["main"]()
            return code, *capsys.readouterr()

        return run

    def test_it_prepares_and_tells_the_counts(self, prepared, tmp_path, command):
        source, _, corpus = prepared
        args = ("--input", source, "--train_tokenizer", "--vocab_size", 300, "--num_workers", 1)
        code, out, _ = command("--out", tmp_path / "c", *args)
        assert code == 0
        assert f"{corpus.info['counts']['train']['tokens']:,} tokens" in out
        assert contents(tmp_path / "c") == contents(corpus.folder)

    def test_every_option_reaches_the_corpus(self, prepared, tmp_path, command):
        (tmp_path / "a.csv").write_text("id,body\n1,tea and cup\n2,tea and cup\n3,hot water\n")
        args = ("--text_key", "body", "--drop_duplicates", "--pad_vocab_to", 64, "--valid_fraction", 0)
        tokenizer = ("--tokenizer", prepared[2].tokenizer_dir)
        code, out, _ = command("--input", tmp_path / "a.csv", "--out", tmp_path / "c", *args, *tokenizer)
        assert code == 0
        assert "2 documents" in out
        assert "1 documents dropped as duplicates" in out
        assert open_corpus(tmp_path / "c").info["padded_vocab_size"] == 320

    @pytest.mark.parametrize("tokenizer", [None, "bytebpe", "unigram"])
    def test_text_that_is_no_unicode_is_replaced_and_counted(self, prepared, tmp_path, command, tokenizer):
        lines = [json.dumps({"text": f"{i} tea \ud83d cup", "title": "\udc00"}) for i in range(40)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        (tmp_path / "b\udcff.txt").write_bytes(b"hot \xff water\n\ngreen \x00 tea\n")
        args = ("--tokenizer", prepared[2].tokenizer_dir)
        if tokenizer:
            args = (
                "--train_tokenizer",
                "--tokenizer_kind",
                tokenizer,
                "--vocab_size",
                300 if tokenizer == "bytebpe" else 290,
            )
        args = ("--input", tmp_path / "a.jsonl", tmp_path / "b\udcff.txt", "--valid_fraction", 0, *args)
        code, out, _ = command("--out", tmp_path / "c", *args)
        assert code == 0
        said = "81 characters that are no Unicode became U+FFFD (most in: a.jsonl 80, 'b\\udcff.txt' 1)"
        assert out.splitlines()[-1] == said
        corpus = open_corpus(tmp_path / "c")
        assert corpus.info["replaced_characters"] == {"a.jsonl": 80, "b\udcff.txt": 1}
        store, backend = open_store(corpus.train_prefix), load_tokenizer(corpus.tokenizer_dir)
        assert backend.decode(store.item(7)[:-1].tolist()) == "7 tea \ufffd cup"
        assert command("--out", tmp_path / "c", *args)[1].splitlines()[-1] == said  # told again by a finished one

    def test_what_was_found_is_told_first_unless_quiet(self, prepared, tmp_path, command):
        (tmp_path / "in").mkdir()
        (tmp_path / "in/a.txt").write_text("tea\n\nwater\n")
        (tmp_path / "in/b.pdf").write_text("x")
        args = ("--input", tmp_path / "in", "--tokenizer", prepared[2].tokenizer_dir, "--valid_fraction", 0)
        code, out, err = command("--out", tmp_path / "c", *args)
        assert code == 0
        _, read, left_out, *_ = err.splitlines()
        assert read.split() == ["read", "text", "1", "11", "bytes", "a.txt"]
        assert left_out.split() == ["left", "out", "of", "no", "known", "kind", "(.pdf)", "1", "b.pdf"]
        assert command("--out", tmp_path / "d", *args, "--quiet") == (0, out.replace("/c/", "/d/"), "")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--input", "no-such.txt", "--train_tokenizer"), "no-such.txt does not exist"),
            (("--input", "x"), "exactly one of them"),
            (("--input", "x", "--tokenizer", "t", "--vocab_size", 9), "--vocab_size=9 has no meaning with --tokenizer"),
            (("--input", "x", "--tokenizer", "t", "--tokenizer_kind", "unigram"), "--tokenizer_kind=unigram has no"),
            (("--input", "x", "--train_tokenizer", "--fairseq_dict", "d"), "--fairseq_dict=d has no meaning with"),
            (("--input", "hf:a:b:c", "--train_tokenizer"), "not of the form hf:NAME"),
        ],
    )
    def test_bad_input_is_one_line(self, tmp_path, command, args, message):
        code, _, err = command("--out", tmp_path / "c", *args)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
