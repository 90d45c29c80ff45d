"""Bad updates, found before they touch a weight: NaN, Inf, and spikes of the loss or of the gradient.

Judged on the device from the global loss and the global gradient norm, which are the same on every rank. The verdict
goes to the optimizer as a tensor (torch's fused AdamW leaves an update out when `found_inf` is 1), so no step waits for
the host; what was found is read when a line of metrics or a checkpoint is due.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # good updates that a spike is measured against (as OLMo-core's SkipStepOptimizer)
FIRST = 32  # with fewer of them nothing is a spike
LONGEST_ROW = 20  # bad updates in a row after which a run is not worth going on


@dataclass(frozen=True)
class Findings:
    """What a guard has seen so far."""

    num_bad: int = 0
    in_a_row: int = 0
    step: int = 0  # of the last bad update, counted from 1
    loss: float = 0.0
    grad_norm: float = 0.0

    def __str__(self) -> str:
        where = f"at step {self.step}"
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss} {where}"
        if not math.isfinite(self.grad_norm):
            return f"the gradient norm is {self.grad_norm} {where} (loss {self.loss:.4g})"
        return f"a spike {where}: loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"


class Guard:
    """Verdicts on updates, one after another.

    Args:
        spike_sigmas: standard deviations above the mean of the last 128 good updates from which a loss or a gradient
            norm is a spike; 0 finds NaN and Inf only.
        stop: after a bad update every later one is left out too, until somebody reads and stops the run.
    """

    def __init__(self, device: torch.device, *, spike_sigmas: float = 0.0, stop: bool = False) -> None:
        self._sigmas, self._stop = spike_sigmas, stop
        self._history = torch.zeros(2, WINDOW, device=device)  # rows: loss, gradient norm
        self._num_good = torch.zeros((), dtype=torch.int64, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # bad ones, of them in a row
        self._last = torch.zeros(3, dtype=torch.float64, device=device)  # step, loss, gradient norm of a bad one

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1 where update `step` (from 1) must be left out, else 0: a 0-d float32 tensor. No host sync.

        Both arguments are 0-d tensors on the guard's device, the same on all ranks; DeepSpeed's gradient norm of -1
        stands for one that is no number.
        """
        values = torch.stack([loss.float(), torch.where(grad_norm >= 0, grad_norm, math.nan).float()])
        bad = ~values.isfinite().all()
        if self._sigmas:
            bad |= self._is_spike(values)
            place = (self._num_good % WINDOW).view(1)
            kept = torch.where(bad, self._history[:, place], values[:, None])
            self._history.index_copy_(1, place, kept)
            self._num_good += ~bad
        return self._noted(bad, step, values)

    def left_out(self, step: int, loss: Tensor, *, bad: bool) -> None:
        """Note an update that the engine has left out on its own: `bad`, or only to lower the scale of fp16."""
        norm = torch.full_like(loss, math.inf)
        self._noted(~loss.isfinite() | bad, step, torch.stack([loss.float(), norm.float()]))

    def _is_spike(self, values: Tensor) -> Tensor:
        filled = torch.arange(WINDOW, device=values.device) < self._num_good
        num = filled.sum().clamp(min=1)
        mean = (self._history * filled).sum(1) / num
        deviation = (((self._history - mean[:, None]) ** 2 * filled).sum(1) / num).sqrt()
        return (values > mean + self._sigmas * deviation).any() & (self._num_good >= FIRST)

    def _noted(self, bad: Tensor, step: int, values: Tensor) -> Tensor:
        latched = self._counts[0] > 0 if self._stop else torch.zeros_like(bad)
        new = bad & ~latched
        self._counts[0] += new
        self._counts[1] = torch.where(bad, self._counts[1] + 1, 0)
        self._last[1:] = torch.where(new, values.double(), self._last[1:])
        self._last[0] = torch.where(new, float(step), self._last[0])
        return (bad | latched).float()

    def read(self) -> Findings:
        """What was found so far. Waits for the device."""
        num_bad, in_a_row = self._counts.tolist()
        step, loss, grad_norm = self._last.tolist()
        return Findings(num_bad, in_a_row, int(step), loss, grad_norm)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge alike, as JSON."""
        return {
            "num_bad": self.read().num_bad,
            "num_good": int(self._num_good),
            "history": self._history.tolist() if self._sigmas else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Bad updates of before count on, but stop nobody again."""
        if not self._stop:
            self._counts[0] = state["num_bad"]
        if self._sigmas and state["history"] is not None:
            self._num_good.fill_(state["num_good"])
            self._history.copy_(torch.tensor(state["history"]))
