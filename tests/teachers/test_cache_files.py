"""The files of a cache: what is written is read, what was changed is noticed, and what it costs."""

import json
import os
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ki_ds.errors import UserError
from ki_ds.teachers import cache_files
from ki_ds.teachers.cache_files import CacheFiles, Chunk, Manifest, bytes_per_row, write_chunk

TEACHER = {"path": "t", "weights_sha256": "0" * 64, "dense_parameters": 1000}
KEY = {"num_classes": 50_265, "num_samples": 4096, "inherit.tau": 2.0}
KEYS = {
    "topk": KEY | {"kind": "topk", "topk": 10},
    "large vocabulary": KEY | {"kind": "topk", "topk": 3, "num_classes": 128_000},
    "fp32": KEY | {"kind": "hidden", "dtype": "fp32", "hidden_size": 12},
    "fp16": KEY | {"kind": "hidden", "dtype": "fp16", "hidden_size": 12},
    "int8": KEY | {"kind": "hidden", "dtype": "int8", "hidden_size": 12},
}


def columns_of(key, num_records, *, rows=(0, 9), seed=0, first_id=0):
    """Records of random rows, for random samples in a random order, every other one of mask 1."""
    draw = np.random.default_rng(seed)
    num_rows = draw.integers(*rows, num_records)
    columns = {
        "sample_ids": first_id + draw.permutation(num_records),
        "masks": np.arange(num_records) % 2,
        "num_rows": num_rows,
        "input_hashes": draw.integers(0, 2**64, num_records, dtype=np.uint64),
    }
    for name, (dtype, shape) in cache_files.row_columns(key).items():
        size = (int(num_rows.sum()), *shape)
        whole = np.issubdtype(dtype, np.integer)
        columns[name] = (draw.integers(0, 100, size) if whole else draw.normal(size=size)).astype(dtype)
    return columns


def write(folder, key, *parts):
    """A cache of the given chunks; its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(key=key, teacher=TEACHER, head_sha256=None, chunks={})
    facts = {}
    for number, columns in enumerate(parts):
        path = folder / f"chunk_{number:012d}.safetensors"
        write_chunk(path, columns, key_sha256=manifest.key_sha256, tokens=100)
        facts[path.name] = Chunk(path, manifest).facts
    manifest = replace(manifest, chunks=facts)
    manifest.write(folder)
    return manifest


def read_all(folder, columns):
    """Every record read by its id and hash."""
    files = CacheFiles.open(folder, Manifest.read(folder))
    pairs = zip(columns["sample_ids"].tolist(), columns["input_hashes"].tolist(), strict=True)
    return [files.read(*pair) for pair in pairs]


@pytest.mark.parametrize("name", KEYS)
def test_what_is_written_is_read(tmp_path, name):
    key = KEYS[name]
    parts = [columns_of(key, 50), columns_of(key, 7, seed=1, first_id=1000), columns_of(key, 1, rows=(0, 1), seed=2)]
    parts[2]["masks"][:] = 5
    write(tmp_path, key, *parts)
    for columns in parts:
        starts = np.cumsum([0, *columns["num_rows"]])
        for record, rows in enumerate(read_all(tmp_path, columns)):
            for column, found in rows.items():
                assert found.dtype == cache_files.row_columns(key)[column][0]
                expected = columns[column][starts[record] : starts[record + 1]]
                assert np.array_equal(found, expected)
    files = CacheFiles.open(tmp_path, Manifest.read(tmp_path))
    assert files.num_records == 58
    assert files.masks == [0, 1, 5]
    asked = np.array([0, 1, 5, 5, 9]), np.array([1000, 1000, 0, 1, 0])
    assert files.has(*asked).sum() == 2  # one of (0, 1000) and (1, 1000); and (5, 0)


def test_what_a_row_costs(tmp_path):
    """At K = 10 at most 44 bytes a row, everything counted."""
    for name, limit in (("topk", 44), ("fp16", 2 * 12 + 4), ("int8", 12 + 4 + 4)):
        columns = columns_of(KEYS[name], 500, rows=(60, 93))  # 512 tokens, 15% of them labelled
        manifest = write(tmp_path / name, KEYS[name], columns)
        num_rows = int(columns["num_rows"].sum())
        cost = (tmp_path / name / "chunk_000000000000.safetensors").stat().st_size / num_rows
        assert bytes_per_row(KEYS[name]) < cost < limit
        assert manifest.chunks["chunk_000000000000.safetensors"][1:] == [500, num_rows, 100]
    assert bytes_per_row(KEYS["topk"]) == 40
    assert bytes_per_row(KEYS["large vocabulary"]) == 3 * (4 + 2)


def test_a_record_of_another_input_or_sample_is_refused(tmp_path):
    columns = columns_of(KEYS["topk"], 5)
    write(tmp_path, KEYS["topk"], columns)
    files = CacheFiles.open(tmp_path, Manifest.read(tmp_path))
    with pytest.raises(UserError, match=r"chunk_0+\.safetensors: the record of sample 3 answers another masked input"):
        files.read(3, 12345)
    for sample_id in (5, 10**9, -1):
        with pytest.raises(UserError, match=f"has no record of sample {sample_id}"):
            files.read(sample_id, 12345)


def test_masks_of_a_sample_lie_side_by_side(tmp_path):
    columns = columns_of(KEYS["topk"], 6, rows=(3, 4))
    columns["sample_ids"][:] = 7
    columns["masks"] = np.arange(6)
    write(tmp_path, KEYS["topk"], columns)
    found = read_all(tmp_path, columns)
    assert np.array_equal(np.concatenate([rows["ids"] for rows in found]), columns["ids"])


def test_chunks_hold_no_file_descriptor(tmp_path):
    """A cache of terabytes has more chunks than a process may have files open."""
    parts = [columns_of(KEYS["topk"], 2, seed=i, first_id=2 * i) for i in range(100)]
    write(tmp_path, KEYS["topk"], *parts)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        files = CacheFiles.open(tmp_path, Manifest.read(tmp_path))
        assert len(files.chunks) == 100
        rows = files.read(int(parts[99]["sample_ids"][0]), int(parts[99]["input_hashes"][0]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(ValueError, match="read-only"):
        rows["ids"][:] = 0


# ------------------------------------------------------------------------------------------------- damage

RECORDS = 250


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of top-K records of 4 rows each, so that any two can be swapped; its columns."""
    folder = tmp_path_factory.mktemp("damage") / "cache"
    columns = columns_of(KEYS["topk"], RECORDS, rows=(4, 5))
    write(folder, KEYS["topk"], columns)
    return folder, columns


