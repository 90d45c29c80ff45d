"""What sources name: kinds by name and content, links, what is left out and said, data sets by `hf:`."""

import bz2
import gzip
import importlib
import json
import operator
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from ki_ds.data.sources import HubSource, find, required
from ki_ds.errors import UserError
from tests.data.test_packings import wide

TEXT = b"Tea is hot.\n\nWater is wet.\n"
RECORDS = b'{"text": "tea"}\n{"text": "water"}\n'
DUMP = b'<mediawiki xml:lang="en"><siteinfo></siteinfo></mediawiki>'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 123\n"
INDEX = b"600:12:Anarchism\n600:25:Autism\n"


def by_name(value):
    """The part of a test's name for a parameter: contents, which differ with the time when packed, are left out."""
    return "" if isinstance(value, bytes) else str(value)


def kinds(*sources, **settings):
    """{name: (kind, packing)} of what is read, in order."""
    found = find(map(str, sources), **settings).sources
    return {file.name: (file.kind, file.packing.name if file.packing else None) for file in found}


def left_out(*sources, **settings):
    """{name: reason} of what is not read."""
    return {left.path.name: left.reason for left in find(map(str, sources), **settings).left_out}


def columnar(path):
    table = pyarrow.table({"text": ["tea"]})
    if "arrow" in path.name:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(table, path)


