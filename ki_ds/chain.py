"""Runs one after another, each a `deepspeed` job: finished ones are skipped, interrupted ones go on."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ki_ds.distributed import free_port
from ki_ds.supervisor import LAUNCHER, is_finished, run_group, supervise

RECIPES = LAUNCHER.parent / "recipes"


@dataclass(frozen=True)
class Job:
    """One training run: a name, recipes laid over one another, and single fields on top."""

    name: str
    run_dir: Path
    recipes: tuple[str, ...]
    fields: dict[str, object] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """The launcher's command line."""
        configs = [part for recipe in self.recipes for part in ("--config", str(RECIPES / recipe))]
        fields = {"run_dir": self.run_dir, **self.fields}
        return configs + [part for name, value in fields.items() for part in (f"--{name}", str(value))]


def run_job(job: Job, *, num_ranks: int, max_restarts: int = 0) -> None:
    """Train the job's run on this host until its last step, unless that is done; again when it fails.

    Raises:
        UserError: the job failed; its own lines above say why.
    """
    if is_finished(job.run_dir):
        print(f"{job.name}: finished before, in {job.run_dir}", flush=True)
        return
    deepspeed = Path(sys.executable).with_name("deepspeed")
    environment = {**os.environ, "PATH": f"{deepspeed.parent}:{os.environ['PATH']}"}

    def start() -> tuple[int, str | None]:
        # a port of its own: DeepSpeed's default may be taken by another job of this host
        command = [str(deepspeed), "--num_gpus", str(num_ranks), "--master_port", free_port()]
        return run_group([*command, str(LAUNCHER), *job.arguments()], environment)

    supervise(job.name, start, lambda: is_finished(job.run_dir), restarts=max_restarts)
