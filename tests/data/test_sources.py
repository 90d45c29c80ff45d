"""What a source names: kinds and packings by suffix, data sets by `hf:`, packages that are not there."""

import importlib
import json

import pytest

from ki_ds.data.sources import FileSource, HubSource, required, resolve
from ki_ds.errors import UserError


@pytest.mark.parametrize(
    ("name", "kind", "packed"),
    [
        ("a.txt", "text", False),
        ("a.jsonl.zst", "jsonl", True),
        ("a.csv.gz", "csv", True),
        ("a.parquet", "parquet", False),
        ("w-articles1.xml-p1p41242.bz2", "wiki", True),
    ],
)
def test_kind_and_packing_are_told_by_the_name(tmp_path, name, kind, packed):
    (tmp_path / name).write_text("x")
    (source,) = resolve(str(tmp_path))
    assert isinstance(source, FileSource)
    assert (source.name, source.kind, source.opener is not None, source.num_bytes) == (name, kind, packed, 1)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hf:wikitext", ("wikitext", None, "train")),
        ("hf:a/b:c-1", ("a/b", "c-1", "train")),
        ("hf:a/b@test[:10%]", None),
        ("hf:a/b@validation", ("a/b", None, "validation")),
        ("hf:a/b:c@test", ("a/b", "c", "test")),
        ("hf:", None),
        ("hf:a:b:c", None),
    ],
)
def test_data_sets_are_named_with_configuration_and_split(source, parts):
    if parts is None:
        with pytest.raises(UserError, match="not of the form hf:NAME"):
            resolve(source)
    else:
        (found,) = resolve(source)
        assert isinstance(found, HubSource)
        assert (found.dataset, found.config, found.split) == parts


def test_the_fingerprint_of_a_data_set_changes_with_its_files(tmp_path):
    def fingerprint():
        return HubSource.parse(f"hf:{tmp_path}").fingerprint()["sha256_of_revision"]

    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a"}))
    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "b"}))
    assert fingerprint() != first


def test_a_package_that_is_not_there_is_named_with_the_command(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"a\.parquet needs the package pyarrow\.parquet; pip install pyarrow"):
        required("pyarrow.parquet", "a.parquet")
