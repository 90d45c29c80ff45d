"""A teacher that answers ahead says what it would have said when asked."""

import hashlib
import threading

import pytest
import torch

from ki_ds.data.batches import Batch, collate
from ki_ds.errors import UserError
from ki_ds.objective.types import Average, Head, Part, Routed, Sparse
from ki_ds.teachers import online
from ki_ds.teachers.online import OverlappedTeacher
from ki_ds.teachers.teacher import Teacher
from tests.teachers.cache_cases import config_of, data_of
from tests.tiny import inherit, records

CPU = torch.device("cpu")
LONG = {"inherit": {"schedule": "linear", "steps": 16}, "train": {"num_steps": 20, "eval_every": 20, "save_every": 20}}


class Recorder(Teacher):
    """Answers with the number of calls, from the thread that it notes."""

    def __init__(self, error=None):
        self.asked, self.threads, self.freed, self.error = [], [], False, error

    def signal(self, batch: Batch):
        self.asked.append(batch.sample_ids_B.tolist())
        self.threads.append(threading.get_ident())
        if self.error:
            raise self.error
        return Head(torch.full((1, 1), float(len(self.asked))), torch.zeros(1, 1), None)

    def free(self):
        self.freed = True


@pytest.fixture(scope="module")
def batches(base):
    data = data_of(config_of(base)).train
    return [
        collate([data.sample(i, seed=1, epoch=0) for i in ids], pad_id=data.pad_id, seq_len=32)
        for ids in ([0, 1], [2, 3], [4, 5])
    ]


def test_what_was_asked_ahead_is_answered_once_and_in_another_thread(batches):
    inner = Recorder()
    teacher = OverlappedTeacher(inner, CPU)
    teacher.ask(batches[0])
    first = teacher.signal(batches[0].to(CPU))
    teacher.ask(batches[1])
    second = teacher.signal(batches[1].to(CPU))
    assert inner.asked == [b.sample_ids_B.tolist() for b in batches[:2]]
    assert (float(first.hidden_ND), float(second.hidden_ND)) == (1.0, 2.0)
    assert threading.get_ident() not in inner.threads


def test_a_batch_that_nobody_announced_is_answered_as_well(batches):
    inner = Recorder()
    teacher = OverlappedTeacher(inner, CPU)
    teacher.ask(batches[2])
    teacher.signal(batches[0].to(CPU))
    assert inner.asked[-1] == batches[0].sample_ids_B.tolist()


def test_what_goes_wrong_there_is_raised_here(batches):
    teacher = OverlappedTeacher(Recorder(UserError("the record is damaged")), CPU)
    teacher.ask(batches[0])
    with pytest.raises(UserError, match="the record is damaged"):
        teacher.signal(batches[0])


def test_freeing_ends_the_thread_and_frees_the_teacher(batches):
    inner = Recorder()
    teacher = OverlappedTeacher(inner, CPU)
    teacher.ask(batches[0])
    teacher.free()
    assert inner.freed
    with pytest.raises(RuntimeError, match="after shutdown"):
        teacher.ask(batches[1])


def test_every_tensor_of_a_batch_is_known_to_the_students_stream():
    hidden = [Head(torch.zeros(2, 3), torch.zeros(5, 3), None) for _ in range(2)]
    topk = Sparse(torch.zeros(2, 4), torch.ones(2, 4), "tail")
    rows = torch.arange(2)
    found = online._tensors(Routed((Part(0, hidden[0], rows, 9), Part(1, topk, rows, 9)), 2))
    assert [id(t) for t in found] == [id(t) for t in (rows, hidden[0].hidden_ND, rows, topk.ids_NK, topk.probs_NK)]
    averaged = online._tensors(Average(tuple(hidden), (0.5, 0.5)))
    assert [id(t) for t in averaged] == [id(h.hidden_ND) for h in hidden]


def trained(base, name, task, **groups):
    folder = inherit(base, name, task, **(LONG | groups))
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    digest = hashlib.sha256((newest / "hf/model.safetensors").read_bytes()).hexdigest()
    return digest, [(r["step"], r["loss"], r["kl"], r["teacher_flops"]) for r in records(folder, "train")]


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_20_steps_are_bitwise_those_of_the_online_teacher(base, monkeypatch, task):
    expected = trained(base, f"overlap_{task}_online", task)
    announced = []
    ask = OverlappedTeacher.ask
    monkeypatch.setattr(OverlappedTeacher, "ask", lambda self, batch: announced.append(batch) or ask(self, batch))
    teacher = {"path": str(base / f"{task}_teacher"), "placement": "overlap"}
    assert trained(base, f"overlap_{task}", task, teacher=teacher) == expected
    assert len(announced) == 16 * 4  # four micro-batches a step, none beyond the last that is taught


def test_a_run_may_go_on_with_it(base):
    expected = trained(base, "overlap_whole", "mlm")
    stopped = LONG["train"] | {"stop_at_step": 7}
    inherit(base, "overlap_resumed", "mlm", **(LONG | {"train": stopped}))
    teacher = {"path": str(base / "mlm_teacher"), "placement": "overlap"}
    assert trained(base, "overlap_resumed", "mlm", teacher=teacher) == expected
