"""Order, blocks and masks: bijections, every token once, counts and shares of masks, frozen random numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.data import view as views
from ki_ds.data.blocks import MaskConfig, find_blocks, mask_tokens, num_masked, pack_rows
from ki_ds.data.randomness import MASK_STREAM, counter_generator
from ki_ds.data.store import SpecialIds, StoreWriter, open_store
from ki_ds.data.view import TokenView
from ki_ds.errors import UserError


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
            patch.setattr(views, "_WINDOW", window)
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
