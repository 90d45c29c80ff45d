"""Documents from text, JSON lines and dumps; one line for everything that is not what it should be."""

import bz2
import gzip
import importlib.util
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_ds.data import corpora
from ki_ds.data.corpora import Corpus, gensim_dump_path, plain_wikitext
from ki_ds.errors import UserError

PACKERS = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
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
    return [list(raw.cleaned().lines) for raw in Corpus(sources, **settings)]


class TestPlainFormats:
    @pytest.mark.parametrize("suffix", PACKERS)
    def test_text_in_every_packing(self, tmp_path, suffix):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(PACKERS[suffix](TEXT.encode()))
        assert lines_of(path) == [["First line.", "Second – line."], ["Another document.", "Its end."]]
        documents = list(Corpus([path], domain="WB"))
        assert [(d.id, d.domain, d.starts, d.ends) for d in documents] == [
            (f"a.txt{suffix}#0", "WB", True, True),
            (f"a.txt{suffix}#1", "WB", True, True),
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
            documents[-1] += part.cleaned().lines
            assert part.cleaned().lines
            ended = part.ends
        assert ended
        assert documents == whole

    def test_folders_and_globs_are_sorted_and_take_known_kinds_only(self, tmp_path):
        for name in ("b.txt", "a/c.txt", "a/d.jsonl", "a/README.md"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text('{"text": "d"}' if name.endswith("l") else name)
        assert [f.name for f in Corpus([tmp_path]).files] == ["c.txt", "d.jsonl", "b.txt"]
        assert [f.name for f in Corpus([tmp_path / "**/*.txt"]).files] == ["c.txt", "b.txt"]

    def test_progress_counts_the_bytes_of_the_files(self, tmp_path):
        (tmp_path / "a.txt").write_text("x\n" * 1000)
        (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"y\n" * 1000))
        corpus = Corpus([tmp_path])
        assert corpus.total_bytes == sum(f.stat().st_size for f in corpus.files)
        seen = [corpus.bytes_read for _ in corpus]
        assert seen == sorted(seen)
        assert corpus.bytes_read == corpus.total_bytes

    def test_equal_inputs_have_equal_fingerprints(self, tmp_path):
        for folder, text in (("one", "same"), ("two", "same"), ("three", "sane")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "a.txt").write_text(text)
        one, two, three = (Corpus([tmp_path / f]).fingerprint() for f in ("one", "two", "three"))
        assert one == two != three


class TestMediaWiki:
    @pytest.mark.parametrize("name", ["w.xml", "w.xml.bz2", "w-articles1.xml-p1p41242.bz2"])
    def test_articles_in_their_latest_revision(self, tmp_path, name):
        (tmp_path / name).write_bytes(PACKERS[".bz2" if name.endswith("bz2") else ""](DUMP.encode()))
        documents = [raw.cleaned() for raw in Corpus([tmp_path / name])]
        assert [(d.id, d.title) for d in documents] == [("11", "Tea"), ("14", "Water")]
        assert list(documents[0].lines) == ["Tea is a beverage.", "Kinds", "green", "black"]
        assert list(documents[1].lines) == ["Water is wet."]

    @pytest.mark.parametrize(
        ("wikitext", "plain"),
        [
            ("'''''bold''''' and ''it''", "bold and it"),
            ("a<!-- no --> b{{cite|x}}c", "a bc"),
            (
                "see [[Category:X]][[de:Tee]][[File:a.png|b [[c]]]] [[:Category:Y]], [[CSI: Miami]]",
                "see Category:Y, CSI: Miami",
            ),
            ("[http://x.org a site] [http://x.org] http://y.org z", "a site z"),
            ("x\n{|\n| cell\n|}\ny", "x\ny"),
            ("Tea ({{IPA|x}}) or (; Greek) &amp; &nbsp;co", "Tea or (Greek) & co"),
            ("H<sub>2</sub>O <math>x^2</math><br/>next <nowiki>''</nowiki>", "H2O\nnext"),
            ("# one\n## two\n: three\n----\n----", "one\ntwo\nthree"),
            ("{| unclosed\n| cell\nprose", "prose"),
            ("1914 | 1918\n12 %", ""),
        ],
    )
    def test_markup(self, wikitext, plain):
        assert plain_wikitext(wikitext) == plain

    @pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="the package gensim is not installed")
    def test_a_real_dump(self):
        documents = [raw for raw, _ in zip(Corpus([gensim_dump_path()]), range(3), strict=False)]
        assert [d.title for d in documents] == ["Anarchism", "Autism", "Albedo"]
        text = "\n".join(documents[2].cleaned().lines)
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
    def test_not_utf8_names_the_byte(self, tmp_path, suffix):
        data = "fine – so far\n".encode() * 3 + b"caf\xe9\n"
        (tmp_path / f"a.txt{suffix}").write_bytes(PACKERS[suffix](data))
        self.refused(tmp_path / f"a.txt{suffix}", f"not UTF-8 at byte offset {data.index(0xE9)} ")

    @pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
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
        for suffix in (".gz", ".bz2", ".xz"):
            (tmp_path / f"a.txt{suffix}").write_text(TEXT)
            self.refused(tmp_path / f"a.txt{suffix}", "cut or damaged")

    @pytest.mark.parametrize("cut", [1, 20, 300, len(DUMP) - 30])
    def test_a_cut_dump(self, tmp_path, cut):
        (tmp_path / "a.xml").write_text(DUMP.rstrip()[:-cut])
        self.refused(tmp_path / "a.xml", "no whole MediaWiki dump")

    def test_a_cut_packed_dump(self, tmp_path):
        data = bz2.compress(DUMP.encode())
        (tmp_path / "a.xml.bz2").write_bytes(data[:-20])
        self.refused(tmp_path / "a.xml.bz2", "cut or damaged")

    @pytest.mark.parametrize("content", [b"<html><a>x</a></html>", b"plain", DUMP.encode("cp1251")])
    def test_another_kind_of_xml(self, tmp_path, content):
        (tmp_path / "a.xml").write_bytes(content)
        self.refused(tmp_path / "a.xml", "no whole MediaWiki dump")

    def test_broken_json(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text"')
        self.refused(tmp_path / "a.jsonl", "line 2 is not JSON")
        (tmp_path / "a.jsonl").write_text('["x"]')
        self.refused(tmp_path / "a.jsonl", "line 1 has no text")
