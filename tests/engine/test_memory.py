"""Freed memory is reused without new pages, and can still be given back."""

import json
import platform
import subprocess
import sys

import pytest

from ki_ds.engine import memory
from tests.tiny import ROOT, environment

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")

MEASURE = """
import json, resource
import psutil, torch
from ki_ds.engine.memory import give_freed_memory_back, keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return psutil.Process().memory_info().rss

torch.set_num_threads(1)
before = new_pages()
kept = keep_freed_memory()
for _ in range(5):
    new_pages()  # until the C library has found its places
after, held = new_pages(), resident()
give_freed_memory_back()
print(json.dumps({"before": before, "kept": kept, "after": after, "given_back": held - resident()}))
"""


@glibc
def test_a_freed_tensor_costs_the_next_one_no_pages():
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["kept"]
    assert found["before"] > 4 * 9_000  # 40 MB in pages of 4 KiB
    assert found["after"] < 0.3 * found["before"]
    assert found["given_back"] > 35e6


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert memory.keep_freed_memory() is False
    memory.give_freed_memory_back()
