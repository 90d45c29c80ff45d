"""Samples, batches and loaders: the same global batches for every split, and nothing lost at a resume."""

import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ki_ds.data.batches import (
    IGNORE_INDEX,
    BlockDataset,
    TrainBatches,
    ValidBatches,
    collate,
    stream_samples,
)
from ki_ds.data.blocks import MaskConfig
from ki_ds.data.store import SpecialIds, StoreWriter, open_store
from ki_ds.data.tokenize import read_fairseq_dict
from ki_ds.errors import UserError

RELEASED = Path(os.environ.get("KI_DS_SHARED", Path(__file__).parents[3] / "shared")) / "fairseq/data-bin"
released = pytest.mark.skipif(not RELEASED.is_dir(), reason="released fairseq files (KI_DS_SHARED) are not there")

VOCAB = 300
SPECIALS = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=4)
GLOBAL = 8


def write_store(folder, *, num_items=120, vocab_size=VOCAB, specials=SPECIALS, seed=0):
    rng = np.random.default_rng(seed)
    with StoreWriter(folder / "s", vocab_size=vocab_size, special_ids=specials) as writer:
        for i in range(num_items):
            item = np.append(rng.integers(5, VOCAB, rng.integers(1, 40)), specials.eos)
            writer.add_items(item, np.array([len(item)]))
            if i % 9 == 0:
                writer.end_document()
    return open_store(folder / "s")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def mlm(store):
    return BlockDataset(store, task="mlm", seq_len=64)


@pytest.fixture(scope="module")
def causal(store):
    return BlockDataset(store, task="causal", seq_len=64)


def samples_of(batch):
    """{(sample id, its inputs, its labels)} of a batch, padding taken off."""
    rows = set()
    for i, sample_id in enumerate(batch.sample_ids_B.tolist()):
        keep = slice(None) if batch.attention_mask_BL is None else batch.attention_mask_BL[i].bool()
        rows.add((sample_id, *batch.input_ids_BL[i][keep].tolist(), -1, *batch.labels_BL[i][keep].tolist()))
    return rows


def global_steps(dataset, *, micro, world=1, workers=0, start=0, stop=6, seed=5):
    """The samples of each step, over all ranks."""
    ranks = [
        TrainBatches(
            dataset,
            seed=seed,
            micro_batch_size=micro,
            global_batch_size=GLOBAL,
            rank=rank,
            world_size=world,
            num_workers=workers,
            start_step=start,
            num_steps=stop,
        )
        for rank in range(world)
    ]
    steps = []
    for parts in zip(*ranks, strict=True):
        assert all(len(part) == GLOBAL // (micro * world) for part in parts)
        batches = list(itertools.chain(*parts))
        assert sum(len(b.sample_ids_B) for b in batches) == GLOBAL
        steps.append(set().union(*map(samples_of, batches)))
    return steps


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
        assert set(store.document_ends().tolist()) <= set(starts.tolist())

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

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_foreign_id_deep_inside_is_one_line_when_it_is_met(self, mlm, workers):
        dataset = pickle.loads(pickle.dumps(mlm))
        dataset.vocab_size = 250  # as if the look at both ends had missed it
        batches = TrainBatches(
            dataset, seed=1, micro_batch_size=8, global_batch_size=8, num_workers=workers, num_steps=50
        )
        with pytest.raises(UserError, match="the vocabulary ends at 249") as caught:
            list(batches)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "settings",
        [
            {"micro_batch_size": 3, "global_batch_size": 8},
            {"micro_batch_size": 4, "global_batch_size": 8, "world_size": 3},
            {"micro_batch_size": 0, "global_batch_size": 8},
            {"micro_batch_size": 8, "global_batch_size": 4},
        ],
    )
    def test_batch_sizes_that_do_not_divide(self, mlm, settings):
        with pytest.raises(UserError, match=f"global_batch_size={settings['global_batch_size']}"):
            TrainBatches(mlm, seed=0, **settings)

    def test_negative_seed_and_empty_validation(self, mlm):
        with pytest.raises(UserError, match="seed=-1"):
            TrainBatches(mlm, seed=-1, micro_batch_size=1, global_batch_size=1)
        with pytest.raises(UserError, match="num_variants=0"):
            ValidBatches(mlm, micro_batch_size=1, num_variants=0)


