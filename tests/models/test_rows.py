import dataclasses

import pytest
import torch
import transformers as hf

from ki_ds.config import LossConfig, ModelConfig
from ki_ds.errors import UserError
from ki_ds.loss import topk_inheritance_loss
from ki_ds.models.presets import InheritanceModel, RowLM, Rows, build_lm
from ki_ds.models.probe import of_one
from ki_ds.objective.types import Sparse
from tests.lms import ARCHITECTURES, SPECIAL, auto, make_batch, spread_out, tiny_preset


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
    out, _ = model(batch, signal, alpha)
    loss_sum, ce_sum, kl_sum, num_rows = out[:4]
    loss_sum.backward()
    for found, wanted in ((loss_sum, expected), (ce_sum, ce), (kl_sum, kl), (num_rows, torch.tensor(5))):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    own = torch.nn.functional.cross_entropy(z_t, batch.row_labels_N, reduction="sum")
    assert out.teachers[0].tolist() == pytest.approx([float(kl), float(own), 5.0, float(ce)], rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


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
    (loss, ce, kl, num_rows, *_), _ = student(batch, Sparse(ids, probs, semantics), 0.3)
    hidden = student.signal(batch)
    logits = torch.nn.functional.linear(hidden.hidden_ND, hidden.weight_VD, hidden.bias_V)
    expected = topk_inheritance_loss(
        logits, batch.row_labels_N, topk_ids=ids, topk_probs=probs, semantics=semantics, alpha=0.3, num_classes=99
    )
    for found, value in zip((loss, ce, kl), expected, strict=False):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
    assert num_rows == 4
    assert kl > 0


def esm(hidden, seed):
    config = hf.EsmConfig(
        **{"vocab_size": 100, "hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 64, "pad_token_id": SPECIAL.pad, "mask_token_id": SPECIAL.mask, "token_dropout": True},
        position_embedding_type="rotary",
    )
    torch.manual_seed(seed)
    return hf.EsmForMaskedLM(config)


def test_a_protein_model_learns_from_a_smaller_one():
    """ESM rescales embeddings by the share of masks in each row, and adds a bias behind its projection."""
    batch = make_batch(padded=True)
    batch.input_ids_BL.view(-1)[batch.rows_N[::2]] = SPECIAL.mask
    teacher, student = RowLM(spread_out(esm(16, 1))), spread_out(esm(32, 2))
    model = InheritanceModel(student, num_classes=100, loss=LossConfig(), tau=2.0)
    teacher.check(Rows("mlm"))
    model.check(Rows("mlm"))
    assert model.check_training(Rows("mlm")) == []
    with torch.no_grad():
        signal = teacher.signal(batch)
        logits = teacher.lm(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    found = torch.nn.functional.linear(signal.hidden_ND, signal.weight_VD, signal.bias_V)
    torch.testing.assert_close(found, logits.flatten(0, 1)[batch.rows_N], rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        (loss_sum, _, kl_sum, *_), _ = model.train()(batch, signal, 1.0)
        optimizer.zero_grad()
        loss_sum.backward()
        optimizer.step()
        losses.append(float(kl_sum))
    assert losses[-1] < 0.5 * losses[0]
    assert model.lm.lm_head.bias.grad.any()
