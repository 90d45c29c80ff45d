import dataclasses

import pytest
import torch
import transformers as hf

from ki_ds.config import LossConfig, ModelConfig
from ki_ds.data.batches import IGNORE_INDEX, Batch
from ki_ds.data.store import SpecialIds
from ki_ds.errors import UserError
from ki_ds.loss import topk_inheritance_loss
from ki_ds.models import (
    InheritanceModel,
    RowLM,
    build_lm,
    count_parameters,
    load_lm,
    max_positions,
    model_folder,
)
from ki_ds.paper import PRESETS
from ki_ds.probe import of_one
from ki_ds.signals import TopKSignal

SPECIAL = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=4)
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GQA = TINY | {"num_key_value_heads": 1}
ARCHITECTURES = [
    hf.RobertaConfig(vocab_size=100, **TINY),
    hf.BertConfig(vocab_size=100, **TINY),
    hf.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
    hf.OPTConfig(
        vocab_size=100, word_embed_proj_dim=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64
    ),
    hf.LlamaConfig(vocab_size=100, **GQA),
]
TABLE_6 = {  # millions of parameters
    **{"roberta_medium": 74, "roberta_base": 125, "roberta_base_plus": 211, "roberta_large": 355},
    **{"gpt_73m": 73, "gpt_124m": 124, "gpt_209m": 209, "gpt_354m": 354, "gpt_773m": 773, "gpt_1b": 1068},
}


def auto(config):
    masked = isinstance(config, hf.RobertaConfig | hf.BertConfig | hf.DistilBertConfig)
    return hf.AutoModelForMaskedLM if masked else hf.AutoModelForCausalLM


