"""Some hundreds of damaged stores: each is refused in one line, or reads exactly what it did before.

What must notice a change:

    open      open_store alone: everything structural (header, sizes, pointers, order of the document indices,
              lengths of both files, the manifest itself)
    verify    TokenStore.verify, where there is a manifest: every changed byte of .bin and .idx
    describe  inspect: ids outside the vocabulary, a damaged dict.txt, and all of the above
    harmless  nothing need notice, for every item reads the same: without a manifest that is an inner document
              boundary that still rises, a dtype of the same width, or the presence of modes that are all 0

Without a manifest and without a vocabulary an edit of .bin that keeps its length cannot be noticed by anyone.
"""

import json
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ki_ds.data.describe import inspect
from ki_ds.data.store import SpecialIds, StoreWriter, open_store
from ki_ds.errors import UserError
from tests import forked

ROOT = Path(__file__).parents[2]
Files = dict[str, bytes]

VOCAB_SIZE = 40
DOCUMENTS = [[[5, 6, 2], [7, 2], [2]], [[8, 9, 10, 2], [2]], [[39, 2], [11, 12, 13, 14, 2], [2]]]
ITEMS = [item for document in DOCUMENTS for item in document]
LENGTHS = tuple(map(len, ITEMS))
NUM_ITEMS, NUM_BOUNDS = len(ITEMS), len(DOCUMENTS) + 1
WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8}


@dataclass(frozen=True)
class Case:
    """A damaged store by its files, and what must notice."""

    name: str
    files: Files
    noticed_by: str


def body(width, lengths=LENGTHS):
    """Sizes and pointers."""
    starts = np.cumsum([0, *lengths])[:-1] * width
    return struct.pack(f"<{NUM_ITEMS}i", *lengths) + struct.pack(f"<{NUM_ITEMS}q", *starts.tolist())


