"""The planner's memory against real jobs: forecast, measured peak of a rank, and their ratio; one table last.

    python -m benchmarks.plan                        # every row, two steps each
    python -m benchmarks.plan --rows mlm_zero0 causal_zero1 --out plan.json

On a CPU a rank's peak is that of its resident set above what it had once everything was imported. The C library is
told to give freed memory back at once, for how much of it a process keeps depends on the order of its allocations;
`--kept` measures as a run is, with memory kept. On a GPU it is the peak of what torch has allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    MIB,
    ROOT,
    check_at_least,
    heading,
    markdown,
    parser,
    run_ranks,
    show,
    words,
    write_results,
)
from benchmarks.text import VOCAB_SIZE, write_splits
from ki_ds import config as configuration
from ki_ds.cli import ends_cleanly
from ki_ds.errors import UserError
from ki_ds.planning import planner
from ki_ds.planning.sizes import size_of_teacher

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


@dataclass(frozen=True)
class Row:
    """A job: its task, ranks, DeepSpeed's JSON and whatever else it changes."""

    task: str
    num_ranks: int
    ds_config: str
    fields: dict[str, Any] = field(default_factory=dict)
    taught: bool = False


BF16, AGAIN = {"engine.precision": "bf16"}, {"engine.activation_checkpointing": True}
ROWS = {
    "mlm_zero0": Row("mlm", 1, "zero0"),
    "causal_zero1_online": Row("causal", 2, "zero1", taught=True),
    "mlm_zero2_bf16_checkpointing": Row("mlm", 2, "zero2", BF16 | AGAIN),
    "mlm_zero3": Row("mlm", 2, "zero3"),
    "causal_zero2_offload_bf16": Row("causal", 2, "zero2_offload", BF16 | AGAIN),
    "causal_zero1_cut_chunks": Row("causal", 1, "zero1", {"loss.chunk_rows": 128, "train.micro_batch_size": 4}),
    "mlm_zero1_save_in_background": Row("mlm", 2, "zero1", {"train.save_in_background": True, "train.save_every": 1}),
}


def arguments(row: Row, folder: Path, args: argparse.Namespace) -> list[str]:
    """The run's command line."""
    fields = {
        "run_dir": folder / "run",
        "task": row.task,
        "data.corpus": folder.parent / "text",
        "data.seq_len": 128,
        "data.break_mode": "none",
        "data.num_workers": 0,
        "data.max_valid_samples": 8,
        "model.name": "roberta_base" if row.task == "mlm" else "gpt_124m",
        **{f"model.{name}": value for name, value in _shape(args.layers, args.width).items()},
        "engine.ds_config": ROOT / "ds_configs" / f"{row.ds_config}.json",
        "engine.num_threads": 1,
        "train.num_steps": args.steps,
        "train.micro_batch_size": 8,
        "train.global_batch_size": 16,
        "train.eval_every": 10**6,
        "train.save_every": 10**6,
        "monitor.progress": "none",
    }
    if row.taught:
        fields |= {"teacher.path": folder.parent / "teacher", "inherit.schedule": "linear", "inherit.steps": 10**6}
    return words(fields | row.fields)


def _shape(layers: int, width: int) -> dict[str, int]:
    return {"num_layers": layers, "hidden_size": width, "num_heads": 6, "ffn_size": 4 * width, "num_positions": 128}