class TestKinds:
    @pytest.mark.parametrize(
        ("name", "content", "kind", "packing"),
        [
            ("a.txt", TEXT, "text", None),
            ("a.TXT.GZ", gzip.compress(TEXT), "text", "gzip"),
            ("a.txt.0003", TEXT, "text", None),
            ("a.jsonl.zst", zstd.compress(RECORDS), "json", "zstd"),
            ("a.JSONL", RECORDS, "json", None),
            ("a.ndjson.bz2", bz2.compress(RECORDS), "json", "bzip2"),
            ("c4.00000-of-00002.json.gz", gzip.compress(RECORDS), "json", "gzip"),
            ("a.csv.gz", gzip.compress(b"text\ntea\n"), "csv", "gzip"),
            ("w-articles1.xml-p1p41242.bz2", bz2.compress(DUMP), "wiki", "bzip2"),
            ("a.txt", zstd.compress(TEXT), "text", "zstd"),  # packed without saying so
            ("part-00000", RECORDS, "json", None),
            ("part-00001.gz", gzip.compress(b'[{"text": "tea"}]'), "json", "gzip"),
            ("wiki_00", TEXT, "text", None),
            ("a.01", "[Tea] and {water} – ".encode() * 9000, "text", None),  # the head ends within a character
            ("dump", DUMP, "wiki", None),
            ("marked", "tea".encode("utf-16"), "text", None),
        ],
        ids=by_name,
    )
    def test_they_are_told_by_name_and_content(self, tmp_path, name, content, kind, packing):
        (tmp_path / name).write_bytes(content)
        assert kinds(tmp_path) == kinds(tmp_path / name) == {name: (kind, packing)}

    @pytest.mark.parametrize("name", ["a.parquet", "a.pq", "parquet", "a.arrow", "arrow"])
    def test_columns_by_their_first_bytes(self, tmp_path, name):
        columnar(tmp_path / name)
        assert kinds(tmp_path) == {name: ("arrow" if "arrow" in name else "parquet", None)}

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("a.pdf", b"%PDF", r"of no known kind \(.pdf\)"),
            ("a.parquet.gz", b"x", "of no known kind"),
            ("a.txt.lz4", b"x", r"of no known kind \(.lz4\)"),
            ("model", b"\0\1\2" * 9, "binary, of no known kind"),
            ("latin", "caf\xe9 au lait".encode("latin-1"), "binary, of no known kind"),
            ("empty.txt", b"", "empty"),
            ("w-multistream-index.txt.bz2", bz2.compress(INDEX), "the index of a multistream dump"),
            ("w-multistream-index1.txt-p1p41242", INDEX, "the index of a multistream dump"),
            ("a.txt", LFS, "a pointer of Git in place of a file"),
            ("a.parquet", LFS, "a pointer of Git in place of a file"),
            ("a.jsonl.gz", LFS, "a pointer of Git in place of a file"),
            ("part-0", b"/annex/objects/SHA256E-s9--0a.txt\n", "a pointer of Git in place of a file"),
        ],
        ids=by_name,
    )
    def test_what_is_no_text_is_an_error_where_named_and_left_out_where_found(self, tmp_path, name, content, reason):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is {reason}.*; give a \.txt"):
            find([str(tmp_path / name)])
        with pytest.raises(UserError, match=rf"holds no .* \(1 left out: {name} is {reason}") as caught:
            find([str(tmp_path)])
        assert "\n" not in str(caught.value)
        (tmp_path / "b.txt").write_bytes(TEXT)
        assert kinds(tmp_path) == kinds(tmp_path / "*") == {"b.txt": ("text", None)}
        assert list(left_out(tmp_path)) == [name]

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("README.txt", TEXT),
            ("readme_de.txt.gz", gzip.compress(TEXT)),
            ("LICENSE", TEXT),
            ("LICENCE-APACHE", TEXT),
            ("xxwiki-20260101-md5sums.txt", TEXT),
            ("SHA256SUMS", TEXT),
            ("xxwiki-latest-all-titles-in-ns0.gz", gzip.compress(TEXT)),
            ("_SUCCESS", b"x"),
            ("dataset_infos.json", b'{"default": [{"a": 1}]}'),
            ("settings.json", b'{"name": "tea", "size": 3}'),
            ("weights.json", b'{"a": ["' + b"b" * 200_000 + b'"]}'),
            ("en_sha256.txt", b"0a" * 32 + b"  a.txt.gz\n"),
            ("SHA1.txt.gz", gzip.compress(b"SHA1 (a.txt) = " + b"0a" * 20 + b"\n\nSHA1 (b.txt) = " + b"1b" * 20)),
            ("urls.txt", b"https://example.org/a.jsonl\ns3://bucket/b.jsonl\n"),
            ("xxwiki-20260101-dumpruninfo.txt", TEXT),
            ("cache-0a1b2c3d4e5f6071_00000_of_00002.arrow", b"\xff\xff\xff\xff\0\0"),
            ("rss.xml", b"<rss><channel></channel></rss>"),
            (".hidden.txt", TEXT),
        ],
        ids=by_name,
    )
    def test_what_merely_lies_beside_the_data_is_left_out_unless_named(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        (tmp_path / "a.txt").write_bytes(TEXT)
        assert list(kinds(tmp_path)) == ["a.txt"]
        assert list(left_out(tmp_path)) == [name]
        if content != b"x":
            assert name in kinds(tmp_path / name)

    @pytest.mark.parametrize("name", ["readme-corpus.jsonl", "book-index.txt", "license_plates.csv", "readers.txt"])
    def test_data_with_such_names_is_read(self, tmp_path, name):
        (tmp_path / name).write_bytes({"l": RECORDS, "t": TEXT, "v": b"text\ntea\n"}[name[-1]])
        assert list(kinds(tmp_path)) == [name]

    @pytest.mark.parametrize("text", [b"https://x.org\n\nTea is hot.\n", b"0a" * 16 + b" is\na sum", b"deadbeef 12\n"])
    def test_text_with_addresses_or_sums_is_read(self, tmp_path, text):
        (tmp_path / "a.txt").write_bytes(text)
        assert list(kinds(tmp_path)) == ["a.txt"]

    def test_what_is_packed_twice_is_told(self, tmp_path):
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bz2.compress(TEXT)))
        with pytest.raises(UserError, match=r"a\.txt\.gz is packed twice \(bzip2 within gzip\); unpack it once"):
            assert find([str(tmp_path)]).sources[0].encoding

    def test_json_of_one_object_is_data_if_it_has_a_text_or_records(self, tmp_path):
        (tmp_path / "a.json").write_text('{"text": "tea"}')
        (tmp_path / "b.json").write_text('{"version": 1, "data": [{"body": "tea"}]}')
        assert list(kinds(tmp_path)) == ["a.json", "b.json"]
        assert list(kinds(tmp_path, text_key="body")) == ["b.json"]


