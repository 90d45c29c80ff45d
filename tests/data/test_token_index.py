"""The index of a token store, field by field: both layouts, every dtype code, modes, other formats."""

import struct

import numpy as np
import pytest

from ki_ds.data import token_index
from ki_ds.data.token_index import index_head, pointer_windows, read_index
from ki_ds.errors import UserError

SIZES = [3, 2, 4]
FLOATS = {6, 7}
# What fairseq (its code table up to 1.0) and Megatron-LM (its DType enumeration) say.
FAIRSEQ = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16", 9: "uint32", 10: "uint64"}
MEGATRON = {code: name for code, name in FAIRSEQ.items() if code <= 8}


def index_bytes(kind, code, width, *, bounds=(0, 2, 3), modes=b""):
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, code, len(SIZES))
    pointers = [0, 3 * width, 5 * width]
    body = struct.pack("<3i", *SIZES) + struct.pack("<3q", *pointers)
    if kind == "fairseq":
        return head + body
    return head + struct.pack("<Q", len(bounds)) + body + struct.pack(f"<{len(bounds)}q", *bounds) + modes


def put(tmp_path, data):
    (tmp_path / "s.idx").write_bytes(data)
    return tmp_path / "s.idx"


@pytest.mark.parametrize("kind", ["fairseq", "Megatron"])
class TestDtypes:
    @pytest.mark.parametrize("code", range(12))
    def test_every_code(self, tmp_path, kind, code):
        known = {"fairseq": FAIRSEQ, "Megatron": MEGATRON}[kind]
        width = np.dtype(known.get(code, "int32")).itemsize
        path = put(tmp_path, index_bytes(kind, code, width))
        if code in known:
            index = read_index(path)
            assert (index.kind, index.dtype.name) == (kind, known[code])
            assert index.sizes.tolist() == SIZES
            assert index.num_bytes == 9 * width
        else:
            rule = "which is floating point" if code in FLOATS else f"a {kind} store of tokens has 1 "
            with pytest.raises(UserError, match=rf"dtype code {code}[,;] {rule}.*write the store again"):
                read_index(path)

    def test_pointers_of_another_width(self, tmp_path, kind):
        with pytest.raises(UserError, match="item 1 to the wrong byte"):
            read_index(put(tmp_path, index_bytes(kind, 4, 2)))


class TestModes:
    def test_text_alone_is_read(self, tmp_path):
        assert read_index(put(tmp_path, index_bytes("Megatron", 8, 2, modes=bytes(3)))).sizes.tolist() == SIZES

    def test_images_are_not(self, tmp_path):
        with pytest.raises(UserError, match="another mode than text"):
            read_index(put(tmp_path, index_bytes("Megatron", 8, 2, modes=b"\0\0\1")))

    def test_too_few(self, tmp_path):
        with pytest.raises(UserError, match="fits neither"):
            read_index(put(tmp_path, index_bytes("Megatron", 8, 2, modes=bytes(2))))


class TestDocuments:
    @pytest.mark.parametrize("bounds", [(), (0,), (1, 3), (0, 2), (0, 2, 1, 3), (0, -1, 3), (0, 4, 3)])
    def test_they_rise_from_the_first_item_to_the_last(self, tmp_path, bounds):
        with pytest.raises(UserError, match="do not rise from 0 to 3"):
            read_index(put(tmp_path, index_bytes("Megatron", 8, 2, bounds=bounds)))

    def test_an_empty_document_is_no_fault(self, tmp_path):
        index = read_index(put(tmp_path, index_bytes("Megatron", 8, 2, bounds=(0, 2, 2, 3))))
        assert index.document_indices.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize(("begin", "name"), [(b"TNTIDX\0\0", "TNTIDX"), (b"HUFFIDX\0\0", "Huffman")])
def test_other_formats_of_fairseq_say_how_to_convert(tmp_path, begin, name):
    with pytest.raises(UserError, match=rf"{name}.*not read here; convert it: .*--dataset-impl mmap"):
        read_index(put(tmp_path, begin + bytes(64)))


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_windows_see_what_the_whole_does(tmp_path, monkeypatch, window):
    monkeypatch.setattr(token_index, "WINDOW", window)
    good = index_bytes("Megatron", 8, 2, bounds=(0, 1, 1, 2, 3), modes=bytes(3))
    read_index(put(tmp_path, good))
    for item, offset in enumerate((46, 54, 62)):
        wrong = bytearray(good)
        wrong[offset] ^= 4
        with pytest.raises(UserError, match=f"item {item} to the wrong byte"):
            read_index(put(tmp_path, bytes(wrong)))
    for falls in ((0, 2, 1, 2, 3), (0, 1, 2, 1, 3), (0, 1, 2, 4, 3)):
        with pytest.raises(UserError, match="do not rise"):
            read_index(put(tmp_path, index_bytes("Megatron", 8, 2, bounds=falls, modes=bytes(3))))


def test_what_is_written_begins_as_it_is_read(tmp_path):
    head = index_head(np.dtype("<u2"), num_items=3, num_bounds=3)
    assert index_bytes("Megatron", 8, 2).startswith(head)
    windows = pointer_windows(iter([np.array([3, 2], np.int32), np.array([4], np.int32)]), 2)
    assert [window.tolist() for window in windows] == [[0, 6, 10], [10, 18]]
