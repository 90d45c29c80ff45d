"""Where a step's time goes: parts with a name, torch's profiler over some steps, a trace and a table of shares.

A part is named where it happens, `with part("teacher"):`; without a profiler that costs a microsecond.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import record_function

PARTS = ("data", "teacher", "student forward", "loss", "backward", "communication", "optimizer")
OTHER = "other"
_PREFIX = "ki_ds."
_COLLECTIVES = ("gloo:", "nccl:")  # as torch names the work of its process groups

Item = TypeVar("Item")


def part(name: str) -> record_function:
    """A context whose time counts as `name` in a profile, less the parts within it."""
    return record_function(_PREFIX + name)


def each(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """The items, the time that each takes to come counted as `name`."""
    iterator = iter(items)
    while True:
        with part(name):
            following = list(itertools.islice(iterator, 1))
        if not following:
            return
        yield following[0]


def profiler(**options: Any) -> torch.profiler.profile:
    """torch's profiler over the CPU and, where there is one, the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, **options)


def seconds_by_part(profile: torch.profiler.profile, seconds: float) -> dict[str, float]:
    """Seconds of each part in a finished profile whose steps took `seconds`, and of what no part had (`other`).

    On a CPU the time in a part, less the parts within it and collectives; collectives count as communication. On a
    GPU that of the kernels that were launched while the part was open, from whatever thread; idle time is `other`.
    """
    events = list(profile.events() or [])
    cpu = torch.autograd.DeviceType.CPU
    spans = [
        (e.time_range.start, e.time_range.end, e.name.removeprefix(_PREFIX))
        for e in events
        if e.name.startswith(_PREFIX) and e.device_type == cpu
    ]
    if torch.cuda.is_available():
        kernels = [(e.time_range.start, e.self_device_time_total, e.name) for e in events if e.self_device_time_total]
        microseconds = _of_kernels(spans, kernels)
    else:
        collectives = [e.time_range for e in events if e.name.startswith(_COLLECTIVES)]
        microseconds = _of_spans(spans + [(times.start, times.end, "communication") for times in collectives])
    by_part = {name: microseconds.get(name, 0.0) / 1e6 for name in PARTS}
    return {**by_part, OTHER: max(seconds - sum(by_part.values()), 0.0)}


Span = tuple[float, float, str]  # begin, end, name


def _of_spans(spans: list[Span]) -> dict[str, float]:
    """Time by name: at every moment that of the span that began last among those still open."""
    times: dict[str, float] = defaultdict(float)
    waiting = sorted(spans, key=lambda span: (-span[0], span[1]))  # of two that begin together, the longer one first
    open_spans: list[Span] = []
    for left, right in itertools.pairwise(sorted({edge for start, end, _ in spans for edge in (start, end)})):
        while waiting and waiting[-1][0] <= left:
            open_spans.append(waiting.pop())
        open_spans = [span for span in open_spans if span[1] > left]
        if open_spans:
            times[open_spans[-1][2]] += right - left
    return times


def _of_kernels(spans: list[Span], kernels: list[Span]) -> dict[str, float]:
    """Device time by name: a kernel (launch, time, name) belongs to the innermost part open when it was launched."""
    times: dict[str, float] = defaultdict(float)
    for moment, time, kernel in kernels:
        around = [span for span in spans if span[0] <= moment < span[1]]
        name = max(around)[2] if around else OTHER
        times["communication" if kernel.startswith(_COLLECTIVES) else name] += time
    return times


def shares_table(seconds: dict[str, float]) -> str:
    """Parts, their seconds and shares of the whole as Markdown."""
    whole = sum(seconds.values())
    lines = ["| part | s | share |", "|---|---|---|"]
    lines += [f"| {name} | {value:.3f} | {value / whole:.1%} |" for name, value in seconds.items()]
    return "\n".join(lines)


@contextlib.contextmanager
def profiled_steps(num_steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """A function to call after each step; of the third to the (2 + num_steps)th, `folder` then holds the profile.

    `trace.json` opens in Perfetto or chrome://tracing, `shares.md` is the table. With 0 steps nothing is measured.
    """
    if not num_steps:
        yield lambda: None
        return

    def write(profile: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        steps = [e for e in profile.events() or [] if e.name.startswith("ProfilerStep")]
        seconds = (max(e.time_range.end for e in steps) - min(e.time_range.start for e in steps)) / 1e6
        profile.export_chrome_trace(str(folder / "trace.json"))
        (folder / "shares.md").write_text(shares_table(seconds_by_part(profile, seconds)) + "\n", encoding="utf-8")

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=num_steps, repeat=1)
    with profiler(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
