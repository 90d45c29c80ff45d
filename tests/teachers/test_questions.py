"""What a run asks: every masked sample once told apart, whatever the padding, the neighbours and the micro-batches."""

import dataclasses

import numpy as np
import pytest
import torch

from ki_ds.data.batches import Sample, TrainBatches, collate
from ki_ds.errors import UserError
from ki_ds.teachers.questions import input_hashes, row_bounds
from tests.teachers.cache_cases import config_of, questions_of


def samples(*lengths, packed=False):
    draw = np.random.default_rng(0)
    made = []
    for number, length in enumerate(lengths):
        ids = draw.integers(4, 300, length)
        positions = np.arange(length) if packed else np.sort(draw.choice(length, max(1, length // 6), replace=False))
        blocks = np.concatenate([np.arange(length - 3), np.arange(3)]) if packed else None
        made.append(Sample(number, ids, positions, draw.integers(4, 300, len(positions)), 0, blocks))
    return made


@pytest.mark.parametrize("packed", [False, True])
def test_a_hash_knows_neither_padding_nor_neighbours(packed):
    three = samples(9, 16, 24, packed=packed)
    together = input_hashes(collate(three, pad_id=1, seq_len=32))
    assert len(set(together)) == 3
    for sample, expected in zip(three, together, strict=True):
        for pad_id in (1, 2):
            assert input_hashes(collate([sample], pad_id=pad_id, seq_len=32)) == [expected]


@pytest.mark.parametrize("packed", [False, True])
def test_a_hash_knows_ids_positions_labels_blocks_and_length(packed):
    (sample,) = samples(24, packed=packed)
    sample = dataclasses.replace(sample, positions_N=sample.positions_N[:-1], labels_N=sample.labels_N[:-1])
    if packed:  # every token of a packed row is labelled
        (sample,) = samples(24, packed=True)
    changes = [{}]
    for name in ("input_ids_T", "labels_N", *(("position_ids_T",) if packed else ("positions_N",))):
        array = getattr(sample, name)
        for place in {0, len(array) // 2, len(array) - 1}:
            changed = array.copy()
            changed[place] += 1
            changes.append({name: changed})
    hashes = [
        input_hashes(collate([dataclasses.replace(sample, **change)], pad_id=0, seq_len=32))[0] for change in changes
    ]
    assert len(set(hashes)) == len(hashes) >= 7
    unchanged = {"sample_id": 5, "domain_id": 3}  # not what the teacher is asked
    assert input_hashes(collate([dataclasses.replace(sample, **unchanged)], pad_id=0, seq_len=32)) == hashes[:1]
    if not packed:
        longer = dataclasses.replace(sample, input_ids_T=np.append(sample.input_ids_T, 0))  # as padding would be
        assert input_hashes(collate([longer], pad_id=0, seq_len=32))[0] not in hashes


def test_rows_of_each_sample():
    three = samples(9, 16, 24)
    batch = collate(three, pad_id=1, seq_len=32)
    counts = [len(s.labels_N) for s in three]
    assert row_bounds(batch) == np.cumsum([0, *counts]).tolist()


@pytest.mark.parametrize("task", ["mlm", "causal"])
@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_are_those_of_the_run(base, task, world):
    config = config_of(base, task)
    questions = questions_of(config)
    settings = {"micro_batch_size": 2, "global_batch_size": 8, "world_size": world, "num_steps": 4}
    number = 0
    loaders = [TrainBatches(questions.train, seed=config.seed, rank=rank, **settings) for rank in range(world)]
    for step in zip(*loaders, strict=True):
        for micro_step in zip(*step, strict=True):
            for batch in micro_step:
                places, _, ids, made = questions.micro_batch(number)
                assert places.tolist() == [2 * number, 2 * number + 1]
                assert torch.equal(batch.input_ids_BL, made.input_ids_BL)
                assert batch.sample_ids_B.tolist() == ids.tolist() == made.sample_ids_B.tolist()
                number += 1
    assert number * 2 == questions.places.stop == 32


def test_masks_are_epochs_or_variants(base):
    epochs = np.arange(5)
    assert questions_of(config_of(base)).masks(epochs).tolist() == [0, 1, 2, 3, 4]
    assert questions_of(config_of(base, data={"mask_variants": 2})).masks(epochs).tolist() == [0, 1, 0, 1, 0]
    assert questions_of(config_of(base, "causal")).masks(epochs).tolist() == [0] * 5


def test_blocks_are_the_stream(base, monkeypatch):
    monkeypatch.setattr("ki_ds.teachers.questions._BLOCK", 100)
    questions = questions_of(config_of(base), steps=range(3, 200))
    places, masks, ids = map(np.concatenate, zip(*questions.blocks(), strict=True))
    epochs, expected = questions.train.stream(24, 1600, seed=questions.seed)
    assert (places.tolist(), masks.tolist(), ids.tolist()) == (
        list(range(24, 1600)),
        epochs.tolist(),
        expected.tolist(),
    )
    assert len(set(zip(masks, ids, strict=True))) == len(ids)


def test_epochs_are_whole_updates(base):
    questions = questions_of(config_of(base))
    assert questions.of_epochs(2).steps == range(-(-2 * len(questions.train) // 8))
    corpus = str(base / "corpus")
    sources = [{"path": corpus, "weight": 1, "domain": "a"}, {"path": corpus, "weight": 2, "domain": "b"}]
    with pytest.raises(UserError, match="--epochs 2: weighted sources"):
        questions_of(config_of(base, data={"sources": sources})).of_epochs(2)


def test_the_key_of_a_causal_run_has_no_masks(base):
    key = questions_of(config_of(base, "causal")).key
    assert "seed" not in key
    assert not any("mask" in name for name in key)
    assert "seed" in questions_of(config_of(base)).key
