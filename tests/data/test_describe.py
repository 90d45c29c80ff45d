"""What is told about a store, and what is refused."""

import os
import runpy
import struct
import sys
from pathlib import Path

import pytest

from ki_ds.data.corpora import Document
from ki_ds.data.describe import describe_store
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
    tokenizer = train_tokenizer([Document(("green tea", "black tea"), "d")] * 4, 264, out_dir=tmp_path / "tokenizer")
    with StoreWriter(
        tmp_path / "train", vocab_size=264, special_ids=special_ids(tokenizer), tokenizer_hash=tokenizer_hash(tokenizer)
    ) as writer:
        for line in ("green tea", "black tea"):
            writer.add_document([[*tokenizer(line, add_special_tokens=False).input_ids, 2]])
    return tmp_path / "train"


def fairseq(tmp_path, ids=(4, 5, 2), dictionary="31373 9\n995 8\n"):
    (tmp_path / "f.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQiq", 1, 8, 1, len(ids), 0))
    (tmp_path / "f.bin").write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    (tmp_path / "dict.txt").write_text(dictionary)
    return tmp_path / "f"


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
        train_tokenizer([Document(("other words",), "d")], 262, out_dir=tmp_path / "other")
        with pytest.raises(UserError, match="is not the tokenizer that"):
            describe_store(ours, tokenizer=tmp_path / "other")

    def test_an_empty_store(self, tmp_path):
        with StoreWriter(tmp_path / "s", vocab_size=9, special_ids=SpecialIds(eos=2)):
            pass
        assert "items      0" in describe_store(tmp_path / "s")


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

    def test_a_cut_index_is_one_line(self, tmp_path, command):
        prefix = fairseq(tmp_path)
        prefix.with_suffix(".idx").write_bytes(prefix.with_suffix(".idx").read_bytes()[:-4])
        code, _, err = command(prefix)
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
