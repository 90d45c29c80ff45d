"""A graph of runs, each a `deepspeed` job: finished ones are skipped, interrupted ones go on, as many side by side as
there are places.

Every job is held by a process of its own (`bash launchers/train_ki.sh --max_restarts N`), which ends the job's ranks
when it is asked to stop, and is asked so when this process dies.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from ki_ds.checkpoints import checkpoint
from ki_ds.errors import EXIT_USER_ERROR, ResumableError, UserError
from ki_ds.files import write_atomically
from ki_ds.jobs.preflight import read_hosts
from ki_ds.jobs.supervisor import LAUNCHER, is_finished, saved_step, signals_handled
from ki_ds.ranks.world import free_port

RECIPES = LAUNCHER.parent / "recipes"
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """One training run.

    Args:
        name: for people, and for `after`.
        recipes: files in launchers/recipes, laid over one another.
        fields: single fields on top, by their dotted names.
        groups: or its whole configuration instead of recipes, written beside the run before it starts.
        after: folders of the runs that must be finished before.
    """

    name: str
    run_dir: Path
    recipes: tuple[str, ...] = ()
    fields: dict[str, object] = field(default_factory=dict)
    groups: dict[str, Any] | None = None
    after: tuple[str, ...] = ()

    @property
    def recipe_path(self) -> Path:
        """Where `groups` is written: a recipe of this one run."""
        return self.run_dir.with_name(f"{self.run_dir.name}.yaml")

    def arguments(self) -> list[str]:
        """The launcher's command line."""
        paths = [self.recipe_path] if self.groups is not None else [RECIPES / recipe for recipe in self.recipes]
        configs = [part for path in paths for part in ("--config", str(path))]
        fields = self.fields if self.groups is not None else {"run_dir": self.run_dir, **self.fields}
        return configs + [part for name, value in fields.items() for part in (f"--{name}", str(value))]


# --- where jobs run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Some of the hosts, GPUs or cores: what DeepSpeed's launcher is told, and how many ranks that makes.

    `num_threads` of a rank, where jobs share the cores of a host without GPUs; 0 leaves it to the run.
    """

    name: str
    arguments: tuple[str, ...]
    num_ranks: int
    num_threads: int = 0


def local_places(num_ranks: int | None = None, parallel: int = 1) -> list[Place]:
    """This host in `parallel` equal parts.

    Args:
        num_ranks: of each job; all GPUs of its part, or one on a host without any.

    Raises:
        UserError: there are not so many GPUs.
    """
    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        ranks = num_ranks or 1
        threads = max(1, len(os.sched_getaffinity(0)) // (parallel * ranks)) if parallel > 1 else 0
        return [Place(f"part {n}", ("--num_gpus", str(ranks)), ranks, threads) for n in range(1, parallel + 1)]
    ranks = num_ranks or num_gpus // parallel
    if ranks < 1 or ranks * parallel > num_gpus:
        raise UserError(
            f"{parallel} jobs of {max(ranks, 1)} GPUs were asked for, this host has {num_gpus}; lower --parallel or "
            "--num_gpus"
        )
    parts = [range(n * ranks, (n + 1) * ranks) for n in range(parallel)]
    names = [",".join(map(str, part)) for part in parts]
    return [Place(f"GPU {name}", ("--include", f"localhost:{name}"), ranks) for name in names]


def hostfile_places(hostfile: Path, num_gpus: int | None = None, parallel: int = 1) -> list[Place]:
    """The hosts of a hostfile in `parallel` equal parts.

    Args:
        num_gpus: of each host; all of its slots.

    Raises:
        UserError: the hostfile cannot be read, or the hosts cannot be parted so.
    """
    slots = read_hosts(str(hostfile))
    hosts = list(slots)
    if len(hosts) % parallel:
        raise UserError(f"{hostfile} has {len(hosts)} hosts, not a multiple of --parallel {parallel}; change one")
    if num_gpus and (short := [host for host in hosts if slots[host] < num_gpus]):
        raise UserError(f"{hostfile}: {short[0]} has {slots[short[0]]} slots, --num_gpus asks for {num_gpus}; lower it")
    size = len(hosts) // parallel
    places = []
    for number in range(parallel):
        part = hosts[number * size : (number + 1) * size]
        used = {host: num_gpus or slots[host] for host in part}
        include = "@".join(f"{host}:{','.join(map(str, range(count)))}" for host, count in used.items())
        places.append(Place(", ".join(part), ("--hostfile", str(hostfile), "--include", include), sum(used.values())))
    return places


# --- running ------------------------------------------------------------------------------------------------------


@dataclass
class _Held:
    """A job that runs, the process that holds it, and where."""

    job: Job
    place: Place
    process: subprocess.Popen
    began: float
    asked: bool = False  # to save and leave

    def ask(self) -> None:
        """Ask the job to save and leave; what is asked twice ends at once."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.asked = True


