"""Documents from text, JSON lines and dumps; one line for everything that is not what it should be."""

import bz2
import csv
import errno
import gzip
import importlib.util
import io
import json
import lzma
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from ki_ds.data import corpora
from ki_ds.data.corpora import Corpus, gensim_dump_path
from ki_ds.data.processes import StoppedError
from ki_ds.data.sources import HubSource
from ki_ds.errors import UserError
from tests import forked
from tests.data.test_packings import wide
from tests.tiny import ROOT, environment

PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),
}
TEXT = "First line.\nSecond – line.\n\n\n  \nAnother document.\r\nIts end.\n"
DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" version="0.10" xml:lang="bg"><siteinfo>
<sitename>W</sitename><dbname>x</dbname><namespaces><namespace key="0" case="first-letter" />
<namespace key="6" case="first-letter">Файл</namespace></namespaces></siteinfo>
<page><title>Tea</title><ns>0</ns><id>11</id><revision><id>3</id><timestamp>2016-01-01T00:00:00Z</timestamp>
<text xml:space="preserve">old text</text></revision><revision><id>4</id><timestamp>2016-01-02T00:00:00Z</timestamp>
<text xml:space="preserve">'''Tea''' is a [[drink|beverage]].
[[Файл:Tea.jpg|thumb|A cup]]
== Kinds ==
* green &lt;ref&gt;a book&lt;/ref&gt;
* black</text></revision></page>
<page><title>Chai</title><ns>0</ns><id>12</id><redirect title="Tea" /><revision><id>5</id>
<timestamp>2016-01-01T00:00:00Z</timestamp><text xml:space="preserve">#REDIRECT [[Tea]]</text></revision></page>
<page><title>Talk:Tea</title><ns>1</ns><id>13</id><revision><id>6</id>
<timestamp>2016-01-01T00:00:00Z</timestamp><text xml:space="preserve">talk</text></revision></page>
<page><title>Water</title><ns>0</ns><id>14</id><revision><id>7</id>
<timestamp>2016-01-01T00:00:00Z</timestamp><text xml:space="preserve">Water is wet.</text></revision></page>
</mediawiki>
"""


def lines_of(*sources, **settings):
    return [list(raw.lines()) for raw in Corpus(sources, **settings)]


class TestPlainFormats:
    @pytest.mark.parametrize("suffix", PACKERS)
    def test_text_in_every_packing(self, tmp_path, suffix):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(PACKERS[suffix](TEXT.encode()))
        assert lines_of(path) == [["First line.", "Second – line."], ["Another document.", "Its end."]]
        documents = list(Corpus([path]))
        assert [(d.id, d.starts, d.ends) for d in documents] == [
            (f"a.txt{suffix}#0", True, True),
            (f"a.txt{suffix}#1", True, True),
        ]

    @pytest.mark.parametrize("suffix", PACKERS)
    def test_json_lines(self, tmp_path, suffix):
        path = tmp_path / f"a.jsonl{suffix}"
        records = [{"text": "one\n\ntwo", "title": "T"}, {"text": "three", "n": 3}]
        path.write_bytes(PACKERS[suffix]("\n".join(map(json.dumps, records)).encode()))
        assert lines_of(path) == [["one", "two"], ["three"]]
        assert next(iter(Corpus([path]))).title == "T"
        with pytest.raises(UserError, match=r"a\.jsonl.* line 1 has no text under 'body'"):
            lines_of(path, text_key="body")

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\n")
        assert lines_of(tmp_path / "a.txt") == [["hello"]]

    @given(lines=st.lists(st.sampled_from(["", "ab", "cdefg"])), limit=st.integers(1, 12))
    def test_parts_of_long_documents_make_the_same_documents(self, tmp_path_factory, lines, limit):
        path = tmp_path_factory.mktemp("parts") / "a.txt"
        path.write_text("\n".join(["x", *lines]))
        whole = lines_of(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(corpora, "MAX_PART_CHARACTERS", limit)
            parts = list(Corpus([path]))
        documents: list[list[str]] = []
        for part in parts:
            assert part.starts == (not documents or ended)  # noqa: F821 - set below, at the first part
            documents += [[]] if part.starts else []
            documents[-1] += part.lines()
            assert part.lines()
            ended = part.ends
        assert ended
        assert documents == whole

    @pytest.mark.parametrize(
        ("suffix", "packed"),
        [
            (".zst", wide(TEXT.encode())),
            (".xz", lzma.compress(TEXT[:20].encode()) + bytes(4) + lzma.compress(TEXT[20:].encode())),
        ],
        ids=["zstd", "xz"],
    )
    def test_forms_that_readers_of_packings_refuse_or_cut(self, tmp_path, suffix, packed):
        (tmp_path / f"a.txt{suffix}").write_bytes(packed)
        assert lines_of(tmp_path) == [["First line.", "Second – line."], ["Another document.", "Its end."]]

    def test_a_stream_that_is_damaged_is_not_the_end(self, tmp_path):
        damaged = bytearray(bz2.compress(TEXT.encode()))
        damaged[0] ^= 1
        (tmp_path / "a.txt.bz2").write_bytes(bz2.compress(TEXT.encode()) + damaged)
        with pytest.raises(UserError, match="cut or damaged"):
            lines_of(tmp_path)

    def test_folders_behind_links_and_kinds_that_were_passed_over(self, tmp_path):
        (tmp_path / "top").mkdir()
        (tmp_path / "top/more").symlink_to("../elsewhere")
        (tmp_path / "top/loop").symlink_to("..")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "top/README.txt").write_text("about tea")
        for name in ("top/1.json", "elsewhere/2.JSONL", "top/3.ndjson", "top/part-00004"):
            (tmp_path / name).write_text('{"text": "NAME"}\n{"text": "tea"}\n'.replace("NAME", name[-9:]))
        with gzip.open(tmp_path / "top/5.json.gz", "wt") as file:
            file.write('[{"text": "5"}, {"text": "tea"}]')
        assert len(lines_of(tmp_path / "top")) == 10

    def test_folders_and_globs_are_sorted(self, tmp_path):
        for name in ("b.txt", "a/c.txt", "a/d.jsonl", "a/README.md"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text('{"text": "d"}' if name.endswith("l") else name)
        assert [f.name for f in Corpus([tmp_path]).sources] == ["c.txt", "d.jsonl", "b.txt"]
        assert [f.name for f in Corpus([tmp_path / "**/*.txt"]).sources] == ["c.txt", "b.txt"]

    def test_progress_counts_the_bytes_of_the_files(self, tmp_path):
        (tmp_path / "a.txt").write_text("x\n" * 1000)
        (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"y\n" * 1000))
        corpus = Corpus([tmp_path])
        assert corpus.total_bytes == sum(f.stat().st_size for f in (source.path for source in corpus.sources))
        seen = [corpus.bytes_read for _ in corpus]
        assert seen == sorted(seen)
        assert corpus.bytes_read == corpus.total_bytes

    def test_equal_inputs_have_equal_fingerprints(self, tmp_path):
        for folder, text in (("one", "same"), ("two", "same"), ("three", "sane")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "a.txt").write_text(text)
        one, two, three = (Corpus([tmp_path / f]).fingerprint() for f in ("one", "two", "three"))
        assert one == two != three


class TestUnicode:
    """What is no Unicode is U+FFFD in the text and counted, as Python's own replacement does it."""

    BYTES = b"a \xff b \xe2\x82 c \xed\xa0\x80 d \xef\xbf\xbd e"  # the last one is a true U+FFFD
    RIGHT = BYTES.decode(errors="replace")
    COUNT = RIGHT.count("\ufffd") - 1

    def check(self, source, *, text=RIGHT, count=COUNT):
        corpus = Corpus([source])
        assert [raw.lines() for raw in corpus] == [(text,)]
        assert corpus.replaced == {corpus.sources[0].name: count}
        assert len(list(corpus)) == 1
        assert corpus.replaced.total() == count  # not added up

    @pytest.mark.parametrize("suffix", PACKERS)
    @pytest.mark.parametrize(
        ("kind", "before", "after"),
        [
            ("txt", b"", b"\n"),
            ("jsonl", b'{"text": "', b'"}\n'),
            ("json", b'[{"text": "', b'"}]'),
            ("csv", b"text\n", b"\n"),
            ("xml", *DUMP.encode().split(b"Water is wet.")),
        ],
        ids=["txt", "jsonl", "json", "csv", "xml"],
    )
    def test_bytes_that_are_no_utf8(self, tmp_path, kind, before, after, suffix):
        path = tmp_path / f"a.{kind}{suffix}"
        path.write_bytes(PACKERS[suffix](before + self.BYTES + after))
        if kind == "xml":
            corpus = Corpus([path])
            assert [raw.text for raw in corpus][1] == self.RIGHT
            assert corpus.replaced == {path.name: self.COUNT}
        else:
            self.check(path)

    @pytest.mark.parametrize("kind", ["jsonl", "json"])
    def test_halves_of_surrogate_pairs_in_json(self, tmp_path, kind):
        record = '{"text": "\\ud800 \\ud83d\\ude00 \\udc00", "title": "\\udfff"}'
        (tmp_path / f"a.{kind}").write_text(record if kind == "jsonl" else f"[{record}]")
        self.check(tmp_path / f"a.{kind}", text="\ufffd \U0001f600 \ufffd", count=3)
        assert next(iter(Corpus([tmp_path]))).title == "\ufffd"

    def test_halves_of_surrogate_pairs_that_a_page_names_by_number(self, tmp_path):
        text = "&amp;#xD83D;&amp;#xde00; is &amp;#55357; wet &amp;#x1F600;&amp;#65;."
        (tmp_path / "a.xml").write_text(DUMP.replace("Water is wet.", text))
        corpus = Corpus([tmp_path / "a.xml"])
        assert [raw.lines() for raw in corpus][1] == ("\ufffd\ufffd is \ufffd wet \U0001f600A.",)
        assert corpus.replaced == {"a.xml": 3}

    def column(self, kind):
        """A column whose bytes were never compared with UTF-8."""
        binary = pyarrow.array([self.BYTES])
        return binary if kind == "binary" else pyarrow.Array.from_buffers(pyarrow.string(), 1, binary.buffers())

    @pytest.mark.parametrize("kind", ["string", "binary"])
    @pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
    def test_columns(self, tmp_path, kind, suffix):
        path, table = tmp_path / f"a.{suffix}", pyarrow.table({"text": self.column(kind)})
        if suffix == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            opened = pyarrow.ipc.new_stream if suffix == "arrow" else pyarrow.ipc.new_file
            with opened(path, table.schema) as writer:
                writer.write_table(table)
        self.check(path)

    @pytest.mark.parametrize("encoding", ["windows-1251", "utf-16", "UTF-8"])
    @pytest.mark.parametrize("declared", [True, False])
    def test_dumps_in_other_encodings(self, tmp_path, encoding, declared):
        declaration = f'<?xml version="1.0" encoding="{encoding}"?>' if declared or encoding == "windows-1251" else ""
        (tmp_path / "a.xml").write_bytes((declaration + DUMP.replace("Water is", "Вода is")).encode(encoding))
        corpus = Corpus([tmp_path])
        assert [raw.text for raw in corpus][1] == "Вода is wet."
        assert not corpus.replaced

    def test_data_sets_of_the_hub(self, tmp_path):
        (tmp_path / "set").mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"text": self.column("string")}), tmp_path / "set/train.parquet")
        self.check(f"hf:{tmp_path}/set")

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    @pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
    def test_byte_order_marks_say_the_encoding(self, tmp_path, encoding, kind):
        text = {"txt": "tea – \0", "jsonl": '{"text": "tea – \\u0000"}', "csv": "text\ntea – \0"}[kind]
        (tmp_path / f"a.{kind}").write_text(text, encoding=encoding)
        corpus = Corpus([tmp_path])
        assert [raw.text.strip() for raw in corpus] == ["tea – \0"]
        assert not corpus.replaced


