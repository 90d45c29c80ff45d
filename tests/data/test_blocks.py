"""Views and blocks: shards read as one, parts nested or disjoint, every token in one block."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.data import blocks as module
from ki_ds.data.blocks import Interval, TokenView, find_blocks, pack_rows, select
from ki_ds.data.store import SpecialIds, StoreWriter, open_store
from tests.data.stores import write_store


def store_of(folder, documents):
    with StoreWriter(folder / "s", vocab_size=1000, special_ids=SpecialIds(eos=2)) as writer:
        for sizes in documents:
            writer.add_items(np.full(sum(sizes), 5), np.array(sizes))
            writer.end_document()
    return open_store(folder / "s")


def by_hand(documents, capacity, mode, long_lines):
    """The definition, token by token: (block sizes, long lines, dropped tokens)."""
    sizes, open_size, dropped = [], 0, 0

    def close():
        nonlocal open_size
        if open_size:
            sizes.append(open_size)
        open_size = 0

    num_long = sum(size > capacity for document in documents for size in document)
    if mode in ("none", "none_doc"):
        num_long = 0
        pieces = [sum(document) for document in documents] if mode == "none_doc" else [sum(map(sum, documents))]
        for size in pieces:
            sizes += [capacity] * (size // capacity) + ([size % capacity] if size % capacity else [])
        return sizes, num_long, dropped
    for document in documents:
        for size in document:
            if size > capacity and long_lines == "drop":
                close()
                dropped += size
                continue
            for piece in [capacity] * ((size - 1) // capacity) + [(size - 1) % capacity + 1]:
                if open_size + piece > capacity or mode == "eos":
                    close()
                open_size += piece
        if mode == "complete_doc":
            close()
    close()
    return sizes, num_long, dropped


class TestBlocks:
    @given(
        documents=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=8),
        capacity=st.integers(2, 60),
        mode=st.sampled_from(["complete", "complete_doc", "eos", "none", "none_doc"]),
        long_lines=st.sampled_from(["split", "drop"]),
        window=st.integers(1, 7),
    )
    @settings(max_examples=300, deadline=None)
    def test_they_are_those_of_the_definition(self, tmp_path_factory, documents, capacity, mode, long_lines, window):
        store = store_of(tmp_path_factory.mktemp("blocks"), documents)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "WINDOW", window)
            found = find_blocks(TokenView([store]), capacity, mode=mode, long_lines=long_lines)
        sizes, num_long, dropped = by_hand(documents, capacity, mode, long_lines)
        bounds = found.bounds_S2
        assert (bounds[:, 1] - bounds[:, 0]).tolist() == sizes
        assert (found.num_long_lines, found.num_dropped_tokens) == (num_long, dropped)
        # in order, no token twice, and none lost but those counted
        assert (bounds[1:, 0] >= bounds[:-1, 1]).all()
        assert sum(sizes) + dropped == store.num_tokens

    def test_an_over_long_line_is_split_or_dropped_but_counted(self, tmp_path):
        view = TokenView([store_of(tmp_path, [[3, 25, 4]])])
        split = find_blocks(view, 10, mode="complete")
        assert split.bounds_S2.tolist() == [[0, 3], [3, 13], [13, 23], [23, 32]]
        assert (split.num_long_lines, split.num_dropped_tokens) == (1, 0)
        dropped = find_blocks(view, 10, mode="complete", long_lines="drop")
        assert dropped.bounds_S2.tolist() == [[0, 3], [28, 32]]
        assert (dropped.num_long_lines, dropped.num_dropped_tokens) == (1, 25)

    @given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 50))
    def test_packed_rows_hold_every_block_once_and_are_full(self, sizes, capacity):
        ends = np.cumsum(sizes)
        rows = pack_rows(np.stack([ends - sizes, ends], axis=1), capacity)
        assert rows[:, 0].tolist() == [0, *rows[:-1, 1]]
        assert rows[-1, 1] == len(sizes)
        widths = [sum(sizes[a:b]) for a, b in rows]
        assert max(widths) <= capacity
        for width, (_, end) in zip(widths[:-1], rows, strict=False):
            assert width + sizes[end] > capacity


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Three shards, the second of which has one line."""
    folder = tmp_path_factory.mktemp("view")
    return [write_store(folder, name=f"s{i}", num_items=n, seed=i) for i, n in enumerate((50, 1, 70))]


