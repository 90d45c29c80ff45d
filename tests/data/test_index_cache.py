"""The cache: built once, rebuilt when damaged, never trusted for a file that changed."""

import os
import time

import numpy as np
import pytest

from ki_ds.data.index_cache import FOLDER_NAME, IndexCache
from ki_ds.errors import UserError

ARRAYS = {"a": np.arange(10).reshape(5, 2), "b": np.array([7])}


def old_file(path, content):
    """A file that was last changed long ago."""
    path.write_bytes(content)
    long_ago = time.time() - 100
    os.utime(path, (long_ago, long_ago))
    return path


def settle(monkeypatch):
    """As if every file had been changed more than two seconds ago (its ctime cannot be set)."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**11)


class TestHashes:
    def test_a_settled_file_is_hashed_once(self, tmp_path, monkeypatch):
        settle(monkeypatch)
        cache, path = IndexCache(tmp_path / "cache"), old_file(tmp_path / "x.bin", b"hello")
        assert not cache.knows(path)
        digest = cache.sha256(path)
        assert cache.knows(path)
        monkeypatch.setattr("hashlib.file_digest", None)
        assert cache.sha256(path) == digest
        assert digest.startswith("2cf24dba5fb0a30e26e83b2ac5b9e29e")

    @pytest.mark.parametrize("keep_times", [False, True])
    def test_a_change_of_equal_length_is_noticed(self, tmp_path, monkeypatch, keep_times):
        settle(monkeypatch)
        cache, path = IndexCache(tmp_path / "cache"), old_file(tmp_path / "x.bin", b"hello")
        digest, stat = cache.sha256(path), path.stat()
        path.write_bytes(b"hellp")
        if keep_times:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert not cache.knows(path)
        assert cache.sha256(path) != digest

    def test_a_file_that_was_just_written_is_not_trusted(self, tmp_path):
        cache, path = IndexCache(tmp_path / "cache"), tmp_path / "x.bin"
        path.write_bytes(b"hello")
        cache.sha256(path)
        assert not cache.knows(path)

    def test_two_files_of_one_name_and_a_damaged_record(self, tmp_path, monkeypatch):
        settle(monkeypatch)
        cache = IndexCache(tmp_path / "cache")
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir()
            old_file(tmp_path / folder / "x.bin", folder.encode())
        digests = {cache.sha256(tmp_path / folder / "x.bin") for folder in ("one", "two")}
        assert len(digests) == 2
        for record in (tmp_path / "cache").iterdir():
            record.write_text("[]")
        assert {cache.sha256(tmp_path / folder / "x.bin") for folder in ("one", "two")} == digests

    def test_a_missing_file_is_one_line(self, tmp_path):
        with pytest.raises(UserError, match=r"nothing\.bin cannot be read"):
            IndexCache(None).sha256(tmp_path / "nothing.bin")


class TestArrays:
    def test_they_are_built_once_for_a_key(self, tmp_path):
        cache, built = IndexCache(tmp_path / "cache"), []

        def build():
            built.append(1)
            return ARRAYS

        for key in ({"x": 1}, {"x": 1}, {"x": 2}):
            found = cache.arrays(key, build)
            assert {name: array.tolist() for name, array in found.items()} == {
                name: array.tolist() for name, array in ARRAYS.items()
            }
        assert len(built) == 2

    @pytest.mark.parametrize("damage", ["flip", "cut", "remove", "key"])
    def test_damage_is_noticed_and_mended(self, tmp_path, damage):
        cache = IndexCache(tmp_path / "cache")
        cache.arrays({"x": 1}, lambda: ARRAYS)
        (folder,) = (tmp_path / "cache").iterdir()
        path = folder / ("key.json" if damage == "key" else "a.npy")
        data = bytearray(path.read_bytes())
        if damage == "remove":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(data[:-8])
        else:
            data[-3 if damage == "flip" else 0] ^= 1
            path.write_bytes(data)
        for _ in range(2):
            assert cache.arrays({"x": 1}, lambda: ARRAYS)["a"].tolist() == ARRAYS["a"].tolist()
        assert cache.arrays({"x": 1}, lambda: pytest.fail("not mended"))["b"].tolist() == [7]

    def test_a_folder_that_cannot_be_written_only_costs_time(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("in the way")
        for cache in (IndexCache(None), IndexCache(tmp_path / "file" / "cache")):
            assert cache.arrays({"x": 1}, lambda: ARRAYS)["b"].tolist() == [7]
            settle(monkeypatch)
            assert cache.sha256(old_file(tmp_path / "x.bin", b"hello"))
            monkeypatch.undo()

    def test_it_lies_beside_the_files_where_it_can(self, tmp_path, monkeypatch):
        assert IndexCache.beside(tmp_path, otherwise=tmp_path / "o").folder == tmp_path / FOLDER_NAME
        (tmp_path / "read_only").mkdir(mode=0o555)  # root, too, leaves it alone
        assert IndexCache.beside(tmp_path / "read_only", otherwise=tmp_path / "o").folder == tmp_path / "o"
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert IndexCache.beside(tmp_path, otherwise=tmp_path / "o").folder == tmp_path / "o"
