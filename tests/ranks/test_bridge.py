"""The bridge: two worlds of one job, tensors and notes across, and what happens when the other side is gone."""

import json
import subprocess
import sys

import pytest
import torch

from ki_ds.errors import UserError
from ki_ds.ranks.bridge import Bridge, split_world
from tests.tiny import ROOT, run_ranks

PROGRAM = """
import os, sys, torch
import torch.distributed as dist
from ki_ds.ranks.bridge import split_world
bridge = split_world(os.environ, int(sys.argv[1]), seconds=60)
if bridge.is_teacher:
    bridge.put(f"students_{bridge.rank}", bridge.students)
    for student in bridge.students:
        bridge.send([torch.arange(6).view(2, 3) + student, torch.zeros(0, 4, dtype=torch.float16)], student)
        bridge.send([torch.full((3,), 0.5, dtype=torch.bfloat16)], student)
    print(dist.is_initialized())
    os._exit(0)
first, second = bridge.receive(bridge.teacher), bridge.receive(bridge.teacher)
total = torch.ones(1)
dist.all_reduce(total)
print(first[0].tolist(), list(first[1].shape), first[1].dtype, second[0].tolist(), second[0].dtype, total.item())
print(os.environ["RANK"], os.environ["WORLD_SIZE"], bridge.get(f"students_{bridge.teacher}", seconds=20))
try:
    bridge.get("nothing", seconds=0.2)
except TimeoutError as error:
    print("timeout", error)
try:
    bridge.receive(bridge.teacher)
except ConnectionError:
    print("gone", flush=True)
dist.barrier()  # rank 0 holds the store
os._exit(0)
"""


@pytest.mark.parametrize(("students", "teachers"), [(1, 1), (3, 2)])
def test_tensors_and_notes_go_across(students, teachers):
    results = run_ranks(["-c", PROGRAM, str(teachers)], world=students + teachers)
    assert [r.returncode for r in results] == [0] * (students + teachers), results[0].stderr[-500:]
    for rank in range(students):
        teacher = students + rank % teachers
        mine = list(range(teacher - students, students, teachers))
        assert results[rank].stdout.splitlines() == [
            f"[[{rank}, {rank + 1}, {rank + 2}], [{rank + 3}, {rank + 4}, {rank + 5}]] [0, 4] torch.float16 "
            f"[0.5, 0.5, 0.5] torch.bfloat16 {students:.1f}",
            f"{rank} {students} {mine}",
            "timeout nothing",
            "gone",
        ]
    for rank in range(students, students + teachers):
        assert results[rank].stdout.splitlines() == ["False"]


@pytest.mark.parametrize(("students", "teachers"), [(1, 1), (5, 2), (2, 5), (3, 3)])
def test_every_student_has_one_teacher(students, teachers):
    bridges = [Bridge(rank, students, teachers, None, None) for rank in range(students + teachers)]
    served = {t: [b.rank for b in bridges[:students] if b.teacher == t] for t in range(students, students + teachers)}
    assert {b.rank: b.students for b in bridges if b.is_teacher} == served
    assert [b.is_teacher for b in bridges] == [False] * students + [True] * teachers


def test_no_rank_is_left_for_the_student_or_the_port_is_taken():
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(UserError, match=r"teacher\.num_ranks=2 of 2 ranks leave none for the student"):
        split_world(env, 2, seconds=5)
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)
    with pytest.raises(UserError, match=rf"MASTER_PORT={store.port} cannot be used"):
        split_world({**env, "MASTER_PORT": str(store.port)}, 1, seconds=5)


def test_it_imports_nothing_heavy():
    """It comes before everything that a rank loads."""
    heavy = "('transformers', 'deepspeed')"
    code = f"import sys, json, ki_ds.ranks.bridge; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout) == []