def spread_out(lm):
    """Larger weights than at initialisation, so that an error cannot hide."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lm.eval()


def make_batch(num_classes=100, padded=False):
    ids = torch.randint(5, num_classes, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, [1, 5]] = torch.tensor([7, 9])
    labels[1, [0, 3, 8]] = torch.tensor([11, 6, 8])
    mask = None
    if padded:
        ids[1, 10:] = SPECIAL.pad
        mask = (torch.arange(12) < torch.tensor([[12], [10]])).long()
    rows = (labels.reshape(-1) != IGNORE_INDEX).nonzero()[:, 0]
    zeros = torch.zeros(2, dtype=torch.int64)
    return Batch(ids, labels, rows, labels.reshape(-1)[rows], mask, zeros, zeros, 22 if padded else 24)


def tiny_preset(task, **changes):
    name = "roberta_base" if task == "mlm" else "gpt_124m"
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "ffn_size": 64, "num_positions": 16}
    config = ModelConfig(name=name, **(sizes | {"dropout": 0.0, "attention_dropout": 0.0} | changes))
    return build_lm(config, task, num_classes=99, special_ids=SPECIAL, seed=3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_table_6(name):
    task = "causal" if name.startswith("gpt") else "mlm"
    with torch.device("meta"):
        lm = build_lm(ModelConfig(name=name), task, num_classes=50265, special_ids=SPECIAL, seed=1)
    counts = count_parameters(lm)
    if name in TABLE_6:
        assert counts["num_parameters"] == pytest.approx(TABLE_6[name] * 1e6, rel=0.01)
    assert 0.98 < counts["dense_parameters"] / counts["num_parameters"] < 1
    assert max_positions(lm) == 512


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda c: c.model_type)
def test_rows_meet_the_head_as_in_the_models_own_logits(config):
    lm = spread_out(auto(config).from_config(config))
    batch = make_batch()
    with torch.no_grad():
        expected = lm(input_ids=batch.input_ids_BL).logits.reshape(24, -1)[batch.rows_N]
        asked = RowLM(lm).eval()
        asked.check()
        signal = asked.signal(batch)
        again = lm(input_ids=batch.input_ids_BL).logits.reshape(24, -1)[batch.rows_N]
    logits = torch.nn.functional.linear(signal.hidden_ND, signal.weight_VD, signal.bias_V)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, expected)  # unasked, the model is as it was
    assert len(signal.hidden_ND) == 5


def test_head_sees_the_labelled_rows_only():
    asked = RowLM(tiny_preset("mlm").eval())
    seen = []
    asked.lm.lm_head.dense.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].numel() // 32))
    asked.signal(make_batch())
    assert seen == [5]


@pytest.mark.parametrize("task", ["mlm", "causal"])
@pytest.mark.parametrize("padded", [False, True])
def test_inheritance_model_is_equation_2(task, padded):
    student, teacher = (spread_out(tiny_preset(task, hidden_size=size)) for size in (32, 16))
    batch = make_batch(99, padded)
    alpha, tau = 0.7, 2.0
    z_s, z_t = (
        lm(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL)
        .logits.reshape(24, -1)[batch.rows_N][:, :99]
        .double()
        for lm in (student, teacher)
    )
    ce = torch.nn.functional.cross_entropy(z_s, batch.row_labels_N, reduction="sum")
    q, log_p = (z_t / tau).softmax(-1), (z_s / tau).log_softmax(-1)
    kl = (q * (q.log() - log_p)).sum()
    expected = (1 - alpha) * ce + alpha * tau**2 * kl
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    with torch.no_grad():
        signal = RowLM(teacher).signal(batch)
    model = InheritanceModel(student, num_classes=99, loss=LossConfig(chunk_rows=2), tau=tau)
    loss_sum, ce_sum, kl_sum, num_rows, teachers = model(batch, signal, alpha)
    loss_sum.backward()
    for found, wanted in ((loss_sum, expected), (ce_sum, ce), (kl_sum, kl), (num_rows, torch.tensor(5))):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    own = torch.nn.functional.cross_entropy(z_t, batch.row_labels_N, reduction="sum")
    assert teachers[0].tolist() == pytest.approx([float(kl), float(own), 5.0, float(ce)], rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        hf.Gemma2Config(vocab_size=100, head_dim=16, final_logit_softcapping=0.5, **GQA),
        hf.GraniteConfig(vocab_size=100, logits_scaling=8.0, **GQA),
    ],
    ids=lambda c: c.model_type,
)
def test_models_that_change_their_logits_later_are_refused(config):
    lm = spread_out(hf.AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match="changes its logits"):
        RowLM(lm).check()


def test_initial_weights_are_a_function_of_the_seed():
    first, second = tiny_preset("mlm").state_dict(), tiny_preset("mlm").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "task", "words"),
    [
        ({"name": "gpt_73m"}, "mlm", "not a model for task=mlm"),
        ({"num_heads": 7}, "mlm", "not a multiple of model.num_heads=7"),
        ({"init": "pretrained"}, "mlm", "is a preset"),
        ({"name": "no/such_folder"}, "mlm", "model.name=no/such_folder cannot be read"),
        ({"name": "no/such_folder", "num_layers": 3}, "mlm", "model.num_layers can only change a preset"),
    ],
)
def test_bad_models_are_one_line(changes, task, words):
    config = dataclasses.replace(ModelConfig(), **changes)
    with pytest.raises(UserError, match=words):
        build_lm(config, task, num_classes=99, special_ids=SPECIAL, seed=1)


def test_a_folder_is_a_starting_point_or_an_architecture(tmp_path):
    lm = tiny_preset("causal")
    lm.save_pretrained(tmp_path / "hf")
    config = ModelConfig(name=str(tmp_path / "hf"), init="pretrained")
    loaded = build_lm(config, "causal", num_classes=99, special_ids=SPECIAL, seed=9).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in lm.state_dict().items())
    config = dataclasses.replace(config, init="random")
    fresh = build_lm(config, "causal", num_classes=99, special_ids=SPECIAL, seed=9).state_dict()
    assert not torch.equal(lm.state_dict()["transformer.wte.weight"], fresh["transformer.wte.weight"])
    with pytest.raises(UserError, match="128 output classes for the tokenizer's 129 ids"):
        build_lm(config, "causal", num_classes=129, special_ids=SPECIAL, seed=9)


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    hf.GPT2Model(
        hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=1, tie_word_embeddings=False)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lm_head"):
        load_lm(str(tmp_path), "causal", torch.float32, what="teacher.path")


def test_model_folder_finds_the_weights_of_a_run(tmp_path):
    assert model_folder(str(tmp_path)) == str(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="without weights yet"):
        model_folder(str(tmp_path))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    assert model_folder(str(tmp_path)) == str(tmp_path / "best")


class TestPacking:
    """Several blocks of one row: each is computed as if it were alone."""

    @pytest.mark.parametrize(
        "config", [c for c in ARCHITECTURES if c.model_type in ("gpt2", "llama")], ids=lambda c: c.model_type
    )
    def test_blocks_of_a_row_do_not_see_each_other(self, config):
        torch.manual_seed(0)
        model = RowLM(auto(config).from_config(config)).eval()
        model.lm.config.use_cache = False  # as `build_lm` and `load_lm` do
        model.check_packing()
        ids = torch.randint(2, 90, (1, 16))
        positions = torch.cat([torch.arange(5), torch.arange(8), torch.arange(3)])[None]  # the last are padding
        packed = dataclasses.replace(of_one(ids, torch.arange(13)), position_ids_BL=positions)
        alone = [of_one(part, torch.arange(part.shape[1])) for part in (ids[:, :5], ids[:, 5:13])]
        with torch.no_grad():
            found = model.signal(packed).hidden_ND
            expected = torch.cat([model.signal(batch).hidden_ND for batch in alone])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", [hf.BloomConfig, hf.OPTConfig])
    def test_a_model_that_cannot_keep_them_apart_is_refused(self, kind):
        config = next((c for c in ARCHITECTURES if type(c) is kind), None)
        config = config or kind(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
        model = RowLM(hf.AutoModelForCausalLM.from_config(config))
        model.lm.config.use_cache = False
        with pytest.raises(UserError, match=r"cannot keep several blocks of a row apart; take data\.packing=false"):
            model.check_packing()


@pytest.mark.parametrize("semantics", ["renormalise", "tail", "sampled"])
def test_a_top_k_signal_gives_the_top_k_loss(semantics):
    torch.manual_seed(0)
    model = ModelConfig(name="roberta_base", num_layers=1, hidden_size=32, num_heads=2, ffn_size=64)
    lm = build_lm(model, "mlm", num_classes=99, special_ids=SPECIAL, seed=3)
    batch = of_one(torch.randint(5, 99, (1, 24)), torch.tensor([1, 5, 9, 20]))
    student = InheritanceModel(lm, num_classes=99, loss=LossConfig(), tau=2.0).eval()
    ids = torch.stack([torch.randperm(99)[:7] for _ in range(4)])
    probs = torch.rand(4, 7).softmax(-1) * 0.9
    loss, ce, kl, num_rows, _ = student(batch, TopKSignal(ids, probs, semantics), 0.3)
    hidden = student.signal(batch)
    logits = torch.nn.functional.linear(hidden.hidden_ND, hidden.weight_VD, hidden.bias_V)
    expected = topk_inheritance_loss(
        logits, batch.row_labels_N, topk_ids=ids, topk_probs=probs, semantics=semantics, alpha=0.3, num_classes=99
    )
    for found, value in zip((loss, ce, kl), expected, strict=False):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
    assert num_rows == 4
    assert kl > 0
