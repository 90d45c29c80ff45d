"""A teacher on ranks of its own gives the same run as one in the process, and never leaves in silence."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ki_ds import config as configuration
from ki_ds.config import TeacherConfig
from ki_ds.data.batches import Sample, collate
from ki_ds.errors import EXIT_RESUMABLE, UserError
from ki_ds.objective.types import Head, LogitForm
from ki_ds.ranks.world import free_port
from ki_ds.teachers.ranks import RanksTeacher, _head
from ki_ds.teachers.teacher import Assignment
from tests import forked
from tests.tiny import ROOT, environment, records, tiny_config, train_ranks, write_config

STEPS = {"num_steps": 20, "eval_every": 20, "save_every": 20}


@pytest.fixture(scope="module")
def configure(base):
    """Writes the configuration of a student of the base's teacher; its file and run folder."""

    def write(name, *, task="mlm", teacher=None, train=None, **groups):
        teacher = {"path": str(base / f"{task}_teacher"), **(teacher or {})}
        groups.setdefault("inherit", {"schedule": "linear", "steps": 16})
        config = tiny_config(
            base / name, base / "corpus", task=task, teacher=teacher, train=STEPS | (train or {}), **groups
        )
        return write_config(base / f"{name}.yaml", config), base / name

    return write


def succeeded(results):
    assert [r.returncode for r in results] == [0] * len(results), [r.stderr[-500:] for r in results]


def weights(run_dir):
    newest = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    return hashlib.sha256((newest / "hf/model.safetensors").read_bytes()).hexdigest()


def figures(run_dir):
    return [(r["step"], r["loss"], r["ce"], r["kl"]) for r in records(run_dir, "train")]


@pytest.mark.parametrize(
    ("task", "zero", "students", "teachers"),
    [
        ("causal", "zero3", 2, 1),
        pytest.param("mlm", "zero1", 1, 1, marks=pytest.mark.slow),
        pytest.param("mlm", "zero2", 2, 2, marks=pytest.mark.slow),
        pytest.param("mlm", "zero0", 1, 3, marks=pytest.mark.slow),
    ],
)
def test_it_is_bitwise_the_run_of_a_teacher_in_the_process(configure, task, zero, students, teachers):
    engine = {"ds_config": str(ROOT / f"ds_configs/{zero}.json"), "num_threads": 1}
    name = f"ranks_{task}_{zero}_{students}_{teachers}"
    alone, online = configure(f"{name}_online", task=task, engine=engine)
    succeeded(train_ranks(alone, world=students))
    apart, ranks = configure(name, task=task, engine=engine, teacher={"placement": "ranks", "num_ranks": teachers})
    succeeded(train_ranks(apart, world=students + teachers))
    assert figures(ranks) == figures(online)
    assert weights(ranks) == weights(online)
    taught = records(ranks, "train")[:16]
    assert all(r["teacher_busy_seconds"] > 0 and r["teacher_idle_seconds"] > 0 for r in taught)
    assert taught[-1]["teacher_wait_seconds"] >= 0
    assert records(ranks, "train")[-1]["teacher_flops"] == records(online, "train")[-1]["teacher_flops"]


class _Wire:
    """A bridge of which only what a student receives is there."""

    teacher = 1

    def __init__(self, sent):
        self._sent = iter(sent)

    def receive(self, _source):
        return next(self._sent)


@pytest.mark.parametrize("form", [LogitForm(), LogitForm(0.1), LogitForm(1 / 3, 30.0)])
def test_a_student_gets_the_form_of_the_teachers_logits_with_the_head(form):
    sample = Sample(0, np.arange(9), np.arange(3), np.arange(3))
    batch = collate([sample], pad_id=1, seq_len=32)
    sent = Head(torch.randn(3, 2), torch.randn(5, 2), None, form)
    messages = [
        [torch.tensor([number, batch.num_tokens, 0, 0]), sent.hidden_ND, *(_head(sent) if number == 0 else ())]
        for number in range(2)
    ]
    settings = TeacherConfig(ahead=1, patience=0.0)
    teacher = RanksTeacher(settings, _Wire(messages), Assignment(None, (1.0,)), torch.device("cpu"), num_batches=2)
    for _ in messages:
        found = teacher.signal(batch)
        assert found.form == form
        assert torch.equal(found.weight_VD, sent.weight_VD)
        assert found.bias_V is None


def test_a_resume_in_the_middle_goes_on_bitwise_and_with_another_placement(configure):
    ranks = {"placement": "ranks"}
    whole, whole_dir = configure("resume_whole", teacher=ranks)
    succeeded(train_ranks(whole, world=2))
    part, part_dir = configure("resume_part", teacher=ranks, train={"stop_at_step": 7})
    succeeded(train_ranks(part, world=2))
    part, _ = configure("resume_part", teacher=ranks, train={"stop_at_step": 12})
    succeeded(train_ranks(part, world=2))
    part, _ = configure("resume_part")  # to the end with the teacher in the process
    succeeded(train_ranks(part, world=1))
    assert figures(part_dir) == figures(whole_dir)
    assert weights(part_dir) == weights(whole_dir)


