#!/usr/bin/env python3
"""How long training waits for a checkpoint that is saved at once and in the background; one table last.

    python -m benchmarks.save                       # a GPT of 25M parameters on random text, one thread
    python -m benchmarks.save --cores 1             # the writing thread has no core of its own
    python -m benchmarks.save --size tiny --repeats 1

Each row trains the same steps from the start in a process of its own, in turns, `--repeats` rounds. "Held" is the time
for which the loop stands still at a save; the save at the end of the run, which is always waited for, is not in it.
Wall and CPU time are those of the whole loop with that last save, the CPU's of all threads. The memory is the largest
resident set. Ratios are taken round by round against the row that saves at its end only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import (
    ROOT,
    check_at_least,
    in_turns,
    markdown,
    median_ratio,
    parser,
    run_ranks,
    show,
    spread,
    timed,
    words,
    write_results,
)
from benchmarks.text import write_splits
from ki_ds.cli import ends_cleanly


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
    ((said, rss_mib),) = run_ranks(["-m", "benchmarks.save", "--work", *words(options | {"run_dir": run_dir})])
    took = json.loads(said)
    row.held += took["held"]
    row.wall.append(took["wall"])
    row.cpu.append(took["cpu"])
    row.rss_mib.append(rss_mib)
    (newest,) = (run_dir / "checkpoints").glob("step_*")
    row.checkpoint_mb = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e6


def work(argv: list[str]) -> None:
    """In a row's process: train, and print what the loop took as the last line."""
    from ki_ds import config as configuration
    from ki_ds.training import loop as training

    save, go = training.Loop.save, training.Loop.go
    held: list[float] = []
    took: dict[str, Any] = {}

    def timed_save(loop: Any, *, at_once: bool) -> None:
        seconds, _ = timed(lambda: save(loop, at_once=at_once), time.perf_counter)
        if not at_once:
            held.append(seconds)

    def timed_go(loop: Any) -> None:
        took["wall"], (took["cpu"], _) = timed(lambda: timed(lambda: go(loop), time.process_time), time.perf_counter)

    training.Loop.save, training.Loop.go = timed_save, timed_go  # type: ignore[assignment, method-assign]
    training.train(configuration.parse(argv))
    print(json.dumps({"held": held, **took}), flush=True)


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    """All rows, in turns."""
    size = SIZES[args.size]
    write_splits(folder / "text", 200_000, vocab_size=size.vocab_size)
    rows = [
        Row("at the end only", {"train.save_every": 10**6}),
        Row("at once", {}),
        Row("in the background", {"train.save_in_background": True}),
    ]
    for turn, row in in_turns(rows, args.repeats):
        train(row, arguments(size, row, folder, args), folder / f"run_{rows.index(row)}_{turn}")
    return rows


def table(rows: list[Row]) -> str:
    """Medians (smallest-largest), and the loop's times over those of the first row."""
    columns = ["saved", "MB a checkpoint", "saves", "held by a save, s", "loop, s", "of the first", "CPU, s"]
    columns += ["of the first", "MiB resident"]
    lines = (
        [
            row.name,
            f"{row.checkpoint_mb:,.0f}",
            str(len(row.held)),
            spread(row.held, 2),
            spread(row.wall, 1),
            median_ratio(row.wall, rows[0].wall),
            spread(row.cpu, 1),
            median_ratio(row.cpu, rows[0].cpu),
            spread(row.rss_mib, 0),
        ]
        for row in rows
    )
    return markdown(columns, lines)


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
        return
    options = parser(__doc__)
    options.add_argument("--size", choices=sorted(SIZES), default="small", help="of the model and its rows")
    options.add_argument("--zero", choices=["zero0", "zero1", "zero2", "zero3"], default="zero1", help="ZeRO stage")
    options.add_argument("--saves", type=int, default=3, help="saves of a run before its last one")
    options.add_argument("--save_every", type=int, default=4, help="steps from save to save")
    options.add_argument("--repeats", type=int, default=3, help="rounds of all rows")
    options.add_argument("--cores", type=int, help="cores that all threads of a run share (all that are there)")
    args = options.parse_args()
    check_at_least(args, saves=1, save_every=1, repeats=1, cores=1)
    with harness.cores(args.cores) as cores, tempfile.TemporaryDirectory(prefix="bench_save_") as folder:
        rows = measure(args, Path(folder))
    size = f"{args.size}, {asdict(SIZES[args.size])}, {args.zero}"
    head = harness.heading(cores=cores, threads=1, size=size)
    write_results(args.out, head, rows=rows)
    show(head, table(rows))


if __name__ == "__main__":
    sys.exit(main())
