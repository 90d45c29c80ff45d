"""`inherit.schedule: auto`: alpha follows how far the student is behind its teacher, and ends once it has passed it.

The loss tells the teacher's cross-entropy on the very rows that it teaches, so the gap costs no forward of its own.
docs/auto_handover.md has the formula, and what it was measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ki_ds.config import RunConfig, schedules
from ki_ds.ranks.world import all_sum

STEEPNESS = 4.0  # alpha a nat of a small gap: of 1, 2 and 4 the best (docs/auto_handover.md)
DECAY = 0.5 ** (1 / 10)  # of the moving average a step: half of it is the last 10 steps
PATIENCE = 20  # steps in a row in which the student must be ahead
FLOOR = 0.01  # alpha of a student that is level with its teacher, until it is surely ahead


class HandOver:
    """alpha before each update, as a 0-d float32 tensor that no host reads; all ranks have the same.

    G is the student's cross-entropy less the teacher's over the rows that were taught (nats a row), a moving average
    over steps weighted by rows. alpha = 1 - exp(-4 G) = 1 - (teacher's perplexity / student's)^4, held within [0.01, 1]
    and never rising; it is 0 for good once G has been below 0 for 20 steps in a row.

    Args:
        first_step: completed updates before the first that it counts.
        period: JSON that tells this period of teaching from others.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        first_step: int = 0,
        period: dict[str, Any] | None = None,
        state: Sequence[float] = (0.0, 0.0, 1.0, 0.0, 0.0),
    ):
        self.first_step, self._period = first_step, period or {}
        self._pending = torch.zeros(2, dtype=torch.float64, device=device)
        # moving sums of gaps and rows, alpha, steps in a row ahead of the teacher, steps that were taught
        self._state = torch.tensor(state, dtype=torch.float64, device=device)

    @classmethod
    def of_run(
        cls, config: RunConfig, checkpoint: dict[str, Any], teachers: list[Any], device: torch.device
    ) -> HandOver | None:
        """The checkpoint's if it is of the same start_step and teachers, else that of a new period; None if not `auto`.

        Args:
            checkpoint: the state that a run goes on from, or {"step": 0}.
            teachers: what tells the teachers from others, as JSON; a checkpoint of older versions has none.
        """
        if config.inherit.schedule != "auto":
            return None
        start, saved = config.inherit.start_step, checkpoint.get("handover")
        period = {"start_step": start, "teachers": teachers}
        if saved is None or any(saved.get(name, period[name]) != period[name] for name in period):
            return cls(device, first_step=max(start, checkpoint["step"]), period=period)
        return cls(device, first_step=saved.get("first_step", start), period=period, state=saved["state"])

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON, between two steps."""
        return {**self._period, "first_step": self.first_step, "state": self.state()}

    def state(self) -> list[float]:
        """The numbers that decide, between two steps."""
        return self._state.tolist()

    @property
    def alpha(self) -> Tensor:
        """The inheritance rate of the next update."""
        return self._state[2].float()

    def add(self, teachers_T4: Tensor) -> None:
        """Count what the loss of one micro-batch of this rank says of the teachers (`LossOutput.teachers`)."""
        _, teacher_ce, rows, ce = teachers_T4.double().sum(0).unbind()
        self._pending += torch.stack([ce - teacher_ce, rows])

    def settle(self) -> None:
        """End a global batch: the next alpha. Called by all ranks; no host sync."""
        gap, rows = all_sum(self._pending).unbind()
        gaps, weights, alpha, ahead, steps = self._state.unbind()
        gaps, weights = DECAY * gaps + gap, DECAY * weights + rows
        mean = gaps / weights.clamp(min=1e-9)
        ahead = torch.where(mean < 0, ahead + 1, 0.0)
        alpha = torch.minimum(alpha, (-torch.expm1(-STEEPNESS * mean)).clamp(min=FLOOR))
        alpha = torch.where(ahead >= PATIENCE, 0.0, alpha)
        known = (rows > 0) & gap.isfinite()  # else no row was taught, or the update is bad
        state = torch.where(known, torch.stack([gaps, weights, alpha, ahead, steps]), self._state)
        state[4] = steps + 1
        self._state = torch.where(self._state[2] == 0, self._state, state)
        self._pending.zero_()

    def taught_steps(self) -> int | None:
        """Steps that were taught, once the student has been left to itself; else None. Waits for the device."""
        return int(self._state[4]) if float(self._state[2]) == 0 else None


def taught_steps(config: RunConfig, handover: HandOver | None) -> range:
    """The completed updates at which alpha can be above 0. Under `auto` waits for the device."""
    steps = schedules.taught_steps(config)
    if handover is None:
        return steps
    count = handover.taught_steps()
    return range(handover.first_step, steps.stop if count is None else handover.first_step + count)
