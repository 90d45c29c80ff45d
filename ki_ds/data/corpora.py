"""Documents out of the sources of `ki_ds.data.sources`, read as streams.

Reading is cheap and done in order; `RawDocument.cleaned` (the slow part for wikitext) can run anywhere.
"""

import csv
import importlib.util
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO
from xml.etree.ElementTree import ParseError

from ki_ds.data import mediawiki
from ki_ds.data.mediawiki import Language
from ki_ds.data.sources import UNPACK_ERRORS, FileSource, HubSource, Source, required, resolve
from ki_ds.errors import UserError

# A longer document is handed on in parts, so that a file without any blank line stays within memory.
MAX_PART_CHARACTERS = 1 << 20
_PARQUET_ROWS = 256  # decoded at once


@dataclass(frozen=True)
class Document:
    """Clean text: `lines` are its paragraphs, without blank ones."""

    lines: tuple[str, ...]
    id: str
    title: str = ""
    domain: str = ""


@dataclass(frozen=True)
class RawDocument:
    """A document, or a part of a long one, as it stands in its file.

    `wiki` is the language of wikitext, None for plain text.
    """

    text: str
    id: str
    title: str = ""
    domain: str = ""
    wiki: Language | None = None
    starts: bool = True
    ends: bool = True

    def cleaned(self) -> Document:
        """The paragraphs: wikitext as `plain_wikitext` does it, plain text only trimmed."""
        text = self.text
        if self.wiki is not None:
            from ki_ds.data.wikitext import plain_wikitext  # only dumps need the parser

            text = plain_wikitext(text, self.wiki)
        lines = (line.strip() for line in text.split("\n"))
        return Document(tuple(line for line in lines if line), self.id, self.title, self.domain)


# ---------------------------------------------------------------------------------------------- the corpus


class Corpus:
    """The raw documents of some sources, in the order given (files of a folder or glob by name).

    Iterating reads the sources as streams; `bytes_read` of `total_bytes` (compressed sizes; data sets of the hub
    count nothing) says how far it is. `text_key` names the key or column of the text in JSON lines and tables.
    UserError, when made: a source is missing, empty or of no known kind. While iterating: a file is not UTF-8, cut
    off, not what its name says, or has no text under `text_key`.
    """

    def __init__(self, sources: Iterable[str | Path], *, domain: str = "", text_key: str = "text") -> None:
        self.sources = [found for source in sources for found in resolve(str(source))]
        self.domain = domain
        self.text_key = text_key
        if not self.sources:
            raise UserError("no corpus was named; give at least one file, folder, glob or hf:NAME")
        self.total_bytes = sum(source.num_bytes for source in self.sources)
        self.left_out: Counter[str] = Counter()
        self._bytes_before = 0
        self._open_file: BinaryIO | None = None

    @property
    def files(self) -> list[Path]:
        """The files among the sources."""
        return [source.path for source in self.sources if isinstance(source, FileSource)]

    @property
    def has_wikitext(self) -> bool:
        """Whether any document is wikitext, whose cleaning takes longer than everything else."""
        return any(source.kind == "wiki" for source in self.sources)

    @property
    def bytes_read(self) -> int:
        """Bytes of the files consumed by the latest iteration."""
        inside = self._open_file.tell() if self._open_file and not self._open_file.closed else 0
        return self._bytes_before + inside

    def __iter__(self) -> Iterator[RawDocument]:
        self._bytes_before = 0
        self.left_out.clear()
        found = False
        for source in self.sources:
            for document in self._read(source):
                found = True
                yield document
            self._open_file = None
            self._bytes_before += source.num_bytes
        if not found:
            raise UserError(f"{self._first_name} and its like hold no document; bring files with text")

    @property
    def _first_name(self) -> str:
        first = self.sources[0]
        return str(first.path) if isinstance(first, FileSource) else first.name

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells equal sources from others at once: see their `fingerprint`."""
        return [source.fingerprint() for source in self.sources]

    def _read(self, source: Source) -> Iterator[RawDocument]:
        if isinstance(source, HubSource):
            yield from _read_hub(self, source)
            return
        with source.open() as raw:
            self._open_file = raw
            try:
                unpacked = source.opener(raw) if source.opener else raw
                yield from _READERS[source.kind](self, source.path, unpacked)
            except UNPACK_ERRORS as error:
                if source.opener is None:
                    raise
                raise UserError(
                    f"{source.path} cannot be unpacked to its end ({error}); it is cut or damaged: fetch it again"
                ) from None


# -------------------------------------------------------------------------------------------- plain formats


def _decoded_lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    """The lines of a UTF-8 file; UserError with the byte offset of what is not UTF-8."""
    offset = 0
    for line in io.BufferedReader(file, 1 << 20) if isinstance(file, io.RawIOBase) else file:
        try:
            yield line.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 at byte offset {offset + error.start:,} of its text; "
                "convert it, e.g. iconv -f LATIN1 -t UTF-8"
            ) from None
        offset += len(line)


def _read_text(corpus: Corpus, path: Path, file: IO[bytes]) -> Iterator[RawDocument]:
    """Documents between blank lines, long ones in parts."""
    lines: list[str] = []
    size, number, starts = 0, 0, True

    def document(ends: bool) -> RawDocument:
        name = f"{path.name}#{number}"
        return RawDocument("".join(lines), name, domain=corpus.domain, starts=starts, ends=ends)

    for line in _decoded_lines(path, file):
        blank = not line.strip()
        if not blank and size >= MAX_PART_CHARACTERS:
            # handed on only now that another line has come, so that a last part is never empty
            yield document(ends=False)
            lines, size, starts = [], 0, False
        if not blank:
            lines.append(line)
            size += len(line)
        elif lines:
            yield document(ends=True)
            lines, size, starts, number = [], 0, True, number + 1
    if lines:
        yield document(ends=True)


def _read_jsonl(corpus: Corpus, path: Path, file: IO[bytes]) -> Iterator[RawDocument]:
    """One document a line."""
    for number, line in enumerate(_decoded_lines(path, file)):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number + 1} is not JSON ({error}); mend or remove that line") from None
        text = record.get(corpus.text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(
                f"{path} line {number + 1} has no text under {corpus.text_key!r}; "
                "give each line an object with that key"
            )
        title = record.get("title")
        yield RawDocument(text, f"{path.name}#{number}", title if isinstance(title, str) else "", corpus.domain)


# ---------------------------------------------------------------------------------------------------- tables


def _read_csv(corpus: Corpus, path: Path, file: IO[bytes]) -> Iterator[RawDocument]:
    """One document a row; the first row names the columns."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(_decoded_lines(path, file), strict=True)
    try:
        names = next(rows, [])
        if names.count(corpus.text_key) != 1:
            raise _no_column(path, corpus.text_key, names)
        column = names.index(corpus.text_key)
        for number, row in enumerate(rows):
            if not row:
                continue
            if len(row) != len(names):
                raise UserError(
                    f"{path} line {rows.line_num} ends a row of {len(row)} fields, the first has {len(names)}; "
                    "mend or remove it"
                )
            yield RawDocument(row[column], f"{path.name}#{number}", domain=corpus.domain)
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num} is not CSV ({error}); mend or remove it") from None


