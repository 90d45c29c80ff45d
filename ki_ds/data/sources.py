"""What sources of text name: files told apart by name and content, and data sets of the Hugging Face hub.

A source is a file, a folder (links in it are followed), a glob or `hf:NAME[:CONFIG][@SPLIT]`. The kind of a file is
told by the ending of its name in any case, before one of a packing (`.gz`, `.bz2`, `.xz`, `.zst`) or a number:

    .txt                       UTF-8, a paragraph a line, blank lines between documents
    .json, .jsonl, .ndjson     records one of whose keys holds a document: see `ki_ds.data.json_records`
    .csv                       names of columns first; a column holds documents
    .parquet, .arrow           a column holds documents (packed within: takes no further suffix)
    .xml, .xml-…               MediaWiki dump (any part or history of one)

Packings, Parquet and Arrow are told by the first bytes of a file, as is what a name without an ending holds.
"""

import codecs
import contextlib
import fnmatch
import glob
import hashlib
import importlib
import json
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from rich.filesize import decimal

from ki_ds.data.json_records import is_record_list
from ki_ds.data.packings import BY_SUFFIX, UNPACK_ERRORS, Packing, packing_of, window_bytes
from ki_ds.errors import UserError

HUB_PREFIX = "hf:"
_KINDS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".jsonlines": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_TITLES = {
    "text": "text",
    "json": "JSON records",
    "csv": "CSV",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "wiki": "MediaWiki dump",
    "hub": "data set of the hub",
}
_COLUMNAR = {b"PAR1": "parquet", b"PARE": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_KINDS_IN_WORDS = ".txt, .json, .jsonl, .csv, .parquet, .arrow or .xml file (or .gz, .bz2, .xz, .zst of one)"
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_FINGERPRINT_BYTES = 1 << 20
_HEAD_BYTES = 1 << 16
_SETTINGS_BYTES = 1 << 24  # of a JSON object that may be no data
_TOLD_WINDOW_BYTES = 1 << 27  # what zstd itself takes without being asked
_NAMES_TOLD = 3
_HUB_ROWS = 256  # handed on at once

# What lies beside data and is none, though its ending says so: {reason: form of its name without a packing}. Only what
# is found in a folder or by a glob is compared with this; a file that was named is read.
_BESIDE_DATA = {
    "about data (a card, licence, list or checksums)": re.compile(
        r"(readme|licen[cs]e|copying|copyright|notice|changelog|citation|contributing|authors|data_?set_?card)"
        r"([_-][\w-]{1,16})?(\.[a-z]{2})?(\.(txt|md|rst|html?))?"
        r"|(.*[._-])?(md5|sha\d+|check)[._-]?sums?(\.(txt|json))?|.*\.(md5|sha\d+)(\.txt)?"
        r"|_success|_(common_)?metadata|requirements\.txt"
        r"|dataset_(infos?|dict)\.json|state\.json|index\.json|.*-rss\.xml|.*-all-titles(-in-ns\d+)?|.*-dumpruninfo\.txt"
        r"|(tokenizer|vocab)\.json|(merges|vocab|dict)\.txt"
    ),
    "a cache of the package datasets beside its data": re.compile(r"cache-[\da-f]{8,64}(_\d+_of_\d+)?\.arrow"),
}
_INDEX_LINE = re.compile(rb"\d+:\d+:.+")
# The form that every line has of a text that is none.
_LISTS = {
    "a list of checksums": re.compile(
        rb"\\?([\da-f]{32}|[\da-f]{40}|[\da-f]{56}|[\da-f]{64}|[\da-f]{96}|[\da-f]{128})\s+\*?\S.*"
        rb"|(MD5|SHA\d+) ?\(.+\) ?= ?[\da-f]{32,128}",
        re.IGNORECASE,
    ),
    "a list of addresses": re.compile(rb"[a-z][a-z\d]{1,8}://\S+", re.IGNORECASE),
}
# What a clone holds in place of a file that was not fetched.
_POINTERS = (b"version https://git-lfs.github.com/spec/", b"/annex/objects/")
_JSON_BEGINS = re.compile(r'\s*\[?\s*\{\s*("([^"\\]|\\.)*"\s*:|\})')


@dataclass(frozen=True)
class FileSource:
    """A file of a known kind: "text", "json", "csv", "parquet", "arrow" or "wiki"; `packing` is None if plain."""

    path: Path
    kind: str
    packing: Packing | None

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name

    @property
    def place(self) -> str:
        """What error lines call it."""
        return str(self.path)

    @cached_property
    def num_bytes(self) -> int:
        """Size on disk."""
        return self.path.stat().st_size

    def open(self) -> BinaryIO:
        """The file as it lies on disk; UserError without the right to read it."""
        with _needs_rights(self.path):
            return self.path.open("rb")

    def first_bytes(self) -> bytes:
        """What it begins with as it lies on disk, enough to tell packings and kinds."""
        with self.open() as file:
            return file.read(64)

    def head(self, limit: int = _HEAD_BYTES) -> bytes:
        """The first bytes of what it holds, unpacked; those before the fault where it cannot be unpacked."""
        with self.open() as raw:
            file: Any = self.packing.open(raw) if self.packing else raw
            head = b""
            with contextlib.suppress(*UNPACK_ERRORS):  # reading it tells what is wrong
                while len(head) < limit and (block := file.read1(limit - len(head))):
                    head += block
            return head

    @cached_property
    def encoding(self) -> str:
        """UTF-8 unless a byte order mark says otherwise; UserError for what cannot be text."""
        head = self.head()
        if self.packing and (inner := packing_of(head)):
            raise UserError(f"{self.path} is packed twice ({inner.name} within {self.packing.name}); unpack it once")
        for mark, encoding in _BYTE_ORDER_MARKS.items():
            if head.startswith(mark):
                return encoding
        if head.count(0) > len(head) // 4:
            raise UserError(f"{self.path} is binary, or UTF-16 without a byte order mark; convert it to UTF-8")
        return "utf-8-sig"

    def fingerprint(self) -> dict[str, Any]:
        """Name, bytes and a hash of both ends: what tells equal inputs from others at once."""
        with self.open() as file:
            ends = file.read(_FINGERPRINT_BYTES)
            file.seek(max(self.num_bytes - _FINGERPRINT_BYTES, 0))
            ends += file.read(_FINGERPRINT_BYTES)
        return {"name": self.name, "bytes": self.num_bytes, "sha256_of_ends": hashlib.sha256(ends).hexdigest()}


@dataclass(frozen=True)
class HubSource:
    """A data set that the package datasets streams: from the hub, or from a local folder named like one."""

    name: str
    dataset: str
    config: str | None
    split: str
    kind = "hub"
    num_bytes = 0  # unknown before it is read
    packing = None

    @property
    def place(self) -> str:
        """What error lines call it."""
        return self.name

    @classmethod
    def parse(cls, source: str) -> "HubSource":
        """`hf:NAME[:CONFIG][@SPLIT]`; the split is train by default. UserError for anything else."""
        match = re.fullmatch(r"hf:([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?", source)
        if match is None:
            raise UserError(
                f"{source} is not of the form hf:NAME[:CONFIG][@SPLIT], e.g. hf:wikitext:wikitext-2-v1@train"
            )
        return cls(source, match[1], match[2], match[3] or "train")

    @cached_property
    def builder(self) -> Any:
        """The `datasets` builder, its files resolved and nothing downloaded; UserError when it is not to be had."""
        datasets = required("datasets", self.name)
        datasets.disable_progress_bars()
        with self.errors_are_one_line():
            return datasets.load_dataset_builder(self.dataset, self.config)

    def tables(self) -> Iterator[Any]:
        """The rows of the split as Arrow tables, in which text may be no UTF-8; raises whatever `datasets` does."""
        yield from self.builder.as_streaming_dataset(split=self.split).with_format("arrow").iter(_HUB_ROWS)

    @contextlib.contextmanager
    def errors_are_one_line(self) -> Iterator[None]:
        """Turn whatever `datasets` raises (network, names, formats) into a UserError that keeps its first line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.name} cannot be read ({reason}); check name, config, split and network") from None

    def fingerprint(self) -> dict[str, Any]:
        """The name with a hash of its files' names and revisions (for local files: their times of change)."""
        files = (self.builder.config.data_files or {}).get(self.split)
        facts = [sorted(os.path.basename(f) for f in files), files.origin_metadata] if files else self.builder.hash
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return {"name": self.name, "sha256_of_revision": digest}


Source = FileSource | HubSource


@contextlib.contextmanager
def _needs_rights(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); get the right to read it") from None


def required(package: str, source: str) -> Any:
    """The imported package; UserError that says how to install it when it is absent."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{source} needs the package {package}; pip install {package.partition('.')[0]}") from None


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that was found and is not read; `reason` continues "it is"."""

    path: Path
    reason: str


@dataclass
class Found:
    """What sources name, in their order, and what was left out of it."""

    sources: list[Source] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def table(self) -> str:
        """What is read by kind, then what is left out by reason: numbers, sizes and the first names of each."""
        groups: dict[tuple[str, str], list[tuple[str, int]]] = {}  # names with their bytes
        for source in self.sources:
            title = _TITLES[source.kind] + (f", {source.packing.name}" if source.packing else "")
            groups.setdefault(("read", title), []).append((source.name, source.num_bytes))
        for left in self.left_out:
            groups.setdefault(("left out", left.reason), []).append((left.path.name, 0))
        rows = [("", "", "files", "size", "names")]
        for (verdict, title), files in groups.items():
            size = sum(num_bytes for _, num_bytes in files)
            names = _some([name for name, _ in files])
            rows.append((verdict, title, f"{len(files):,}", decimal(size) if size else "", names))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{verdict:<{widths[0]}}  {title:<{widths[1]}}  {count:>{widths[2]}}  {size:>{widths[3]}}  {names}"
            for verdict, title, count, size, names in rows
        ]
        windows = [(window_bytes(s.first_bytes()), s.name) for s in self.sources if isinstance(s, FileSource)]
        window, name = max(windows, default=(0, ""))
        if window > _TOLD_WINDOW_BYTES:
            lines.append(f"{name} takes {window / 2**30:,.2f} GiB of memory at most to unpack")
        return "\n".join(lines)


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_TOLD
    return ", ".join(map(printable, names[:_NAMES_TOLD])) + (f" and {more:,} more" if more > 0 else "")