def run_jobs(jobs: Sequence[Job], places: Sequence[Place], *, max_restarts: int = 0) -> None:
    """Train every run to its last step, each once those that it comes after are finished.

    With one place the jobs write to this terminal, with several each to RUN_DIR.log. A signal asks all jobs to save
    and leave; a second one ends them.

    Args:
        max_restarts: times that a failed job is started again from its last checkpoint.

    Raises:
        UserError: a job refused to go on or failed; the others were asked to save and leave.
        ResumableError: stopped by a signal.
    """
    waiting = [job for job in jobs if not _already(job)]
    _check_complete(waiting)
    free, running, received = list(places), list[_Held](), list[str]()
    number, total = len(jobs) - len(waiting), len(jobs)

    def handle(signum: int, _frame: object) -> None:
        received.append(signal.Signals(signum).name)
        for held in running:
            held.ask()

    with signals_handled(handle):
        try:
            while (waiting or running) and not received:
                while free and (job := _next(waiting)) is not None:
                    waiting.remove(job)
                    number += 1
                    if not _already(job):  # by another chain, meanwhile
                        running.append(_start(job, free.pop(0), f"[{number}/{total}]", len(places) > 1, max_restarts))
                time.sleep(_POLL_SECONDS)
                for held in [each for each in running if each.process.poll() is not None and not received]:
                    running.remove(held)
                    free.append(held.place)
                    _check_ended(held, quiet=len(places) == 1)
        finally:
            for held in running:
                if not held.asked:
                    held.ask()
            for held in running:
                held.process.wait()
    if received:
        raise ResumableError(f"stopped by {received[0]}; call it again to go on")


def _already(job: Job) -> bool:
    if is_finished(job.run_dir):
        print(f"{job.name}: finished before, in {job.run_dir}", flush=True)
        return True
    return False


def _check_complete(waiting: Sequence[Job]) -> None:
    known = {str(job.run_dir) for job in waiting}
    for job in waiting:
        for folder in job.after:
            assert folder in known or is_finished(Path(folder)), f"{job.name} waits for {folder}, which nobody trains"


def _next(waiting: Sequence[Job]) -> Job | None:
    """The first job whose turn has come: what it needs is finished, and nobody else trains it."""
    for job in waiting:
        if all(is_finished(Path(folder)) for folder in job.after) and not checkpoint.in_use(job.run_dir):
            return job
    return None


def _start(job: Job, place: Place, number: str, to_log: bool, max_restarts: int) -> _Held:
    if job.groups is not None:
        job.run_dir.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(job.recipe_path, yaml.safe_dump(job.groups, sort_keys=False))
    step = saved_step(job.run_dir)
    where = f" on {place.name}" if to_log else ""
    print(f"{number} {job.name}{where}{f', going on from step {step:,}' if step else ''}: {job.run_dir}", flush=True)
    arguments = ["--max_restarts", str(max_restarts), *job.arguments()]
    arguments += ["--engine.num_threads", str(place.num_threads)] if place.num_threads else []
    # a port of its own: DeepSpeed's default may be taken by another job of this host
    deepspeed = [*place.arguments, "--master_port", free_port()]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["KI_DS_ARGS"] = shlex.join(deepspeed)
    log = job.run_dir.with_name(f"{job.run_dir.name}.log").open("ab") if to_log else None
    process = subprocess.Popen(
        [sys.executable, "-u", str(LAUNCHER), *arguments],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT if log else None,
        start_new_session=True,
        preexec_fn=_ends_with_parent,
    )
    if log:
        log.close()
    return _Held(job, place, process, time.monotonic())


def _ends_with_parent() -> None:
    """In a child before it runs: SIGTERM when its parent dies, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _check_ended(held: _Held, *, quiet: bool) -> None:
    job, code = held.job, held.process.returncode
    if is_finished(job.run_dir):
        if not quiet:
            print(f"      {job.name}: finished in {time.monotonic() - held.began:.0f} s", flush=True)
        return
    why = "its own line says why" if quiet else f"{job.run_dir}.log says why"
    text = f"{job.name} ended with exit code {code} before its last step; {why}"
    raise UserError(text) if code == EXIT_USER_ERROR else ResumableError(f"{text}; call it again to go on")
