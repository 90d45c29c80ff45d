"""A model without its padding: the same logits for the tokenizer's ids, whatever the architecture, and nothing else."""

import os
import stat

import pytest
import torch
import transformers as hf

from ki_ds.convert.folder import begin_with, cut, num_classes_of, unpadded, write_beside
from ki_ds.errors import UserError
from ki_ds.models.presets import lm_of

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TINY |= {"max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
MASKED = [
    hf.RobertaConfig(vocab_size=100, **TINY),
    hf.BertConfig(vocab_size=100, tie_word_embeddings=False, **TINY),
    hf.AlbertConfig(vocab_size=100, embedding_size=8, **TINY),
    hf.DebertaV2Config(vocab_size=100, **TINY),
]
CAUSAL = [
    hf.GPT2Config(vocab_size=100, n_positions=40, n_embd=16, n_layer=1, n_head=2),
    hf.LlamaConfig(vocab_size=100, tie_word_embeddings=False, **TINY),
    hf.OPTConfig(vocab_size=100, word_embed_proj_dim=8, num_hidden_layers=1, hidden_size=16, num_attention_heads=2),
    hf.Gemma3TextConfig(vocab_size=100, head_dim=8, num_key_value_heads=1, **TINY),
]


def random_lm(config, task):
    torch.manual_seed(0)
    lm = lm_of(config, task).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lm


@pytest.mark.parametrize(
    ("config", "task"),
    [*((config, "mlm") for config in MASKED), *((config, "causal") for config in CAUSAL)],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_the_kept_logits_are_the_same_to_the_bit(config, task, tmp_path):
    lm = random_lm(config, task)
    made = unpadded(lm, 90, dtype=torch.float32)
    made.save_pretrained(tmp_path, state_dict=cut(lm.state_dict(), made))
    auto = hf.AutoModelForMaskedLM if task == "mlm" else hf.AutoModelForCausalLM
    again, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        found, expected = again.eval()(input_ids=ids).logits, lm(input_ids=ids).logits
    assert again.config.get_text_config().vocab_size == num_classes_of(again) == found.shape[-1] == 90
    assert torch.equal(found, expected[..., :90])
    head, embedding = (get().weight for get in (lm.get_output_embeddings, lm.get_input_embeddings))
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == (head is embedding)
    assert num_classes_of(lm) == lm.config.vocab_size == 100  # training goes on with its own


def test_nothing_to_cut_is_everything_as_it_is():
    lm = random_lm(CAUSAL[0], "causal")
    made = unpadded(lm, 100, dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16
    state = cut(lm.state_dict(), made)
    assert all(torch.equal(state[name], tensor) for name, tensor in lm.state_dict().items())


def test_padding_beyond_the_tokenizer_is_nobodys_id():
    config = hf.GPT2Config(vocab_size=100, n_positions=40, n_embd=16, n_layer=1, n_head=2, pad_token_id=95)
    assert unpadded(random_lm(config, "causal"), 90, dtype=torch.float32).config.pad_token_id is None


def test_an_architecture_that_cannot_be_cut(monkeypatch):
    lm = random_lm(CAUSAL[0], "causal")
    lm.config.n_layer = 2  # as if its layers hung on the size of the vocabulary
    with pytest.raises(UserError, match=r"GPT2LMHeadModel with 90 output classes instead of 100 has another \S*h\.1\."):
        unpadded(lm, 90, dtype=torch.float32)


def test_what_a_text_begins_behind():
    lm = random_lm(CAUSAL[0], "causal")
    lm.generation_config.temperature = 0.5  # without sampling: it could not be saved
    begin_with(lm, 2, eos=2, pad=None)
    for config in (lm.config, lm.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (2, 2)
    assert lm.generation_config.pad_token_id == 2
    lm.config.eos_token_id = [7, 2]
    begin_with(lm, 2, eos=2, pad=1)
    assert (lm.config.eos_token_id, lm.generation_config.eos_token_id) == ([7, 2], [7, 2])
    assert lm.generate(max_new_tokens=1, do_sample=False)[0, 0] == 2


def test_weights_are_as_readable_as_the_rest(tmp_path):
    before = os.umask(0o027)
    try:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").touch(mode=0o600)
    finally:
        os.umask(before)
    write_beside(tmp_path, {}, "a card", None)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}