def printable(name: str) -> str:
    """The name, escaped if it has line ends or bytes that are no UTF-8."""
    return name if name.isprintable() else ascii(name)


# ------------------------------------------------------------------------------------- what a source names


@dataclass(frozen=True)
class _Entry:
    """A file that a source leads to; `named` if it is the source itself."""

    path: Path
    source: str
    named: bool


def find(sources: Iterable[str], *, text_key: str = "text") -> Found:
    """What the sources name, each file once, folders and globs in the order of names.

    UserError: a source does not exist, is of no known kind, or leads to nothing that can be read. What is found in
    folders and by globs and is no text is left out.
    """
    found = Found()
    files: dict[Hashable, list[_Entry]] = {}  # all the ways that lead to a file
    sources = list(sources)
    for source in sources:
        if source.startswith(HUB_PREFIX):
            files.setdefault(HubSource.parse(source), []).append(_Entry(Path(source), source, named=True))
            continue
        for entry in _entries(source, found.left_out):
            files.setdefault(_identity(entry.path), []).append(entry)
    for key, entries in files.items():
        if isinstance(key, HubSource):
            found.sources.append(key)
            found.left_out += [LeftOut(entry.path, "read already") for entry in entries[1:]]
        else:
            _take(entries, found, text_key)
    _refuse_what_leads_to_nothing(sources, files.values(), found)
    return found


