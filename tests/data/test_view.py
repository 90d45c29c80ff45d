"""Views: shards read as one, parts that are nested or disjoint and whose union is everything."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.data import view as views
from ki_ds.data.view import Interval, TokenView, select
from tests.data.stores import write_store


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
    monkeypatch.setattr(views, "_WINDOW", window)
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