def _read_parquet(corpus: Corpus, path: Path, file: IO[bytes]) -> Iterator[RawDocument]:
    """One document a row, decoded a few rows at a time."""
    parquet = required("pyarrow.parquet", str(path))
    from pyarrow import ArrowException

    try:
        table = parquet.ParquetFile(file, pre_buffer=False)
        names = table.schema_arrow.names
        if names.count(corpus.text_key) != 1:
            raise _no_column(path, corpus.text_key, names)
        number = 0
        for batch in table.iter_batches(_PARQUET_ROWS, columns=[corpus.text_key], use_threads=False):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise _no_text(f"{path} row {number + 1}", corpus.text_key)
                yield RawDocument(text, f"{path.name}#{number}", domain=corpus.domain)
                number += 1
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no whole Parquet file ({reason}); it is cut or damaged: fetch it again") from None


def _read_hub(corpus: Corpus, source: HubSource) -> Iterator[RawDocument]:
    """One document a row of a data set that the package datasets streams."""
    with source.errors_are_one_line():
        for number, row in enumerate(source.rows()):
            if corpus.text_key not in row:
                raise _no_column(source.name, corpus.text_key, list(row))
            text = row[corpus.text_key]
            if not isinstance(text, str):
                raise _no_text(f"{source.name} row {number + 1}", corpus.text_key)
            yield RawDocument(text, f"{source.name}#{number}", domain=corpus.domain)


def _no_column(source: str | Path, name: str, names: list[str]) -> UserError:
    count = "no column" if name not in names else "more than one column"
    return UserError(f"{source} has {count} {name!r}; name one with text_key: {', '.join(names) or 'it has none'}")


def _no_text(where: str, name: str) -> UserError:
    return UserError(f"{where} has no text under {name!r}; remove that row or take another column")


# ------------------------------------------------------------------------------------------------ MediaWiki


def _read_wiki(corpus: Corpus, path: Path, file: IO[bytes]) -> Iterator[RawDocument]:
    """The latest revision of each article that is wikitext, no redirect and not blank."""
    try:
        for article in mediawiki.articles(file, corpus.left_out):
            yield RawDocument(article.text, article.id, article.title, corpus.domain, wiki=article.language)
    except (ParseError, ValueError) as error:
        raise UserError(
            f"{path} is no whole MediaWiki dump ({error}); it is cut, not UTF-8 or something else: fetch it again"
        ) from None


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "wiki": _read_wiki,
}


def gensim_dump_path() -> Path:
    """A real MediaWiki dump, 106 articles of English Wikipedia, that the installed package gensim carries."""
    spec = importlib.util.find_spec("gensim")  # finds the folder and imports nothing
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for path in sorted(Path(folder, "test", "test_data").glob("enwiki-latest-pages-articles1.xml-*.bz2")):
            return path
    raise UserError("the Wikipedia excerpt of the package gensim is not there; pip install gensim==4.4.0")