@pytest.mark.slow
def test_a_teacher_that_begins_later_is_not_ahead_of_its_time(configure):
    inherit = {"schedule": "linear", "steps": 6, "start_step": 9}
    online, online_dir = configure("later_online", inherit=inherit)
    succeeded(train_ranks(online))
    ranks, ranks_dir = configure("later_ranks", inherit=inherit, teacher={"placement": "ranks"})
    succeeded(train_ranks(ranks, world=2))
    assert figures(ranks_dir) == figures(online_dir)
    assert [r["kl"] > 0 for r in records(ranks_dir, "train")] == [False] * 9 + [True] * 6 + [False] * 5


def start(config, world):
    """The processes of a job, not waited for."""
    ranks = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    command = [sys.executable, "launchers/train_ki.sh", "--config", str(config)]
    return [
        forked.Popen(
            command,
            env=environment(**ranks, RANK=str(rank), LOCAL_RANK=str(rank)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def wait_for_step(run_dir, step, processes):
    until = time.monotonic() + 120
    while not ((run_dir / "metrics.jsonl").exists() and any(r["step"] >= step for r in records(run_dir, "train"))):
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.05)


@pytest.mark.parametrize("fault", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_teacher_that_dies_or_hangs_ends_the_run_by_name(configure, fault):
    teacher = {"placement": "ranks", "patience": 3.0}
    train = {"num_steps": 5000, "eval_every": 5000, "save_every": 10}
    name = f"fault_{fault.name}"
    config, run_dir = configure(name, teacher=teacher, train=train, inherit={"schedule": "constant"})
    student, victim = processes = start(config, 2)
    try:
        wait_for_step(run_dir, 12, processes)
        os.kill(victim.pid, fault)
        _, errors = student.communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert student.returncode == EXIT_RESUMABLE
    last = errors.strip().splitlines()[-1]
    what = "is gone" if fault == signal.SIGKILL else "has sent nothing for"
    assert last.startswith("error: teacher rank 1 (")
    assert f"pid {victim.pid}) {what}" in last
    assert "Traceback" not in errors
    assert all(r["kl"] > 0 for r in records(run_dir, "train"))  # it never learned alone


@pytest.mark.slow
def test_a_teacher_whose_student_is_gone_ends_too(configure):
    train = {"num_steps": 5000, "eval_every": 5000, "save_every": 5000}
    config, run_dir = configure(
        "left_alone", teacher={"placement": "ranks"}, train=train, inherit={"schedule": "constant"}
    )
    student, teacher = processes = start(config, 2)
    try:
        wait_for_step(run_dir, 3, processes)
        student.kill()
        _, errors = teacher.communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert teacher.returncode == EXIT_RESUMABLE
    assert "Traceback" not in errors


def test_what_a_teacher_rank_cannot_use_is_said_once(configure, base):
    config, _ = configure("bad_teacher", teacher={"placement": "ranks", "path": str(base / "nothing")})
    results = train_ranks(config, world=2)
    assert [r.returncode for r in results] == [2, 2]
    lines = [line for r in results for line in r.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "teacher.path" in lines[0]


def test_a_teacher_whose_student_is_refused_ends_too(configure):
    """Before the student has said where to begin; nobody but the teacher itself can end it here."""
    config, run_dir = configure("refused", teacher={"placement": "ranks"})
    run_dir.mkdir()
    (run_dir / "stranger").touch()
    student, teacher = train_ranks(config, world=2)
    assert (student.returncode, teacher.returncode) == (2, EXIT_RESUMABLE)
    assert "holds stranger but no run" in student.stderr
    assert "Traceback" not in teacher.stderr


def test_options_without_meaning(configure):
    config, _ = configure("no_meaning", teacher={"num_ranks": 2})
    with pytest.raises(UserError, match=r"teacher\.num_ranks=2 has no meaning with teacher\.placement=online"):
        configuration.load(config)


@pytest.mark.slow
def test_over_a_hostfile_the_teacher_takes_the_last_slots(configure, tmp_path):
    """Two launchers as on two hosts, without ssh: the student on the first one's slot, the teacher on the second's."""
    path, ranks = configure("hostfile_ranks", teacher={"placement": "ranks"}, train={"num_steps": 6})
    _, online = configure("hostfile_online", train={"num_steps": 6})
    hosts = tmp_path / "hostfile"
    hosts.write_text("student-host slots=1\nteacher-host slots=1\n")
    port = free_port()
    launchers = [
        subprocess.Popen(
            [
                *("deepspeed", "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node)),
                *("--master_addr", "127.0.0.1", "--master_port", port, "launchers/train_ki.sh", "--config", str(path)),
            ],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said[0][-1000:] + said[1][-1000:]
    succeeded(train_ranks(online.with_suffix(".yaml")))
    assert weights(ranks) == weights(online)
    assert figures(ranks) == figures(online)