def _identity(path: Path) -> Hashable:
    """What two ways to one file or folder have in common; some network file systems number no inodes."""
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size) if status.st_ino else path.resolve()


def _take(entries: list[_Entry], found: Found, text_key: str) -> None:
    """Put a file among the sources or among what is left out, and its other names there."""
    # the cache of the hub has a file under a hash and, by a link, under its name, which says what it is
    best = min(entries, key=lambda entry: (not entry.named, not _ending(entry.path.name)))
    classified = _classified(best.path, named=best.named, text_key=text_key)
    if isinstance(classified, FileSource):
        found.sources.append(classified)
        others = [entry.path for entry in entries if entry is not best]
        found.left_out += [LeftOut(path, "read already (the same file, by link or named again)") for path in others]
    elif best.named:
        raise UserError(f"{best.path} is {classified}; give a {_KINDS_IN_WORDS}")
    else:
        found.left_out += [LeftOut(entry.path, classified) for entry in entries]


def _refuse_what_leads_to_nothing(sources: list[str], files: Iterable[list[_Entry]], found: Found) -> None:
    read = {file.path for file in found.sources if isinstance(file, FileSource)}
    of_use = {entry.source for entries in files if any(e.path in read for e in entries) for entry in entries}
    for source in sources:
        if source in of_use or source.startswith(HUB_PREFIX):
            continue
        left = [left for left in found.left_out if left.path.is_relative_to(_glob_root(source))]
        said = "; ".join(f"{one.path.name} is {one.reason}" for one in left[:_NAMES_TOLD])
        count = f" ({len(left):,} left out: {said})" if left else ""
        raise UserError(f"{source} holds no {_KINDS_IN_WORDS}{count}; name files")


