"""What a run reports: sums and counts over ranks, one JSON line a record, a progress bar, DeepSpeed's monitor.

Means are made here, at the edge, from sums. One word per figure, the same in the JSONL file, the monitors and the
progress bar: alpha, loss, ce, kl, ppl, lr, tokens_per_second, ...
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from ki_ds.files import write_atomically
from ki_ds.objective.types import LossOutput
from ki_ds.ranks.world import all_sum, is_main


@dataclass
class Totals:
    """What a run has cost so far, over all ranks. FLOPs are 6 P per token for training, 2 P for a forward."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    student_flops: float = 0.0
    teacher_flops: float = 0.0
    seconds: float = 0.0  # of training, without validation and saving


@dataclass(frozen=True)
class Figures:
    """What a window comes to over all ranks, by the names of the metrics.

    `means` has loss, ce and kl a row. `others` has tokens_per_second; aux_loss, what the architecture added to the loss
    itself, as the average of the micro-batches, where it adds something; and teacher_ce a row, where it is known of the
    only teacher. `teachers` says for each teacher over the rows that it taught: kl, ce and its own teacher_ce a row
    (left out where it is not known), rows (0 where the run's teachers are averaged), and the tokens of its forward.
    """

    means: dict[str, float]
    others: dict[str, float]
    teachers: list[dict[str, float]]


class Window:
    """Sums since the last line of metrics; nothing is read back from the device before `settle`.

    Args:
        seconds: of training before it began (`Totals.seconds`).
    """

    def __init__(self, device: torch.device, *, num_teachers: int = 0, seconds: float = 0.0):
        shapes = {"sums": (5,), "aux": (2,), "teachers": (num_teachers, 4), "tokens": (1 + num_teachers,)}
        self._local = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        self._local["tokens"] = self._local["tokens"].cpu()
        self._settled = {name: np.zeros(shape) for name, shape in shapes.items()}  # over all ranks
        self.seconds = seconds

    def add(
        self,
        out: LossOutput,
        num_tokens: int,
        *,
        teacher_tokens: Sequence[int] = (),
        aux_loss: Tensor | None = None,
    ) -> None:
        """Count one micro-batch of this rank; `teacher_tokens` as of `ki_ds.teachers.teacher.teacher_tokens`.

        One whose loss is no number is left out of the means.
        """
        local = self._local
        row = torch.stack([value.detach().double() for value in (out.loss_sum, out.ce_sum, out.kl_sum, out.num_rows)])
        finite = row.isfinite().all()
        local["sums"][:4] += torch.where(finite, row, 0)
        local["sums"][4] += ~finite
        if aux_loss is not None:  # the sum over micro-batches, and their number
            local["aux"] += torch.where(finite, torch.stack([aux_loss.detach().double(), finite.double()]), 0)
        if out.teachers.shape == local["teachers"].shape:  # not those of an average
            local["teachers"] += torch.where(finite, out.teachers, 0)
        local["tokens"][: 1 + len(teacher_tokens)] += torch.tensor([num_tokens, *teacher_tokens])

    def settle(self) -> tuple[int, list[int]]:
        """Tokens over all ranks since it was settled last, and those of each teacher's forward. Waits for the device.

        Called by all ranks.
        """
        flat = all_sum(torch.cat([values.to(self._local["sums"]).view(-1) for values in self._local.values()]))
        parts = np.split(np.array(flat.tolist()), np.cumsum([total.size for total in self._settled.values()])[:-1])
        for local, total, part in zip(self._local.values(), self._settled.values(), parts, strict=True):
            total += part.reshape(total.shape)
            local.zero_()
        tokens, *teacher_tokens = map(int, parts[-1])
        return tokens, teacher_tokens

    def figures(self, seconds: float) -> Figures:
        """The means over what has been settled; `seconds` of training when it ended (`Totals.seconds`)."""
        loss, ce, kl, rows, bad = self._settled["sums"].tolist()
        rows = math.nan if bad and not rows else max(rows, 1.0)
        tokens, *teacher_tokens = map(int, self._settled["tokens"])
        others = {"tokens_per_second": tokens / max(seconds - self.seconds, 1e-9)}
        aux_sum, num_aux = self._settled["aux"].tolist()
        if num_aux:
            others["aux_loss"] = aux_sum / num_aux
        teachers = []
        for sums, asked in zip(self._settled["teachers"].tolist(), teacher_tokens, strict=True):
            taught = sums[2]
            named = {"kl": sums[0], "ce": sums[3], "teacher_ce": sums[1]}
            means = {name: value / max(taught, 1.0) for name, value in named.items() if not math.isnan(value)}
            teachers.append(means | {"rows": int(taught), "tokens": asked})
        if len(teachers) == 1 and teachers[0]["rows"] and "teacher_ce" in teachers[0]:
            others["teacher_ce"] = teachers[0]["teacher_ce"]
        return Figures({"loss": loss / rows, "ce": ce / rows, "kl": kl / rows}, others, teachers)

    def state(self) -> dict[str, Any]:
        """What has been settled, as JSON, for a checkpoint between two lines."""
        return {name: total.tolist() for name, total in self._settled.items()} | {"seconds": self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; what it says of teachers is left out if those of now are not as many."""
        self.seconds = state["seconds"]
        self._settled["tokens"][0] = state["tokens"][0]
        for name, total in self._settled.items():
            if total.shape == np.shape(state[name]):
                total[:] = state[name]


def perplexity(ce_sum: float, num_rows: float) -> float:
    """exp of the mean cross-entropy in nats; infinite rather than an overflow."""
    mean = ce_sum / max(num_rows, 1.0)
    return math.exp(mean) if mean < 700 else math.inf


class Stopwatch:
    """Seconds of training, over all resumes; paused while something else is done."""

    def __init__(self, seconds: float = 0.0):
        self._seconds = seconds
        self._since: float | None = None

    def run(self) -> None:
        """Count from now on, unless it counts already."""
        if self._since is None:
            self._since = time.monotonic()

    def pause(self) -> float:
        """Stop counting; return the seconds so far. Waits for the device, whose work is counted."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._since is not None:
            self._seconds += time.monotonic() - self._since
            self._since = None
        return self._seconds


class MetricsLog:
    """The file metrics.jsonl of a run; only rank 0 writes it."""

    def __init__(self, path: Path, *, resume_step: int):
        """Open for appending. Records of a part that is done again are dropped: after `resume_step`, all after 0."""
        self._path = path
        if is_main() and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if resume_step and _step_of(line) <= resume_step]
            if kept != lines:
                write_atomically(path, "".join(line + "\n" for line in kept))

    def write(self, kind: str, totals: Totals, **figures: Any) -> None:
        """Append one record: {"kind": kind, the totals, the figures}."""
        if is_main():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **asdict(totals), **figures}) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut by a crash


