"""Documents out of the sources of `ki_ds.data.sources`, read as streams.

Reading is cheap and done in order; `RawDocument.cleaned` (the slow part for wikitext) can run anywhere.
"""

import codecs
import csv
import importlib.util
import io
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
_PARQUET_ROWS = 256  # decoded at once
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
    count nothing) says how far it is. `text_key` names the key or column of the text in JSON and tables. What is no
    Unicode becomes U+FFFD; `replaced` counts it by the names of sources, `left_out_pages` the pages of dumps that are
    no articles by reason. `found` says what is read and what is not.
    UserError, when made: a source is missing, empty or of no known kind. While iterating: a file is in another
    encoding, cut off, not what its name says, or has no text under `text_key`.
    """

    def __init__(self, sources: Iterable[str | Path], *, domain: str = "", text_key: str = "text") -> None:
        self.found = find(map(str, sources), text_key=text_key)
        self.sources = self.found.sources
        self.domain = domain
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
        self.left_out_pages.clear()
        self.replaced.clear()
        found = False
        for source in self.sources:
            self._num_replaced = num_characters = 0
            for document in self._read(source):
                found = True
                text, title = self.unicode(document.text), self.unicode(document.title)
                if text is not document.text or title is not document.title:
                    document = replace(document, text=text, title=title)
                num_characters += len(document.text)
                if self._num_replaced > max(_MAX_REPLACED, _MAX_REPLACED_SHARE * num_characters):
                    raise UserError(
                        f"{_place(source)} is not UTF-8: {self._num_replaced:,} of its first {num_characters:,} "
                        "characters are none; convert it, e.g. iconv -f LATIN1 -t UTF-8"
                    )
                yield document
            if self._num_replaced:
                self.replaced[source.name] += self._num_replaced
            self._open_file = None
            self._bytes_before += source.num_bytes
        if not found:
            pages = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out_pages.items())
            left = f" (pages of dumps left out: {pages})" if pages else ""
            raise UserError(f"{_place(self.sources[0])} and its like hold no document{left}; bring files with text")

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

    def _read(self, source: Source) -> Iterator[RawDocument]:
        if isinstance(source, HubSource):
            yield from _read_hub(self, source)
            return
        with source.open() as raw:
            self._open_file = raw
            try:
                unpacked = source.packing.open(raw) if source.packing else raw
                as_read = _AS_READ.get(source.kind, lambda _, __, file: file)
                yield from _READERS[source.kind](self, source.path, as_read(self, source, unpacked))
            except UNPACK_ERRORS as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise StoppedError(
                        f"{source.path} cannot be read ({error.strerror}); what is done stays: call again"
                    ) from None
                if source.packing is None:
                    raise
                raise unpack_error(source.path, source.packing, error) from None


def _place(source: Source) -> str:
    return str(source.path) if isinstance(source, FileSource) else source.name


# -------------------------------------------------------------------------------------------- plain formats


def _as_text(_: Corpus, source: FileSource, file: IO[bytes]) -> TextIO:
    """The text of a file, its lines as they end; what is not in its encoding as `_SURROGATE`."""
    buffered = io.BufferedReader(file, _TEXT_BUFFER_BYTES)  # type: ignore[type-var]
    # rows of tables may end in carriage returns too
    return io.TextIOWrapper(buffered, source.encoding, errors="surrogate", newline="" if source.kind == "csv" else "\n")


class _Utf8(io.RawIOBase):
    """A text as bytes of UTF-8, for a parser that wants nothing else; what is no Unicode is replaced in it."""

    def __init__(self, corpus: Corpus, source: FileSource, file: IO[bytes]) -> None:
        self._corpus = corpus
        self._text = _as_text(corpus, source, file)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of the buffer; 0 at the end of the file."""
        data = self._corpus.unicode(self._text.read(len(buffer) // 4)).encode()
        buffer[: len(data)] = data
        return len(data)


def _as_xml(corpus: Corpus, source: FileSource, file: IO[bytes]) -> IO[bytes]:
    """The bytes of a dump, what is no UTF-8 replaced; as they are if they are in another encoding and say so."""
    says_another = re.match(rb"\s*<\?xml[^>]*encoding=.(?!utf-?8\W)", source.head(), re.IGNORECASE)
    if says_another or source.encoding != "utf-8-sig":
        return file
    return io.BufferedReader(_Utf8(corpus, source, file), _TEXT_BUFFER_BYTES)


def _read_text(corpus: Corpus, path: Path, file: TextIO) -> Iterator[RawDocument]:
    """Documents between blank lines, long ones in parts."""
    lines: list[str] = []
    size, number, starts = 0, 0, True

    def document(ends: bool) -> RawDocument:
        name = f"{path.name}#{number}"
        return RawDocument("".join(lines), name, domain=corpus.domain, starts=starts, ends=ends)

    for line in file:
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


def _read_json(corpus: Corpus, path: Path, file: TextIO) -> Iterator[RawDocument]:
    """One document a record."""
    for number, record in enumerate(json_records(file, path, corpus.text_key)):
        title = record.get("title")
        yield RawDocument(
            record[corpus.text_key], f"{path.name}#{number}", title if isinstance(title, str) else "", corpus.domain
        )


# ---------------------------------------------------------------------------------------------------- tables


def _read_csv(corpus: Corpus, path: Path, file: TextIO) -> Iterator[RawDocument]:
    """One document a row; the first row names the columns."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(file, strict=True)
    try:
        names = next(rows, [])
        column = names.index(_only_column(path, corpus.text_key, names))
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

    def batches() -> Iterator[Any]:
        table = parquet.ParquetFile(file, pre_buffer=False)
        column = _only_column(path, corpus.text_key, table.schema_arrow.names)
        return table.iter_batches(_PARQUET_ROWS, columns=[column], use_threads=False)

    yield from _read_columnar(corpus, path, "Parquet", batches)


def _read_arrow(corpus: Corpus, path: Path, file: IO[bytes]) -> Iterator[RawDocument]:
    """One document a row of an Arrow file or stream."""
    ipc = required("pyarrow.ipc", str(path))

    def batches() -> Iterator[Any]:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
        column = _only_column(path, corpus.text_key, reader.schema.names)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            for first in range(0, batch.num_rows, _PARQUET_ROWS):
                yield batch.slice(first, _PARQUET_ROWS).select([column])

    yield from _read_columnar(corpus, path, "Arrow", batches)


def _read_columnar(
    corpus: Corpus, path: Path, kind: str, batches: Callable[[], Iterator[Any]]
) -> Iterator[RawDocument]:
    """The documents of batches of one column; UserError for what pyarrow cannot read, and for damage."""
    from pyarrow import ArrowException, ArrowNotImplementedError

    number = 0
    try:
        for batch in batches():
            for text in _texts(batch.column(0), f"{path} row", number, corpus.text_key):
                yield RawDocument(text, f"{path.name}#{number}", domain=corpus.domain)
                number += 1
    except (ArrowException, UnicodeDecodeError, OSError, MemoryError) as error:  # names of columns can be no UTF-8
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ArrowException):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        foreign = isinstance(error, ArrowNotImplementedError | MemoryError) or "encrypt" in reason.casefold()
        if foreign:
            raise UserError(
                f"{path} is {kind} that cannot be read here ({reason}); write it anew without that"
            ) from None
        raise UserError(f"{path} is no whole {kind} file ({reason}); it is cut or damaged: fetch it again") from None


def _texts(column: Any, where: str, first: int, name: str) -> Iterator[str]:
    """The texts of an Arrow array, which pyarrow does not compare with UTF-8; UserError where there is none."""
    import pyarrow
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    kinds = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    has_text = any(is_kind(kind) for is_kind in (*kinds, types.is_binary_view))
    for number, text in enumerate(
        _checked(column).cast(pyarrow.large_binary()).to_pylist() if has_text else [None] * len(column)
    ):
        if text is None:
            raise _no_text(f"{where} {first + number + 1}", name)
        yield text.decode(errors="surrogate")


def _checked(column: Any) -> Any:
    """The Arrow array of text, as bytes; ArrowInvalid where damage would lead out of it, which pyarrow reads unseen."""
    import pyarrow

    as_bytes = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }
    if isinstance(column, pyarrow.DictionaryArray):
        values = column.dictionary.view(as_bytes.get(column.dictionary.type, column.dictionary.type))
        checked = pyarrow.DictionaryArray.from_arrays(column.indices, values, safe=False)
        checked.validate(full=True)
        return checked.cast(values.type)
    checked = column.view(as_bytes.get(column.type, column.type))
    checked.validate(full=True)
    return checked


def _read_hub(corpus: Corpus, source: HubSource) -> Iterator[RawDocument]:
    """One document a row of a data set that the package datasets streams."""
    number = 0
    for table in source.tables():
        column = table.column(_only_column(source.name, corpus.text_key, table.column_names))
        for chunk in column.chunks:
            with source.errors_are_one_line():
                texts = list(_texts(chunk, f"{source.name} row", number, corpus.text_key))
            for text in texts:
                yield RawDocument(text, f"{source.name}#{number}", domain=corpus.domain)
                number += 1


def _only_column(source: str | Path, name: str, names: list[str]) -> str:
    if names.count(name) != 1:
        raise _no_column(source, name, names)
    return name


def _no_column(source: str | Path, name: str, names: list[str]) -> UserError:
    count = "no column" if name not in names else "more than one column"
    told = ", ".join(map(printable, names)) or "it has none"
    return UserError(f"{source} has {count} {name!r}; name one with text_key: {told}")


def _no_text(where: str, name: str) -> UserError:
    return UserError(f"{where} has no text under {name!r}; remove that row or take another column")


# ------------------------------------------------------------------------------------------------ MediaWiki


def _read_wiki(corpus: Corpus, path: Path, file: IO[bytes]) -> Iterator[RawDocument]:
    """The latest revision of each article that is wikitext, no redirect and not blank."""
    try:
        for article in mediawiki.articles(file, corpus.left_out_pages):
            text = _REFERENCES.sub(_without_surrogate, article.text) if "&#" in article.text else article.text
            yield RawDocument(text, article.id, article.title, corpus.domain, wiki=article.language)
    except mediawiki.NotADumpError as error:
        raise UserError(f"{path} is no whole MediaWiki dump: {error}") from None
    except (ParseError, ValueError) as error:
        raise UserError(
            f"{path} is no whole MediaWiki dump ({error}); it is cut, not UTF-8 or something else: fetch it again"
        ) from None


def _without_surrogate(reference: re.Match[str]) -> str:
    """A reference to a character by its number as it stands, or `_SURROGATE` if that is half a pair."""
    code = int(reference[1], 16) if reference[1] else int(reference[2])
    return _SURROGATE if 0xD800 <= code <= 0xDFFF else reference[0]


_READERS: dict[str, Callable[[Corpus, Path, Any], Iterator[RawDocument]]] = {
    "text": _read_text,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "wiki": _read_wiki,
}
# how a reader is given its file; the others read bytes as they are
_AS_READ: dict[str, Callable[[Corpus, FileSource, Any], Any]] = {
    "text": _as_text,
    "json": _as_text,
    "csv": _as_text,
    "wiki": _as_xml,
}


def gensim_dump_path() -> Path:
    """A real MediaWiki dump, 106 articles of English Wikipedia, that the installed package gensim carries."""
    spec = importlib.util.find_spec("gensim")  # finds the folder and imports nothing
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for path in sorted(Path(folder, "test", "test_data").glob("enwiki-latest-pages-articles1.xml-*.bz2")):
            return path
    raise UserError("the Wikipedia excerpt of the package gensim is not there; pip install gensim==4.4.0")
