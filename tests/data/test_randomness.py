"""Keyed random numbers: frozen values, orders that are bijections, shares of turns, counts and fates of masks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.data.randomness import (
    MASK_STREAM,
    ORDER_STREAM,
    SUBSET_STREAM,
    MaskConfig,
    counter_generator,
    mask_tokens,
    num_masked,
    permute,
    shuffled_epochs,
    take_turns,
)
from ki_ds.errors import UserError

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


class TestStream:
    def test_every_epoch_is_a_permutation_without_gaps(self):
        epochs, ids = shuffled_epochs(np.arange(0, 30), 10, seed=3)
        assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 10
        for epoch in range(3):
            assert sorted(ids[epochs == epoch].tolist()) == list(range(10))
        assert ids[:10].tolist() != ids[10:20].tolist()

    def test_parts_make_the_whole(self):
        whole = shuffled_epochs(np.arange(0, 50), 7, seed=3)[1].tolist()
        parts = [shuffled_epochs(np.arange(i, i + 5), 7, seed=3)[1].tolist() for i in range(0, 50, 5)]
        assert list(itertools.chain(*parts)) == whole


class TestTurns:
    @given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=5), st.integers(0, 10**9))
    @settings(deadline=None)
    def test_every_source_has_its_share_after_any_number(self, shares, start):
        places = np.arange(start, start + 200)
        source, before = take_turns(places, shares)
        for number, share in enumerate(shares):
            mine = source == number
            assert (np.diff(before[mine]) == 1).all()  # one after the other
            exact = places[mine] * share / sum(shares)
            assert np.abs(before[mine] - exact).max(initial=0) < len(shares)

    def test_places_are_numbered_from_zero_and_none_is_left_out(self):
        source, before = take_turns(np.arange(60), [1, 2, 3])
        assert np.bincount(source).tolist() == [10, 20, 30]
        for number in range(3):
            assert before[source == number].tolist() == list(range(10 * (number + 1)))


class TestMasks:
    TOKENS = np.arange(10, 522, dtype=np.uint16)
    RANDOM_IDS = np.arange(5, 1000)

    def masked(self, sample_id, *, seed=1, epoch=0, tokens=TOKENS, config=None):
        return mask_tokens(
            tokens,
            counter_generator(MASK_STREAM, seed=seed, epoch=epoch, sample_id=sample_id),
            config=config or MaskConfig(),
            mask_id=4,
            random_ids=self.RANDOM_IDS,
        )

    def test_76_or_77_of_512_and_the_mean_is_exact(self):
        counts = [len(self.masked(i)[1]) for i in range(2000)]
        assert set(counts) == {76, 77}
        assert abs(np.mean(counts) - 76.8) < 5 * 0.4 / np.sqrt(2000)

    def test_what_becomes_of_the_chosen(self):
        kept = masked = randomised = 0
        places = np.zeros(512, int)
        for i in range(2000):
            out, positions = self.masked(i)
            assert (np.diff(positions) > 0).all()
            untouched = np.delete(np.arange(512), positions)
            assert (out[untouched] == self.TOKENS[untouched]).all()
            kept += (out[positions] == self.TOKENS[positions]).sum()
            masked += (out[positions] == 4).sum()
            randomised += ((out[positions] != 4) & (out[positions] != self.TOKENS[positions])).sum()
            places[positions] += 1
        n = places.sum()
        # a random id is the token itself once in 995 times
        for count, share in ((masked, 0.8), (kept, 0.1 + 0.1 / 995), (randomised, 0.1 - 0.1 / 995)):
            assert abs(count - share * n) < 5 * np.sqrt(n * share * (1 - share))
        # every position alike, the first and the last (<s> and </s>) too
        assert np.abs(places - 300).max() < 5.5 * np.sqrt(300)

    def test_random_ids_are_uniform_over_those_given(self):
        config = MaskConfig(mask_prob=0.5, keep_prob=0.0, random_prob=1.0)
        ids = np.concatenate([self.masked(i, config=config)[0][self.masked(i, config=config)[1]] for i in range(400)])
        counts = np.bincount(ids, minlength=1000)
        assert counts[:5].sum() == 0
        assert np.abs(counts[5:] - len(ids) / 995).max() < 5.5 * np.sqrt(len(ids) / 995)

    def test_it_depends_on_seed_epoch_and_sample_and_on_nothing_else(self):
        base = self.masked(3)
        np.random.default_rng(0).random(5)
        assert all((a == b).all() for a, b in zip(base, self.masked(3), strict=True))
        for other in (self.masked(4), self.masked(3, epoch=1), self.masked(3, seed=2)):
            assert not np.array_equal(base[1], other[1])

    @given(size=st.integers(1, 60), prob=st.floats(0.01, 0.99), sample_id=st.integers(0, 2**40))
    def test_the_count_is_told_without_tokens(self, size, prob, sample_id):
        config = MaskConfig(mask_prob=prob)
        _, positions = self.masked(sample_id, tokens=self.TOKENS[:size], config=config)
        draw = counter_generator(MASK_STREAM, seed=1, epoch=0, sample_id=sample_id).random_raw(1)[0]
        assert len(positions) == len(set(positions.tolist())) == num_masked(size, prob, draw)
        assert int(prob * size) <= len(positions) <= int(prob * size) + 1

    @pytest.mark.parametrize(
        "wrong", [{"mask_prob": 0.0}, {"mask_prob": 1.0}, {"keep_prob": -0.1}, {"random_prob": 0.95}]
    )
    def test_impossible_shares(self, wrong):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            MaskConfig(**wrong)


class TestWholeWords:
    BEGINS = np.arange(1000) % 3 != 1  # ids 1, 4, 7, ... go on with a word

    def masked(self, tokens, **settings):
        return mask_tokens(
            tokens,
            counter_generator(MASK_STREAM, seed=1, epoch=0, sample_id=settings.pop("sample_id", 0)),
            config=MaskConfig(whole_words=True, **settings),
            mask_id=999,
            random_ids=np.arange(5, 900),
            begins_word_V=self.BEGINS,
        )

    @given(st.lists(st.integers(5, 900), min_size=1, max_size=60), st.integers(0, 1000))
    def test_a_word_is_labelled_whole_and_shares_one_fate(self, tokens, sample_id):
        tokens = np.array(tokens)
        masked, positions = self.masked(tokens, mask_prob=0.4, sample_id=sample_id)
        word_T = np.cumsum(self.BEGINS[tokens] | (np.arange(len(tokens)) == 0))
        chosen = set(word_T[positions].tolist())
        assert positions.tolist() == [t for t in range(len(tokens)) if word_T[t] in chosen]
        untouched = np.setdiff1d(np.arange(len(tokens)), positions)
        assert (masked[untouched] == tokens[untouched]).all()
        for word in chosen:
            became = masked[word_T == word]
            if (became == 999).any():
                assert (became == 999).all()
        assert len(chosen) - int(0.4 * word_T[-1]) in (0, 1)

    def test_shares_are_those_of_words(self):
        tokens = np.tile([6, 7, 9], 40)  # 80 words: 6-7 and 9
        words = kept = masks = 0
        for i in range(400):
            masked, positions = self.masked(tokens, sample_id=i)
            firsts = positions[tokens[positions] != 7]
            words += len(firsts)
            masks += (masked[firsts] == 999).sum()
            kept += (masked[firsts] == tokens[firsts]).sum()
        assert abs(words - 400 * 12) < 5 * np.sqrt(400)
        for count, share in ((masks, 0.8), (kept, 0.1)):
            assert abs(count - share * words) < 5 * np.sqrt(words * share * (1 - share))