def _entries(source: str, left_out: list[LeftOut]) -> list[_Entry]:
    """The files that a source leads to, in the order of names; what is no file goes to `left_out`."""
    path = Path(source)
    if not source:
        raise UserError("a source is empty text; name a file, a folder, a glob or hf:NAME")
    if path.exists() and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{source} is no plain file; write what it gives to one")
        return [_Entry(path, source, named=True)]
    matches = [path] if path.is_dir() else [match for match in _matches(source, left_out) if str(match) != source]
    if not matches:
        raise UserError(f"{source} does not exist; name a file, a folder, a glob or hf:NAME")
    files: list[Path] = []
    for match in matches:
        files += _files_below(match, left_out) if match.is_dir() else _plain_file(match, left_out)
    return [_Entry(file, source, named=False) for file in files]


def _plain_file(path: Path, left_out: list[LeftOut]) -> list[Path]:
    """The path in a list; nothing where it is no plain file, which `left_out` then says."""
    if path.is_file():
        return [path]
    left_out.append(LeftOut(path, "no plain file" if path.exists() else "a link to nothing"))
    return []


def _glob_root(source: str) -> Path:
    """The folder below which a glob looks; the path itself where it is none."""
    parts = Path(source).parts
    plain = [glob.has_magic(part) for part in parts]
    return Path(*parts[: plain.index(True)]) if True in plain else Path(source)


