"""A wish to stop early: a signal to any one rank stops all of them, saved, at the end of the same step.

SIGTERM, SIGUSR1 and a first Ctrl-C only set a flag. The flags are summed in the reduction that every step begins with
anyway, so the agreement costs no collective of its own; its outcome is read when the step's work has been handed to
the device, which waits for the beginning of that step at most.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from ki_ds.ranks.world import all_sum, world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption:
    """One rank's wish to stop, and what all ranks have agreed on."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._outcome = torch.zeros(1)
        self._copied: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Turn the signals into requests while the context lasts. A second Ctrl-C ends the process as usual."""
        if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.request(signal.Signals(number).name)

    def request(self, reason: str) -> None:
        """Wish to stop at the end of the step; the first reason stays."""
        self.reason = self.reason or reason

    def global_rows(self, num_rows: int, device: torch.device) -> Tensor:
        """Labelled rows of the global batch as a 0-d float32 tensor on the device, at least 1; no host sync.

        The same reduction carries the ranks' wishes. To be called at the beginning of every step.
        """
        sums = torch.empty(2, device=device)
        sums[0], sums[1] = float(num_rows), float(self.reason is not None)
        all_sum(sums)
        if device.type == "cuda":
            if self._copied is None:
                self._outcome, self._copied = torch.zeros(1).pin_memory(), torch.cuda.Event()
            self._outcome.copy_(sums[1:], non_blocking=True)
            self._copied.record()
        else:
            self._outcome = sums[1:]
        return sums[0].clamp(min=1.0)

    def agreed(self) -> bool:
        """Whether a rank wished to stop before the step began; the same on all ranks."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._outcome.item())

    def reasons(self) -> str:
        """Why, e.g. "SIGTERM". Called by all ranks, once they have agreed."""
        found: list[str | None] = [self.reason]
        if world_size() > 1:
            found = [None] * world_size()
            dist.all_gather_object(found, self.reason)
        return ", ".join(dict.fromkeys(reason for reason in found if reason is not None))
