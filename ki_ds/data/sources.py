"""What a source of text names: files told apart by their names, and data sets of the Hugging Face hub.

A source is a file, a folder, a glob or `hf:NAME[:CONFIG][@SPLIT]`. The kind of a file is told by its name, before
a `.gz`, `.bz2`, `.xz` or `.zst`:

    .txt             UTF-8, a paragraph a line, blank lines between documents
    .jsonl           UTF-8, an object a line, one of whose keys holds a document
    .csv             UTF-8, names of columns first; a column holds documents
    .parquet         a column holds documents (packed within: takes no further suffix)
    .xml, .xml-…     MediaWiki dump (any part or history of one)
"""

import bz2
import contextlib
import glob
import gzip
import hashlib
import importlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from backports import zstd

from ki_ds.errors import UserError

Opener = Callable[[BinaryIO], Any]

CODECS: dict[str, Opener] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": zstd.ZstdFile,
}
UNPACK_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)

HUB_PREFIX = "hf:"
_KINDS = {".txt": "text", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_KINDS_IN_WORDS = ".txt, .jsonl, .csv, .parquet or .xml file (or .gz, .bz2, .xz, .zst of one)"
_FINGERPRINT_BYTES = 1 << 20


@dataclass(frozen=True)
class FileSource:
    """A file of a known kind: "text", "jsonl", "csv", "parquet" or "wiki"; `opener` unpacks it, None if plain."""

    path: Path
    kind: str
    opener: Opener | None

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name

    @cached_property
    def num_bytes(self) -> int:
        """Size on disk; UserError for an empty file."""
        size = self.path.stat().st_size
        if size == 0:
            raise UserError(f"{self.path} is empty; bring a file with text or leave it out")
        return size

    def open(self) -> BinaryIO:
        """The file as it lies on disk; UserError without the right to read it."""
        try:
            return self.path.open("rb")
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); get the right to read it") from None

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

    def rows(self) -> Any:
        """The rows of the split as a stream of dicts."""
        with self.errors_are_one_line():
            return self.builder.as_streaming_dataset(split=self.split)

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


def required(package: str, source: str) -> Any:
    """The imported package; UserError that says how to install it when it is absent."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{source} needs the package {package}; pip install {package.partition('.')[0]}") from None


def resolve(source: str) -> list[Source]:
    """What a source names, in the order of names. UserError: nothing, or nothing of a known kind."""
    if source.startswith(HUB_PREFIX):
        return [HubSource.parse(source)]
    path = Path(source)
    if path.is_dir():
        found = [file for p in sorted(path.rglob("*")) if p.is_file() and (file := _file_source(p)) is not None]
        if not found:
            raise UserError(f"{source} holds no {_KINDS_IN_WORDS}; name files")
        return list(found)
    if path.is_file():
        file = _file_source(path)
        if file is None:
            raise UserError(f"{source} is of no known kind; give a {_KINDS_IN_WORDS}")
        return [file]
    matches = sorted(map(Path, glob.glob(source, recursive=True)))
    if not matches:
        raise UserError(f"{source} does not exist; name a file, a folder, a glob or hf:NAME")
    return [file for match in matches for file in resolve(str(match))]


def _file_source(path: Path) -> FileSource | None:
    opener = CODECS.get(path.suffix)
    stem = path.stem if opener else path.name
    # Wikimedia puts the page range behind the suffix: pages-articles1.xml-p1p41242.bz2
    kind = "wiki" if re.search(r"\.xml(-|$)", stem) else _KINDS.get(Path(stem).suffix)
    if kind is None or (kind == "parquet" and opener is not None):
        return None
    return FileSource(path, kind, opener)
