#!/usr/bin/env python3
"""How long training waits for a checkpoint that is saved at once and in the background; one table last.

    python tools/bench_save.py                       # a GPT of 25M parameters on random text, one thread
    python tools/bench_save.py --cores 1             # the writing thread has no core of its own
    python tools/bench_save.py --size tiny --repeats 1

Each row trains the same steps from the start in a process of its own, in turns, `--repeats` rounds. "Held" is the time
for which the loop stands still at a save; the save at the end of the run, which is always waited for, is not in it.
Wall and CPU time are those of the whole loop with that last save, the CPU's of all threads. The memory is the largest
resident set. Ratios are taken round by round against the row that saves at its end only.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from bench_data import spread, write_text
from bench_placements import words

from ki_ds.cli import ends_cleanly
from ki_ds.errors import UserError
from ki_ds.ranks.world import free_port

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Size:
    """A GPT and the rows it sees."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    seq_len: int
    micro_batch_size: int


SIZES = {"small": Size(4, 512, 24_000, 128, 4), "tiny": Size(2, 32, 640, 32, 2)}


@dataclass
class Row:
    """A line of the table; lists have one figure a round, `held` one a save."""

    name: str
    fields: dict[str, Any]
    held: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    checkpoint_mb: float = 0.0


def arguments(size: Size, row: Row, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a run."""
    model = {"num_layers": size.num_layers, "hidden_size": size.hidden_size, "num_heads": 4}
    model |= {"ffn_size": 4 * size.hidden_size, "num_positions": size.seq_len}
    return {
        "task": "causal",
        "data.corpus": folder / "text",
        "data.index_dir": folder / "index",
        "data.seq_len": size.seq_len,
        "data.num_workers": 0,
        "data.max_valid_samples": 4,
        "model.name": "gpt_124m",
        **{f"model.{name}": value for name, value in model.items()},
        "engine.ds_config": ROOT / "ds_configs" / f"{args.zero}.json",
        "engine.num_threads": 1,
        "train.num_steps": args.saves * args.save_every + 1,
        "train.micro_batch_size": size.micro_batch_size,
        "train.global_batch_size": size.micro_batch_size,
        "train.eval_every": 10**6,
        "train.save_every": args.save_every,
        "train.keep_checkpoints": 1,
        "train.log_every": 1,
        "monitor.progress": "none",
        **row.fields,
    }


def train(row: Row, options: dict[str, Any], run_dir: Path) -> None:
    """Train a row once in a process of its own, and note what it took."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    ranks |= {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, __file__, "--work", *words(options | {"run_dir": run_dir})]
    process = subprocess.Popen(
        command, env={**os.environ, **ranks}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = [line for line in process.stdout.read().splitlines() if line.strip()] or ["no word"]
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{row.name} failed: {lines[-1][:300]}")
    found = json.loads(lines[-1])
    row.held += found["held"]
    row.wall.append(found["wall"])
    row.cpu.append(found["cpu"])
    row.rss_mib.append(usage.ru_maxrss / 1024)
    (newest,) = (run_dir / "checkpoints").glob("step_*")
    row.checkpoint_mb = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e6


def work(argv: list[str]) -> None:
    """In a row's process: train, and print what the loop took as the last line."""
    from ki_ds import config as configuration
    from ki_ds.training import loop as training

    save, go = training.Loop.save, training.Loop.go
    held: list[float] = []
    found: dict[str, Any] = {}

    def timed_save(loop: Any, *, at_once: bool) -> None:
        began = time.perf_counter()
        save(loop, at_once=at_once)
        if not at_once:
            held.append(time.perf_counter() - began)

    def timed_go(loop: Any) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        go(loop)
        found.update(wall=time.perf_counter() - began, cpu=time.process_time() - cpu)

    training.Loop.save, training.Loop.go = timed_save, timed_go  # type: ignore[assignment, method-assign]
    training.train(configuration.parse(argv))
    print(json.dumps({"held": held, **found}), flush=True)


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    """All rows, in turns."""
    size = SIZES[args.size]
    for split, share in (("train", 1), ("valid", 10)):
        write_text(folder / "text", 200_000 // share, split=split, vocab_size=size.vocab_size)
    rows = [
        Row("at the end only", {"train.save_every": 10**6}),
        Row("at once", {}),
        Row("in the background", {"train.save_in_background": True}),
    ]
    for repeat in range(args.repeats):
        for number, row in enumerate(rows):
            print(f"{repeat + 1}/{args.repeats} {row.name}", flush=True)
            train(row, arguments(size, row, folder, args), folder / f"run_{number}_{repeat}")
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: one line a row; medians (smallest-largest), and the loop's times over those of the first row."""
    lines = ["| saved | MB a checkpoint | saves | held by a save, s | loop, s | of the first | CPU, s | of the first "]
    lines[0] += "| MiB resident |"
    lines.append("|---" * 9 + "|")
    for row in rows:
        ratios = [
            statistics.median(a / b for a, b in zip(mine, first, strict=True))
            for mine, first in ((row.wall, rows[0].wall), (row.cpu, rows[0].cpu))
        ]
        held = spread(row.held, 2) if row.held else ""
        cells = [f"{row.checkpoint_mb:,.0f}", str(len(row.held)), held, spread(row.wall, 1), f"{ratios[0]:.2f}"]
        cells += [spread(row.cpu, 1), f"{ratios[1]:.2f}", spread(row.rss_mib, 0)]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
        return
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", choices=sorted(SIZES), default="small", help="of the model and its rows")
    options.add_argument("--zero", choices=["zero0", "zero1", "zero2", "zero3"], default="zero1", help="ZeRO stage")
    options.add_argument("--saves", type=int, default=3, help="saves of a run before its last one")
    options.add_argument("--save_every", type=int, default=4, help="steps from save to save")
    options.add_argument("--repeats", type=int, default=3, help="rounds of all rows")
    options.add_argument("--cores", type=int, help="cores that all threads of a run share (all that are there)")
    options.add_argument("--out", type=Path, help="JSON file for the results")
    args = options.parse_args()
    for name in ("saves", "save_every", "repeats", "cores"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
    there = sorted(os.sched_getaffinity(0))
    if args.cores and args.cores > len(there):
        raise UserError(f"--cores {args.cores} is more than the {len(there)} that are there")
    os.sched_setaffinity(0, there[: args.cores])
    with tempfile.TemporaryDirectory(prefix="bench_save_") as folder:
        rows = measure(args, Path(folder))
    os.sched_setaffinity(0, there)
    heading = {
        "machine": platform.machine(),
        "cores": args.cores or len(there),
        "threads": 1,
        "torch": torch.__version__,
        "size": f"{args.size}, {asdict(SIZES[args.size])}, {args.zero}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    if args.out:
        args.out.write_text(json.dumps({**heading, "rows": [asdict(row) for row in rows]}, indent=1))
    print("\n" + ", ".join(f"{key} {value}" for key, value in heading.items()) + "\n")
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
