"""What is told about a store, and what is refused."""

import json
import os
import runpy
import struct
import sys
from pathlib import Path

import pytest

from ki_ds.data.describe import inspect
from ki_ds.data.prepare import TokenizerSpec, build_store
from ki_ds.data.store import SpecialIds, StoreWriter
from ki_ds.data.tokenize import special_ids, tokenizer_hash, train_tokenizer
from ki_ds.errors import UserError

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("KI_DS_SHARED", ROOT.parent / "shared"))
released = pytest.mark.skipif(
    not (SHARED / "fairseq/data-bin").is_dir(), reason="released fairseq files (KI_DS_SHARED) are not there"
)


@pytest.fixture
def ours(tmp_path):
    """A folder as `build_store` makes it."""
    tokenizer = train_tokenizer([["green tea", "black tea"]] * 4, 264, out_dir=tmp_path / "tokenizer")
    with StoreWriter(
        tmp_path / "train", vocab_size=264, special_ids=special_ids(tokenizer), tokenizer_hash=tokenizer_hash(tokenizer)
    ) as writer:
        for line in ("green tea", "black tea"):
            writer.add_document([[*tokenizer(line, add_special_tokens=False).input_ids, 2]])
    return tmp_path / "train"


def fairseq(tmp_path, ids=(4, 5, 2), dictionary="31373 9\n995 8\n", name="f"):
    tmp_path.joinpath(f"{name}.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQiq", 1, 8, 1, len(ids), 0))
    tmp_path.joinpath(f"{name}.bin").write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    (tmp_path / "dict.txt").write_text(dictionary)
    return tmp_path / name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    text = "\n\n".join(f"green tea {i}\nblack tea {'x' * i}" for i in range(30))
    (folder / "text.txt").write_text(text)
    build_store(
        [folder / "text.txt"], TokenizerSpec(vocab_size=270), folder / "out", valid_fraction=0.2, show_progress=False
    )
    return folder / "out"


def describe_store(path, **options):
    """What people read of a store."""
    return [line for facts in inspect(path, **options) for line in facts.lines()]


class TestDescribe:
    def test_ours(self, ours):
        text = "\n".join(describe_store(ours))
        for part in ("Megatron", "uint16", "items      2", "documents  2", "vocabulary 264", "match the manifest"):
            assert part in text
        assert "item 0: green tea" in text
        assert "item 1: black tea" in text

    def test_fairseq_in_symbols(self, tmp_path):
        lines = describe_store(fairseq(tmp_path))
        assert "fairseq" in lines[0]
        assert lines[-1] == "item 0: 31373 995 </s>"

    @released
    def test_the_released_files_as_text(self):
        lines = describe_store(SHARED / "fairseq/data-bin/valid", tokenizer=SHARED / "data/tok/gpt2")
        assert "items      300" in lines
        assert "item 149: 'And still you believe her innocent?'" in lines

    def test_a_changed_file(self, ours):
        data = bytearray(ours.with_suffix(".bin").read_bytes())
        data[0] ^= 1
        ours.with_suffix(".bin").write_bytes(data)
        describe_store(ours, verify=False)
        with pytest.raises(UserError, match="SHA-256"):
            describe_store(ours)

    def test_ids_outside_the_vocabulary(self, tmp_path):
        with pytest.raises(UserError, match="id 7 at token 1, the vocabulary ends at 6"):
            describe_store(fairseq(tmp_path, ids=(4, 7, 2)))

    def test_another_tokenizer(self, ours, tmp_path):
        train_tokenizer([["other words"]], 262, out_dir=tmp_path / "other")
        with pytest.raises(UserError, match="is not the tokenizer that"):
            describe_store(ours, tokenizer=tmp_path / "other")

    def test_an_empty_store(self, tmp_path):
        with StoreWriter(tmp_path / "s", vocab_size=9, special_ids=SpecialIds(eos=2)):
            pass
        assert "items      0" in describe_store(tmp_path / "s")

    def test_lengths(self, tmp_path):
        with StoreWriter(tmp_path / "s", vocab_size=9, special_ids=SpecialIds(eos=2)) as writer:
            writer.add_document([[5] * n for n in (3, 511, 512, 900)])
        (facts,) = inspect(tmp_path / "s")
        assert (facts.min_length, facts.median_length, facts.max_length, facts.num_long_items) == (3, 511.5, 900, 2)
        assert "lengths    3 to 900 tokens a line, median 511.5; longer than 511: 2" in facts.lines()

    def test_shards_are_told_as_one(self, tmp_path):
        fairseq(tmp_path, ids=(4, 2))
        fairseq(tmp_path, ids=(5, 5, 2), name="f1")
        (facts,) = inspect(tmp_path / "f", num_samples=2)
        assert (facts.num_shards, facts.num_items, facts.num_tokens, facts.max_length) == (2, 2, 5, 3)
        assert facts.samples == ((0, "31373 </s>"), (1, "995 995 </s>"))
        assert facts.lines()[0].endswith("uint16, 2 shards")

    def test_a_wrong_id_in_a_later_shard(self, tmp_path):
        fairseq(tmp_path)
        fairseq(tmp_path, ids=(5, 9, 2), name="f1")
        with pytest.raises(UserError, match="f1 has id 9 at token 1"):
            inspect(tmp_path / "f")

    def test_shards_with_and_without_manifest(self, ours, tmp_path):
        for suffix in (".bin", ".idx", ".json"):
            ours.with_suffix(suffix).rename(tmp_path / f"c_1{suffix}")
        for suffix in (".bin", ".idx"):
            (tmp_path / f"c_0{suffix}").write_bytes((tmp_path / f"c_1{suffix}").read_bytes())
        (facts,) = inspect(tmp_path / "c_*")
        assert (facts.num_shards, facts.num_verified, facts.vocab_size) == (2, 1, 264)
        assert "hashes     1 of 2 shards match their manifests, the others have none" in facts.lines()

    def test_without_a_vocabulary_ids_are_shown_and_must_not_be_negative(self, tmp_path):
        (tmp_path / "s.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQiqqq", 1, 4, 1, 2, 3, 0, 0, 1))
        (tmp_path / "s.bin").write_bytes(struct.pack("<3i", 7, 8, 70_000))
        assert describe_store(tmp_path / "s")[-1] == "item 0: 7 8 70000"
        (tmp_path / "s.bin").write_bytes(struct.pack("<3i", 7, -8, 70_000))
        with pytest.raises(UserError, match="id -8 at token 1, ids begin at 0"):
            describe_store(tmp_path / "s")

    def test_symbols_of_another_tokenizer(self, ours, tmp_path):
        with pytest.raises(UserError, match=r"dict\.txt has the symbol 31373, the tokenizer .* ends at 263"):
            describe_store(fairseq(tmp_path), tokenizer=tmp_path / "tokenizer")

    def test_a_negative_number_of_samples(self, ours):
        with pytest.raises(UserError, match="num_samples=-1 is negative"):
            describe_store(ours, num_samples=-1)