class TestFolders:
    def write(self, folder, *names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"this is {name}")

    def test_links_are_followed_and_loops_end(self, tmp_path):
        self.write(tmp_path, "top/a.txt", "top/deep/c.txt", "elsewhere/b.txt")
        (tmp_path / "top/more").symlink_to("../elsewhere")
        (tmp_path / "top/loop").symlink_to(".")
        (tmp_path / "top/deep/up").symlink_to("../..")
        (tmp_path / "top/nothing").symlink_to("no-such")
        expected = ["a.txt", "c.txt", "b.txt"]
        for source in ("top", "top/**", "top/**/*.txt", "t*p"):
            assert list(kinds(tmp_path / source)) == expected
        assert {"loop", "nothing"} <= left_out(tmp_path / "top").keys()

    def test_a_folder_with_two_ways_to_it_is_read_once_under_its_own_name(self, tmp_path):
        self.write(tmp_path, "z/a.txt", "z/sub/b.txt")
        (tmp_path / "a").symlink_to("z")
        (tmp_path / "b").symlink_to("z/sub")
        found = find([str(tmp_path)])
        assert [file.path.relative_to(tmp_path).as_posix() for file in found.sources] == ["z/a.txt", "z/sub/b.txt"]
        assert {left.path.name: left.reason for left in found.left_out} == dict.fromkeys(
            "ab", "a link to a folder that is read already"
        )

    def test_a_file_named_twice_is_read_once(self, tmp_path):
        self.write(tmp_path, "a.txt", "b.txt")
        (tmp_path / "link.txt").symlink_to("a.txt")
        os.link(tmp_path / "a.txt", tmp_path / "hard.txt")
        sources = [tmp_path / "b.txt", tmp_path, tmp_path / "*.txt", tmp_path / "b.txt"]
        assert list(kinds(*sources)) == ["b.txt", "a.txt"]
        reasons = [left.reason for left in find(map(str, sources)).left_out]
        assert len(reasons) == 8
        assert set(reasons) == {"read already (the same file, by link or named again)"}
        assert [source.name for source in find(["hf:a/b", "hf:a/b"]).sources] == ["hf:a/b"]

    def test_file_systems_without_inodes(self, tmp_path, monkeypatch):
        self.write(tmp_path, "a.txt", "b/b.txt", "c/c.txt")
        (tmp_path / "link.txt").symlink_to("a.txt")
        original = Path.stat
        without = operator.attrgetter("st_mode", "st_dev", "st_size")

        def stat(path, **settings):
            mode, device, size = without(original(path, **settings))
            return os.stat_result((mode, 0, device, 1, 0, 0, size, 0, 0, 0))

        monkeypatch.setattr(Path, "stat", stat)
        assert list(kinds(tmp_path)) == ["a.txt", "b.txt", "c.txt"]
        assert list(left_out(tmp_path)) == ["link.txt"]

    def test_a_name_that_says_the_kind_goes_before_one_that_does_not(self, tmp_path):
        """A store of files under hashes, with links under names."""
        self.write(tmp_path, "objects/0a1b", "objects/2c3d", "objects/4e5f")
        (tmp_path / "tree").mkdir()
        for name, blob in (("README.md", "0a1b"), ("a.txt", "2c3d"), ("b.csv", "4e5f")):
            (tmp_path / "tree" / name).symlink_to(f"../objects/{blob}")
        assert kinds(tmp_path) == {"a.txt": ("text", None), "b.csv": ("csv", None)}
        assert left_out(tmp_path).keys() >= {"README.md", "0a1b"}

    def test_of_the_cache_of_the_hub_what_main_names_is_read(self, tmp_path):
        cache = tmp_path / "datasets--a--b"
        self.write(cache, "refs/main", "refs/convert/parquet", "blobs/attributes", "blobs/old", "blobs/new")
        for name, blob in (("1f/a.txt", "old"), ("2e/a.txt", "new"), ("2e/.gitattributes", "attributes")):
            link = cache / "snapshots" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"../../blobs/{blob}")
        (cache / "refs" / "main").write_text("2e")
        assert [file.path.relative_to(cache).parts[1] for file in find([str(tmp_path)]).sources] == ["2e"]
        of_cache = "of the cache of the hub"
        assert left_out(tmp_path) == {
            "1f": "another revision than main in the cache of the hub",
            "blobs": of_cache,
            "refs": of_cache,
            ".gitattributes": "hidden (its name begins with a dot)",
        }
        (cache / "refs" / "main").unlink()
        assert [file.path.relative_to(cache).parts[1] for file in find([str(cache)]).sources] == ["1f", "2e"]

    def test_a_prepared_corpus_within_a_folder_is_left_out(self, tmp_path):
        self.write(tmp_path, "a.txt", "out/corpus.json", "out/train.idx", "out/tokenizer/tokenizer.json")
        assert list(kinds(tmp_path)) == ["a.txt"]
        assert left_out(tmp_path) == {"out": "a prepared corpus"}

    def test_empty_text_is_no_source(self, tmp_path, monkeypatch):
        self.write(tmp_path, "a.txt")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="a source is empty text"):
            find([""])
        assert list(kinds(".")) == ["a.txt"]

    def test_one_source_that_leads_to_nothing_is_an_error_among_others(self, tmp_path):
        self.write(tmp_path, "a/a.txt", "b/a.pdf")
        with pytest.raises(UserError, match=r"b holds no \.txt.* \(1 left out: a\.pdf is of no known kind"):
            find([str(tmp_path / "a"), str(tmp_path / "b")])

    @pytest.mark.parametrize("target", ["no-such", "link.txt"])
    def test_a_link_to_nothing(self, tmp_path, target):
        self.write(tmp_path, "a.txt")
        (tmp_path / "link.txt").symlink_to(target)
        with pytest.raises(UserError, match=r"link\.txt does not exist"):
            find([str(tmp_path / "link.txt")])
        assert left_out(tmp_path) == left_out(tmp_path / "*") == {"link.txt": "a link to nothing"}

    def test_a_pipe_is_no_plain_file(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.txt")
        (tmp_path / "a.txt").write_bytes(TEXT)
        assert left_out(tmp_path) == left_out(tmp_path / "*") == {"pipe.txt": "no plain file"}
        with pytest.raises(UserError, match=r"pipe\.txt is no plain file"):
            find([str(tmp_path / "pipe.txt")])


def test_the_table_tells_all_that_is_read_and_left_out(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jsonl").write_bytes(RECORDS)
    (tmp_path / "README.txt").write_bytes(TEXT)
    (tmp_path / "long.jsonl.zst").write_bytes(wide(RECORDS))
    header, *rows = find([str(tmp_path)]).table().splitlines()
    assert header.split() == ["files", "size", "names"]
    assert [row.split() for row in rows[:3]] == [
        ["read", "JSON", "records", "5", "170", "bytes", "0.jsonl,", "1.jsonl,", "2.jsonl", "and", "2", "more"],
        ["read", "JSON", "records,", "zstd", "1", f"{len(wide(RECORDS))}", "bytes", "long.jsonl.zst"],
        ["left", "out", "about", "data", "(a", "card,", "licence,", "list", "or", "checksums)", "1", "README.txt"],
    ]
    assert rows[3:] == ["long.jsonl.zst takes 2.00 GiB of memory at most to unpack"]


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
            find([source])
    else:
        (found,) = find([source]).sources
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
