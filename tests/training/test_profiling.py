"""Parts of a step are told apart, with what lies within them, and a run writes its profile when asked."""

import json
import time
from types import SimpleNamespace

import torch

from ki_ds.training import profiling
from ki_ds.training.profiling import PARTS, each, part, profiler, seconds_by_part
from tests.tiny import inherit, run, tiny_corpus


def test_time_goes_to_the_innermost_part():
    def numbers():
        for number in range(3):
            time.sleep(0.02)
            yield number

    started = time.perf_counter()
    with profiler() as profile:
        assert list(each("data", numbers())) == [0, 1, 2]
        with part("student forward"):
            time.sleep(0.03)
            with part("loss"):
                time.sleep(0.05)
        with part("optimizer"), torch.profiler.record_function("gloo:all_reduce"):
            time.sleep(0.04)
    time.sleep(0.03)
    found = seconds_by_part(profile, time.perf_counter() - started)
    expected = {"data": 0.06, "student forward": 0.03, "loss": 0.05, "communication": 0.04}
    assert list(found) == [*PARTS, "other"]
    for name in PARTS:
        assert expected.get(name, 0.0) <= found[name] < expected.get(name, 0.0) + 0.2, name  # a busy machine oversleeps
    assert found["other"] >= 0.03


def test_every_moment_counts_once():
    spans = [(0, 10, "student forward"), (4, 9, "loss"), (5, 6, "communication"), (12, 15, "backward")]
    assert profiling._of_spans(spans) == {"student forward": 5, "loss": 4, "communication": 1, "backward": 3}
    assert profiling._of_spans([(0, 3, "loss"), (0, 8, "student forward")]) == {"loss": 3, "student forward": 5}


def test_kernels_belong_to_the_part_that_launched_them(monkeypatch):
    """As a GPU reports them: autograd launches from a thread of its own, long before the kernel runs."""

    def event(name, start, end, device_time=0.0):
        times = SimpleNamespace(start=start, end=end)
        cpu = torch.autograd.DeviceType.CPU
        return SimpleNamespace(name=name, time_range=times, self_device_time_total=device_time, device_type=cpu)

    events = [
        event("ki_ds.student forward", 0, 100),
        event("ki_ds.loss", 50, 90),
        event("ki_ds.backward", 100, 200),
        event("aten::mm", 10, 12, 3e6),
        event("aten::mm", 60, 61, 2e6),
        event("aten::mm", 150, 151, 4e6),
        event("nccl:all_reduce", 160, 170, 1e6),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = seconds_by_part(SimpleNamespace(events=lambda: events), 12.0)
    assert {name: seconds for name, seconds in found.items() if seconds} == {
        "student forward": 3.0,
        "loss": 2.0,
        "backward": 4.0,
        "communication": 1.0,
        "other": 2.0,
    }


def test_a_run_writes_its_profile(tmp_path):
    tiny_corpus(tmp_path / "corpus")
    run(tmp_path / "mlm_teacher", tmp_path / "corpus")
    folder = inherit(tmp_path, "student", monitor={"progress": "none", "profile_steps": 2})
    trace = json.loads((folder / "profile" / "trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("ki_ds.teacher") == 2 * 4  # micro-batches of two steps
    lines = (folder / "profile" / "shares.md").read_text().splitlines()[2:]
    shares = {line.split(" | ")[0].removeprefix("| "): float(line.split(" | ")[1]) for line in lines}
    assert list(shares) == [*PARTS, "other"]
    for name in ("data", "teacher", "student forward", "loss", "backward", "optimizer"):
        assert shares[name] > 0, name
    assert not (tmp_path / "mlm_teacher" / "profile").exists()


def test_the_table_adds_up():
    table = profiling.shares_table({"data": 1.0, "loss": 3.0})
    assert table.splitlines()[2:] == ["| data | 1.000 | 25.0% |", "| loss | 3.000 | 75.0% |"]
