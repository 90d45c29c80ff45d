import copy
import random

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from ki_ds.config import LossConfig
from ki_ds.data.batches import Sample, collate
from ki_ds.errors import UserError
from ki_ds.models import probe
from ki_ds.models.presets import InheritanceModel, RowLM, Rows
from tests.lms import GQA, TINY, spread_out

CLASSES = 100
MOE = GQA | {"vocab_size": CLASSES, "head_dim": 16, "output_router_logits": True, "router_aux_loss_coef": 0.5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BART = {
    **{"vocab_size": CLASSES, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
}
SPECIAL_IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
ESM = hf.EsmConfig(
    **TINY | SPECIAL_IDS | {"vocab_size": CLASSES, "mask_token_id": 4},
    position_embedding_type="rotary",
    token_dropout=True,
    emb_layer_norm_before=False,
)
MOBILEBERT = hf.MobileBertConfig(
    pad_token_id=1,
    **TINY | {"vocab_size": CLASSES, "embedding_size": 16, "intra_bottleneck_size": 32, "num_feedforward_networks": 1},
)
FORMS = {
    "cap": ("causal", hf.Gemma2Config(vocab_size=CLASSES, head_dim=16, final_logit_softcapping=3.0, **GQA)),
    "scale": ("causal", hf.GraniteConfig(vocab_size=CLASSES, logits_scaling=6.0, **GQA)),
    "factor": ("causal", hf.CohereConfig(vocab_size=CLASSES, logit_scale=0.3, **GQA)),
    "multiplier": (
        "causal",
        hf.FalconH1Config(
            vocab_size=CLASSES, lm_head_multiplier=0.2, mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, **GQA
        ),
    ),
    "bias": ("mlm", ESM),
    "buffer": ("mlm", hf.MBartConfig(**BART)),
    "two_weights": ("mlm", MOBILEBERT),
}


def lm_of(task, config, seed=0):
    torch.manual_seed(seed)
    kind = hf.AutoModelForMaskedLM if task == "mlm" else hf.AutoModelForCausalLM
    lm = spread_out(kind.from_config(config), seed)
    for name, tensor in lm.named_buffers():
        if name.endswith("final_logits_bias"):
            tensor.normal_()
    embedding = lm.get_input_embeddings()
    if embedding.padding_idx is not None:
        with torch.no_grad():
            embedding.weight[embedding.padding_idx] = 0.0
    lm.config.use_cache = False
    return lm


def samples(task, lengths=(16, 9), seed=0):
    draw = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        ids = draw.integers(5, CLASSES, length)
        positions = np.arange(length - 1) if task == "causal" else np.array([1, 4, 7])
        labels = ids[1:].copy() if task == "causal" else ids[positions]
        if task == "mlm":
            ids[positions[:2]] = 4
        made.append(Sample(number, ids, positions, labels))
    return made


def batch_of(task, **changes):
    return collate(samples(task, **changes), pad_id=1, seq_len=32)


def own_logits(lm, task):
    """Hugging Face's logits of each row alone, at the labelled positions."""
    given = samples(task)
    alone = [lm(input_ids=torch.from_numpy(row.input_ids_T)[None]).logits[0, row.positions_N] for row in given]
    return torch.cat(alone).double()


@pytest.mark.parametrize("name", FORMS)
def test_what_a_model_does_to_its_logits_is_in_the_loss_of_student_and_teacher(name):
    task, config = FORMS[name]
    student, teacher = lm_of(task, config), RowLM(lm_of(task, config, seed=1).requires_grad_(False))
    reference, batch = copy.deepcopy(student), batch_of(task)
    z_t = own_logits(teacher.lm, task)
    teacher.check(Rows(task))
    signal = teacher.signal(batch)
    z_s = own_logits(reference, task)
    q, log_p = (z_t / 2).softmax(-1), (z_s / 2).log_softmax(-1)
    ce = nn.functional.cross_entropy(z_s, batch.row_labels_N, reduction="sum")
    (0.4 * ce + 0.6 * 4 * (q * (q.log() - log_p)).sum()).backward()
    model = InheritanceModel(student, num_classes=CLASSES, loss=LossConfig(chunk_rows=4), tau=2.0)
    model.eval().check(Rows(task))
    (loss_sum, ce_sum, *_), _ = model(batch, signal, 0.6)
    loss_sum.backward()
    assert float(ce_sum) == pytest.approx(float(ce), rel=1e-5)
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in student.named_parameters():
        if wanted[name] is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_form_is_measured_and_no_name_is_read():
    lm = lm_of(*FORMS["cap"])
    lm.forward = changed(lm.forward, lambda logits: 5.0 * torch.tanh((0.5 * logits) / 5.0))
    lm.config.final_logit_softcapping = None
    model = RowLM(lm)
    model.check()
    assert model.form == pytest.approx((0.5, 5.0))


def changed(forward, change):
    def changed_forward(*args, **kwargs):
        out = forward(*args, **kwargs)
        out["logits"] = change(out["logits"])
        return out

    return changed_forward


@pytest.mark.parametrize(
    "change",
    [lambda z: z * z, lambda z: z - z.mean(-1, keepdim=True), lambda z: z.sigmoid(), lambda z: z.log_softmax(-1)],
    ids=["square", "centred", "sigmoid", "log_softmax"],
)
def test_any_other_change_of_logits_is_refused(change):
    lm = lm_of("causal", hf.LlamaConfig(vocab_size=CLASSES, **GQA))
    lm.forward = changed(lm.forward, change)
    with pytest.raises(UserError, match=r"^LlamaForCausalLM .*; take another"):
        RowLM(lm).check()


def test_a_scale_that_is_trained_is_refused():
    lm = lm_of("causal", hf.LlamaConfig(vocab_size=CLASSES, **GQA))
    lm.temperature = nn.Parameter(torch.ones(()))
    lm.forward = changed(lm.forward, lambda logits: logits * lm.temperature)
    with pytest.raises(UserError, match="temperature change them"):
        RowLM(lm).check()


def test_errors_of_a_models_own_forward_are_one_line():
    lm = lm_of("mlm", hf.XmodConfig(vocab_size=CLASSES, **TINY, languages=["en_XX"]))
    with pytest.raises(UserError, match=r"its forward fails \(ValueError: Input language unknown") as caught:
        RowLM(lm).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        hf.BertConfig(vocab_size=CLASSES, **TINY),
        hf.XLNetConfig(vocab_size=CLASSES, d_model=32, n_layer=2, n_head=2, d_inner=64),
        hf.XLMConfig(vocab_size=CLASSES, emb_dim=32, n_layers=2, n_heads=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_causal_model_that_sees_later_tokens_is_refused(config):
    lm = lm_of("causal", config)
    RowLM(lm).check(Rows(padded=False))
    with pytest.raises(UserError, match="sees the tokens that it is to predict"):
        RowLM(lm).check(Rows("causal"))


PADDING = {
    "fnet": hf.FNetConfig(vocab_size=CLASSES, pad_token_id=1, **TINY),
    "convbert": hf.ConvBertConfig(vocab_size=CLASSES, embedding_size=32, pad_token_id=1, **TINY),
    "nystromformer": hf.NystromformerConfig(
        vocab_size=CLASSES, num_landmarks=8, segment_means_seq_len=8, pad_token_id=1, **TINY
    ),
}


@pytest.mark.parametrize("name", PADDING)
def test_a_model_that_sees_padding_is_refused_where_rows_are_padded(name):
    lm = lm_of("mlm", PADDING[name])
    RowLM(lm).check(Rows("mlm", padded=False))
    for use in (RowLM(lm), InheritanceModel(lm, num_classes=CLASSES, loss=LossConfig(), tau=1.0)):
        with pytest.raises(UserError, match=r"sees padding: .* or data whose rows all have data\.seq_len tokens"):
            use.check(Rows("mlm"))


def test_an_embedding_of_padding_that_training_would_move_is_refused_in_training_alone():
    model = InheritanceModel(lm_of("mlm", MOBILEBERT), num_classes=CLASSES, loss=LossConfig(), tau=1.0)
    model.check(Rows("mlm"))  # 0 as it is
    with pytest.raises(UserError, match="sees padding"):
        model.check_training(Rows("mlm"))
    assert model.check_training(Rows("mlm", padded=False)) == []
    with pytest.raises(UserError, match="sees padding"):
        model.check(Rows("mlm", pad_id=5))  # the run pads with another token than the model's


class Restless(nn.Module):
    """Counts in a buffer and in attributes, draws numbers from everywhere and changes the configuration."""

    def __init__(self, config):
        super().__init__()
        self.config, self.calls, self.seen = config, 0, []
        self.register_buffer("mean", torch.zeros(1))
        self.norm = nn.BatchNorm1d(32)

    def forward(self, hidden):
        self.mean += 1.0
        self.calls += 1
        self.seen.append(self.calls)
        self.config.touched = True
        torch.rand(1), np.random.rand(), random.random()
        self.extra = nn.Linear(1, 1)
        if self.training:
            self.norm(hidden.reshape(-1, 32))
        return hidden


def test_looking_leaves_a_model_as_it_was():
    config = hf.RobertaConfig(vocab_size=CLASSES, pad_token_id=1, **TINY)
    lm = lm_of("mlm", config)
    lm.roberta.encoder.layer[0].output.dropout = restless = Restless(lm.config)
    lm.train()
    lm.roberta.encoder.layer[1].eval()
    lm.roberta.embeddings.requires_grad_(False)
    model = InheritanceModel(lm, num_classes=CLASSES, loss=LossConfig(), tau=1.0)

    def state():
        torch.manual_seed(7), np.random.seed(7), random.seed(7)
        model.check(Rows("mlm"))
        model.check_training(Rows("mlm"))
        drawn = float(torch.rand(1)), np.random.rand(), random.random()
        tensors = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
        modes = [module.training for module in lm.modules()]
        flags = [p.requires_grad for p in lm.parameters()]
        return drawn, tensors, modes, flags, lm.config.to_dict(), (restless.calls, list(restless.seen))

    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    drawn = float(torch.rand(1)), np.random.rand(), random.random()
    modes = [module.training for module in lm.modules()]
    flags = [p.requires_grad for p in lm.parameters()]
    tensors = copy.deepcopy(lm.state_dict())
    found = state()
    assert found[0] == drawn
    assert found[1].keys() == tensors.keys()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in tensors.items())
    assert found[2:] == (modes, flags, copy.deepcopy(lm.config).to_dict(), (0, []))
    assert not hasattr(lm.config, "touched")


def test_a_model_that_rebuilds_itself_for_short_rows_stays_what_it_is():
    config = hf.BigBirdConfig(vocab_size=CLASSES, block_size=4, num_random_blocks=1, pad_token_id=1, **TINY)
    lm = lm_of("mlm", config)
    RowLM(lm).check(Rows("mlm"))
    assert lm.bert.attention_type == "block_sparse"


def mixtral(**changes):
    return hf.MixtralConfig(**MOE | {"num_local_experts": 4, "num_experts_per_tok": 1} | changes)


BALANCED = {
    "mixtral": mixtral(),
    "qwen2_moe": hf.Qwen2MoeConfig(**MOE | EXPERTS, shared_expert_intermediate_size=32),
    "olmoe": hf.OlmoeConfig(**MOE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": hf.GptOssConfig(**MOE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": hf.GraniteMoeConfig(**MOE | {"num_local_experts": 4, "logits_scaling": 4.0}),
    "jetmoe": hf.JetMoeConfig(
        **{
            "vocab_size": CLASSES,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 16,
        },
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "aux_loss_coef": 0.5},
    ),
}


@pytest.mark.parametrize("name", BALANCED)
def test_what_a_model_adds_to_its_loss_is_added_with_its_own_coefficient(name):
    lm = lm_of("causal", BALANCED[name])
    reference, batch = copy.deepcopy(lm), batch_of("causal")
    model = InheritanceModel(lm, num_classes=CLASSES, loss=LossConfig(), tau=1.0)
    model.check(Rows("causal"))
    assert model.check_training(Rows("causal")) == []
    given = {"input_ids": batch.input_ids_BL, "attention_mask": batch.attention_mask_BL}
    theirs = reference.train()(**given, labels=torch.where(batch.attention_mask_BL == 1, batch.input_ids_BL, -100))
    theirs.loss.backward()
    (loss_sum, ce_sum, _, num_rows, *_), aux_loss = model.train()(batch)
    (loss_sum / num_rows + aux_loss).backward()
    assert float(aux_loss) > 0.1
    assert float(ce_sum / num_rows + aux_loss) == pytest.approx(float(theirs.loss), rel=1e-5)
    for (name, found), wanted in zip(lm.named_parameters(), reference.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert model.eval()(batch)[1] is None  # what is measured is cross-entropy alone


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (mixtral(router_aux_loss_coef=0.0), []),
        (mixtral(output_router_logits=False), ["only with output_router_logits=true"]),
        (hf.LlamaConfig(vocab_size=CLASSES, **GQA), []),
        (ESM, []),
    ],
    ids=["coefficient_0", "not_asked_for", "dense", "masked"],
)
def test_a_model_that_adds_nothing(config, words):
    task = "mlm" if config is ESM else "causal"
    model = InheritanceModel(lm_of(task, config), num_classes=CLASSES, loss=LossConfig(), tau=1.0)
    notes = model.check_training(Rows(task))
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
    assert model.train()(batch_of(task))[1] is None


def test_a_loss_that_needs_all_logits_is_refused():
    lm = lm_of("causal", hf.LlamaConfig(vocab_size=CLASSES, **GQA))
    forward = lm.forward

    def with_z_loss(*args, labels=None, **kwargs):
        out = forward(*args, labels=labels, **kwargs)
        if labels is not None:
            out["loss"] = out["loss"] + 0.1 * out["logits"].logsumexp(-1).pow(2).mean()
        return out

    lm.forward = with_z_loss
    with pytest.raises(UserError, match="LlamaForCausalLM has a loss of its own"):
        InheritanceModel(lm, num_classes=CLASSES, loss=LossConfig(), tau=1.0).check_training(Rows("causal"))


def test_a_forward_that_fails_with_labels_is_said():
    lm = lm_of("causal", hf.LlamaConfig(vocab_size=CLASSES, **GQA))
    lm.loss_function = lambda *_, **__: 1 / 0
    model = InheritanceModel(lm, num_classes=CLASSES, loss=LossConfig(), tau=1.0)
    (note,) = model.check_training(Rows("causal"))
    assert note.startswith("LlamaForCausalLM fails when it is given labels; what it may add")


def test_half_precision_is_no_reason_to_refuse():
    lm = lm_of(*FORMS["scale"]).bfloat16()
    model = RowLM(lm)
    model.check(Rows("causal"))
    assert model.form.scale == pytest.approx(1 / 6, rel=1e-4)
    assert model.form.cap is None


def test_a_form_of_given_products():
    form = probe.LogitForm(2.0, 3.0)
    found = probe.shaped(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, 0.5]), form)
    torch.testing.assert_close(found, 3 * torch.tanh(torch.tensor([[1.0, 0.5 / 3]])))
