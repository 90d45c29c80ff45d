"""The token store: layouts to the byte, round trips, refusal of everything malformed, no half-written files."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.data import token_index
from ki_ds.data.store import (
    SpecialIds,
    StoreWriter,
    is_fairseq_folder,
    open_shards,
    open_store,
    token_dtype,
)
from ki_ds.errors import UserError
from tests import forked

SPECIALS = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=4)
SHARED = Path(os.environ.get("KI_DS_SHARED", Path(__file__).parents[3] / "shared"))
released = pytest.mark.skipif(
    not (SHARED / "fairseq/data-bin").is_dir(), reason="released fairseq files (KI_DS_SHARED) are not there"
)


def write(prefix, documents, vocab_size=100, tokenizer_hash="h", special_ids=SPECIALS):
    with StoreWriter(prefix, vocab_size=vocab_size, special_ids=special_ids, tokenizer_hash=tokenizer_hash) as writer:
        for document in documents:
            writer.add_document(document)
    return open_store(prefix)


def megatron_bytes(documents, code=8, modes=False):
    """(idx, bin) written by the layout, field by field."""
    items = [item for document in documents for item in document]
    letter, width = {8: ("H", 2), 4: ("i", 4)}[code]
    idx = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    idx += struct.pack("<Q", len(items)) + struct.pack("<Q", len(documents) + 1)
    for item in items:
        idx += struct.pack("<i", len(item))
    position = 0
    for item in items:
        idx += struct.pack("<q", position)
        position += len(item) * width
    bound = 0
    for document in [[], *documents]:
        bound += len(document)
        idx += struct.pack("<q", bound)
    if modes:
        idx += b"\x00" * len(items)
    return idx, b"".join(struct.pack("<" + letter, i) for item in items for i in item)


def fairseq_bytes(items, code=8):
    """(idx, bin) of a fairseq mmap store, field by field."""
    letter = {8: "H", 4: "i"}[code]
    width = struct.calcsize(letter)
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, code, len(items))
    idx += struct.pack(f"<{len(items)}i", *map(len, items))
    idx += struct.pack(f"<{len(items)}q", *(width * sum(map(len, items[:i])) for i in range(len(items))))
    return idx, b"".join(struct.pack("<" + letter, i) for item in items for i in item)


def put(tmp_path, idx, bin_, name="s"):
    (tmp_path / f"{name}.idx").write_bytes(idx)
    (tmp_path / f"{name}.bin").write_bytes(bin_)
    return tmp_path / name


DOCUMENTS = [[[5, 6, 2], [7, 2]], [[8, 9, 10, 2]]]
documents_of_items = st.lists(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=4), max_size=6
)


class TestLayouts:
    @pytest.mark.parametrize(("code", "modes"), [(8, False), (8, True), (4, False)])
    def test_a_file_written_byte_by_byte_is_read(self, tmp_path, code, modes):
        store = open_store(put(tmp_path, *megatron_bytes(DOCUMENTS, code, modes)))
        assert (store.kind, store.num_items, store.num_tokens, store.num_documents) == ("Megatron", 3, 9, 2)
        assert store.dtype == {8: np.uint16, 4: np.int32}[code]
        assert [store.item(i).tolist() for i in range(3)] == [[5, 6, 2], [7, 2], [8, 9, 10, 2]]
        assert store.document_indices.tolist() == [0, 2, 3]
        assert store.manifest is None
        assert store.verify() is None

    @pytest.mark.parametrize("vocab_size", [100, 65_500])
    def test_ours_is_that_layout_to_the_byte(self, tmp_path, vocab_size):
        write(tmp_path / "s", DOCUMENTS, vocab_size)
        code = 8 if vocab_size < 65_500 else 4
        assert ((tmp_path / "s.idx").read_bytes(), (tmp_path / "s.bin").read_bytes()) == megatron_bytes(DOCUMENTS, code)

    def test_fairseq_documents_end_at_blank_lines(self, tmp_path):
        sizes = [3, 1, 2, 1, 2]
        idx = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, 8, 5) + struct.pack("<5i", *sizes)
        idx += struct.pack("<5q", 0, 6, 8, 12, 14)
        store = open_store(put(tmp_path, idx, struct.pack("<9H", 9, 9, 2, 2, 9, 2, 7, 9, 2)))
        assert store.kind == "fairseq"
        assert store.document_indices.tolist() == [0, 2, 5]  # the lone token 7 is a line, not a blank one

    @released
    @pytest.mark.parametrize(
        ("split", "num_items", "num_tokens", "ids_sum", "digests", "last", "blank_lines"),
        [
            (
                "train",
                3000,
                135_496,
                57_375_038,
                ("b8ae94d6e9cd4957", "7bcfc6bc0eddf678"),
                [442, 3, 3, 3, 3, 3695, 2],
                33,
            ),
            ("valid", 300, 15_318, 6_049_025, ("d8333b1b88142907", "c00f1f6aa93a11cc"), [3, 13, 16, 56, 3, 674], 2),
        ],
    )
    def test_the_released_files_are_read_as_the_released_code_does(
        self, split, num_items, num_tokens, ids_sum, digests, last, blank_lines
    ):
        """The figures come from its own reader (load_indexed_dataset), run on these files."""
        (store,) = open_shards(SHARED / "fairseq/data-bin" / split)
        assert (store.kind, store.num_items, store.num_tokens) == ("fairseq", num_items, num_tokens)
        assert store.dtype == np.uint16
        items = [store.item(i) for i in range(num_items)]
        assert np.array_equal(np.concatenate(items), store.tokens)
        assert int(store.tokens.sum(dtype=np.int64)) == ids_sum
        found = (store.tokens, np.array([len(item) for item in items]))
        assert tuple(hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] for ids in found) == digests
        assert (
            items[0][:7].tolist()
            == {"train": [19, 3032, 35, 18, 33, 4, 989], "valid": [2058, 3, 84, 509, 289, 6, 2]}[split]
        )
        assert items[-1][: len(last)].tolist() == last
        assert all(item[-1] == 2 for item in items)
        ends = [i + 1 for i, item in enumerate(items) if item.tolist() == [2]]
        assert len(ends) == blank_lines
        assert store.document_indices.tolist() == [0, *ends, num_items]

    def test_dtype_changes_at_65_500(self):
        assert token_dtype(65_499) == np.uint16
        assert token_dtype(65_500) == np.int32


class TestRoundTrip:
    @given(documents=documents_of_items, wide=st.booleans())
    @settings(max_examples=40, deadline=None)
    def test_what_is_written_is_read(self, tmp_path_factory, documents, wide):
        folder = tmp_path_factory.mktemp("store")
        store = write(folder / "s", documents, 70_000 if wide else 100)
        items = [item for document in documents for item in document]
        assert [store.item(i).tolist() for i in range(store.num_items)] == items
        assert store.tokens.tolist() == [i for item in items for i in item]
        assert store.document_indices.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
        starts = store.item_starts(np.arange(len(items)))
        assert starts.tolist() == np.cumsum([0, *map(len, items)])[:-1].tolist()
        manifest = store.verify()
        assert manifest is not None
        assert (manifest.num_tokens, manifest.special_ids) == (store.num_tokens, SPECIALS)

    def test_a_pickled_store_opens_again_without_its_tokens(self, tmp_path):
        store = write(tmp_path / "s", [[list(range(90)) * 50]])
        data = pickle.dumps(store)
        assert len(data) < 1000
        assert pickle.loads(data).tokens.tolist() == store.tokens.tolist()

    def test_any_of_its_files_names_a_store(self, tmp_path):
        write(tmp_path / "s", DOCUMENTS)
        assert open_store(tmp_path / "s.bin").num_items == open_store(f"{tmp_path}/s.idx").num_items == 3


class TestMalformed:
    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match=r"s\.idx cannot be read"):
            open_store(tmp_path / "s")

    def test_legacy_index_says_how_to_convert(self, tmp_path):
        with pytest.raises(UserError, match=r"legacy fairseq index.*--dataset-impl mmap"):
            open_store(put(tmp_path, b"TNTIDX\0\0" + bytes(64), b""))

    @pytest.mark.parametrize("content", [b"", b"x", b"not a token index, but long enough to be one", bytes(200)])
    def test_not_a_token_file(self, tmp_path, content):
        with pytest.raises(UserError, match=r"s\.idx"):
            open_store(put(tmp_path, content, b""))

    @pytest.mark.parametrize(
        ("offset", "layout", "value", "message"),
        [
            (9, "<Q", 2, "index version 2"),
            (17, "<B", 6, "dtype code 6"),
            (17, "<B", 4, "has 18 bytes, but its index speaks of"),
            (18, "<Q", 4, "fits neither"),
            (18, "<Q", 2**63, "fits neither"),
            (26, "<Q", 4, "fits neither"),
            (34, "<i", 4, "wrong byte"),
            (34, "<i", -3, "wrong byte"),
            (54, "<q", 8, "wrong byte"),
            (70, "<q", 1, "document indices"),
            (78, "<q", 4, "document indices"),
            (86, "<q", 2, "document indices"),
        ],
    )
    def test_each_field_is_checked(self, tmp_path, offset, layout, value, message):
        idx, bin_ = megatron_bytes(DOCUMENTS)
        changed = bytearray(idx)
        struct.pack_into(layout, changed, offset, value)
        if offset == 17 and value == 4:
            # the pointers would have noticed first: make them those of int32
            changed[46:70] = struct.pack("<3q", 0, 12, 20)
        with pytest.raises(UserError, match=message):
            open_store(put(tmp_path, bytes(changed), bin_))

    @given(cut=st.integers(0, 93), which=st.sampled_from(["idx", "bin"]))
    @settings(max_examples=40, deadline=None)
    def test_every_cut_is_refused_in_one_line(self, tmp_path_factory, cut, which):
        idx, bin_ = megatron_bytes(DOCUMENTS)
        assert len(idx) == 94
        prefix = put(tmp_path_factory.mktemp("cut"), idx, bin_)
        path = prefix.with_suffix("." + which)
        path.write_bytes(path.read_bytes()[: cut % path.stat().st_size])
        with pytest.raises(UserError) as caught:
            open_store(prefix)
        assert "\n" not in str(caught.value)

    @given(data=st.data())
    @settings(max_examples=100, deadline=None)
    def test_a_changed_index_is_refused_or_reads_the_same(self, tmp_path_factory, data):
        idx, bin_ = megatron_bytes(DOCUMENTS)
        changed = bytearray(idx)
        changed[data.draw(st.integers(0, len(idx) - 1))] = data.draw(st.integers(0, 255))
        prefix = put(tmp_path_factory.mktemp("fuzz"), bytes(changed), bin_)
        try:
            store = open_store(prefix)
        except UserError:
            return
        # only the place of an inner document boundary can be changed and still be possible
        assert [store.item(i).tolist() for i in range(3)] == [i for d in DOCUMENTS for i in d]

    def test_an_edit_of_the_same_size_is_noticed_by_its_hash(self, tmp_path):
        write(tmp_path / "s", DOCUMENTS)
        data = bytearray((tmp_path / "s.bin").read_bytes())
        data[0] ^= 1
        (tmp_path / "s.bin").write_bytes(data)
        open_store(tmp_path / "s")
        with pytest.raises(UserError, match=r"s\.bin has SHA-256 .* its manifest says"):
            open_store(tmp_path / "s").verify()

    @pytest.mark.parametrize("text", ["", "{}", "[1]", '{"special_ids": 3}', "\udcff"])
    def test_a_broken_manifest(self, tmp_path, text):
        write(tmp_path / "s", DOCUMENTS)
        (tmp_path / "s.json").write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match="not a manifest"):
            open_store(tmp_path / "s")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("num_tokens", 8, "is not as it was written"),
            ("vocab_size", 101, "is not as it was written"),
            ("tokenizer_hash", "other", "is not as it was written"),
            ("special_ids", {"bos": 7, "others": []}, "is not as it was written"),
            ("manifest_sha256", "0" * 64, "is not as it was written"),
            ("manifest_sha256", None, "is not as it was written"),
            ("extra", 1, "not a manifest"),
            ("format_version", 1, "has format version 1, this program reads 2"),
        ],
    )
    def test_an_edited_manifest(self, tmp_path, key, value, message):
        write(tmp_path / "s", DOCUMENTS)
        manifest = json.loads((tmp_path / "s.json").read_text())
        (tmp_path / "s.json").write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(UserError, match=rf"s\.json {message}|s\.json is {message}"):
            open_store(tmp_path / "s")

    @pytest.mark.parametrize("other", [DOCUMENTS[:1], [[*DOCUMENTS[0], *DOCUMENTS[1]]]])
    def test_the_manifest_of_another_store(self, tmp_path, other):
        write(tmp_path / "s", DOCUMENTS)
        write(tmp_path / "other", other)
        (tmp_path / "other.json").replace(tmp_path / "s.json")
        with pytest.raises(UserError, match="do not belong together"):
            open_store(tmp_path / "s")


class TestShards:
    @staticmethod
    def fairseq(folder, numbers, code=8):
        for number in numbers:
            put(folder, *fairseq_bytes([[10 + number, 2]], code), name=f"train{number or ''}")

    @staticmethod
    def first_ids(stores):
        return [int(store.tokens[0]) for store in stores]

    def test_fairseq_shards_come_in_the_order_of_their_numbers(self, tmp_path):
        self.fairseq(tmp_path, range(12))
        put(tmp_path, *fairseq_bytes([[99, 2]]), name="train_raw")
        put(tmp_path, *fairseq_bytes([[99, 2]]), name="train01")  # fairseq would not read it either
        assert self.first_ids(open_shards(tmp_path / "train")) == list(range(10, 22))

    def test_a_numbered_prefix_is_that_shard_alone(self, tmp_path):
        self.fairseq(tmp_path, [*range(12)])
        assert self.first_ids(open_shards(tmp_path / "train1")) == [11]

    @pytest.mark.parametrize(
        ("numbers", "missing", "there"),
        [([0, 1, 3], 2, 3), ([0, 2], 1, 2), ([0, 1, 4, 9], 2, 4), ([0, 9_999_999], 1, 9_999_999)],
    )
    def test_a_gap_is_named(self, tmp_path, numbers, missing, there):
        for number in numbers:
            put(tmp_path, *fairseq_bytes([[5, 2]]), name=f"train{number or ''}")
        with pytest.raises(UserError, match=rf"/train{missing} is missing, but there is .*/train{there};"):
            open_shards(tmp_path / "train")

    def test_the_first_shard_is_missing(self, tmp_path):
        self.fairseq(tmp_path, [1, 2])
        with pytest.raises(UserError, match=r"train\.idx cannot be read"):
            open_shards(tmp_path / "train")

    @pytest.mark.parametrize("suffix", [".idx", ".bin"])
    def test_half_a_shard(self, tmp_path, suffix):
        self.fairseq(tmp_path, [0, 1])
        (tmp_path / f"train1{suffix}").unlink()
        with pytest.raises(UserError, match=rf"train1\{suffix} cannot be read"):
            open_shards(tmp_path / "train")

    def test_shards_of_two_dtypes(self, tmp_path):
        self.fairseq(tmp_path, [0])
        self.fairseq(tmp_path, [1], code=4)
        with pytest.raises(UserError, match=r"train1 has dtype int32, .*train has uint16; shards must agree"):
            open_shards(tmp_path / "train")

    def test_shards_of_two_kinds(self, tmp_path):
        self.fairseq(tmp_path, [0])
        put(tmp_path, *megatron_bytes(DOCUMENTS), name="train1")
        with pytest.raises(UserError, match=r"train1 has kind Megatron, .*train has fairseq"):
            open_shards(tmp_path / "train")

    def test_a_megatron_prefix_is_one_store(self, tmp_path):
        for name in ("corpus", "corpus1"):
            put(tmp_path, *megatron_bytes(DOCUMENTS), name=name)
        assert [store.prefix.name for store in open_shards(tmp_path / "corpus")] == ["corpus"]

    @pytest.mark.parametrize("pattern", ["corpus_*", "corpus_*.bin", "corpus_*.idx", "*_*"])
    def test_a_glob_is_sorted_naturally(self, tmp_path, pattern):
        names = ["corpus_1", "corpus_2", "corpus_02b", "corpus_10", "corpus_a"]
        for name in reversed(names):
            put(tmp_path, *megatron_bytes(DOCUMENTS), name=name)
        found = [store.prefix.name for store in open_shards(tmp_path / pattern)]
        assert found == ["corpus_1", "corpus_2", "corpus_02b", "corpus_10", "corpus_a"]

    def test_a_name_with_brackets_is_no_glob(self, tmp_path):
        put(tmp_path, *megatron_bytes(DOCUMENTS), name="corpus[1]")
        assert len(open_shards(tmp_path / "corpus[1]")) == 1

    def test_a_glob_of_nothing(self, tmp_path):
        with pytest.raises(UserError, match=r"corpus_\* matches no token store"):
            open_shards(tmp_path / "corpus_*")

    def test_a_glob_over_half_a_store(self, tmp_path):
        for name in ("corpus_1", "corpus_2"):
            put(tmp_path, *megatron_bytes(DOCUMENTS), name=name)
        (tmp_path / "corpus_2.idx").unlink()
        with pytest.raises(UserError, match=r"corpus_2\.idx cannot be read"):
            open_shards(tmp_path / "corpus_*")

    def test_a_glob_over_fairseq_shards_could_hide_a_gap(self, tmp_path):
        self.fairseq(tmp_path, [0, 2])
        with pytest.raises(UserError, match="name the first one without a glob"):
            open_shards(tmp_path / "train*")

    @pytest.mark.parametrize(
        ("difference", "message"),
        [
            ({"tokenizer_hash": "other"}, "c2 has tokenizer_hash other, .*c1 has h"),
            ({"vocab_size": 101}, "c2 has vocab_size 101, .*c1 has 100"),
            ({"special_ids": SpecialIds(eos=2)}, "c2 has special_ids"),
        ],
    )
    def test_manifests_must_agree(self, tmp_path, difference, message):
        put(tmp_path, *megatron_bytes(DOCUMENTS), name="c0")  # has no manifest, and so no say
        write(tmp_path / "c1", DOCUMENTS)
        write(tmp_path / "c2", DOCUMENTS, **difference)
        with pytest.raises(UserError, match=message):
            open_shards(tmp_path / "c*")
        write(tmp_path / "same1", DOCUMENTS)
        write(tmp_path / "same2", DOCUMENTS)
        assert len(open_shards(tmp_path / "same*")) == 2

    def test_what_a_fairseq_folder_is(self, tmp_path):
        assert not is_fairseq_folder(tmp_path / "nowhere")
        self.fairseq(tmp_path, [0])
        assert not is_fairseq_folder(tmp_path)
        (tmp_path / "dict.txt").write_text("a 1\n")
        assert is_fairseq_folder(tmp_path)


class TestOpenedAgain:
    def test_a_worker_does_not_check_the_items_again(self, tmp_path, monkeypatch):
        store = write(tmp_path / "s", DOCUMENTS)

        def too_slow(*_):
            raise AssertionError

        monkeypatch.setattr(token_index, "_windows", too_slow)
        with pytest.raises(AssertionError):
            open_store(tmp_path / "s")
        again = pickle.loads(pickle.dumps(store))
        assert again.manifest == store.manifest
        assert again.document_indices.tolist() == [0, 2, 3]
        assert pickle.loads(pickle.dumps(again)).tokens.tolist() == store.tokens.tolist()

    @pytest.mark.parametrize("suffix", [".idx", ".bin"])
    def test_but_it_looks_at_the_lengths(self, tmp_path, suffix):
        data = pickle.dumps(write(tmp_path / "s", DOCUMENTS))
        path = tmp_path / f"s{suffix}"
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(UserError, match=rf"s\{suffix} has"):
            pickle.loads(data)


KILLED = """
import os, signal, sys
import numpy as np
from ki_ds.data.store import SpecialIds, StoreWriter
with StoreWriter(sys.argv[1], vocab_size=100, special_ids=SpecialIds(eos=2)) as writer:
    for i in range(400):
        writer.add_items(np.full(1000, i % 100), np.array([1000]))
        if i == 300:
            os.kill(os.getpid(), signal.SIGKILL)
