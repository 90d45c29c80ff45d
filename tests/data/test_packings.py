"""Compressed files: every valid form is read whole, and a fault is told as what it is."""

import bz2
import gzip
import io
import lzma

import pytest
from backports import zstd

from ki_ds.data.packings import PACKINGS, UNPACK_ERRORS, packing_of, unpack_error, window_bytes

DATA = b"".join(b"line %d\n" % (i * i) for i in range(3000))
SKIPPED = b"\x5a\x2a\x4d\x18\x03\x00\x00\x00abc"  # a zstd frame for other programs


def wide(data):
    """A zstd frame of one stored block with a window of 2^31, as `zstd --long=31` writes it."""
    assert len(data) < 1 << 17
    return b"\x28\xb5\x2f\xfd\x00\xa8" + (len(data) << 3 | 1).to_bytes(3, "little") + data


def unpacked(data):
    packing = packing_of(data)
    assert packing is not None
    with packing.open(io.BytesIO(data)) as file:
        return file.read()


@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress(DATA),
        gzip.compress(DATA[:50]) + gzip.compress(b"") + gzip.compress(DATA[50:]),  # as bgzip has them
        gzip.compress(DATA) + bytes(700),
        bz2.compress(DATA[:50]) + bz2.compress(DATA[50:]),
        bz2.compress(b"") + bz2.compress(DATA),
        bz2.compress(DATA) + bytes(700),
        lzma.compress(DATA[:50]) + lzma.compress(DATA[50:]),
        lzma.compress(DATA[:50]) + bytes(4) + lzma.compress(DATA[50:]) + bytes(300_000) + lzma.compress(b"") + bytes(8),
        lzma.compress(DATA, check=lzma.CHECK_SHA256, preset=9 | lzma.PRESET_EXTREME),
        zstd.compress(DATA[:50]) + zstd.compress(b"") + zstd.compress(DATA[50:]),
        SKIPPED + zstd.compress(DATA[:50]) + SKIPPED + zstd.compress(DATA[50:]) + SKIPPED,
        wide(DATA),
    ],
    ids=["gz", "bgz", "gz0", "bz2", "bz2-empty", "bz2-0", "xz", "xz-padded", "xz-9e", "zst", "zst-skipped", "zst-long"],
)
def test_every_valid_form_is_read_whole(packed):
    assert unpacked(packed) == DATA


@pytest.mark.parametrize("name", ["bzip2", "xz", "zstd"])
def test_a_fault_in_a_later_stream_is_not_the_end(name):
    compress = {"bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd.compress}[name]
    second = bytearray(compress(DATA))
    second[0] ^= 1
    for behind in (bytes(second), b"garbage", compress(DATA)[:20]):
        with pytest.raises(UNPACK_ERRORS):
            unpacked(compress(DATA) + behind)


def test_plain_files_are_of_no_packing():
    for data in (b"", b"BZh", b"BZhang came home", b"\x1f\x8b", b"(tea)"):
        assert packing_of(data) is None
    assert packing_of(bz2.compress(b"")).name == "bzip2"


def test_windows():
    assert window_bytes(wide(DATA)) == 1 << 31
    assert window_bytes(zstd.compress(DATA)) == len(DATA)  # a single segment
    assert window_bytes(gzip.compress(DATA)) == window_bytes(b"") == 0


def told(path, packed, name):
    path.write_bytes(packed)
    packing = next(packing for packing in PACKINGS if packing.name == name)
    with pytest.raises(UNPACK_ERRORS) as caught, path.open("rb") as raw:
        packing.open(raw).read()
    line = str(unpack_error(path, packing, caught.value))
    assert line.startswith(str(path))
    assert "\n" not in line
    return line


def test_faults_are_told_as_what_they_are(tmp_path):
    samples = [b"tea and water %d" % (i % 7) * 9 for i in range(500)]
    dictionary = zstd.train_dict(samples, 500)
    packed = zstd.compress(samples[0], zstd_dict=dictionary)
    assert "needs the dictionary" in told(tmp_path / "a.zst", packed, "zstd")
    assert "is no gzip file, though its name says so" in told(tmp_path / "a.gz", b"tea", "gzip")
    unknown_check = bytearray(lzma.compress(DATA))
    unknown_check[7] ^= 0x0F  # of the header, whose own sum then fails
    assert "cut or damaged" in told(tmp_path / "a.xz", bytes(unknown_check), "xz")
    for name, compress in (("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)):
        assert "cut or damaged" in told(tmp_path / "cut", compress(DATA)[:-9], name)
    line = str(unpack_error(tmp_path / "a.xz", PACKINGS[2], lzma.LZMAError("Invalid or unsupported options")))
    assert "cannot be unpacked here (Invalid or unsupported options)" in line
    assert "cannot be unpacked here (MemoryError)" in str(unpack_error(tmp_path / "a.xz", PACKINGS[2], MemoryError()))
