"""Workers: in order, bounded, and gone when their caller is."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ki_ds.data import processes
from ki_ds.data.processes import StoppedError, ordered_map

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("threads", [True, False])
def test_order_and_bound(threads):
    taken = []

    def items():
        for i in range(40):
            taken.append(i)
            yield -i

    results = ordered_map(abs, items(), num_workers=2, threads=threads)
    assert next(results) == 0
    assert len(taken) <= 2 * processes.ITEMS_PER_WORKER
    assert list(results) == list(range(1, 40))


def test_one_worker_is_the_caller():
    assert set(ordered_map(lambda _: threading.get_ident(), range(3), num_workers=1)) == {threading.get_ident()}


@pytest.mark.parametrize("threads", [True, False])
def test_errors_come_through(threads):
    with pytest.raises(ZeroDivisionError):
        list(ordered_map((1).__truediv__, [1, 0, 2], num_workers=2, threads=threads))


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(StoppedError, match="a worker process died"):
        list(ordered_map(os._exit, [3], num_workers=2))


def test_a_caller_that_stops_ends_its_workers_at_once():
    results = ordered_map(time.sleep, [0, *[100] * 5], num_workers=2)
    next(results)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 10


def alive(pid):
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(int(pid), 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_the_workers_of_a_killed_caller_end():
    command = """
import time
from ki_ds.data.processes import ordered_map
for _ in ordered_map(time.sleep, [0, *[100] * 5], num_workers=2):
    print("started", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def large(_number):
    return bytes(100_000_000)


def test_workers_that_end_while_they_send_hold_nobody_up():
    """In a process of its own, for a pool that waits for the rest of a result waits for ever, at its exit too."""
    program = "from tests.data.test_processes import large\nfrom ki_ds.data.processes import ordered_map\n"
    program += "if __name__ == '__main__':\n    found = ordered_map(large, range(40), num_workers=2)\n"
    program += "    next(found)\n    found.close()\n    print('closed')\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "closed\n", done.stderr