def read_log(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Display:
    """A progress bar with ETA and a line of figures on a terminal, plain lines elsewhere, or nothing.

    Silent on ranks above 0.
    """

    def __init__(self, kind: str, *, title: str, num_steps: int, start_step: int):
        self._title, self._num_steps, self._start_step = title, num_steps, start_step
        self._started, self._figures, self._valid = time.monotonic(), "", ""
        bar = kind == "bar" or (kind == "auto" and sys.stdout.isatty())
        self._lines = is_main() and not bar and kind != "none"
        self._live: Live | None = None
        if is_main() and bar:
            columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, TextColumn("eta"), TimeRemainingColumn())
            self._task = self._progress.add_task(title, total=num_steps, completed=start_step)
            self._live = Live(self._progress, console=Console(force_terminal=True), refresh_per_second=4)
            self._live.start()

    def advance(self, step: int) -> None:
        """Show that `step` updates are done."""
        if self._live:
            self._progress.update(self._task, completed=step)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Show a line of training figures."""
        self._figures = (
            f"{figures['tokens_per_second']:,.0f} tokens/s  alpha {figures['alpha']:.2f}  ce {figures['ce']:.3f}  "
            f"kl {figures['kl']:.3f}  lr {figures['lr']:.1e}"
        )
        seconds_per_step = (time.monotonic() - self._started) / max(step - self._start_step, 1)
        eta = seconds_per_step * (self._num_steps - step)
        self._show(f"{self._title} step {step}/{self._num_steps}  eta {eta:.0f} s  {self._figures}{self._valid}")

    def validation(self, step: int, ppl: float, domains: dict[str, float]) -> None:
        """Show a validation perplexity (and those of several domains), which then stays beside the other figures."""
        self._valid = f"  valid ppl {ppl:.2f}"
        if len(domains) > 1:
            self._valid += " (" + ", ".join(f"{name} {value:.2f}" for name, value in domains.items()) + ")"
        self._show(f"{self._title} step {step}/{self._num_steps}{self._valid}")

    def _show(self, line: str) -> None:
        if self._live:
            self._live.update(Group(self._progress, Text(self._figures + self._valid)))
        elif self._lines:
            print(line, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._live:
            self._live.stop()
