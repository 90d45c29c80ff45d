"""Runs one after another, each a `deepspeed` job: finished ones are skipped, interrupted ones go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ki_ds import checkpoint
from ki_ds.distributed import free_port
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
    # a port of its own: DeepSpeed's default may be taken by another job of this host
    command = [str(deepspeed), "--num_gpus", str(num_ranks), "--master_port", free_port()]
    command += [str(LAUNCHER), *job.arguments()]
    environment = {**os.environ, "PATH": f"{deepspeed.parent}:{os.environ['PATH']}"}
    code = _run_group(command, environment)
    if code or not is_finished(job.run_dir):  # DeepSpeed's launcher returns 0 when it is killed itself
        raise UserError(f"{job.name} stopped with exit code {code} before its last step; call it again to go on")


def _run_group(command: list[str], environment: dict[str, str]) -> int:
    """The command's exit code. It gets a process group of its own, which ends with us however we are ended.

    DeepSpeed's launcher leaves its ranks behind when it is killed; ending the group leaves none.
    """
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
        for number, grace in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            if _group_ended(process, number, grace):
                break


def _group_ended(process: subprocess.Popen, number: signal.Signals, grace_seconds: float) -> bool:
    """Send a signal to what is left of the group; whether nothing is left after the time of grace."""
    end = time.monotonic() + grace_seconds
    while time.monotonic() < end:
        process.poll()
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
