"""From raw text to a student that paid less: corpus, teacher, student alone, student inheriting, report."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from ki_ds.config import Task
from ki_ds.data.corpora import gensim_dump_path
from ki_ds.data.prepare import TokenizerSpec, build_store
from ki_ds.jobs.chain import Job, local_places, run_jobs
from ki_ds.reports.report import text_table, write_report

VOCAB_SIZES = {"mlm": 1024, "causal": 2048}
VALID_FRACTION = 0.05  # 199:1 of 106 articles would leave one of them


def demo_folder(task: Task, size: str, seed: int) -> Path:
    """Where a demo keeps everything."""
    return Path("runs") / "_".join(
        ["demo", task, *([size] if size != "full" else []), *([f"seed{seed}"] if seed != 1 else [])]
    )


def demo_jobs(task: Task, size: str, seed: int) -> list[Job]:
    """The demo's three runs in order: teacher, self-learner, inheritor. Recipes hold every hyperparameter."""
    folder = demo_folder(task, size, seed)
    smoke = size == "smoke"
    common = {"data.corpus": folder / "corpus", "seed": seed}
    jobs = []
    for name in ("teacher", "self", "inherit"):
        recipes = [f"demo_{task}.yaml"]
        recipes += [f"demo_{task}_{name}.yaml"] if name != "self" else []
        recipes += ["demo_smoke.yaml"] if smoke else []
        recipes += ["demo_smoke_inherit.yaml"] if smoke and name == "inherit" else []
        fields = {**common, "teacher.path": folder / "teacher"} if name == "inherit" else common
        jobs.append(Job(name, folder / name, tuple(recipes), fields))
    return jobs


def run_demo(task: Task, *, size: str = "full", seed: int = 1) -> None:
    """Run what is left of the demo and print its table; finished parts are not repeated.

    Raises:
        UserError: a part cannot be done; called again, it goes on there.
    """
    started = time.monotonic()
    folder = demo_folder(task, size, seed)
    print(
        f"[1/3] corpus: Wikipedia articles -> {VOCAB_SIZES[task]} byte-level BPE tokens -> {folder}/corpus", flush=True
    )
    spec = TokenizerSpec(vocab_size=VOCAB_SIZES[task])
    build_store([gensim_dump_path()], spec, folder / "corpus", valid_fraction=VALID_FRACTION)
    jobs = demo_jobs(task, size, seed)
    print("[2/3] runs: a small teacher and a larger student, each alone, then the same student inheriting", flush=True)
    run_jobs(jobs, local_places(torch.cuda.device_count() or 2))
    print(f"[3/3] report: {folder}/report.html", flush=True)
    sections = write_report([job.run_dir for job in jobs[1:]], folder / "report.html")
    Console(width=None if sys.stdout.isatty() else 160).print(text_table(sections))
    print(f"whole demo: {(time.monotonic() - started) / 60:.1f} minutes in this call")
