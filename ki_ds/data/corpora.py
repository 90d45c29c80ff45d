"""Documents out of text files, JSON lines and MediaWiki dumps, read as streams.

A source is a file, a folder or a glob. The kind of a file is told by its name, before a `.gz`, `.bz2` or `.xz`:

    .txt             UTF-8, a paragraph a line, blank lines between documents
    .jsonl           UTF-8, an object a line, whose "text" is a document
    .xml, .xml-…     MediaWiki dump (any part or history of one)

Reading is cheap and done in order; `RawDocument.cleaned` (the slow part for wikitext) can run anywhere.
"""

import bz2
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO
from xml.etree.ElementTree import ParseError

import mwparserfromhell
import mwxml
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Text, Wikilink

from ki_ds.errors import UserError

# A longer document is handed on in parts, so that a file without any blank line stays within memory.
MAX_PART_CHARACTERS = 1 << 20
_FINGERPRINT_BYTES = 1 << 20

_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
_UNPACK_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)


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

    `namespaces` are the names of the dump's namespaces for wikitext, None for plain text.
    """

    text: str
    id: str
    title: str = ""
    domain: str = ""
    namespaces: frozenset[str] | None = None
    starts: bool = True
    ends: bool = True

    def cleaned(self) -> Document:
        """The paragraphs: wikitext as `plain_wikitext` does it, plain text only trimmed."""
        text = self.text if self.namespaces is None else plain_wikitext(self.text, self.namespaces)
        lines = (line.strip() for line in text.split("\n"))
        return Document(tuple(line for line in lines if line), self.id, self.title, self.domain)


# ---------------------------------------------------------------------------------------------- the corpus


class Corpus:
    """The raw documents of some sources, in the order given (files of a folder or glob by name).

    Iterating reads the files as streams; `bytes_read` of `total_bytes` (compressed sizes) says how far it is.
    UserError, when made: a source is missing or of no known kind. While iterating: a file is empty, not UTF-8,
    cut off, or not what its name says.
    """

    def __init__(self, sources: Iterable[str | Path], *, domain: str = "", text_key: str = "text") -> None:
        self.files = [file for source in sources for file in _files_of(str(source))]
        self.domain = domain
        self.text_key = text_key
        if not self.files:
            raise UserError("no corpus was named; give at least one file, folder or glob")
        for path in self.files:
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty; bring a file with text or leave it out")
        self.total_bytes = sum(path.stat().st_size for path in self.files)
        self._bytes_before = 0
        self._open_file: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the files consumed by the latest iteration."""
        inside = self._open_file.tell() if self._open_file and not self._open_file.closed else 0
        return self._bytes_before + inside

    def __iter__(self) -> Iterator[RawDocument]:
        self._bytes_before = 0
        found = False
        for path in self.files:
            with _opened(path) as raw:
                self._open_file = raw
                for document in self._read(path, raw):
                    found = True
                    yield document
            self._open_file = None
            self._bytes_before += path.stat().st_size
        if not found:
            raise UserError(f"{self.files[0]} and its like hold no document; bring files with text")

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, bytes and a hash of both ends of each file: what tells equal inputs from others at once."""
        return [_fingerprint(path) for path in self.files]

    def _read(self, path: Path, raw: BinaryIO) -> Iterator[RawDocument]:
        stem, opener = _split_name(path)
        reader = {"text": _read_text, "jsonl": _read_jsonl, "wiki": _read_wiki}[_kind_of(stem) or "text"]
        try:
            unpacked = opener(raw) if opener else raw
            yield from reader(self, path, unpacked)
        except _UNPACK_ERRORS as error:
            if opener is None:
                raise
            raise UserError(
                f"{path} cannot be unpacked to its end ({error}); it is cut or damaged: fetch it again"
            ) from None


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); get the right to read it") from None


def _files_of(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind_of(_split_name(p)[0]))
        if not files:
            raise UserError(f"{source} holds no .txt, .jsonl or .xml file (or .gz, .bz2, .xz of one); name files")
        return files
    if path.is_file():
        if _kind_of(_split_name(path)[0]) is None:
            raise UserError(f"{source} is of no known kind; name it .txt, .jsonl or .xml (or .gz, .bz2, .xz of one)")
        return [path]
    matches = sorted(Path(match) for match in glob.glob(source, recursive=True))
    if not matches:
        raise UserError(f"{source} does not exist; name a file, a folder or a glob")
    return [file for match in matches for file in _files_of(str(match))]


def _split_name(path: Path) -> tuple[str, Callable[[BinaryIO], Any] | None]:
    """(name without the suffix of a compression, its opener)."""
    opener = _OPENERS.get(path.suffix)
    return (path.stem if opener else path.name), opener


def _kind_of(stem: str) -> str | None:
    # Wikimedia puts the page range behind the suffix: pages-articles1.xml-p1p41242.bz2
    if re.search(r"\.xml(-|$)", stem):
        return "wiki"
    return {".txt": "text", ".jsonl": "jsonl"}.get(Path(stem).suffix)


def _fingerprint(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with _opened(path) as file:
        ends = file.read(_FINGERPRINT_BYTES)
        file.seek(max(size - _FINGERPRINT_BYTES, 0))
        ends += file.read(_FINGERPRINT_BYTES)
    return {"name": path.name, "bytes": size, "sha256_of_ends": hashlib.sha256(ends).hexdigest()}


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


# ------------------------------------------------------------------------------------------------ MediaWiki


def _read_wiki(corpus: Corpus, path: Path, file: IO[bytes]) -> Iterator[RawDocument]:
    """The latest revision of each article (namespace 0) that is no redirect."""
    try:
        dump = mwxml.Dump.from_file(file)
        namespaces = frozenset(n.name.casefold() for n in dump.site_info.namespaces or () if n.name)
        for page in dump:
            if page.namespace != 0 or page.redirect is not None:
                continue
            text = ""
            for revision in page:
                text = revision.text or text
            yield RawDocument(text, str(page.id), page.title or "", corpus.domain, namespaces=namespaces)
    except (ParseError, mwxml.errors.MalformedXML, AssertionError) as error:
        raise UserError(
            f"{path} is no whole MediaWiki dump ({str(error) or 'another kind of XML'}); "
            "it is cut, not UTF-8 or something else: fetch it again"
        ) from None


# Tags whose content is no running text.
_DROPPED_TAGS = frozenset(
    {"ref", "references", "table", "gallery", "math", "chem", "timeline", "syntaxhighlight", "source", "pre"}
    | {"code", "score", "imagemap", "graph", "hiero", "templatedata", "mapframe", "maplink", "style", "script"}
)
# English names work in every wiki, beside those of its own language.
_DROPPED_NAMESPACES = frozenset({"file", "image", "media", "category"})
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*|simple")
_QUOTES = re.compile(r"'{2,5}")
_EMPTY_BRACKETS = re.compile(r"\s?\(\s*[;,:]?\s*\)")
_OPENING_MARK = re.compile(r"([(\[])\s*[;,:]\s*")
_BLANKS = re.compile(r"[^\S\n]+")
_LIST_MARKS = re.compile(r"[*#:;\s]+")


def plain_wikitext(text: str, namespaces: frozenset[str] = frozenset()) -> str:
    """The running text of wikitext, a paragraph, heading or list entry a line.

    Out go templates, tables, references, comments, formulas and other non-text tags, links to files,
    categories and other languages, and lines without any letter; of other links the visible text stays.
    """
    code = mwparserfromhell.parse(text, skip_style_tags=True)
    plain = _QUOTES.sub("", _plain(code.nodes, namespaces | _DROPPED_NAMESPACES))
    lines = []
    for line in plain.split("\n"):
        line = _LIST_MARKS.sub("", line, count=1) if line[:1] in "*#:;" else line
        line = _OPENING_MARK.sub(r"\1", _EMPTY_BRACKETS.sub("", _BLANKS.sub(" ", line))).strip()
        # "|", "!" and "{|" begin the rows of tables that the parser could not close
        if any(map(str.isalpha, line)) and not line.startswith(("|", "!", "{|")):
            lines.append(line)
    return "\n".join(lines)


def _plain(nodes: Sequence[Any], namespaces: frozenset[str]) -> str:
    parts = []
    for node in nodes:
        match node:
            case Text():
                parts.append(node.value)
            case Wikilink():
                parts.append(_link_text(node, namespaces))
            case ExternalLink() if node.title is not None:
                parts.append(_plain(node.title.nodes, namespaces))
            case Heading():
                parts.append(_plain(node.title.nodes, namespaces))
            case HTMLEntity():
                parts.append(_entity(node))
            case Tag():
                parts.append(_tag_text(node, namespaces))
    return "".join(parts)


def _link_text(link: Wikilink, namespaces: frozenset[str]) -> str:
    prefix, colon, _ = str(link.title).partition(":")
    if colon and prefix.strip().replace("_", " ").casefold() in namespaces:
        return ""
    if colon and _LANGUAGE.fullmatch(prefix):  # small letters only: [[CSI: Miami]] is an article
        return ""
    visible = link.text if link.text is not None else link.title
    return _plain(visible.nodes, namespaces).removeprefix(":")


def _entity(node: HTMLEntity) -> str:
    try:
        return str(node.normalize())
    except (ValueError, KeyError, OverflowError):  # &#0; and the like name no character
        return ""


def _tag_text(node: Tag, namespaces: frozenset[str]) -> str:
    name = str(node.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return ""
    if name == "br":
        return "\n"
    if node.wiki_markup in ("*", "#", ":", ";", "----"):
        return "" if node.wiki_markup != "----" else "\n"
    return _plain(node.contents.nodes, namespaces) if node.contents is not None else ""


def gensim_dump_path() -> Path:
    """A real MediaWiki dump, 106 articles of English Wikipedia, that the installed package gensim carries."""
    spec = importlib.util.find_spec("gensim")  # finds the folder and imports nothing
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for path in sorted(Path(folder, "test", "test_data").glob("enwiki-latest-pages-articles1.xml-*.bz2")):
            return path
    raise UserError("the Wikipedia excerpt of the package gensim is not there; pip install gensim==4.4.0")