def _matches(source: str, left_out: list[LeftOut]) -> list[Path]:
    """What a glob matches, in the order of names; `**` follows links, but into no folder twice."""
    pattern = Path(source).parts
    if "**" not in pattern:
        return sorted(map(Path, glob.glob(source)))
    root = _glob_root(source)
    files = _files_below(root, left_out) if root.is_dir() else []
    # a folder that matches stands for the files in it
    depths = range(len(root.parts) + 1, max((len(file.parts) for file in files), default=0) + 1)
    return [file for file in files if any(_fits(file.parts[:depth], pattern) for depth in depths)]


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path has the form of a glob, in which `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _snapshots(folder: Path, left_out: list[LeftOut]) -> list[Path]:
    """The revisions that are read in the folder of a data set in the cache of the hub: that of main, or else all.

    All else there holds the same files under hashes, or notes of the cache.
    """
    revisions = sorted((folder / "snapshots").iterdir())
    main = folder / "refs" / "main"
    name = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    read = [path for path in revisions if path.name == name] or revisions
    left_out += [
        LeftOut(path, "another revision than main in the cache of the hub") for path in revisions if path not in read
    ]
    left_out += [
        LeftOut(path, "of the cache of the hub") for path in sorted(folder.iterdir()) if path.name != "snapshots"
    ]
    return read


def _files_below(folder: Path, left_out: list[LeftOut]) -> list[Path]:
    """The files in a folder and those below it, in the order of names; every folder is gone through once.

    Links are followed last, so that a folder with two ways to it is read under its own name.
    """
    files: list[Path] = []
    folders, links, seen = [folder], list[Path](), set[Hashable]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        identity = _identity(current)
        if identity in seen:
            left_out.append(LeftOut(current, "a link to a folder that is read already"))
            continue
        seen.add(identity)
        with _needs_rights(current):
            entries = sorted(current.iterdir())
        if (current / "corpus.json").exists() and (current / "train.idx").exists():
            left_out.append(LeftOut(current, "a prepared corpus"))
            continue
        if (current / "snapshots").is_dir() and ((current / "blobs").is_dir() or (current / "refs/main").is_file()):
            entries = _snapshots(current, left_out)
        for path in entries:
            if path.name.startswith("."):
                left_out.append(LeftOut(path, "hidden (its name begins with a dot)"))
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            else:
                files += _plain_file(path, left_out)
    return sorted(files)


# ---------------------------------------------------------------------------------------- what a file holds


def _ending(name: str) -> str:
    """The ending of a name that says its kind, in lower case, without packings and numbers; "" where there is none."""
    stem = Path(name.casefold())
    while stem.suffix in BY_SUFFIX or re.fullmatch(r"\.\d+", stem.suffix):
        stem = stem.with_suffix("")
    # Wikimedia puts the page range behind the suffix: pages-articles1.xml-p1p41242.bz2
    match = re.search(r"(\.[a-z]\w{0,11})(-p\d+p\d+)?$", stem.name)
    return match[1] if match else ""


def _classified(path: Path, *, named: bool, text_key: str) -> FileSource | str:
    """The file as a source, or what it is instead."""
    name, first = path.name.casefold(), FileSource(path, "", None).first_bytes()
    if not first:
        return "empty"
    suffix = Path(name).suffix
    if not named:
        plain_name = name.removesuffix(suffix) if suffix in BY_SUFFIX else name
        for reason, form in _BESIDE_DATA.items():
            if form.fullmatch(plain_name):
                return reason
    packing = packing_of(first) or BY_SUFFIX.get(suffix)
    for magic, columnar in _COLUMNAR.items():
        if first.startswith(magic) and packing is None:
            return FileSource(path, columnar, None)
    ending = _ending(name)
    kind = "wiki" if ending == ".xml" or ".xml-" in name else _KINDS.get(ending, "")
    if (ending and not kind) or (kind in ("parquet", "arrow") and packing is not None):
        return f"of no known kind ({ending})"
    if first.startswith(_POINTERS):
        return "a pointer of Git in place of a file that was not fetched (git lfs pull, git annex get)"
    kind = kind or _kind_of_content(FileSource(path, kind, packing).head())
    if not kind:
        return "binary, of no known kind"
    file = FileSource(path, kind, packing)
    return _mistaken(file, named=named, text_key=text_key) or file


def _kind_of_content(head: bytes) -> str:
    """The kind of a file without an ending; "" for none that is known."""
    if any(head.startswith(mark) for mark in _BYTE_ORDER_MARKS):
        return "text"
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # a character may go on behind it
    except UnicodeDecodeError:
        return ""
    if not text or "\0" in text:
        return ""
    if re.match(r"\s*(<\?xml[^>]*>\s*)?<mediawiki", text):
        return "wiki"
    return "json" if _JSON_BEGINS.match(text) else "text"


def _mistaken(file: FileSource, *, named: bool, text_key: str) -> str:
    """What a file of a known kind is instead; "" where it is of that kind."""
    if file.kind == "text" and "index" in file.name.casefold() and _every_line(file.head(), _INDEX_LINE):
        return "the index of a multistream dump"
    if named:
        return ""
    if file.kind == "text":
        for what, form in _LISTS.items():
            if _every_line(file.head(), form):
                return what
    if file.kind == "wiki" and (head := file.head().replace(b"\0", b"")) and b"<mediawiki" not in head:
        return "XML of another kind than a MediaWiki dump"
    if file.kind == "json" and _ending(file.name) == ".json" and _has_no_record(file, text_key):
        return "JSON without records"
    return ""


def _every_line(head: bytes, form: re.Pattern[bytes]) -> bool:
    """Whether all lines but blank ones have that form; of a file that goes on, all but the last."""
    whole = head[: head.rfind(b"\n") + 1] if len(head) == _HEAD_BYTES else head
    lines = [line for line in map(bytes.strip, whole.split(b"\n")) if line]
    return bool(lines) and all(map(form.fullmatch, lines))


def _has_no_record(file: FileSource, text_key: str) -> bool:
    """Whether it is all of one JSON object with neither a text nor a list of records: settings, not data."""
    for limit in (_HEAD_BYTES, _SETTINGS_BYTES):
        head = file.head(limit)
        try:
            value = json.loads(head)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data" or not head.lstrip().startswith(b"{") or len(head) < limit:
                return False
        except (ValueError, RecursionError):
            return False
        else:
            return isinstance(value, dict) and text_key not in value and not any(map(is_record_list, value.values()))
    return False