def make_teacher(folder: Path, args: argparse.Namespace) -> None:
    """A teacher of half the student's size with random weights."""
    from ki_ds.config import ModelConfig
    from ki_ds.data.datasets import read_vocabulary
    from ki_ds.models.presets import build_lm

    vocabulary = read_vocabulary(configuration.DataConfig(corpus=str(folder / "text")), "causal")
    shape: Any = _shape(args.layers // 2, args.width // 2)
    model = ModelConfig(name="gpt_124m", **shape)
    lm = build_lm(model, "causal", num_classes=vocabulary.size, special_ids=vocabulary.special_ids, seed=1)
    lm.save_pretrained(folder / "teacher")
    vocabulary.export(folder / "teacher", "causal")


def measure(row: Row, command: list[str], *, kept: bool) -> float:
    """The largest peak of a rank in MiB."""
    env = {"KI_DS_BENCH_KEPT": "1"} if kept else GIVE_BACK
    ended = run_ranks(["-m", "benchmarks.plan", "--work", *command], num_ranks=row.num_ranks, env=env)
    return max(json.loads(said)["peak_mib"] for said, _ in ended)


def work(argv: list[str]) -> None:
    """Train in this process, a rank of a job, and say its peak."""
    from ki_ds.engine import student as engine
    from ki_ds.training.loop import train

    if "KI_DS_BENCH_KEPT" not in os.environ:
        engine.keep_freed_memory = lambda: False
    config = configuration.parse(argv)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    base = _status_mib("VmRSS")
    train(config)
    peak = torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else _status_mib("VmHWM") - base
    print("\n" + json.dumps({"peak_mib": peak, "imports_mib": base}), flush=True)
    os._exit(0)


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def forecast(row: Row, command: list[str]) -> tuple[float, str]:
    """(the planner's MiB of a rank, less what is imported; the moment of it)."""
    config, on_gpu = configuration.parse(command), torch.cuda.is_available()
    teachers = [size_of_teacher(entry.path, config.task, VOCAB_SIZE) for entry in config.all_teachers]
    found = planner.plan(config, num_ranks=row.num_ranks, num_classes=VOCAB_SIZE, teachers=teachers, on_gpu=on_gpu)
    return (found.total_memory - (0 if on_gpu else planner.CPU_IMPORTS)) / MIB, found.memory_moment


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    options = parser(__doc__)
    options.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=list(ROWS), help="which jobs")
    options.add_argument("--layers", type=int, default=6, help="of the student; its teacher has half")
    options.add_argument("--width", type=int, default=384, help="of the student, a multiple of 12")
    options.add_argument("--steps", type=int, default=2, help="of a job; the second has everything")
    options.add_argument("--kept", action="store_true", help="measure with freed memory kept, as a run is")
    args = options.parse_args()
    check_at_least(args, steps=2, layers=2, width=12)
    if args.width % 12:
        raise UserError(f"--width {args.width} is no multiple of 12")
    if torch.cuda.is_available() and torch.cuda.device_count() < max(ROWS[name].num_ranks for name in args.rows):
        raise UserError(f"{torch.cuda.device_count()} GPU is too few for these rows; take --rows of one rank")
    results: list[dict[str, Any]] = []
    head = heading(kept=args.kept)
    with tempfile.TemporaryDirectory(prefix="bench_plan_") as name:
        folder = Path(name)
        write_splits(folder / "text", 50_000)
        make_teacher(folder, args)
        for row_name in args.rows:
            row = ROWS[row_name]
            command = arguments(row, folder / row_name, args)
            expected, moment = forecast(row, command)
            peak = measure(row, command, kept=args.kept)
            result = {"row": row_name, "ranks": row.num_ranks, "forecast_mib": expected, "measured_mib": peak}
            results.append(result | {"ratio": expected / peak, "moment": moment})
            print(f"{row_name}: {expected:,.0f} forecast, {peak:,.0f} measured", flush=True)
            write_results(args.out, head, rows=results)
    lines = [
        (
            r["row"],
            str(r["ranks"]),
            *(f"{r[f'{k}_mib']:,.0f}" for k in ("forecast", "measured")),
            f"{r['ratio']:.2f}",
            r["moment"],
        )
        for r in results
    ]
    show(head, markdown(["job", "ranks", "forecast, MiB", "measured, MiB", "ratio", "worst moment"], lines))


if __name__ == "__main__":
    sys.exit(main())