def tokens(letter):
    return b"".join(struct.pack(f"<{letter}", i) for item in ITEMS for i in item)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The undamaged files of four stores with the same items."""
    head = b"MMIDIDX\0\0" + struct.pack("<Q", 1)
    bounds = np.cumsum([0, *map(len, DOCUMENTS)]).tolist()
    counted = struct.pack("<QQ", NUM_ITEMS, NUM_BOUNDS)
    words = "".join(f"w{i} {99 - i}\n" for i in range(VOCAB_SIZE - 5))
    bounds_bytes = struct.pack(f"<{NUM_BOUNDS}q", *bounds)
    ours = tmp_path_factory.mktemp("ours")
    with StoreWriter(ours / "s", vocab_size=VOCAB_SIZE, special_ids=SpecialIds(eos=2), tokenizer_hash="h") as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return {
        "fairseq": {
            "s.idx": head + struct.pack("<BQ", 8, NUM_ITEMS) + body(2),
            "s.bin": tokens("H"),
            "dict.txt": words.encode(),
        },
        "Megatron": {"s.idx": head + b"\4" + counted + body(4) + bounds_bytes, "s.bin": tokens("i")},
        "modes": {"s.idx": head + b"\10" + counted + body(2) + bounds_bytes + bytes(NUM_ITEMS), "s.bin": tokens("H")},
        "ours": {path.name: path.read_bytes() for path in ours.iterdir()},
    }


def sections(kind: str) -> dict[str, tuple[int, int]]:
    """Where each part of the index of a store lies: [first byte, end)."""
    names = [("magic", 9), ("version", 8), ("dtype", 1), ("n", 8)]
    if kind != "fairseq":
        names.append(("d", 8))
    names += [("sizes", 4 * NUM_ITEMS), ("pointers", 8 * NUM_ITEMS)]
    if kind != "fairseq":
        names.append(("documents", 8 * NUM_BOUNDS))
    if kind == "modes":
        names.append(("modes", NUM_ITEMS))
    ends = np.cumsum([0, *(length for _, length in names)]).tolist()
    return {name: (ends[i], ends[i + 1]) for i, (name, _) in enumerate(names)}


def flipped(data: bytes, position: int, mask: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= mask
    return bytes(changed)


def index_flips(kind: str, files: Files, random: np.random.Generator) -> Iterator[Case]:
    """Every byte of the header and of the ends of each array, and random places of the arrays."""
    for name, (first, end) in sections(kind).items():
        places = set(range(first, end))
        if name in ("sizes", "pointers", "documents"):
            places = {first, end - 1, *(int(i) for i in random.integers(first, end, 12))}
        for place in sorted(places):
            idx = flipped(files["s.idx"], place, int(random.integers(1, 256)))
            yield Case(f"{kind} flip {name} {place}", files | {"s.idx": idx}, flip_noticed_by(kind, name, idx, files))


def flip_noticed_by(kind: str, name: str, idx: bytes, files: Files) -> str:
    if name == "dtype":
        old, new = files["s.idx"][17], idx[17]
        readable = new in WIDTHS and (new < 9 or kind == "fairseq")
        alike = readable and WIDTHS[new] == WIDTHS[old]
        return "open" if not alike or "s.json" in files else "harmless"
    if name == "documents":
        first, end = sections(kind)["documents"]
        bounds = struct.unpack(f"<{NUM_BOUNDS}q", idx[first:end])
        rising = sorted(bounds) == list(bounds) and (bounds[0], bounds[-1]) == (0, NUM_ITEMS)
        return "open" if not rising else "verify" if "s.json" in files else "harmless"
    return "open"


def dtype_codes(kind: str, files: Files, _: np.random.Generator) -> Iterator[Case]:
    for code in set(range(13)) - {files["s.idx"][17]}:
        idx = flipped(files["s.idx"], 17, code ^ files["s.idx"][17])
        yield Case(f"{kind} dtype {code}", files | {"s.idx": idx}, flip_noticed_by(kind, "dtype", idx, files))


def cuts(kind: str, files: Files, random: np.random.Generator) -> Iterator[Case]:
    """Both files cut at every boundary of their structure, beside it, and anywhere."""
    data = files["s.idx"]
    bounds = {end for _, end in sections(kind).values()} | {0}
    places = {p + i for p in bounds for i in (-1, 0, 1)} | {int(i) for i in random.integers(0, len(data), 8)}
    for place in sorted(p for p in places if 0 <= p < len(data)):
        only_modes = kind == "modes" and place == sections(kind)["documents"][1]
        noticed_by = "harmless" if only_modes else "open"
        yield Case(f"{kind} idx cut at {place}", files | {"s.idx": data[:place]}, noticed_by)
    for place in (0, 1, 2, 7, len(files["s.bin"]) - 2, len(files["s.bin"]) - 1):
        yield Case(f"{kind} bin cut at {place}", files | {"s.bin": files["s.bin"][:place]}, "open")


def growth(kind: str, files: Files, random: np.random.Generator) -> Iterator[Case]:
    for suffix in ("s.idx", "s.bin"):
        for length in (1, 2, 4, NUM_ITEMS, 8, 12, 12 * NUM_ITEMS, 20):
            for more in (bytes(length), random.bytes(length - 1) + b"\1"):
                becomes_modes = suffix == "s.idx" and kind in ("Megatron", "ours") and more == bytes(NUM_ITEMS)
                noticed_by = "open" if not becomes_modes else "verify" if kind == "ours" else "harmless"
                name = f"{kind} {suffix} grown by {length}"
                yield Case(name, files | {suffix: files[suffix] + more}, noticed_by)


def moved_documents(kind: str, files: Files, _: np.random.Generator) -> Iterator[Case]:
    """Inner boundaries of documents at other places, rising and falling."""
    if kind == "fairseq":
        return
    first, end = sections(kind)["documents"]
    for inner in ((0, 5), (1, 4), (3, 3), (4, 5), (5, 8), (5, 3), (-1, 5), (3, 9)):
        idx = files["s.idx"][:first] + struct.pack("<4q", 0, *inner, NUM_ITEMS) + files["s.idx"][end:]
        name = f"{kind} documents {inner}"
        yield Case(name, files | {"s.idx": idx}, flip_noticed_by(kind, "documents", idx, files))


def negative_sizes(kind: str, files: Files, _: np.random.Generator) -> Iterator[Case]:
    """An item of negative length, with pointers and a sum that agree with it."""
    lengths = list(LENGTHS)
    lengths[2], lengths[3] = -1, lengths[3] + lengths[2] + 1
    start, end = sections(kind)["sizes"][0], sections(kind)["pointers"][1]
    idx = files["s.idx"][:start] + body(WIDTHS[files["s.idx"][17]], lengths) + files["s.idx"][end:]
    yield Case(f"{kind} negative size", files | {"s.idx": idx}, "open")


def missing(kind: str, files: Files, _: np.random.Generator) -> Iterator[Case]:
    for name in ("s.idx", "s.bin"):
        yield Case(f"{kind} without {name}", {k: v for k, v in files.items() if k != name}, "open")
        yield Case(f"{kind} with an empty {name}", files | {name: b""}, "open")
    yield Case(f"{kind} swapped names", files | {"s.idx": files["s.bin"], "s.bin": files["s.idx"]}, "open")


def swaps(stores: dict[str, Files]) -> Iterator[Case]:
    """Pairs put together out of two stores of other items or another width."""
    wide = {"fairseq": stores["Megatron"], "Megatron": stores["fairseq"], "ours": stores["Megatron"]}
    for kind, other in wide.items():
        for name in ("s.idx", "s.bin"):
            yield Case(f"{kind} with {name} of another width", stores[kind] | {name: other[name]}, "open")
    shorter = stores["modes"] | {"s.bin": stores["modes"]["s.bin"][2:]}
    yield Case("bin of one token less", shorter, "open")
    # the same bytes under the other layout's header: d put in, d taken out
    fairseq, megatron = stores["fairseq"]["s.idx"], stores["modes"]["s.idx"]
    put_in = fairseq[:26] + struct.pack("<Q", NUM_BOUNDS) + fairseq[26:]
    yield Case("fairseq index with a count of documents", stores["fairseq"] | {"s.idx": put_in}, "open")
    taken_out = megatron[:26] + megatron[34:]
    yield Case("Megatron index without its count of documents", stores["modes"] | {"s.idx": taken_out}, "open")
    same_length = bytes(reversed(stores["ours"]["s.bin"]))
    yield Case("ours with another bin of that length", stores["ours"] | {"s.bin": same_length}, "verify")
    yield Case("ours with fairseq's index", stores["ours"] | {"s.idx": fairseq}, "open")


def bin_edits(files: Files, random: np.random.Generator) -> Iterator[Case]:
    for place in sorted({0, len(files["s.bin"]) - 1, *(int(i) for i in random.integers(0, len(files["s.bin"]), 15))}):
        changed = flipped(files["s.bin"], place, int(random.integers(1, 256)))
        yield Case(f"ours bin edited at {place}", files | {"s.bin": changed}, "verify")


def foreign_ids(kind: str, files: Files, random: np.random.Generator) -> Iterator[Case]:
    width = WIDTHS[files["s.idx"][17]]
    for token in random.integers(0, len(files["s.bin"]) // width, 8).tolist():
        value = int(random.integers(VOCAB_SIZE, 1 << 15)) if kind != "Megatron" else -int(random.integers(1, 99))
        start = token * width
        edited = (
            files["s.bin"][:start] + value.to_bytes(width, "little", signed=value < 0) + files["s.bin"][start + width :]
        )
        yield Case(f"{kind} id {value} at {token}", files | {"s.bin": edited}, "describe")


def dictionaries(files: Files, random: np.random.Generator) -> Iterator[Case]:
    lines = files["dict.txt"].split(b"\n")[:-1]
    for number in random.choice(len(lines), 8, replace=False).tolist():
        line = lines[number]
        damaged = {  # a line that begins with a blank is none: fairseq reads an empty symbol
            "no count": line.split()[0],
            "a count that is none": line + b"x",
            "not UTF-8": b"\xff" + line,
            "blank": b"",
            "twice": lines[number - 1],
            "a special symbol": b"<pad> 3",
            "glued to the next": line + b"\t" + lines[(number + 1) % len(lines)].replace(b" ", b"\t"),
        }
        for name, new in damaged.items():
            text = b"\n".join([*lines[:number], new, *lines[number + 1 :]]) + b"\n"
            yield Case(f"dict line {number} {name}", files | {"dict.txt": text}, "describe")
    for kept in (0, 1, 10, len(lines) - 1):  # the last id of all is 39, the last one of the mask is never used
        text = b"".join(line + b"\n" for line in lines[:kept])
        yield Case(f"dict of {kept} lines", files | {"dict.txt": text}, "describe")


def manifests(files: Files, random: np.random.Generator) -> Iterator[Case]:
    text = files["s.json"]
    for key, value in json.loads(text).items():
        without = {k: v for k, v in json.loads(text).items() if k != key}
        others = [without | {key: other} for other in (None, [], {}, "x", -1, 10**30, True) if other != value]
        for number, other in enumerate([without, *others]):
            yield Case(f"manifest {key} {number}", files | {"s.json": json.dumps(other).encode()}, "open")
    for place in sorted({int(i) for i in random.integers(0, len(text), 60)}):
        mask = int(random.integers(1, 256))
        changed = flipped(text, place, mask)
        noticed_by = "open" if not same_json(changed, text) else "harmless"
        yield Case(f"manifest flip at {place}", files | {"s.json": changed}, noticed_by)
    for place in sorted({0, 1, len(text) // 2, len(text) - 2, *(int(i) for i in random.integers(0, len(text), 8))}):
        noticed_by = "open" if not same_json(text[:place], text) else "harmless"
        yield Case(f"manifest cut at {place}", files | {"s.json": text[:place]}, noticed_by)
    for number, other in enumerate((b"[" * 100_000, b"null", b"7", b'"x"', b"{}", b"\xff\xfe", text + text)):
        yield Case(f"another manifest {number}", files | {"s.json": other}, "open")


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one.decode()) == json.loads(other.decode())
    except ValueError:
        return False


def all_cases(stores: dict[str, Files]) -> Iterator[Case]:
    random = np.random.default_rng(7)
    for kind, files in stores.items():
        for mutations in (index_flips, dtype_codes, cuts, growth, moved_documents, negative_sizes, missing):
            yield from mutations(kind, files, random)
    yield from swaps(stores)
    yield from bin_edits(stores["ours"], random)
    for kind in ("fairseq", "Megatron", "ours"):
        yield from foreign_ids(kind, stores[kind], random)
    yield from dictionaries(stores["fairseq"], random)
    yield from manifests(stores["ours"], random)


def put(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / "s"


def refusal(function, prefix: Path) -> str | None:
    """The message of the refusal, which is one line that names a file; None if there is none."""
    try:
        function(prefix)
    except UserError as error:
        text = str(error)
        assert "\n" not in text
        assert str(prefix.parent) in text
        return text
    return None


def verify(prefix: Path) -> None:
    """Open a store and compare its hashes."""
    open_store(prefix).verify()


def verdict(prefix: Path, noticed_by: str) -> str | None:
    """What is wrong with how a damaged store is taken."""
    opened, verified = refusal(open_store, prefix), refusal(verify, prefix)
    described = refusal(inspect, prefix)
    if opened and not (verified and described):
        return "refused by open_store and not by the others"
    found = {"open": opened, "verify": verified and described, "describe": described, "harmless": "nothing"}[noticed_by]
    if found is None:
        return f"not noticed by {noticed_by}"
    if described is None:
        store = open_store(prefix)
        if [store.item(i).tolist() for i in range(store.num_items)] != ITEMS:
            return "accepted with other items"
    return None


def test_the_undamaged_stores_are_read(stores, tmp_path):
    for kind, files in stores.items():
        prefix = put(tmp_path / kind, files)
        assert [refusal(function, prefix) for function in (open_store, verify, inspect)] == [None] * 3
        assert [item.tolist() for item in map(open_store(prefix).item, range(NUM_ITEMS))] == ITEMS


def test_every_damage_is_noticed_or_harmless(stores, tmp_path, record_property):
    wrong, kinds = [], Counter()
    for number, case in enumerate(all_cases(stores)):
        problem = verdict(put(tmp_path / str(number), case.files), case.noticed_by)
        kinds[case.noticed_by] += 1
        if problem:
            wrong.append(f"{case.name}: {problem}")
    assert wrong == []
    noticed = kinds.total() - kinds["harmless"]
    record_property("figure", f"{noticed}/{noticed} damaged stores and dictionaries refused")
    assert kinds.total() >= 200
    assert kinds["harmless"] < kinds.total() / 20
    assert min(kinds.values()) > 5


def test_no_worker_trips_over_a_file_that_was_damaged_after_it_was_checked(stores, tmp_path):
    """`checked=True` may read nonsense where the check would have refused, but it never ends in a traceback."""
    for number, case in enumerate(all_cases(stores)):
        prefix = put(tmp_path / str(number), case.files)
        refusal(lambda path: open_store(path, checked=True), prefix)


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("fairseq", "s.idx", lambda data: data[:40]),
        ("fairseq", "dict.txt", lambda data: b"\xff" + data),
        ("Megatron", "s.idx", lambda data: flipped(data, 40, 1)),
        ("Megatron", "s.bin", lambda data: data[:-4] + b"\xff" * 4),
        ("ours", "s.bin", lambda data: flipped(data, 3, 1)),
        ("ours", "s.json", lambda data: data[:-9]),
    ],
)
def test_the_command_says_one_line(stores, tmp_path, kind, name, change):
    files = stores[kind]
    prefix = put(tmp_path / "store", files | {name: change(files[name])})
    done = forked.run(
        [sys.executable, ROOT / "tools/inspect_data.py", prefix], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
