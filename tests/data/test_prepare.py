"""Corpus folders: the same for any number of workers, whole or not there, split by documents."""

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
import pytest

from ki_ds.data import corpora, prepare
from ki_ds.data.prepare import TokenizerSpec, build_store, open_corpus, ordered_map
from ki_ds.data.store import open_store, verify_store
from ki_ds.data.tokenize import load_tokenizer, tokenizer_hash
from ki_ds.errors import UserError

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


def build(source, out, tokenizer=SPEC, **settings):
    return build_store([source], tokenizer, out, **{"num_workers": 1, "show_progress": False, **settings})


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
            assert all(store.item(i)[-1] == 2 for i in range(len(store)))
            lines = [tokenizer.decode(store.item(i)[:-1].tolist()) for i in range(len(store))]
            bounds = store.document_indices.tolist()
            found += [lines[a:b] for a, b in itertools.pairwise(bounds)]
        assert sorted(found) == sorted(documents)

    def test_the_manifests_tell_what_was_done(self, prepared):
        source, documents, corpus = prepared
        counts = corpus.info["counts"]
        assert counts["train"]["documents"] + counts["valid"]["documents"] == len(documents)
        assert corpus.info["num_characters"] == sum(len(line) for lines in documents for line in lines)
        for name, prefix in (("train", corpus.train_prefix), ("valid", corpus.valid_prefix)):
            manifest = verify_store(prefix)
            assert manifest.tokenizer_hash == tokenizer_hash(load_tokenizer(corpus.tokenizer_dir))
            assert manifest.vocab_size == corpus.info["vocab_size"] == 300
            assert manifest.special_ids.mask == 4
            assert manifest.source["split"] == name
            assert manifest.source["files"][0]["name"] == source.name
            assert manifest.num_tokens == counts[name]["tokens"] == open_store(prefix).num_tokens

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
            texts.append(sorted(store.item(i).tolist() for i in range(len(store))))
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
        monkeypatch.setattr(prepare, "_write_stores", lambda *_: pytest.fail("it was done again"))
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
        (tmp_path / "in/b.txt").write_bytes(b"fine\n\xff\n")
        for workers in (1, 2):
            with pytest.raises(UserError, match=r"b\.txt is not UTF-8 at byte offset 5 "):
                build(tmp_path / "in", tmp_path / "c", tokenizer=corpus.tokenizer_dir, num_workers=workers)
        assert [p.name for p in tmp_path.iterdir()] == ["in"]

    @pytest.mark.parametrize("limit", [300, 3000, 30_000])  # in the configuration, the tokenizer, the tokens
    def test_a_full_disk(self, prepared, tmp_path, limit):
        source, _ = write_text(tmp_path / "in", num_documents=800)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(UserError, match=r"cannot be written .*free space") as caught:
                build(source, tmp_path / "c", prepared[2].tokenizer_dir if limit < 30_000 else SPEC)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "\n" not in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["in"]

    def test_a_place_that_cannot_be_written(self, prepared):
        with pytest.raises(UserError, match="cannot be written"):
            build(prepared[0], prepared[0] / "inside/c", prepared[2].tokenizer_dir)

    def test_a_killed_preparation_leaves_no_final_name_and_no_worker(self, prepared, tmp_path):
        source, _, corpus = prepared
        (tmp_path / "in").mkdir()
        source = shutil.copy(source, tmp_path / "in")
        Path(source).write_text((Path(source).read_text() + "\n\n") * 500)
        args = ["--input", source, "--out", tmp_path / "c", "--tokenizer", corpus.tokenizer_dir]
        process = subprocess.Popen(
            [sys.executable, ROOT / "tools/prepare_data.py", *args, "--num_workers", "2"], stderr=subprocess.DEVNULL
        )
        written = tmp_path / ".c.partial/train.bin.tmp"
        deadline = time.monotonic() + 60
        while not (written.exists() and written.stat().st_size > 0):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert children
        assert not (tmp_path / "c").exists()
        while any(alive(pid) for pid in children):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        small, _ = write_text(tmp_path / "small", num_documents=5)
        build(small, tmp_path / "c", tokenizer=corpus.tokenizer_dir)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "in", "small"]

    def test_two_preparations_of_one_folder(self, prepared, tmp_path, monkeypatch):
        source, _, _ = prepared
        inner = []

        def train(*args):
            with pytest.raises(UserError, match="is being prepared by another process"):
                build(source, tmp_path / "c")
            inner.append(True)
            return original(*args)

        original = prepare._train
        monkeypatch.setattr(prepare, "_train", train)
        build(source, tmp_path / "c")
        assert inner == [True]

    @pytest.mark.parametrize("settings", [{"valid_fraction": 1.0}, {"valid_fraction": -0.1}, {"seed": -1}])
    def test_bad_settings(self, prepared, tmp_path, settings):
        name, value = next(iter(settings.items()))
        with pytest.raises(UserError, match=f"{name}={value}"):
            build(prepared[0], tmp_path / "c", **settings)


def alive(pid):
    try:
        os.kill(int(pid), 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


class TestOrderedMap:
    def test_order_and_bound(self):
        taken = []

        def items():
            for i in range(40):
                taken.append(i)
                yield -i

        results = ordered_map(abs, items(), num_workers=2)
        assert next(results) == 0
        assert len(taken) <= 2 * prepare.CHUNKS_PER_WORKER
        assert list(results) == list(range(1, 40))

    def test_a_worker_that_dies_is_one_line(self):
        with pytest.raises(UserError, match="a worker process died"):
            list(ordered_map(os._exit, [3], num_workers=2))


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

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--input", "no-such.txt", "--train_tokenizer"), "no-such.txt does not exist"),
            (("--input", "x"), "exactly one of them"),
        ],
    )
    def test_bad_input_is_one_line(self, tmp_path, command, args, message):
        code, _, err = command("--out", tmp_path / "c", *args)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
