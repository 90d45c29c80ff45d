import math

import pytest
import torch

from ki_ds.config import LossConfig, ModelConfig
from ki_ds.data.batches import ValidBatches
from ki_ds.data.prepare import open_corpus
from ki_ds.data.samples import BlockDataset
from ki_ds.data.store import open_store
from ki_ds.errors import UserError
from ki_ds.evaluation.perplexity import Perplexity, validate
from ki_ds.models.presets import InheritanceModel, build_lm
from ki_ds.objective.types import LossOutput
from tests.tiny import tiny_corpus

CPU = torch.device("cpu")
SMALL = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "ffn_size": 64, "num_positions": 32}


@pytest.fixture(scope="module", params=["mlm", "causal"])
def case(request, tmp_path_factory):
    """(validation blocks, an untrained student with dropout off as in validation)."""
    corpus = open_corpus(tiny_corpus(tmp_path_factory.mktemp("perplexity") / "corpus", num_documents=60))
    blocks = BlockDataset(open_store(corpus.valid_prefix), task=request.param, seq_len=32)
    model = ModelConfig(name="roberta_base" if request.param == "mlm" else "gpt_124m", **SMALL)
    lm = build_lm(model, request.param, num_classes=blocks.vocab_size, special_ids=blocks.special_ids, seed=1)
    return blocks, InheritanceModel(lm, num_classes=blocks.vocab_size, loss=LossConfig(), tau=2.0).eval()


@torch.no_grad()
def evaluated(model, batch):
    return model(batch)[0]


def measure(case, **options):
    blocks, model = case
    return validate(
        ValidBatches(blocks, micro_batch_size=3, **options), lambda batch: evaluated(model, batch), device=CPU
    )


def test_it_is_the_cross_entropy_of_every_labelled_row(case):
    blocks, model = case
    found = measure(case)
    ce_sum, num_rows = 0.0, 0
    for batch in ValidBatches(blocks, micro_batch_size=1):
        with torch.no_grad():
            logits = model.lm(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits.double()
        logits = logits.flatten(0, 1)[batch.rows_N][:, : blocks.vocab_size]
        ce_sum += torch.nn.functional.cross_entropy(logits, batch.row_labels_N, reduction="sum").item()
        num_rows += batch.num_rows
    assert found.num_rows == num_rows > 50
    assert found.ce_sum == pytest.approx(ce_sum, rel=1e-6)
    assert found.ce == found.ce_sum / num_rows
    assert found.ppl == math.exp(found.ce)


@pytest.mark.parametrize("world", [2, 3])
def test_it_is_the_same_for_any_number_of_ranks(case, world):
    alone = measure(case)
    parts = [measure(case, rank=rank, world_size=world) for rank in range(world)]
    assert len({len(ValidBatches(case[0], micro_batch_size=3, rank=r, world_size=world)) for r in range(world)}) == 1
    assert sum(part.num_rows for part in parts) == alone.num_rows
    assert sum(part.ce_sum for part in parts) == pytest.approx(alone.ce_sum, rel=1e-12)


def test_it_is_the_same_each_time(case):
    assert measure(case) == measure(case)


def test_a_batch_without_labels_adds_nothing_and_no_nan(case):
    world = len(ValidBatches(case[0], micro_batch_size=3)) + 1  # the last rank has nothing but a filler
    with pytest.raises(UserError, match="no labelled row"):  # it is alone here, so nothing is left to measure
        measure(case, rank=world - 1, world_size=world)


def test_sums_are_kept_in_float64():
    big, small = (LossOutput(*[torch.tensor(v)] * 3, torch.tensor(1), *torch.empty(4, 0)) for v in (2.0**24, 1.0))

    class Passing:
        def to(self, *_args, **_kwargs):
            return self

    outputs = iter([big, small, small, small])
    found = validate([Passing()] * 4, lambda _: next(outputs), device=CPU)
    assert found == Perplexity(2.0**24 + 3, 4)
    assert found.ppl == math.inf