class TestTables:
    TEXTS = ('one\n\ntwo, with "quotes"', "", "–")

    def csv_file(self, path, pack=lambda data: data):
        with io.StringIO(newline="") as file:
            csv.writer(file).writerows([["id", "body"], *enumerate(self.TEXTS)])
            path.write_bytes(pack(file.getvalue().encode()))
        return path

    def parquet_file(self, path, texts=TEXTS, **settings):
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "body": texts}), path, **settings)
        return path

    @pytest.mark.parametrize("suffix", PACKERS)
    def test_a_column_of_csv(self, tmp_path, suffix):
        path = self.csv_file(tmp_path / f"a.csv{suffix}", PACKERS[suffix])
        assert lines_of(path, text_key="body") == [["one", 'two, with "quotes"'], [], ["–"]]
        assert [d.id for d in Corpus([path], text_key="body")] == [f"{path.name}#{i}" for i in range(3)]

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_every_end_of_a_row(self, tmp_path, end):
        (tmp_path / "a.csv").write_bytes(f'text{end}a{end}"b\r\nc"{end}'.encode())
        assert [raw.text for raw in Corpus([tmp_path])] == ["a", "b\r\nc"]

    def test_csv_fields_may_be_long_and_a_mark_may_come_first(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\r\n" + b"x" * 300_000 + b"\r\n")
        assert lines_of(tmp_path / "a.csv") == [["x" * 300_000]]

    @pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), "dictionary"])
    def test_a_column_of_parquet(self, tmp_path, kind):
        texts = pyarrow.array(self.TEXTS)
        texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
        path = self.parquet_file(tmp_path / "a.parquet", texts)
        assert lines_of(path, text_key="body") == [["one", 'two, with "quotes"'], [], ["–"]]

    def test_parquet_is_read_in_pieces(self, tmp_path):
        texts = [f"{i} " + "word " * 50 for i in range(4000)]
        path = self.parquet_file(tmp_path / "a.parquet", texts, row_group_size=500)
        corpus = Corpus([path], text_key="body")
        seen = [(document.text, corpus.bytes_read) for document in corpus]
        assert [text for text, _ in seen] == texts
        assert 0 < seen[0][1] < seen[-1][1] <= corpus.total_bytes

    @pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
    def test_a_wrong_column_is_answered_with_those_there_are(self, tmp_path, name):
        write = self.csv_file if name.endswith("csv") else self.parquet_file
        with pytest.raises(UserError, match=r"has no column 'text'; name one with text_key: id, body"):
            lines_of(write(tmp_path / name))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'text\nfine\n"open\n', "line 3 is not CSV"),
            (b'text\n"a"b\n', "line 2 is not CSV"),
            (b"text,id\na,1\nb\n", "line 3 ends a row of 1 fields, the first has 2"),
            (b"text,text\na,b\n", "has more than one column 'text'"),
            (b'"a\nb",c\nd,e\n', r"has no column 'text'; name one with text_key: 'a\\nb', c$"),
            (b"text\n", "hold no document"),
        ],
    )
    def test_malformed_csv(self, tmp_path, content, message):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            lines_of(tmp_path / "a.csv")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
    def test_cut_parquet_and_other_things_by_its_name(self, tmp_path, share):
        data = self.parquet_file(tmp_path / "a.parquet", ["word " * i for i in range(400)]).read_bytes()
        for content in (data[: int(len(data) * share)], b"text, not a table\n" * 9):
            (tmp_path / "a.parquet").write_bytes(content)
            with pytest.raises(UserError, match=r"a\.parquet is no whole Parquet file") as caught:
                lines_of(tmp_path / "a.parquet", text_key="body")
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("compression", ["snappy", "gzip", "brotli", "zstd", "lz4"])
    def test_every_compression_of_parquet(self, tmp_path, compression):
        path = self.parquet_file(tmp_path / "a.parquet", compression=compression)
        assert lines_of(path, text_key="body") == [["one", 'two, with "quotes"'], [], ["–"]]

    def test_what_pyarrow_lacks_is_no_damage(self, tmp_path, monkeypatch):
        def lacking(*_, **__):
            raise pyarrow.ArrowNotImplementedError("Support for codec 'lzo' not built")

        path = self.parquet_file(tmp_path / "a.parquet")
        monkeypatch.setattr(pyarrow.parquet, "ParquetFile", lacking)
        with pytest.raises(UserError, match=r"Parquet that cannot be read here \(Support for codec 'lzo' not built\)"):
            lines_of(path, text_key="body")

    @pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
    def test_a_name_of_a_column_that_is_no_utf8_is_damage(self, tmp_path, name):
        path, table = tmp_path / name, pyarrow.table({"text": ["tea"], "other": ["b"]})
        if name == "a.parquet":
            pyarrow.parquet.write_table(table, path, store_schema=False)
        else:
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        path.write_bytes(path.read_bytes().replace(b"other", b"oth\xff\xff"))
        with pytest.raises(UserError, match=r"is no whole (Parquet|Arrow) file"):
            lines_of(path)

    @pytest.mark.parametrize("kind", ["string", "dictionary"])
    def test_lengths_and_places_are_checked_before_a_text_is_read(self, kind):
        ends = pyarrow.array([0, 3, 2], pyarrow.int32()).buffers()[1]
        column = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, ends, pyarrow.py_buffer(b"tea")])
        if kind == "dictionary":
            places = pyarrow.array([0, 1], pyarrow.int8())
            column = pyarrow.DictionaryArray.from_arrays(places, pyarrow.array(["tea"]), safe=False)
        with pytest.raises(pyarrow.ArrowInvalid):
            next(corpora._texts([column], HubSource.parse("hf:a"), "text"))

    def test_numbers_and_nulls_are_no_text(self, tmp_path):
        for texts in ([1, 2], ["a", None]):
            self.parquet_file(tmp_path / "a.parquet", texts)
            with pytest.raises(UserError, match=r"row [12] has no text under 'body'"):
                lines_of(tmp_path / "a.parquet", text_key="body")