"""
FULL = """
import resource, sys
import numpy as np
from ki_ds.data.store import SpecialIds, StoreWriter
from ki_ds.cli import ends_cleanly
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
@ends_cleanly
def main():
    with StoreWriter(sys.argv[1], vocab_size=100, special_ids=SpecialIds(eos=2)) as writer:
        for i in range(400):
            writer.add_items(np.full(100, i % 100), np.full(50, 2))
sys.exit(main())
"""


class TestNothingHalfWritten:
    def test_an_exception_leaves_nothing(self, tmp_path):
        def fail():
            with StoreWriter(tmp_path / "s", vocab_size=9, special_ids=SPECIALS) as writer:
                writer.add_document([[1, 2]])
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_an_id_outside_the_vocabulary(self, tmp_path):
        with pytest.raises(UserError, match="5 to 100 leave the vocabulary of 100"):
            write(tmp_path / "s", [[[5, 100]]])
        assert list(tmp_path.iterdir()) == []

    def test_no_silent_overwriting(self, tmp_path):
        write(tmp_path / "s", DOCUMENTS)
        before = (tmp_path / "s.bin").read_bytes()
        with pytest.raises(UserError, match="exists already"):
            write(tmp_path / "s", [[[1]]])
        assert (tmp_path / "s.bin").read_bytes() == before

    def test_two_writers(self, tmp_path):
        with StoreWriter(tmp_path / "s", vocab_size=9, special_ids=SPECIALS) as first:
            first.add_document([[1, 2]])
            with (
                pytest.raises(UserError, match="by another process"),
                StoreWriter(tmp_path / "s", vocab_size=9, special_ids=SPECIALS),
            ):
                pass
        assert open_store(tmp_path / "s").tokens.tolist() == [1, 2]

    def test_a_killed_writer_leaves_no_final_name_and_can_be_followed(self, tmp_path):
        done = forked.run([sys.executable, "-c", KILLED, tmp_path / "s"], check=False)
        assert done.returncode == -signal.SIGKILL
        assert all(path.suffix == ".tmp" for path in tmp_path.iterdir())
        write(tmp_path / "s", DOCUMENTS)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["s.bin", "s.idx", "s.json"]

    @pytest.mark.parametrize("limit", [100, 40_000, 79_999, 100_000])  # of 80,000 bytes .bin, 240,042 .idx
    def test_a_full_disk_is_one_line(self, tmp_path, limit):
        done = forked.run(
            [sys.executable, "-c", FULL, tmp_path / "s", str(limit)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "free space" in done.stderr
        assert done.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot be written"):
            write(tmp_path / "file/s", DOCUMENTS)

    def test_too_little_space_is_told_before_writing(self, tmp_path):
        with (
            pytest.raises(UserError, match="MB are needed"),
            StoreWriter(tmp_path / "s", vocab_size=9, special_ids=SPECIALS, expected_bytes=1 << 60),
        ):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_space_that_runs_out_is_told_while_writing(self, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)

        def fill():
            with StoreWriter(tmp_path / "s", vocab_size=9, special_ids=SPECIALS) as writer:
                monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
                writer.add_items(np.ones(5_000_000, np.int64), np.array([5_000_000]))

        with pytest.raises(UserError, match="MB free"):
            fill()
        assert list(tmp_path.iterdir()) == []
