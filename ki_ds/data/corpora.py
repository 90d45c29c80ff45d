"""Documents out of the sources of `ki_ds.data.sources`, read as streams.

Reading is cheap and done in order; `Document.lines` (the slow part for wikitext) can run anywhere.
"""

import codecs
import contextlib
import csv
import importlib.util
import io
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO
from xml.etree.ElementTree import ParseError

from ki_ds.data import mediawiki
from ki_ds.data.json_records import json_records
from ki_ds.data.mediawiki import Language
from ki_ds.data.packings import UNPACK_ERRORS, unpack_error
from ki_ds.data.processes import StoppedError
from ki_ds.data.sources import FileSource, HubSource, Source, find, printable, required
from ki_ds.errors import UserError

# A longer document is handed on in parts, so that a file without any blank line stays within memory.
MAX_PART_CHARACTERS = 1 << 20
_COLUMN_ROWS = 256  # decoded at once
_TEXT_BUFFER_BYTES = 1 << 18

# Bytes that are no UTF-8 are read as half a surrogate pair, which no text holds, so that one place tells, counts and
# replaces all that is no Unicode: such bytes, and the halves of pairs that JSON can name.
_SURROGATE = "\ud800"
_SURROGATES = re.compile("[\ud800-\udfff]")
_REFERENCES = re.compile(r"&#(?:x([\da-f]{4,8})|(\d{5,8}));", re.IGNORECASE)
codecs.register_error("surrogate", lambda error: (_SURROGATE, error.end))  # type: ignore[attr-defined]

# A source of which more than this many characters, and this share, are no Unicode is in another encoding.
_MAX_REPLACED = 1000
_MAX_REPLACED_SHARE = 0.02


@dataclass(frozen=True)
class Document:
    """A document, or a part of a long one, as it stands in its file; `wiki` is the language of wikitext, else None."""

    text: str
    id: str
    title: str = ""
    wiki: Language | None = None
    starts: bool = True
    ends: bool = True

    def lines(self) -> tuple[str, ...]:
        """Its paragraphs without blank ones: wikitext as `plain_wikitext` does it, plain text only trimmed."""
        text = self.text
        if self.wiki is not None:
            from ki_ds.data.wikitext import plain_wikitext  # only dumps need the parser

            text = plain_wikitext(text, self.wiki)
        return tuple(line for line in map(str.strip, text.split("\n")) if line)


# ---------------------------------------------------------------------------------------------- the corpus


class Corpus:
    """The documents of some sources, in the order given (files of a folder or glob by name).

    Iterating reads the sources as streams; `bytes_read` of `total_bytes` (compressed sizes; data sets of the hub
    count nothing) says how far it is. `text_key` names the key or column of the text in JSON and tables. What is no
    Unicode becomes U+FFFD; `replaced` counts it by the names of sources, `left_out_pages` the pages of dumps that are
    no articles by reason. `found` says what is read and what is not.
    UserError, when made: a source is missing, empty or of no known kind. While iterating: a file is in another
    encoding, cut off, not what its name says, or has no text under `text_key`.
    """

    def __init__(self, sources: Iterable[str | Path], *, text_key: str = "text") -> None:
        self.found = find(map(str, sources), text_key=text_key)
        self.sources = self.found.sources
        self.text_key = text_key
        if not self.sources:
            raise UserError("no corpus was named; give at least one file, folder, glob or hf:NAME")
        self.total_bytes = sum(source.num_bytes for source in self.sources)
        self.left_out_pages = Counter[str]()
        self.replaced = Counter[str]()
        self._num_replaced = 0  # in the source that is being read
        self._bytes_before = 0
        self._open_file: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files consumed by the latest iteration."""
        inside = self._open_file.tell() if self._open_file and not self._open_file.closed else 0
        return self._bytes_before + inside

    def __iter__(self) -> Iterator[Document]:
        self._bytes_before = 0
        self.left_out_pages.clear()
        self.replaced.clear()
        is_empty = True
        for source in self.sources:
            self._num_replaced = num_characters = 0
            for number, entry in enumerate(self._read(source)):
                is_empty = False
                document = entry if isinstance(entry, Document) else Document(entry, f"{source.name}#{number}")
                text, title = self.unicode(document.text), self.unicode(document.title)
                if text is not document.text or title is not document.title:
                    document = replace(document, text=text, title=title)
                num_characters += len(document.text)
                if self._num_replaced > max(_MAX_REPLACED, _MAX_REPLACED_SHARE * num_characters):
                    raise UserError(
                        f"{source.place} is not UTF-8: {self._num_replaced:,} of its first {num_characters:,} "
                        "characters are none; convert it, e.g. iconv -f LATIN1 -t UTF-8"
                    )
                yield document
            if self._num_replaced:
                self.replaced[source.name] += self._num_replaced
            self._open_file = None
            self._bytes_before += source.num_bytes
        if is_empty:
            pages = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out_pages.items())
            left = f" (pages of dumps left out: {pages})" if pages else ""
            raise UserError(f"{self.sources[0].place} and its like hold no document{left}; bring files with text")

    def unicode(self, text: str) -> str:
        """The text with U+FFFD for each half of a surrogate pair, which is counted."""
        try:
            text.encode()  # ten times as fast as a search
        except UnicodeEncodeError:
            text, count = _SURROGATES.subn("\ufffd", text)
            self._num_replaced += count
        return text

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells equal sources from others at once: see their `fingerprint`."""
        return [source.fingerprint() for source in self.sources]

    def _read(self, source: Source) -> Iterator["Document | str"]:
        if isinstance(source, HubSource):
            yield from _read_hub(self, source)
            return
        with source.open() as raw:
            self._open_file = raw
            try:
                yield from _READERS[source.kind](self, source, source.packing.open(raw) if source.packing else raw)
            except UNPACK_ERRORS as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise StoppedError(
                        f"{source.path} cannot be read ({error.strerror}); what is done stays: call again"
                    ) from None
                if source.packing is None:
                    raise
                raise unpack_error(source.path, source.packing, error) from None