class TestFolders:
    def test_each_split_of_a_corpus(self, corpus):
        train, valid = inspect(corpus)
        assert (Path(train.prefix).name, Path(valid.prefix).name) == ("train", "valid")
        assert train.num_documents + valid.num_documents == 30
        assert train.num_verified == valid.num_verified == 1
        assert "tea" in train.samples[0][1]

    @pytest.mark.parametrize(("value", "message"), [(1, "corpus.json tells"), (None, "corpus.json tells no counts")])
    def test_a_corpus_whose_json_was_edited(self, corpus, tmp_path, value, message):
        for path in corpus.iterdir():
            (tmp_path / path.name).symlink_to(path)
        info = json.loads((corpus / "corpus.json").read_text())
        info["counts"] = value and info["counts"] | {"valid": info["counts"]["valid"] | {"tokens": value}}
        (tmp_path / "corpus.json").unlink()
        (tmp_path / "corpus.json").write_text(json.dumps(info))
        with pytest.raises(UserError, match=message):
            inspect(tmp_path)

    def test_each_split_of_fairseq_data(self, tmp_path):
        for name in ("train", "train1", "valid", "test"):
            fairseq(tmp_path, name=name)
        assert [(Path(f.prefix).name, f.num_shards) for f in inspect(tmp_path)] == [
            ("test", 1),
            ("train", 2),
            ("valid", 1),
        ]

    def test_any_other_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"neither a prepared corpus .* nor fairseq data .*; name the prefix"):
            inspect(tmp_path)


class TestCommand:
    @pytest.fixture
    def command(self, monkeypatch, capsys):
        def run(*args):
            monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, args)])
            code = runpy.run_path(str(ROOT / "tools/inspect_data.py"))["main"]()
            return code, *capsys.readouterr()

        return run

    def test_it_prints_what_is_told(self, tmp_path, command):
        code, out, _ = command(fairseq(tmp_path))
        assert code == 0
        assert out.splitlines() == describe_store(tmp_path / "f")

    def test_a_folder_as_json(self, corpus, command):
        code, out, _ = command(corpus, "--json", "--num_samples", "1")
        assert code == 0
        train, valid = json.loads(out)
        assert train == inspect(corpus, num_samples=1)[0].to_dict()
        assert valid["samples"][0]["item"] == 0

    def test_foreign_ids_are_one_line(self, tmp_path, command):
        code, out, err = command(fairseq(tmp_path, ids=(4, 700, 2)), "--json")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {tmp_path}/f has id 700 at token 1, the vocabulary ends at 6; ")
        assert err.count("\n") == 1

    def test_a_cut_index_is_one_line(self, tmp_path, command):
        prefix = fairseq(tmp_path)
        prefix.with_suffix(".idx").write_bytes(prefix.with_suffix(".idx").read_bytes()[:-4])
        code, _, err = command(prefix)
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