def lines(view):
    """The lines of a view as tuples of ids, with the numbers of those that end a document."""
    found, last = [], set()
    before = 0
    for items in view.windows():
        for end, is_last in zip(items.ends_I.tolist(), items.is_last_I.tolist(), strict=True):
            if is_last:
                last.add(len(found))
            found.append(tuple(view.read(before, end).tolist()))
            before = end
    return found, last


@pytest.mark.parametrize("window", [1, 7, 1 << 20])
def test_shards_are_read_as_one(stores, window, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", window)
    view = TokenView(stores)
    expected = [tuple(store.item(i).tolist()) for store in stores for i in range(store.num_items)]
    found, last = lines(view)
    assert found == expected
    firsts = np.cumsum([0, *(store.num_items for store in stores)])
    assert last == {int(f + i) - 1 for f, s in zip(firsts, stores, strict=False) for i in s.document_indices[1:]}
    assert view.num_tokens == sum(map(len, expected))
    assert view.num_items == len(expected)


@given(first=st.integers(0, 2500), size=st.integers(0, 400))
def test_any_range_is_that_of_the_whole(stores, first, size):
    view = TokenView(stores)
    whole = np.concatenate([store.tokens for store in stores])
    first = min(first, len(whole))
    assert view.read(first, min(first + size, len(whole))).tolist() == whole[first : first + size].tolist()


def test_a_range_inside_one_run_is_no_copy(stores):
    assert np.shares_memory(TokenView(stores[:1]).read(3, 40), stores[0].tokens)


@given(
    cut=st.floats(0.05, 0.95),
    inner=st.floats(0.1, 1.0),
    seed=st.integers(0, 5),
    budget=st.integers(1, 3000),
)
@settings(max_examples=60, deadline=None)
def test_parts_are_disjoint_nested_and_complete(stores, cut, inner, seed, budget):
    whole = [(i, line) for i, line in enumerate(lines(TokenView(stores))[0])]
    total = sum(len(line) for _, line in whole)

    def part(first, last, max_tokens=None):
        view = select(stores, Interval(first, last, max_tokens), seed=seed)
        items = [i for first, last in view.runs_R2.tolist() for i in range(first, last)]
        assert items == sorted(items)
        assert lines(view)[0] == [whole[i][1] for i in items]
        return set(items), view.num_tokens

    (a, size_a), (b, _) = part(0.0, cut), part(cut, 1.0)
    assert not a & b
    assert a | b == set(range(len(whole)))
    longest = max(len(line) for _, line in whole)
    assert abs(size_a - cut * total) <= longest
    assert part(0.0, cut * inner)[0] <= a
    few, size = part(0.0, cut, budget)
    assert few <= a
    assert abs(size - min(budget, size_a)) <= longest


def test_documents_stay_whole_but_at_the_bounds(stores):
    view = select(stores, Interval(0.2, 0.7), seed=1)
    first_items = np.cumsum([0, *(store.num_items for store in stores)])
    bounds = {int(f + i) for f, s in zip(first_items, stores, strict=False) for i in s.document_indices}
    cut = [i for run in view.runs_R2.tolist() for i in run if i not in bounds]
    assert len(cut) <= 2


def test_seeds_choose_differently_and_a_view_pickles(stores):
    runs = [select(stores, Interval(0.0, 0.5), seed=seed).runs_R2.tolist() for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    view = select(stores, Interval(0.0, 0.5), seed=0)
    again = pickle.loads(pickle.dumps(view))
    assert lines(again) == lines(view)