class TestHub:
    @pytest.fixture
    def source(self, tmp_path):
        folder = tmp_path / "set"
        folder.mkdir()
        for split, texts in (("train", ["one\ntwo", "three"]), ("test", ["four"])):
            (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": t, "n": 1}) for t in texts))
        return f"hf:{folder}"

    def test_a_local_folder_named_like_a_data_set(self, source):
        assert lines_of(source) == lines_of(f"{source}:default") == [["one", "two"], ["three"]]
        assert lines_of(f"{source}:default@test") == lines_of(f"{source}@test") == [["four"]]

    @pytest.mark.parametrize(
        ("suffix", "settings", "message"),
        [
            ("@none", {}, "cannot be read"),
            (":none", {}, "cannot be read"),
            ("-absent", {}, "cannot be read"),
            ("", {"text_key": "body"}, "has no column 'body'; name one with text_key: text, n"),
            ("", {"text_key": "n"}, "row 1 has no text under 'n'"),
        ],
    )
    def test_what_is_not_there_is_one_line(self, source, suffix, settings, message):
        with pytest.raises(UserError, match=message) as caught:
            lines_of(source + suffix, **settings)
        assert "\n" not in str(caught.value)
        assert source in str(caught.value)

    def test_a_broken_file_is_one_line(self, source):
        Path(source.removeprefix("hf:"), "train.jsonl").write_text('{"text": "x"}\n{"text"')
        with pytest.raises(UserError, match="cannot be read"):
            lines_of(source)

    def test_without_a_network_it_is_one_line(self):
        command = "from ki_ds.data.corpora import Corpus; list(Corpus(['hf:no-one/no-such-set']))"
        done = forked.run([sys.executable, "-c", command], env=environment(), cwd=ROOT, capture_output=True, text=True)
        assert "UserError: hf:no-one/no-such-set cannot be read" in done.stderr.splitlines()[-1]


class TestMediaWiki:
    @pytest.mark.parametrize("name", ["w.xml", "w.xml.bz2", "w-articles1.xml-p1p41242.bz2"])
    def test_articles_in_their_latest_revision(self, tmp_path, name):
        (tmp_path / name).write_bytes(PACKERS[".bz2" if name.endswith("bz2") else ""](DUMP.encode()))
        documents = list(Corpus([tmp_path / name]))
        assert [(d.id, d.title) for d in documents] == [("11", "Tea"), ("14", "Water")]
        assert list(documents[0].lines()) == ["Tea is a beverage.", "Kinds", "green", "black"]
        assert list(documents[1].lines()) == ["Water is wet."]

    @pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="the package gensim is not installed")
    def test_a_real_dump(self):
        documents = [raw for raw, _ in zip(Corpus([gensim_dump_path()]), range(3), strict=False)]
        assert [d.title for d in documents] == ["Anarchism", "Autism", "Albedo"]
        text = "\n".join(documents[2].lines())
        assert text.startswith("Albedo")
        assert not any(mark in text for mark in ("[[", "{{", "'''", "<ref", "]]", "{|"))
        assert len(text) > 5000

    def test_without_gensim_the_line_says_what_to_install(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(UserError, match="pip install gensim"):
            gensim_dump_path()


class TestBadCorpora:
    def refused(self, path, message):
        with pytest.raises(UserError, match=message) as caught:
            lines_of(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    def test_missing_unknown_and_none(self, tmp_path):
        self.refused(tmp_path / "no.txt", "does not exist")
        (tmp_path / "a.pdf").write_text("x")
        self.refused(tmp_path / "a.pdf", "of no known kind")
        self.refused(tmp_path, "holds no .txt")
        with pytest.raises(UserError, match="no corpus was named"):
            Corpus([])

    @pytest.mark.parametrize("content", ["", "\n  \n\n"])
    def test_empty(self, tmp_path, content):
        (tmp_path / "a.txt").write_text(content)
        self.refused(tmp_path / "a.txt", "no document" if content else "is empty")

    @pytest.mark.parametrize("suffix", PACKERS)
    def test_another_encoding_is_told_before_it_is_taken_for_damage(self, tmp_path, suffix):
        data = "D\xe9j\xe0 vu.\n\n".encode("latin-1") * 600
        (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix](data))
        self.refused(
            tmp_path / f"a.txt{suffix}", "is not UTF-8: 1,002 of its first 4,509 characters are none; convert it"
        )

    @pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-be"])
    def test_wide_characters_without_a_mark(self, tmp_path, encoding):
        (tmp_path / "a.txt").write_text("tea and water", encoding=encoding)
        self.refused(tmp_path / "a.txt", "binary, or UTF-16 without a byte order mark")

    @pytest.mark.parametrize("suffix", list(PACKERS)[1:])
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
    def test_cut_or_damaged_packings(self, tmp_path, suffix, share):
        path = tmp_path / f"a.txt{suffix}"
        data = PACKERS[suffix]("\n".join(f"line {i * i}" for i in range(3000)).encode())
        path.write_bytes(data[: int(len(data) * share)])
        self.refused(path, "cut or damaged")
        damaged = bytearray(data)
        damaged[int(len(data) * share)] ^= 0x55
        path.write_bytes(damaged)
        self.refused(path, "cut or damaged")

    def test_packed_by_name_only(self, tmp_path):
        for suffix in list(PACKERS)[1:]:
            (tmp_path / f"a.txt{suffix}").write_text(TEXT)
            self.refused(tmp_path / f"a.txt{suffix}", "file, though its name says so")

    def test_a_disk_that_fails_keeps_what_is_done(self, tmp_path, monkeypatch):
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))

        def failing(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(corpora, "json_records", failing)
        (tmp_path / "a.jsonl").write_text("{}")
        with pytest.raises(StoppedError, match=r"a\.jsonl cannot be read \(Input/output error\); what is done stays"):
            lines_of(tmp_path / "a.jsonl")

    @pytest.mark.parametrize("cut", [1, 20, 300, len(DUMP) - 30])
    def test_a_cut_dump(self, tmp_path, cut):
        (tmp_path / "a.xml").write_text(DUMP.rstrip()[:-cut])
        self.refused(tmp_path / "a.xml", "no whole MediaWiki dump")

    def test_a_cut_packed_dump(self, tmp_path):
        data = bz2.compress(DUMP.encode())
        (tmp_path / "a.xml.bz2").write_bytes(data[:-20])
        self.refused(tmp_path / "a.xml.bz2", "cut or damaged")

    def test_a_dump_without_articles_says_what_it_has(self, tmp_path):
        log = "<mediawiki><logitem><id>1</id></logitem></mediawiki>"
        (tmp_path / "a.xml").write_text(log)
        self.refused(tmp_path / "a.xml", "no whole MediaWiki dump: it is a dump of logs, without pages$")
        page = "<page><title>A</title><redirect/><revision><text>x</text></revision></page>"
        (tmp_path / "a.xml").write_text(f"<mediawiki>{page}{page}</mediawiki>")
        self.refused(tmp_path / "a.xml", r"hold no document \(pages of dumps left out: 2 redirects\); bring")

    @pytest.mark.parametrize("content", [b"<html><a>x</a></html>", b"plain"])
    def test_another_kind_of_xml(self, tmp_path, content):
        (tmp_path / "a.xml").write_bytes(content)
        self.refused(tmp_path / "a.xml", "no whole MediaWiki dump")

    def test_broken_json(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text"')
        self.refused(tmp_path / "a.jsonl", "line 2 is not JSON")
        (tmp_path / "a.jsonl").write_text('["x"]')
        self.refused(tmp_path / "a.jsonl", "line 1 has no text")
