"""Samples: every token once, masks that follow their key, documents kept apart; mixtures and their shares."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from ki_ds.data.batches import TrainBatches
from ki_ds.data.blocks import TokenView, find_blocks
from ki_ds.data.randomness import MaskConfig
from ki_ds.data.samples import BlockDataset, Mixture
from ki_ds.data.store import SpecialIds, open_store
from ki_ds.data.tokenize import read_fairseq_dict
from ki_ds.errors import UserError
from tests.data.stores import SPECIALS, VOCAB, write_store

RELEASED = Path(os.environ.get("KI_DS_SHARED", Path(__file__).parents[3] / "shared")) / "fairseq/data-bin"
released = pytest.mark.skipif(not RELEASED.is_dir(), reason="released fairseq files (KI_DS_SHARED) are not there")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def mlm(store):
    return BlockDataset(store, task="mlm", seq_len=64)


@pytest.fixture(scope="module")
def causal(store):
    return BlockDataset(store, task="causal", seq_len=64)


def test_rows_are_padded_unless_all_of_them_are_full(store):
    assert BlockDataset(store, task="mlm", seq_len=64).padded  # blocks of whole lines
    whole = BlockDataset(store, task="causal", seq_len=64, break_mode="none")
    sizes = [whole.size(i) for i in range(len(whole))]
    assert whole.padded == (set(sizes) != {64})
    full = next(n for n in range(8, 4096) if sum(sizes) % n == 0)
    assert not BlockDataset(store, task="causal", seq_len=full, break_mode="none").padded
    assert not BlockDataset(store, task="causal", seq_len=64, break_mode="none_doc", packing=True).padded


class TestDataset:
    def test_mlm_labels_are_the_text_and_only_chosen_places_change(self, mlm, store):
        seen = []
        for i in range(len(mlm)):
            sample = mlm.sample(i, seed=1, epoch=0)
            restored = sample.input_ids_T.copy()
            restored[sample.positions_N] = sample.labels_N
            assert restored[0] == 0
            assert len(restored) == mlm.size(i) <= 64
            assert len(sample.labels_N) == mlm.num_rows(i, seed=1, epoch=0)
            seen += restored[1:].tolist()
        assert seen == store.tokens.tolist()  # every token exactly once an epoch

    def test_masks_follow_seed_and_epoch(self, mlm):
        base = mlm.sample(2, seed=1, epoch=0)
        assert np.array_equal(base.input_ids_T, mlm.sample(2, seed=1, epoch=0).input_ids_T)
        for seed, epoch in ((1, 1), (2, 0)):
            assert not np.array_equal(base.input_ids_T, mlm.sample(2, seed=seed, epoch=epoch).input_ids_T)

    def test_no_special_id_is_drawn_and_the_mask_is_the_mask(self, store):
        config = MaskConfig(mask_prob=0.9, keep_prob=0.0, random_prob=1.0)
        dataset = BlockDataset(store, task="mlm", seq_len=64, masking=config)
        drawn = np.concatenate(
            [(s := dataset.sample(i, seed=0, epoch=0)).input_ids_T[s.positions_N] for i in range(20)]
        )
        assert not set(drawn.tolist()) & set(SPECIALS.all_ids)
        dataset = BlockDataset(store, task="mlm", seq_len=64, masking=MaskConfig(keep_prob=0.0, random_prob=0.0))
        sample = dataset.sample(0, seed=0, epoch=0)
        assert set(sample.input_ids_T[sample.positions_N].tolist()) == {4}

    def test_causal_inputs_are_the_labels_moved_by_one(self, causal, store):
        samples = [causal.sample(i, seed=1, epoch=0) for i in range(len(causal))]
        labels = np.concatenate([s.labels_N for s in samples])
        inputs = np.concatenate([s.input_ids_T for s in samples])
        assert labels.tolist() == store.tokens.tolist()
        assert inputs.tolist() == [2, *store.tokens[:-1].tolist()]
        assert [causal.size(i) for i in range(len(causal))] == [len(s.labels_N) for s in samples]
        assert causal.num_rows(0, seed=0, epoch=0) == 64

    def test_complete_doc_never_crosses_a_document(self, store):
        dataset = BlockDataset(store, task="mlm", seq_len=64, break_mode="complete_doc")
        starts = np.cumsum([0] + [dataset.size(i) - 1 for i in range(len(dataset))])
        assert set(np.cumsum(store.sizes)[store.document_indices[1:] - 1].tolist()) <= set(starts.tolist())

    def test_it_pickles_and_knows_its_end(self, mlm):
        again = pickle.loads(pickle.dumps(mlm))
        assert np.array_equal(again.sample(3, seed=1, epoch=2).input_ids_T, mlm.sample(3, seed=1, epoch=2).input_ids_T)
        with pytest.raises(IndexError):
            mlm.sample(len(mlm), seed=1, epoch=0)

    def test_a_vocabulary_without_padding_pads_with_eos(self, tmp_path):
        store = write_store(tmp_path, specials=SpecialIds(bos=7, eos=7, unk=7))
        assert BlockDataset(store, task="causal", seq_len=64).pad_id == 7

    @released
    @pytest.mark.parametrize("task", ["mlm", "causal"])
    def test_released_files_are_trained_on_as_they_are(self, task):
        symbols, specials = read_fairseq_dict(RELEASED / "dict.txt")
        store = open_store(RELEASED / "train")
        dataset = BlockDataset(store, task=task, seq_len=128, vocab_size=len(symbols), special_ids=specials)
        assert sum(dataset.size(i) for i in range(len(dataset))) == 135_496 + (task == "mlm") * len(dataset)
        sample = dataset.sample(0, seed=1, epoch=0)
        text = store.tokens[: dataset.size(0) - (task == "mlm")].tolist()
        restored = sample.input_ids_T.copy()
        restored[sample.positions_N] = sample.labels_N
        assert restored.tolist() == ([0, *text] if task == "mlm" else text)


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"seq_len": 7}, "data.seq_len=7 is below 8"),
            ({"seq_len": 5000}, "less than one block of data.seq_len=5000"),
            ({"vocab_size": 299}, "was prepared with 300 ids, the vocabulary has 299"),
            ({"special_ids": SpecialIds(eos=2)}, "no mask token, which task=mlm needs"),
            ({"special_ids": SpecialIds(mask=4)}, "has no eos token"),
            ({"special_ids": SpecialIds(eos=2, mask=300)}, "special id 300 lies outside"),
        ],
    )
    def test_settings(self, store, settings, message):
        with pytest.raises(UserError, match=message):
            BlockDataset(store, **{"task": "mlm", "seq_len": 64} | settings)

    def test_a_store_without_manifest_needs_a_vocabulary(self, store, tmp_path):
        for suffix in (".bin", ".idx"):
            (tmp_path / f"s{suffix}").write_bytes(store.prefix.with_suffix(suffix).read_bytes())
        foreign = open_store(tmp_path / "s")
        with pytest.raises(UserError, match="no manifest that tells its vocabulary"):
            BlockDataset(foreign, task="mlm", seq_len=64)
        BlockDataset(foreign, task="mlm", seq_len=64, vocab_size=VOCAB, special_ids=SPECIALS)
        with pytest.raises(UserError, match="has token id 299, the vocabulary ends at 249"):
            BlockDataset(foreign, task="mlm", seq_len=64, vocab_size=250, special_ids=SPECIALS)


class TestModes:
    @pytest.mark.parametrize("task", ["mlm", "causal"])
    @pytest.mark.parametrize("mode", ["complete", "complete_doc", "eos", "none", "none_doc"])
    def test_every_token_is_in_one_sample_once(self, store, task, mode):
        dataset = BlockDataset(store, task=task, seq_len=24, break_mode=mode)
        seen = []
        for i in range(len(dataset)):
            sample = dataset.sample(i, seed=1, epoch=0)
            text = sample.input_ids_T.copy()
            text[sample.positions_N] = sample.labels_N
            assert len(text) == dataset.size(i) <= 24
            seen += text[task == "mlm" :].tolist()
        assert seen == store.tokens.tolist()

    def test_a_causal_block_begins_with_what_stands_before_it_or_with_eos(self, store):
        by_cut = BlockDataset(store, task="causal", seq_len=24, break_mode="none")
        assert by_cut.sample(3, seed=0, epoch=0).input_ids_T[0] == store.tokens[3 * 24 - 1]
        for mode in ("complete", "none_doc", "eos"):
            dataset = BlockDataset(store, task="causal", seq_len=24, break_mode=mode)
            samples = [dataset.sample(i, seed=0, epoch=0) for i in range(len(dataset))]
            assert {int(sample.input_ids_T[0]) for sample in samples} == {2}
            assert all((s.input_ids_T[1:] == s.labels_N[:-1]).all() for s in samples)

    @pytest.mark.parametrize("mode", ["eos", "none_doc", "complete_doc"])
    def test_packed_rows_hold_the_same_blocks_with_positions_of_their_own(self, store, mode):
        plain = BlockDataset(store, task="causal", seq_len=64, break_mode=mode)
        packed = BlockDataset(store, task="causal", seq_len=64, break_mode=mode, packing=True)
        assert len(packed) < len(plain)
        parts = []
        for i in range(len(packed)):
            sample = packed.sample(i, seed=0, epoch=0)
            assert len(sample.input_ids_T) == packed.size(i) <= 64
            starts = np.flatnonzero(sample.position_ids_T == 0)
            parts += [p.tolist() for p in np.split(sample.input_ids_T, starts[1:])]
            assert all((np.diff(p) == 1).all() for p in np.split(sample.position_ids_T, starts[1:]))
        assert parts == [plain.sample(i, seed=0, epoch=0).input_ids_T.tolist() for i in range(len(plain))]

    def test_packing_where_nothing_is_to_pack_is_refused(self, store):
        for task, mode in (("mlm", "eos"), ("causal", "none"), ("causal", "complete")):
            with pytest.raises(UserError, match=f"data.packing has no meaning for task={task} .*break_mode={mode}"):
                BlockDataset(store, task=task, seq_len=64, break_mode=mode, packing=True)

    def test_dropping_every_line_is_refused(self, store, tmp_path):
        only_long = write_store(tmp_path, num_items=1, seed=3)
        assert only_long.num_tokens > 12
        with pytest.raises(UserError, match=r"no line fits into data\.seq_len=8"):
            BlockDataset(only_long, task="causal", seq_len=8, break_mode="eos", long_lines="drop")

    def test_static_masks_take_turns(self, store):
        masking = MaskConfig(num_variants=3)
        dataset = BlockDataset(store, task="mlm", seq_len=64, masking=masking)
        masks = [dataset.sample(1, seed=1, epoch=epoch).input_ids_T.tolist() for epoch in range(7)]
        assert masks[0] == masks[3] == masks[6]
        assert masks[1] == masks[4]
        assert len({tuple(mask) for mask in masks}) == 3
        assert [dataset.num_rows(1, seed=1, epoch=e) for e in range(3)] == [
            len(dataset.sample(1, seed=1, epoch=e).labels_N) for e in range(3)
        ]

    def test_whole_words_need_to_know_the_words(self, store):
        masking = MaskConfig(whole_words=True)
        with pytest.raises(UserError, match="which ids begin a word"):
            BlockDataset(store, task="mlm", seq_len=64, masking=masking)
        begins = np.arange(VOCAB) % 2 == 0
        dataset = BlockDataset(store, task="mlm", seq_len=64, masking=masking, begins_word_V=begins)
        sample = dataset.sample(4, seed=1, epoch=0)
        text = sample.input_ids_T.copy()
        text[sample.positions_N] = sample.labels_N
        labelled = set(sample.positions_N.tolist())
        going_on = [t for t in range(1, len(text)) if not begins[text[t]]]
        assert going_on
        assert all((t in labelled) == (t - 1 in labelled) for t in going_on)
        assert dataset.num_rows(4, seed=1, epoch=0) == len(sample.labels_N)


# How the released code cuts its own files (mode, block size): blocks kept, start of the SHA-256 of their bounds.
RELEASED_BLOCKS = [
    ("complete", 30, 1150, "1d4746572b7d2873"),
    ("none", 30, 4517, "ea90bd51d55d6ed2"),
    ("eos", 30, 1491, "7e26a0a836470ac6"),
    ("complete", 127, 1056, "e4cc3d2477742064"),
    ("none", 127, 1067, "7a1f20fa0922a12c"),
    ("eos", 127, 2829, "caf798e55f6e893a"),
    ("complete", 511, 292, "a1d34b403fa80740"),
    ("none", 511, 266, "da3ac4d014a603c2"),
    ("eos", 511, 2999, "fb61b006c76a8916"),
]


@released
@pytest.mark.parametrize(("mode", "capacity", "num_blocks", "digest"), RELEASED_BLOCKS)
def test_blocks_are_those_of_the_released_code(mode, capacity, num_blocks, digest):
    view = TokenView([open_store(RELEASED / "train")])
    bounds_S2 = find_blocks(view, capacity, mode=mode, long_lines="drop").bounds_S2
    assert len(bounds_S2) == num_blocks
    assert hashlib.sha256(bounds_S2.astype("<i8").tobytes()).hexdigest().startswith(digest)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    sizes = (150, 60, 90)
    stores = [write_store(folder, name=f"s{i}", num_items=n, seed=i) for i, n in enumerate(sizes)]
    return [BlockDataset(store, task="mlm", seq_len=64, domain_id=i) for i, store in enumerate(stores)]


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