def noticed(folder, columns) -> bool:
    """Whether opening the cache, the check of what a run needs, or reading every record refuses in one line."""
    try:
        files = CacheFiles.open(folder, Manifest.read(folder))
        if not files.has(columns["masks"], columns["sample_ids"]).all():
            return True  # refused before the first step
        read_all(folder, columns)
    except UserError as error:
        return "\n" not in str(error) and str(folder) in str(error)
    return False


def spans(path):
    """{column: (first byte, end)} in a chunk's file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + size])
    return {n: tuple(8 + size + o for o in e["data_offsets"]) for n, e in head.items() if n != "__metadata__"}


def test_the_untouched_cache_is_taken(cache):
    assert not noticed(*cache)


def test_1000_flipped_bytes_are_all_noticed(cache, tmp_path, record_property):
    folder, columns = cache
    copy = shutil.copytree(folder, tmp_path / "cache")
    path = next(copy.glob("chunk_*"))
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    index = [place for name in ("sample_ids", "masks", "num_rows", "crcs") for place in range(*spans(path)[name])]
    places = [*range(min(first for first, _ in spans(path).values())), *draw.choice(index, 100)]  # all of the header
    places += draw.integers(0, len(whole), 1000 - len(places)).tolist()
    assert len(places) == 1000
    missed = []
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << int(draw.integers(0, 8))
        path.write_bytes(broken)
        if not noticed(copy, columns):
            missed.append(place)
    record_property("figure", f"{1000 - len(missed)}/1000 flips in records noticed")
    assert missed == []


@pytest.mark.parametrize("moved", ["rows", "rows and CRC", "rows, CRC and hash", "ids"])
def test_250_swapped_records_are_all_noticed(cache, tmp_path, moved, record_property):
    folder, columns = cache
    copy = shutil.copytree(folder, tmp_path / "cache")
    path = next(copy.glob("chunk_*"))
    whole, where = path.read_bytes(), spans(path)
    draw = np.random.default_rng(1)
    names = {
        "rows": ["ids", "log_probs"],
        "rows and CRC": ["ids", "log_probs", "crcs"],
        "rows, CRC and hash": ["ids", "log_probs", "crcs", "input_hashes"],
        "ids": ["sample_ids"],
    }[moved]
    for _ in range(250):
        one, other = draw.choice(RECORDS, 2, replace=False)
        broken = bytearray(whole)
        for name in names:
            first, end = where[name]
            size = (end - first) // RECORDS
            a, b = first + one * size, first + other * size
            broken[a : a + size], broken[b : b + size] = whole[b : b + size], whole[a : a + size]
        path.write_bytes(broken)
        assert noticed(copy, columns)
    record_property("figure", f"250/250 swaps of {moved} noticed")


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "longer", "foreign", "not safetensors"])
def test_a_damaged_chunk_is_one_line_that_names_it(cache, tmp_path, damage):
    folder, _ = cache
    copy = shutil.copytree(folder, tmp_path / "cache")
    path = next(copy.glob("chunk_*"))
    whole = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "empty":
            path.write_bytes(b"")
        case "longer":
            path.write_bytes(whole + b"\0" * 8)
        case "foreign":
            key = KEYS["topk"] | {"inherit.tau": 1.0}
            write(tmp_path / "other", key, columns_of(key, RECORDS, rows=(4, 5)))
            shutil.copy(tmp_path / "other" / path.name, path)
        case "not safetensors":
            path.write_bytes(b"x" * len(whole))
    manifest = Manifest.read(copy)
    for listed in (manifest.chunks[path.name], None):  # as a run opens it; as the tool does that goes on
        with pytest.raises(UserError, match=path.name) as caught:
            Chunk(path, manifest, facts=listed)
        assert "\n" not in str(caught.value)
        assert "tools/cache_teacher.py" in str(caught.value)


def test_every_byte_of_the_manifest_counts(cache, tmp_path):
    folder, _ = cache
    copy = shutil.copytree(folder, tmp_path / "cache")
    path = copy / "manifest.json"
    whole = path.read_bytes()
    blank = set(b" \n")
    for place in [p for p in range(len(whole)) if whole[p] not in blank]:
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"manifest\.json (is damaged|has format)") as caught:
            Manifest.read(copy)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[:-40])
    with pytest.raises(UserError, match="is damaged"):
        Manifest.read(copy)
    path.unlink()
    with pytest.raises(UserError, match="is no teacher cache"):
        Manifest.read(copy)


def test_a_head_is_stored_with_its_hash(tmp_path):
    digest = cache_files.write_head(tmp_path, b"weights")
    assert cache_files.read_head(tmp_path, digest) == b"weights"
    (tmp_path / "head.safetensors").write_bytes(b"weightz")
    with pytest.raises(UserError, match=r"head\.safetensors is damaged"):
        cache_files.read_head(tmp_path, digest)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(UserError, match=r"head\.safetensors cannot be read"):
        cache_files.read_head(tmp_path, digest)


@pytest.mark.parametrize("limit", [0, 1000, 10_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, limit):
    columns = columns_of(KEYS["topk"], 100, rows=(4, 5))
    path = tmp_path / "chunk_0.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"chunk_0\.safetensors cannot be written \(File too large\)"):
            write_chunk(path, columns, key_sha256="", tokens=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_chunk_has_its_name_only_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "chunk_0.safetensors"
    seen = []
    synced = os.fsync

    def fsync(handle):
        seen.append((path.exists(), os.fstat(handle).st_size))
        synced(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_chunk(path, columns_of(KEYS["topk"], 100), key_sha256="", tokens=0)
    assert seen[0] == (False, path.stat().st_size)  # the file, before its name
    assert seen[1][0]  # the folder, with the name


def test_two_keys_are_compared_by_field(cache):
    manifest = Manifest.read(cache[0])
    manifest.check(KEY, folder=cache[0], fix="do it")
    changed = KEY | {"inherit.tau": 4.0}
    with pytest.raises(UserError, match=r"was made with inherit.tau=2.0, the run has inherit.tau=4.0; do it"):
        manifest.check(changed, folder=cache[0], fix="do it")
    with pytest.raises(UserError, match=r"was made with data\.new=nothing, the run has data.new=1"):
        manifest.check({"data.new": 1}, folder=cache[0], fix="")


@pytest.mark.parametrize("name", ["../chunk_0.safetensors", "/etc/hostname", "a/b", "..", "", "a\nb"])
def test_a_manifest_that_names_a_chunk_elsewhere_is_refused(tmp_path, name):
    Manifest(key={}, teacher=TEACHER, head_sha256=None, chunks={name: [1, 1, 1, 1]}).write(tmp_path)
    with pytest.raises(UserError, match=r"names the chunk .*, which is no file beside it") as caught:
        Manifest.read(tmp_path)
    assert "\n" not in str(caught.value)
