import pytest
import torch

from ki_ds.config import ModelConfig
from ki_ds.errors import UserError
from ki_ds.planning.sizes import activations, architecture, size_of, size_of_teacher

TABLE_6 = {  # millions of parameters, a vocabulary of 50,265
    "roberta_medium": 74,
    "roberta_base": 125,
    "roberta_base_plus": 211,
    "roberta_large": 355,
    "gpt_73m": 73,
    "gpt_124m": 124,
    "gpt_209m": 209,
    "gpt_354m": 354,
    "gpt_773m": 773,
    "gpt_1b": 1068,
}


def task_of(name):
    return "causal" if name.startswith("gpt") else "mlm"


@pytest.mark.parametrize("name", TABLE_6)
def test_the_presets_of_table_6_within_a_percent(name):
    size = size_of(ModelConfig(name=name), task_of(name), 50_265)
    assert size.num_parameters == pytest.approx(TABLE_6[name] * 1e6, rel=0.01)


def test_a_size_says_what_training_counts():
    size = size_of(ModelConfig(name="roberta_base"), "mlm", 50_265)
    assert (size.num_layers, size.hidden_size, size.num_heads, size.ffn_size) == (12, 768, 12, 3072)
    assert (size.vocab_size, size.tied, size.head_bias) == (50_304, True, True)
    looked_up = (512 + 2) * 768 + 768  # positions behind the padding's, and the only token type
    assert size.num_parameters - size.dense_parameters == looked_up
    assert size.largest_parameter == 50_304 * 768


SMALL = ModelConfig(name="gpt_124m", num_layers=3, hidden_size=32, num_heads=2, ffn_size=64, num_positions=64)


def kept(**changed):
    given = {"batch": 2, "length": 64, "dtype": torch.float32, "on_gpu": False, "padded": False} | changed
    return activations(SMALL, "causal", 640, **given)


def really_kept(config):
    """Bytes that autograd keeps of a real forward on this machine."""
    from torch.autograd.graph import saved_tensors_hooks

    from ki_ds.models.presets import lm_of

    lm, seen = lm_of(config, "causal").train(), {}
    weights = {p.data_ptr() for p in lm.parameters()}

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = lm.base_model(input_ids=torch.zeros(2, 64, dtype=torch.int64), use_cache=False).last_hidden_state
    keep(out)
    return sum(t.untyped_storage().nbytes() for key, t in seen.items() if key not in weights)


def test_activations_are_those_of_a_real_forward():
    found, really = kept(), really_kept(architecture(SMALL, "causal", 640))
    assert found.num_layers == 3
    assert found.kept(checkpointing=False) == pytest.approx(really, rel=0.02)


def test_what_checkpointing_halves_and_kernels_save():
    plain = kept()
    assert plain.kept(checkpointing=True) == plain.outside + 3 * 2 * 64 * 32 * 4
    assert plain.recomputed(checkpointing=True) == plain.layer > plain.recomputed(checkpointing=False) == 0
    assert kept(batch=4).layer == pytest.approx(2 * plain.layer, rel=0.01)
    scores = 2 * 2 * 64 * 64 * 4  # batch, heads, length x length, float32
    assert plain.layer - kept(on_gpu=True).layer > 2 * scores  # a fused kernel keeps none
    assert kept(dtype=torch.bfloat16, on_gpu=True).layer < 0.6 * kept(on_gpu=True).layer


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("roberta_base", "causal", "is not a model for task=causal"),
        ("runs/not_there_yet", "mlm", "is no model on this machine"),
        ("roberta-base", "mlm", "a plan downloads nothing"),
    ],
)
def test_a_model_that_cannot_be_sized_is_one_line(name, task, words):
    with pytest.raises(UserError, match=words):
        size_of(ModelConfig(name=name), task, 50_265)


def test_a_teacher_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"teachers\.1\.path=.* is no model on this machine"):
        size_of_teacher(str(tmp_path), "mlm", 640, what="teachers.1.path")


def test_a_teacher_in_a_folder(tmp_path):
    architecture(SMALL, "causal", 640).save_pretrained(tmp_path)
    assert size_of_teacher(str(tmp_path), "causal", 640) == size_of(SMALL, "causal", 640)
