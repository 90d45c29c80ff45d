import errno
import os

import pytest

from ki_ds import files
from ki_ds.errors import UserError
from ki_ds.files import file_sha256, is_plain_name, read_json, write_atomically, write_errors_are_one_line, write_json


def test_json_files(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"status": "running"})
    assert read_json(path) == {"status": "running"}
    with pytest.raises(UserError, match=r"run\.json cannot be read \(it lacks data, task\); remove it"):
        read_json(path, "status", "data", "task", fix="remove it")
    for broken in ("{", "\xff", "[]", "3", "", "[" * 100_000):
        path.write_text(broken, encoding="latin-1")
        with pytest.raises(UserError, match=r"run\.json cannot be read"):
            read_json(path)
    with pytest.raises(UserError, match=r"none\.json cannot be read"):
        read_json(tmp_path / "none.json")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fails)
        with pytest.raises(UserError, match="No space left"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_only_what_the_user_can_mend_becomes_a_line(tmp_path):
    with pytest.raises(UserError, match=r"x cannot be written \(No space left"), write_errors_are_one_line("x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="Input/output"), write_errors_are_one_line("x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_names_and_hashes(tmp_path):
    assert [is_plain_name(name) for name in ("a.bin", "..", ".", "", "a/b", 3)] == [True, *[False] * 5]
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