class TestBatch:
    @pytest.mark.parametrize("task", ["mlm", "causal"])
    def test_fields_agree(self, task, request):
        dataset = request.getfixturevalue(task)
        last = len(dataset) - 1
        samples = [dataset.sample(i, seed=1, epoch=0) for i in (0, last, 3)]
        batch = collate(samples, pad_id=1, seq_len=64)
        assert batch.input_ids_BL.shape == batch.labels_BL.shape
        assert batch.input_ids_BL.shape[1] % 8 == 0
        flat = batch.labels_BL.flatten()
        assert torch.equal(batch.rows_N, torch.nonzero(flat != IGNORE_INDEX).flatten())
        assert torch.equal(batch.row_labels_N, flat[batch.rows_N])
        assert batch.num_rows == sum(len(s.labels_N) for s in samples)
        assert batch.num_tokens == sum(len(s.input_ids_T) for s in samples)
        assert batch.attention_mask_BL is not None
        assert int(batch.attention_mask_BL.sum()) == batch.num_tokens
        assert (batch.input_ids_BL[batch.attention_mask_BL == 0] == 1).all()
        assert batch.sample_ids_B.tolist() == [0, last, 3]
        assert batch.domain_ids_B.tolist() == [0, 0, 0]
        for tensor in (batch.input_ids_BL, batch.labels_BL, batch.rows_N, batch.row_labels_N):
            assert tensor.dtype == torch.int64

    def test_no_mask_without_padding_and_moving_keeps_it(self, causal):
        batch = collate([causal.sample(i, seed=1, epoch=0) for i in (0, 1)], pad_id=1, seq_len=64)
        assert batch.attention_mask_BL is None
        moved = batch.to("meta", non_blocking=True)
        assert moved.input_ids_BL.device.type == "meta"
        assert (moved.attention_mask_BL, moved.num_tokens) == (None, 128)

    def test_the_width_never_exceeds_seq_len(self, store):
        dataset = BlockDataset(store, task="causal", seq_len=61)
        assert collate([dataset.sample(0, seed=0, epoch=0)], pad_id=1, seq_len=61).input_ids_BL.shape == (1, 61)


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


