"""Keyed random numbers and orders: bijections, frozen values, nothing shared between keys."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.data.randomness import MASK_STREAM, ORDER_STREAM, SUBSET_STREAM, counter_generator, permute

RAW = [9084917172179582266, 5000876269047834120]
ORDER = [3, 2, 4, 1, 7, 0, 9, 6, 8, 5]


class TestRandom:
    def test_the_numbers_are_those_of_earlier_releases(self):
        """A change here would change the data order of every run that is resumed."""
        raw = counter_generator(MASK_STREAM, seed=7, epoch=2, sample_id=12345).random_raw(2)
        assert raw.tolist() == RAW
        assert permute(np.arange(10), 10, seed=7, epoch=2).tolist() == ORDER

    @given(st.lists(st.tuples(*[st.integers(0, 2**63)] * 3, st.sampled_from([1, 2, 3])), min_size=2, unique=True))
    def test_every_key_has_its_own_numbers(self, keys):
        raws = {
            tuple(counter_generator(stream, seed=seed, epoch=epoch, sample_id=i).random_raw(2).tolist())
            for seed, epoch, i, stream in keys
        }
        assert len(raws) == len(keys)
        assert len({MASK_STREAM, ORDER_STREAM, SUBSET_STREAM}) == 3


class TestPermute:
    @given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
    @settings(max_examples=60, deadline=None)
    def test_it_is_a_bijection(self, size, seed, epoch):
        out = permute(np.arange(size), size, seed=seed, epoch=epoch)
        assert sorted(out.tolist()) == list(range(size))

    def test_a_part_gives_what_the_whole_gives(self):
        whole = permute(np.arange(1000), 1000, seed=1, epoch=0)
        assert permute(np.array([[7, 999], [0, 7]]), 1000, seed=1, epoch=0).tolist() == [
            [whole[7], whole[999]],
            [whole[0], whole[7]],
        ]
        assert permute(np.arange(0), 1000, seed=1, epoch=0).shape == (0,)

    def test_a_huge_size_takes_no_memory(self):
        size = 10**12 + 39
        out = permute(np.arange(size - 5, size), size, seed=1, epoch=0)
        assert len(set(out.tolist())) == 5
        assert ((out >= 0) & (out < size)).all()

    def test_epochs_and_seeds_differ_and_neighbours_part(self):
        size = 5000
        orders = [permute(np.arange(size), size, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
        for i, a in enumerate(orders):
            assert abs(np.corrcoef(a, np.arange(size))[0, 1]) < 0.06
            assert (np.abs(np.diff(a)) == 1).sum() < 12
            for b in orders[i + 1 :]:
                assert (a == b).sum() < 12
                assert abs(np.corrcoef(a, b)[0, 1]) < 0.06

    def test_every_place_is_equally_likely(self):
        places = np.array([permute(np.array([3]), 10, seed=s, epoch=0)[0] for s in range(4000)])
        counts = np.bincount(places, minlength=10)
        assert np.abs(counts - 400).max() < 5 * np.sqrt(400)

    def test_sources_and_streams_have_orders_of_their_own(self):
        orders = [
            permute(np.arange(500), 500, seed=1, epoch=0, stream=stream, source=source).tolist()
            for stream in (ORDER_STREAM, SUBSET_STREAM)
            for source in (0, 1)
        ]
        assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
