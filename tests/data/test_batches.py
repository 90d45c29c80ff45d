"""Samples, batches and loaders: the same global batches for every split, and nothing lost at a resume."""

import dataclasses
import hashlib
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.data.batches import IGNORE_INDEX, TrainBatches, ValidBatches, collate, with_next
from ki_ds.data.randomness import MaskConfig, shuffled_epochs
from ki_ds.data.samples import BlockDataset, Mixture
from ki_ds.errors import UserError
from tests.data.stores import VOCAB, write_store

GLOBAL = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def mlm(store):
    return Mixture([BlockDataset(store, task="mlm", seq_len=64)])


@pytest.fixture(scope="module")
def causal(store):
    return Mixture([BlockDataset(store, task="causal", seq_len=64)])


def samples_of(batch):
    """{(sample id, its inputs, its labels)} of a batch, padding taken off."""
    rows = set()
    for i, sample_id in enumerate(batch.sample_ids_B.tolist()):
        keep = slice(None) if batch.attention_mask_BL is None else batch.attention_mask_BL[i].bool()
        if batch.position_ids_BL is not None:
            keep = batch.labels_BL[i] != IGNORE_INDEX  # causal: every token but the padding has a label
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


class TestBadInput:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_foreign_id_deep_inside_is_one_line_when_it_is_met(self, mlm, workers):
        dataset = pickle.loads(pickle.dumps(mlm))
        dataset.datasets[0].vocab_size = 250  # as if the look at both ends had missed it
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
        epochs, ids = shuffled_epochs(np.arange(8 * GLOBAL), len(mlm), seed=5)
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


def digest_of(dataset, *, world, workers, micro, stop=5):
    """SHA-256 of all samples of the first steps, in the order of the global batches, whatever the split."""
    digest = hashlib.sha256()
    for step in global_steps(dataset, micro=micro, world=world, workers=workers, stop=stop):
        digest.update(repr(sorted(step)).encode())
    return digest.hexdigest()


class TestOneHash:
    """{1, 2, 4} ranks x {0, 1, 2, 4} workers x accumulation, for what trainings are made of."""

    @pytest.fixture(scope="class", params=["weights", "tokens", "words", "packed"])
    def dataset(self, request, tmp_path_factory):
        folder = tmp_path_factory.mktemp("hash")
        stores = [write_store(folder, name=f"s{i}", num_items=n, seed=i) for i, n in enumerate((40, 30))]
        if request.param == "packed":
            parts = [BlockDataset(s, task="causal", seq_len=48, break_mode="none_doc", packing=True) for s in stores]
            return Mixture(parts)
        words = request.param == "words"
        settings = {"masking": MaskConfig(whole_words=words, num_variants=2), "begins_word_V": np.arange(VOCAB) % 3 > 0}
        parts = [BlockDataset(s, task="mlm", seq_len=48, domain_id=i, **settings) for i, s in enumerate(stores)]
        return Mixture(parts, [1.0, 3.0] if request.param == "weights" else None)

    def test_ranks_and_accumulation(self, dataset):
        digests = {
            digest_of(dataset, world=world, workers=0, micro=micro)
            for world in (1, 2, 4)
            for micro in (1, 2, GLOBAL // world)
        }
        assert len(digests) == 1
        assert digests != {digest_of(dataset, world=1, workers=0, micro=8, stop=4)}

    @pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four workers on two cores
    @pytest.mark.parametrize("workers", [1, 2, 4])
    def test_workers(self, dataset, workers):
        assert digest_of(dataset, world=1, workers=workers, micro=2) == digest_of(dataset, world=1, workers=0, micro=4)


def test_packed_rows_keep_their_positions_and_padding_is_a_block_of_its_own(store):
    dataset = BlockDataset(store, task="causal", seq_len=61, break_mode="eos", packing=True)
    samples = [dataset.sample(i, seed=0, epoch=0) for i in range(5)]
    batch = collate(samples, pad_id=1, seq_len=61)
    assert batch.attention_mask_BL is None
    for sample, ids, positions in zip(samples, batch.input_ids_BL, batch.position_ids_BL, strict=True):
        length = len(sample.input_ids_T)
        assert ids[:length].tolist() == sample.input_ids_T.tolist()
        assert positions[:length].tolist() == sample.position_ids_T.tolist()
        assert positions[length:].tolist() == list(range(len(positions) - length))


def test_a_moved_batch_keeps_what_the_host_may_look_at(mlm):
    (batch,) = next(iter(TrainBatches(mlm, seed=1, micro_batch_size=4, global_batch_size=4)))
    moved = batch.to("meta").to("meta")
    assert moved.input_ids_BL.is_meta
    assert moved.host is batch
    assert batch.host is None


class TestSelect:
    """Some sequences of a batch are the batch that would have been made of their samples alone."""

    @pytest.fixture(scope="class", params=["mlm", "causal", "padded", "packed"])
    def dataset(self, request, store):
        if request.param in ("mlm", "causal"):
            return BlockDataset(store, task=request.param, seq_len=64, domain_id=3)
        packing = request.param == "packed"
        return BlockDataset(store, task="causal", seq_len=61, break_mode="none_doc", packing=packing)

    @given(chosen=st.sets(st.integers(0, 5), min_size=1), first=st.integers(0, 20))
    @settings(max_examples=40, deadline=None)
    def test_it_is_the_batch_of_those_samples(self, dataset, chosen, first):
        samples = [dataset.sample((first + i) % len(dataset), seed=0, epoch=0) for i in range(6)]
        chosen = sorted(chosen)
        whole = collate(samples, pad_id=1, seq_len=dataset.seq_len)
        found, numbers = whole.select(chosen)
        expected = collate([samples[i] for i in chosen], pad_id=1, seq_len=dataset.seq_len)
        for field in dataclasses.fields(expected):
            ours, theirs = getattr(found, field.name), getattr(expected, field.name)
            same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
            assert same, field.name
        assert whole.row_labels_N[numbers].tolist() == expected.row_labels_N.tolist()
        owners = (whole.rows_N // whole.input_ids_BL.shape[1])[numbers]
        assert sorted(set(owners.tolist())) == chosen
        assert whole.lengths.tolist() == [len(s.input_ids_T) for s in samples]


def test_each_batch_comes_with_the_next_one():
    assert list(with_next(iter("abc"))) == [("a", "b"), ("b", "c"), ("c", None)]
    assert list(with_next([])) == []