# -------------------------------------------------------------------------------------------- plain formats


def _as_text(source: FileSource, file: IO[bytes]) -> TextIO:
    """The text of a file, its lines as they end; what is not in its encoding as `_SURROGATE`."""
    buffered = io.BufferedReader(file, _TEXT_BUFFER_BYTES)  # type: ignore[type-var]
    # rows of tables may end in carriage returns too
    return io.TextIOWrapper(buffered, source.encoding, errors="surrogate", newline="" if source.kind == "csv" else "\n")


def _read_text(_: Corpus, source: FileSource, file: IO[bytes]) -> Iterator[Document]:
    """Documents between blank lines, long ones in parts."""
    lines: list[str] = []
    size, number, starts = 0, 0, True

    def document(ends: bool) -> Document:
        return Document("".join(lines), f"{source.name}#{number}", starts=starts, ends=ends)

    for line in _as_text(source, file):
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


def _read_json(corpus: Corpus, source: FileSource, file: IO[bytes]) -> Iterator[Document]:
    """One document a record."""
    for number, record in enumerate(json_records(_as_text(source, file), source.path, corpus.text_key)):
        title = record.get("title")
        text = record[corpus.text_key]
        yield Document(text, f"{source.name}#{number}", title if isinstance(title, str) else "")


# ---------------------------------------------------------------------------------------------------- tables


