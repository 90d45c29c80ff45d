"""Compressed files as streams: gzip, bzip2, xz and zstd, told by their first bytes."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from backports import zstd

from ki_ds.errors import UserError

UNPACK_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError, MemoryError)

_ZSTD_MAX_WINDOW_LOG = 31  # what `zstd --long=31` and `--ultra` write at most
_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class Packing:
    """A way to compress a file: `magic` are its first bytes, `open` makes a stream of what a file holds unpacked."""

    name: str
    suffixes: tuple[str, ...]
    magic: re.Pattern[bytes]
    open: Callable[[BinaryIO], Any]


class Streams(io.RawIOBase):
    """What compressed streams that follow one another hold, zero bytes between and behind them left out.

    EOFError: the file ends within one. Whatever else stands behind a stream is an error of the decompressor, and
    not the end of the file, as it is for the readers of the standard library, which pass over what follows.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        self._raw = raw
        self._new = new
        self._decompressor = new()
        self._started = False

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of the buffer at least; 0 at the end of the file."""
        while True:
            packed = b""
            if self._decompressor.eof:
                packed = (self._decompressor.unused_data or self._raw.read(_BLOCK_BYTES)).lstrip(b"\0")
                while not packed:
                    if not (block := self._raw.read(_BLOCK_BYTES)):
                        return 0
                    packed = block.lstrip(b"\0")
                self._decompressor = self._new()
            elif self._decompressor.needs_input and not (packed := self._raw.read(_BLOCK_BYTES)):
                raise EOFError("the file ends within a compressed stream")
            if data := self._decompressor.decompress(packed, len(buffer)):
                buffer[: len(data)] = data
                return len(data)


def _streams(new: Callable[[], Any]) -> Callable[[BinaryIO], Any]:
    return lambda raw: io.BufferedReader(Streams(raw, new), _BLOCK_BYTES)


def _zstd_decompressor() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_MAX_WINDOW_LOG})


PACKINGS = (
    Packing("gzip", (".gz", ".gzip", ".bgz"), re.compile(rb"\x1f\x8b\x08"), lambda raw: gzip.GzipFile(fileobj=raw)),
    Packing("bzip2", (".bz2",), re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), _streams(bz2.BZ2Decompressor)),
    Packing("xz", (".xz",), re.compile(rb"\xfd7zXZ\0"), _streams(lzma.LZMADecompressor)),
    # a frame to be passed over may come first
    Packing(
        "zstd",
        (".zst", ".zstd"),
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        _streams(_zstd_decompressor),
    ),
)
BY_SUFFIX = {suffix: packing for packing in PACKINGS for suffix in packing.suffixes}


def packing_of(head: bytes) -> Packing | None:
    """The packing of a file that begins with these bytes; None for a plain one."""
    return next((packing for packing in PACKINGS if packing.magic.match(head)), None)


def window_bytes(head: bytes) -> int:
    """The memory that unpacking a zstd file that begins with these bytes takes; 0 for other files."""
    if len(head) < 6 or not head.startswith(b"\x28\xb5\x2f\xfd"):
        return 0
    if head[4] & 0x20:  # a single segment: its window is its content
        size = zstd.get_frame_info(head).decompressed_size
        return size or 0
    exponent, mantissa = head[5] >> 3, head[5] & 7
    return (1 << (10 + exponent)) // 8 * (8 + mantissa)


def unpack_error(path: Path, packing: Packing, error: Exception) -> UserError:
    """One line for an error of the decompressor: another kind of file, something it lacks, or damage."""
    reason = str(error) or type(error).__name__
    with path.open("rb") as file:
        head = file.read(16)
    if not packing.magic.match(head):
        return UserError(f"{path} is no {packing.name} file, though its name says so; rename or fetch it again")
    if "dictionary" in reason.casefold():
        return UserError(f"{path} needs the dictionary that it was packed with ({reason}); unpack it first: zstd -d -D")
    if isinstance(error, MemoryError) or re.search("memory|allocat|support|unknown compression", reason, re.IGNORECASE):
        return UserError(f"{path} cannot be unpacked here ({reason}); unpack it first with its own program")
    return UserError(f"{path} cannot be unpacked to its end ({reason}); it is cut or damaged: fetch it again")
