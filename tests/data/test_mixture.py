"""Mixtures: shares kept at every moment, every token once where there are none, domains told."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.data.batches import TrainBatches
from ki_ds.data.mixture import Mixture, stream_samples, take_turns
from ki_ds.data.samples import BlockDataset
from ki_ds.data.store import SpecialIds
from ki_ds.errors import UserError
from tests.data.stores import SPECIALS, write_store


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    sizes = (150, 60, 90)
    stores = [write_store(folder, name=f"s{i}", num_items=n, seed=i) for i, n in enumerate(sizes)]
    return [BlockDataset(store, task="mlm", seq_len=64, domain_id=i) for i, store in enumerate(stores)]


class TestStream:
    def test_every_epoch_is_a_permutation_without_gaps(self):
        epochs, ids = stream_samples(0, 30, 10, seed=3)
        assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 10
        for epoch in range(3):
            assert sorted(ids[epochs == epoch].tolist()) == list(range(10))
        assert ids[:10].tolist() != ids[10:20].tolist()

    def test_parts_make_the_whole(self):
        whole = stream_samples(0, 50, 7, seed=3)[1].tolist()
        parts = [stream_samples(i, i + 5, 7, seed=3)[1].tolist() for i in range(0, 50, 5)]
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


class TestMixture:
    def test_without_weights_every_sample_comes_once_an_epoch(self, datasets):
        mixture = Mixture(datasets)
        epochs, ids = mixture.stream(0, 2 * len(mixture), seed=3)
        for epoch in (0, 1):
            assert sorted(ids[epochs == epoch].tolist()) == list(range(len(mixture)))
        assert len(mixture) == sum(map(len, datasets))

    def test_with_weights_tokens_come_in_their_ratio_and_each_source_in_epochs_of_its_own(self, datasets):
        mixture = Mixture(datasets, [4.0, 1.0, 1.0])
        epochs, ids = mixture.stream(0, 6000, seed=3)
        tokens = np.zeros(3)
        for epoch, sample_id in zip(epochs.tolist(), ids.tolist(), strict=True):
            sample = mixture.sample(sample_id, seed=3, epoch=epoch)
            tokens[sample.domain_id] += len(sample.input_ids_T) - 1
        assert tokens / tokens.sum() == pytest.approx([4 / 6, 1 / 6, 1 / 6], rel=0.01)
        first = 0
        for dataset in datasets:
            mine = (ids >= first) & (ids < first + len(dataset))
            assert sorted(ids[mine & (epochs == 0)].tolist()) == list(range(first, first + len(dataset)))
            first += len(dataset)

    def test_a_sample_is_that_of_its_data_set_and_its_mask_is_keyed_by_the_number_in_the_mixture(self, datasets):
        mixture = Mixture(datasets)
        for number, dataset in enumerate(datasets):
            first = sum(map(len, datasets[:number]))
            sample = mixture.sample(first + 2, seed=1, epoch=0)
            assert (sample.sample_id, sample.domain_id) == (first + 2, number)
            restored = sample.input_ids_T.copy()
            restored[sample.positions_N] = sample.labels_N
            alone = dataset.sample(2, seed=1, epoch=0)
            expected = alone.input_ids_T.copy()
            expected[alone.positions_N] = alone.labels_N
            assert restored.tolist() == expected.tolist()
            assert mixture.num_rows(first + 2, seed=1, epoch=0) == len(sample.labels_N)
        masks = [mixture.sample(i, seed=1, epoch=0).positions_N.tolist() for i in (0, len(datasets[0]))]
        assert masks[0] != masks[1]
        with pytest.raises(IndexError):
            mixture.sample(len(mixture), seed=1, epoch=0)

    def test_batches_name_the_domain_of_each_sample(self, datasets):
        mixture = Mixture(datasets, [1.0, 1.0, 2.0])
        ((batch,),) = list(TrainBatches(mixture, seed=2, micro_batch_size=40, global_batch_size=40, num_steps=1))
        firsts = np.cumsum([0, *map(len, datasets)])
        expected = np.searchsorted(firsts, batch.sample_ids_B.numpy(), side="right") - 1
        assert batch.domain_ids_B.tolist() == expected.tolist()
        assert set(expected.tolist()) == {0, 1, 2}

    def test_other_vocabularies_and_weights_that_are_none_are_refused(self, datasets, tmp_path):
        other = write_store(tmp_path, specials=SpecialIds(bos=0, pad=1, eos=3, unk=2, mask=4))
        with pytest.raises(UserError, match="have different vocabularies"):
            Mixture([datasets[0], BlockDataset(other, task="mlm", seq_len=64)])
        assert SPECIALS.eos == 2
        with pytest.raises(UserError, match="each must be positive"):
            Mixture(datasets, [1.0, 0.0, 1.0])


def test_the_domains_of_samples(datasets):
    mixture = Mixture(datasets)
    ids = np.arange(len(mixture))[::-1]
    assert mixture.domain_ids(ids).tolist() == [mixture.sample(i, seed=0, epoch=0).domain_id for i in ids]