def _read_csv(corpus: Corpus, source: FileSource, file: IO[bytes]) -> Iterator[str]:
    """The texts of a column; the first row names the columns."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(_as_text(source, file), strict=True)
    try:
        names = next(rows, [])
        column = names.index(_only_column(source, corpus.text_key, names))
        for row in filter(None, rows):
            if len(row) != len(names):
                raise UserError(
                    f"{source.path} line {rows.line_num} ends a row of {len(row)} fields, the first has {len(names)}; "
                    "mend or remove it"
                )
            yield row[column]
    except csv.Error as error:
        raise UserError(f"{source.path} line {rows.line_num} is not CSV ({error}); mend or remove it") from None


def _read_parquet(corpus: Corpus, source: FileSource, file: IO[bytes]) -> Iterator[str]:
    """The texts of a column, decoded a few rows at a time."""
    parquet = required("pyarrow.parquet", source.place)
    with _columnar_errors(source, "Parquet"):
        table = parquet.ParquetFile(file, pre_buffer=False)
        name = _only_column(source, corpus.text_key, table.schema_arrow.names)
        batches = table.iter_batches(_COLUMN_ROWS, columns=[name], use_threads=False)
        yield from _texts((batch.column(0) for batch in batches), source, name)


def _read_arrow(corpus: Corpus, source: FileSource, file: IO[bytes]) -> Iterator[str]:
    """The texts of a column of an Arrow file or stream."""
    ipc = required("pyarrow.ipc", source.place)
    with _columnar_errors(source, "Arrow"):
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
        name = _only_column(source, corpus.text_key, reader.schema.names)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        columns = (batch.column(name) for batch in batches)
        parts = (c.slice(first, _COLUMN_ROWS) for c in columns for first in range(0, len(c), _COLUMN_ROWS))
        yield from _texts(parts, source, name)


def _read_hub(corpus: Corpus, source: HubSource) -> Iterator[str]:
    """The texts of a column of a data set that the package datasets streams."""
    with source.errors_are_one_line():
        tables = ((table, _only_column(source, corpus.text_key, table.column_names)) for table in source.tables())
        yield from _texts((chunk for table, name in tables for chunk in table[name].chunks), source, corpus.text_key)


@contextlib.contextmanager
def _columnar_errors(source: FileSource, kind: str) -> Iterator[None]:
    """UserError for what pyarrow cannot read, and for damage."""
    from pyarrow import ArrowException, ArrowNotImplementedError

    try:
        yield
    except (ArrowException, UnicodeDecodeError, OSError, MemoryError) as error:  # names of columns can be no UTF-8
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ArrowException):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, ArrowNotImplementedError | MemoryError) or "encrypt" in reason.casefold():
            fault = f"{kind} that cannot be read here ({reason}); write it anew without that"
        else:
            fault = f"no whole {kind} file ({reason}); it is cut or damaged: fetch it again"
        raise UserError(f"{source.path} is {fault}") from None


def _texts(columns: Iterable[Any], source: Source, name: str) -> Iterator[str]:
    """The texts of Arrow arrays, which pyarrow does not compare with UTF-8; UserError where there is none."""
    import pyarrow
    from pyarrow import types

    strings = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_binary_view)
    rows = itertools.count(1)
    for column in columns:
        kind = column.type.value_type if types.is_dictionary(column.type) else column.type
        has_text = any(is_kind(kind) for is_kind in (*strings, *binaries))
        texts = _checked(column).cast(pyarrow.large_binary()).to_pylist() if has_text else [None] * len(column)
        for text, row in zip(texts, rows, strict=False):
            if text is None:
                raise UserError(
                    f"{source.place} row {row} has no text under {name!r}; remove that row or take another column"
                )
            yield text.decode(errors="surrogate")


def _checked(column: Any) -> Any:
    """The Arrow array of text, as bytes; ArrowInvalid where damage would lead out of it, which pyarrow reads unseen."""
    import pyarrow

    if isinstance(column, pyarrow.DictionaryArray):
        values = _as_bytes(column.dictionary)
        places = pyarrow.DictionaryArray.from_arrays(column.indices, values, safe=False)
        places.validate(full=True)
        return places.cast(values.type)
    checked = _as_bytes(column)
    checked.validate(full=True)
    return checked


def _as_bytes(column: Any) -> Any:
    import pyarrow

    kinds = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }
    return column.view(kinds.get(column.type, column.type))


def _only_column(source: Source, name: str, names: list[str]) -> str:
    """The name; UserError unless one column has it."""
    if names.count(name) == 1:
        return name
    count = "no column" if name not in names else "more than one column"
    told = ", ".join(map(printable, names)) or "it has none"
    raise UserError(f"{source.place} has {count} {name!r}; name one with text_key: {told}")


# ------------------------------------------------------------------------------------------------ MediaWiki


class _Utf8(io.RawIOBase):
    """A text as bytes of UTF-8, for a parser that wants nothing else; what is no Unicode is replaced in it."""

    def __init__(self, corpus: Corpus, source: FileSource, file: IO[bytes]) -> None:
        self._corpus = corpus
        self._text = _as_text(source, file)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of the buffer; 0 at the end of the file."""
        data = self._corpus.unicode(self._text.read(len(buffer) // 4)).encode()
        buffer[: len(data)] = data
        return len(data)


def _read_wiki(corpus: Corpus, source: FileSource, file: IO[bytes]) -> Iterator[Document]:
    """The latest revision of each article that is wikitext, no redirect and not blank."""
    # the parser itself reads what is in another encoding and says so
    says_another = re.match(rb"\s*<\?xml[^>]*encoding=.(?!utf-?8\W)", source.head(), re.IGNORECASE)
    if not says_another and source.encoding == "utf-8-sig":
        file = io.BufferedReader(_Utf8(corpus, source, file), _TEXT_BUFFER_BYTES)
    try:
        for article in mediawiki.articles(file, corpus.left_out_pages):
            text = _REFERENCES.sub(_without_surrogate, article.text) if "&#" in article.text else article.text
            yield Document(text, article.id, article.title, wiki=article.language)
    except mediawiki.NotADumpError as error:
        raise UserError(f"{source.path} is no whole MediaWiki dump: {error}") from None
    except (ParseError, ValueError) as error:
        raise UserError(
            f"{source.path} is no whole MediaWiki dump ({error}); it is cut, not UTF-8 or something else: "
            "fetch it again"
        ) from None


def _without_surrogate(reference: re.Match[str]) -> str:
    """A reference to a character by its number as it stands, or `_SURROGATE` if that is half a pair."""
    code = int(reference[1], 16) if reference[1] else int(reference[2])
    return _SURROGATE if 0xD800 <= code <= 0xDFFF else reference[0]


_READERS: dict[str, Callable[[Corpus, FileSource, Any], Iterator[Document] | Iterator[str]]] = {
    "text": _read_text,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
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
