"""Runs one after another, each a `deepspeed` job: finished ones are skipped, interrupted ones go on."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ki_ds import checkpoint
from ki_ds.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "launchers" / "train_ki.sh"
RECIPES = ROOT / "launchers" / "recipes"


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


def is_finished(run_dir: Path) -> bool:
    """Whether the folder holds a run that came to its last step."""
    path = run_dir / "run.json"
    return path.exists() and checkpoint.read_json(path)["status"] == "finished"


def run_job(job: Job, *, num_ranks: int) -> None:
    """Train the job's run on this host until its last step, unless that is done.

    Raises:
        UserError: the job failed; its own lines above say why.
    """
    if is_finished(job.run_dir):
        print(f"{job.name}: finished before, in {job.run_dir}", flush=True)
        return
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [str(deepspeed), "--num_gpus", str(num_ranks), str(LAUNCHER), *job.arguments()]
    environment = {**os.environ, "PATH": f"{deepspeed.parent}:{os.environ['PATH']}"}
    code = subprocess.run(command, env=environment, check=False).returncode
    if code or not is_finished(job.run_dir):  # DeepSpeed's launcher returns 0 when it is killed itself
        raise UserError(f"{job.name} stopped with exit code {code} before its last step; call it again to go on")