class TestTrainBatches:
    @pytest.mark.parametrize("task", ["mlm", "causal"])
    def test_ranks_micro_batches_and_accumulation_change_nothing(self, task, request):
        dataset = request.getfixturevalue(task)
        expected = global_steps(dataset, micro=GLOBAL)
        for world, micro in itertools.product((1, 2, 4), (1, 2, 4, 8)):
            if GLOBAL % (world * micro) == 0:
                assert global_steps(dataset, micro=micro, world=world) == expected, (world, micro)

    @pytest.mark.parametrize("world", [1, 2])
    def test_workers_change_nothing(self, mlm, world):
        expected = global_steps(mlm, micro=4, world=world, stop=4)
        assert global_steps(mlm, micro=4, world=world, workers=2, stop=4) == expected

    def test_a_resume_at_every_step_gives_the_same_rest(self, mlm):
        steps = 2 * len(mlm) // GLOBAL + 2  # beyond two epochs
        whole = global_steps(mlm, micro=4, stop=steps)
        for start in range(steps + 1):
            assert global_steps(mlm, micro=4, start=start, stop=steps) == whole[start:]

    def test_other_ranks_in_mid_epoch_repeat_and_lose_nothing(self, mlm):
        seen = [
            sample[0]
            for world, start, stop in ((1, 0, 2), (4, 2, 3), (2, 3, 8))
            for step in global_steps(mlm, micro=2, world=world, start=start, stop=stop)
            for sample in step
        ]
        epochs, ids = stream_samples(0, 8 * GLOBAL, len(mlm), seed=5)
        assert sorted(seen) == sorted(ids.tolist())
        assert sorted(ids[epochs == 0].tolist()) == list(range(len(mlm)))

    def test_rows_of_a_step_are_known_beforehand(self, mlm):
        batches = TrainBatches(mlm, seed=5, micro_batch_size=2, global_batch_size=GLOBAL, num_steps=3)
        for step, micro_batches in enumerate(batches):
            assert sum(b.num_rows for b in micro_batches) == batches.num_rows(step)

    def test_lengths_and_iterating_twice(self, mlm):
        batches = TrainBatches(mlm, seed=5, micro_batch_size=4, global_batch_size=GLOBAL, start_step=2, num_steps=5)
        assert len(batches) == 3
        first, second = ([samples_of(b) for step in batches for b in step] for _ in range(2))
        assert first == second
        endless = TrainBatches(mlm, seed=5, micro_batch_size=4, global_batch_size=GLOBAL)
        assert len(list(itertools.islice(endless, 9))) == 9
        with pytest.raises(TypeError):
            len(endless)

    def test_torchs_own_random_state_is_left_alone(self, mlm):
        before = torch.get_rng_state()
        global_steps(mlm, micro=4, stop=2)
        assert torch.equal(before, torch.get_rng_state())


class TestValidBatches:
    def gathered(self, dataset, world, **settings):
        ranks = [
            list(ValidBatches(dataset, micro_batch_size=3, rank=r, world_size=world, **settings)) for r in range(world)
        ]
        assert len({len(batches) for batches in ranks}) == 1  # collectives want equally many
        return [batch for batches in ranks for batch in batches if batch.sample_ids_B[0] >= 0], ranks

    @pytest.mark.parametrize(
        "settings", [{}, {"num_variants": 3}, {"max_samples": 7}, {"max_samples": 4, "num_variants": 2}]
    )
    def test_the_union_is_the_same_for_every_world(self, mlm, settings):
        expected, _ = self.gathered(mlm, 1, **settings)
        texts = sorted(itertools.chain(*map(samples_of, expected)))
        count = min(settings.get("max_samples", len(mlm)), len(mlm)) * settings.get("num_variants", 1)
        assert len(texts) == count
        assert len(list(ValidBatches(mlm, micro_batch_size=3, **settings))) == -(-count // 3)
        for world in (2, 4, 16):
            found, _ = self.gathered(mlm, world, **settings)
            assert sorted(itertools.chain(*map(samples_of, found))) == texts

    def test_masks_are_fixed(self, mlm):
        batches = ValidBatches(mlm, micro_batch_size=3)
        first, second = ([samples_of(b) for b in batches] for _ in range(2))
        assert first == second

    def test_variants_mask_differently_and_causal_needs_none(self, mlm, causal):
        batches, _ = self.gathered(mlm, 1, num_variants=2)
        by_id: dict = {}
        for sample in itertools.chain(*map(samples_of, batches)):
            by_id.setdefault(sample[0], set()).add(sample[1:])
        assert all(len(variants) == 2 for variants in by_id.values())
        assert ValidBatches(causal, micro_batch_size=3, num_variants=2).num_samples == len(causal)

    def test_a_filler_adds_nothing(self, mlm):
        _, ranks = self.gathered(mlm, 16, max_samples=3)
        filler = ranks[5][0]
        assert (filler.num_rows, filler.num_tokens, len(filler.row_labels_N)) == (0, 0, 0)
        assert (filler.labels_BL == IGNORE_INDEX).all()
        assert set(filler.sample_ids_B.tolist()) == {-1}
        assert filler.input_ids_BL.numel() > 0
