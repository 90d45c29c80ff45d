"""Which rank is slower than the others, for how long, and by how much.

A rank that waits for a slow one looks as slow as that one. So each times only what it does before it meets the others
in a step: its data and its forward pass, the teacher's included, unless that waits for others too, as a forward pass
does which gathers weights (ZeRO-3) and a teacher on ranks of its own.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from ki_ds.ranks.world import all_sum, rank, world_size

Item = TypeVar("Item")
WINDOW = 12  # steps whose lower quartile is compared: a rank that is slow now and then is not a slow rank
FACTOR = 1.5  # of the other ranks' quartile from which a rank is a straggler,
SHARE = 0.1  # if what it takes longer is that much of a step


class Pace:
    """This rank's seconds a step, and how they compare. On a GPU measured by events: nothing waits before `report`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._steps: deque[list[float | tuple[torch.cuda.Event, torch.cuda.Event]]] = deque(maxlen=WINDOW)
        self._device = device
        self._began: deque[float] = deque(maxlen=WINDOW)
        self._named: int | None = None

    def loading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches; each begins a step, and the wait for it is timed."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._began.append(began)
            self._steps.append([time.perf_counter() - began])
            yield item

    @contextlib.contextmanager
    def computing(self, *, alone: bool) -> Iterator[None]:
        """Time what is done in the context as work of the current step, if it is done `alone`: waiting for no rank."""
        if not alone:
            yield
        elif self._cuda:
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            yield
            ended.record()
            self._steps[-1].append((began, ended))
        else:
            start = time.perf_counter()
            yield
            self._steps[-1].append(time.perf_counter() - start)

    def report(self, step: int) -> str | None:
        """A line when a rank becomes a straggler, or is none any more. Called by all ranks; waits for the device."""
        if world_size() == 1:
            return None
        quartiles = torch.zeros(world_size(), device=self._device)
        if len(self._steps) == WINDOW:
            quartiles[rank()] = lower_quartile(map(_seconds, self._steps))
        quartiles = all_sum(quartiles)
        if len(self._began) < WINDOW:
            return None
        return self.compare(quartiles.tolist(), step, (self._began[-1] - self._began[0]) / (WINDOW - 1))

    def compare(self, quartiles: list[float], step: int, step_seconds: float) -> str | None:
        """As `report`, from the ranks' quartiles and the seconds that a whole step takes."""
        slowest = max(range(len(quartiles)), key=quartiles.__getitem__)
        others = statistics.median(value for number, value in enumerate(quartiles) if number != slowest)
        is_slow = quartiles[slowest] > max(FACTOR * others, others + SHARE * step_seconds)
        before, self._named = self._named, slowest if is_slow else None
        if self._named == before:
            return None
        if self._named is None:
            return f"rank {before} keeps up again at step {step}"
        return (
            f"warning: rank {slowest} is slow: at step {step} its data and forward take {quartiles[slowest] * 1e3:.0f} "
            f"ms, those of the other ranks {others * 1e3:.0f} ms (lower quartiles of {WINDOW} steps); look at its host"
        )


def lower_quartile(values: Iterable[float]) -> float:
    """The value that a quarter of them lies below."""
    ordered = sorted(values)
    return ordered[len(ordered) // 4]


def _seconds(parts: list[float | tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    return sum(part if isinstance(part, float) else part[0].elapsed_time(part[1]) / 1e3 for part in parts)
