import copy
import hashlib
import json
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

from ki_ds.config import LossConfig
from ki_ds.data.batches import Sample, collate
from ki_ds.models.presets import InheritanceModel
from ki_ds.teachers.online import OnlineTeacher
from tests.tiny import ROOT, environment

CPU = torch.device("cpu")
VOCAB = 101


def tiny_lm(task, *, hidden=32, seed=0):
    """A model with dropout, which a teacher must not use."""
    torch.manual_seed(seed)
    if task == "causal":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=40, n_embd=hidden, n_layer=2, n_head=2))
    config = RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=42,
    )
    return RobertaForMaskedLM(config)


def batch_of(lengths=(16, 11, 5), seed=0):
    """A padded batch with some labelled rows in each sample."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(4, VOCAB, (length,), generator=draw).numpy()
        positions = torch.randperm(length, generator=draw)[:3].sort().values.numpy()
        samples.append(Sample(number, ids, positions, ids[positions]))
    return collate(samples, pad_id=1, seq_len=40)


def weights_hash(lm):
    digest = hashlib.sha256()
    for name, tensor in sorted(lm.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_a_signal_is_the_models_own_logits_of_the_labelled_rows(task):
    lm, batch = tiny_lm(task), batch_of()
    untouched = copy.deepcopy(lm).eval()
    teacher = OnlineTeacher(lm, device=CPU)
    with torch.no_grad():
        logits = untouched(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    expected = logits.flatten(0, 1)[batch.rows_N]
    for _ in range(2):  # the same again: no dropout, nothing kept from the call before
        signal = teacher.signal(batch)
        found = torch.nn.functional.linear(signal.hidden_ND, signal.weight_VD, signal.bias_V)
        assert signal.hidden_ND.shape == (batch.num_rows, 32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_without_labels_gives_an_empty_signal():
    batch = collate(
        [Sample(0, batch_of().input_ids_BL[0].numpy(), *[torch.zeros(0).long().numpy()] * 2)], pad_id=1, seq_len=40
    )
    assert OnlineTeacher(tiny_lm("mlm"), device=CPU).signal(batch).hidden_ND.shape == (0, 32)


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_a_teacher_is_frozen_and_in_eval_mode(task):
    lm = tiny_lm(task).train()
    signal = OnlineTeacher(lm, device=CPU).signal(batch_of())
    assert not any(module.training for module in lm.modules())
    assert not any(p.requires_grad for p in lm.parameters())
    assert not any(t.requires_grad for t in (signal.hidden_ND, signal.weight_VD))


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_a_student_learns_and_its_teacher_stays_as_it_was(task):
    lm = tiny_lm(task)
    before = weights_hash(lm)
    teacher = OnlineTeacher(lm, device=CPU)
    student = InheritanceModel(tiny_lm(task, hidden=48, seed=1), num_classes=VOCAB, loss=LossConfig(), tau=2.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        batch = batch_of()
        (loss_sum, _, kl_sum, *_), _ = student(batch, teacher.signal(batch), 1.0)
        optimizer.zero_grad()
        loss_sum.backward()
        optimizer.step()
        losses.append(float(kl_sum))
    assert losses[-1] < losses[0]
    assert weights_hash(lm) == before
    assert all(p.grad is None for p in lm.parameters())
    assert not {id(p) for p in student.parameters()} & {id(p) for p in lm.parameters()}


def test_a_freed_teacher_holds_nothing_even_if_others_hold_the_module():
    lm = tiny_lm("mlm")
    storages = [weakref.ref(p.untyped_storage()) for p in lm.parameters()]
    teacher = OnlineTeacher(lm, device=CPU)
    teacher.signal(batch_of())
    teacher.free()
    assert all(tensor.data.numel() == 0 for tensor in (*lm.parameters(), *lm.buffers()))
    assert all(reference() is None for reference in storages)


def test_a_freed_teacher_that_is_asked_is_a_defect_of_ours():
    teacher = OnlineTeacher(tiny_lm("causal"), device=CPU)
    teacher.free()
    with pytest.raises(AssertionError, match="freed"):
        teacher.signal(batch_of())
    with pytest.raises(AssertionError):
        teacher.free()


MEASURE = """
import gc, json, sys, psutil, torch
from ki_ds.config import TeacherConfig
from ki_ds.data.batches import Sample, collate
from ki_ds.engine.memory import keep_freed_memory
from ki_ds.models.presets import Rows
from ki_ds.teachers.factory import make_teacher

def resident():
    gc.collect()
    return psutil.Process().memory_info().rss

torch.set_num_threads(1)
keep_freed_memory()
limits = {"tokenizer_sha256": "", "num_classes": 8192, "device": torch.device("cpu")}
teacher, facts = make_teacher(TeacherConfig(path=sys.argv[1]), Rows("causal", 8), **limits)
ids = torch.arange(8).numpy()
teacher.signal(collate([Sample(0, ids, ids, ids)], pad_id=0, seq_len=8))
before = resident()
teacher.free()
print(json.dumps({"weights": 4 * facts.num_parameters, "given_back": before - resident()}))
"""


def test_the_memory_of_a_freed_teacher_goes_back_to_the_system(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_positions=8, n_embd=512, n_layer=4, n_head=2)).save_pretrained(
        tmp_path
    )
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], env=environment(), capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found["weights"] > 60e6
    assert found["given_back"] >= 0.8 * found["weights"]
