"""One student taught from each placement of its teacher: bytes, memory, seconds a step, losses; one table last.

    python -m benchmarks.placements                                     # a small model on random text
    python -m benchmarks.placements --corpus runs/corpus --out p.json   # on a corpus of tools/prepare_data.py

A teacher is trained first (`--teacher_steps`), its caches are written, then the rows are trained from the start with
the same seed, one after another, each in fresh processes with one thread a rank, `--repeats` rounds of all. Seconds a
step are those of the second half of the steps, loading and metrics included; memory is the largest resident set of a
process, everything imported counted. Losses are of the last step and of the final validation.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    ROOT,
    check_at_least,
    heading,
    in_turns,
    markdown,
    median_ratio,
    parser,
    run_ranks,
    show,
    spread,
    words,
    write_results,
)
from benchmarks.text import write_splits
from ki_ds.cli import ends_cleanly
from ki_ds.errors import UserError
from ki_ds.reports.metrics import read_log
from ki_ds.teachers.cache_files import Manifest


@dataclass(frozen=True)
class Size:
    """Width of student and teacher (4 and 2 layers, FFN of four times the width) and the rows they see."""

    student: int
    teacher: int
    seq_len: int
    micro_batch_size: int
    num_tokens: int  # of random text
    vocab_size: int


SIZES = {"small": Size(256, 128, 128, 16, 400_000, 50_265), "tiny": Size(32, 16, 32, 4, 20_000, 640)}


@dataclass
class Row:
    """A line of the table; lists have one figure a repeat."""

    name: str
    options: dict[str, Any]
    num_ranks: int = 1
    bytes_per_row: float = 0.0  # moved or stored
    seconds: list[float] = field(default_factory=list)
    student_mib: list[float] = field(default_factory=list)
    teacher_mib: list[float] = field(default_factory=list)
    loss: float = 0.0
    ce: float = 0.0
    valid_ce: float = 0.0


def fields(size: Size, width: int, num_layers: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The fields that all runs share."""
    model = {"name": "roberta_base", "num_layers": num_layers, "hidden_size": width, "num_heads": 2}
    model |= {"ffn_size": 4 * width, "num_positions": size.seq_len}
    return {
        "data.corpus": args.corpus or folder / "text",
        "data.index_dir": folder / "index",
        "data.seq_len": size.seq_len,
        "data.num_workers": 0,
        "data.max_valid_samples": 64,
        **{f"model.{name}": value for name, value in model.items()},
        "engine.num_threads": 1,
        "train.micro_batch_size": size.micro_batch_size,
        "train.global_batch_size": size.micro_batch_size,
        "train.eval_every": 10**6,
        "train.save_every": 10**6,
        "train.log_every": 1,
        "monitor.progress": "none",
    }


def train(row: Row, options: dict[str, Any], run_dir: Path, num_steps: int) -> None:
    """Train a row once and note what it took."""
    command = ["launchers/train_ki.sh", *words(options | row.options | {"run_dir": run_dir})]
    memory = [rss_mib for _, rss_mib in run_ranks(command, num_ranks=row.num_ranks)]
    row.student_mib.append(memory[0])
    row.teacher_mib += memory[1:]
    records = read_log(run_dir / "metrics.jsonl")
    steps = {record["step"]: record for record in records if record["kind"] == "train"}
    half = num_steps // 2
    row.seconds.append((steps[num_steps]["seconds"] - steps[half]["seconds"]) / (num_steps - half))
    row.loss, row.ce = steps[num_steps]["loss"], steps[num_steps]["ce"]
    row.valid_ce = [record for record in records if record["kind"] == "valid"][-1]["ce"]


def cache(row: Row, options: dict[str, Any], out: Path, kind: list[str]) -> None:
    """Write the cache that a row reads, and note its bytes."""
    teacher = {"run_dir": f"{out}_run", **row.options, "teacher.placement": "online"}
    teacher |= {"teacher.path": out.with_name("teacher")}
    run_ranks(["tools/cache_teacher.py", "--out", str(out), *kind, *words(options | teacher)])
    num_bytes, _, num_rows, _ = map(sum, zip(*Manifest.read(out).chunks.values(), strict=True))
    row.bytes_per_row = num_bytes / num_rows


def measure(args: argparse.Namespace, folder: Path, keep: Callable[[list[Row]], None]) -> list[Row]:
    """All rows, in turns; `keep` gets them after every round."""
    size = SIZES[args.size]
    if not args.corpus:
        write_splits(folder / "text", size.num_tokens, vocab_size=size.vocab_size)
    teacher = fields(size, size.teacher, 2, args, folder)
    teacher |= {"optim.lr": 2e-3, "train.num_steps": args.teacher_steps, "run_dir": folder / "teacher"}
    print("training the teacher", flush=True)
    run_ranks(["launchers/train_ki.sh", *words(teacher)])
    options = fields(size, size.student, 4, args, folder) | {"optim.lr": 1e-3, "train.num_steps": args.steps}
    taught = {"teacher.path": folder / "teacher", "inherit.schedule": "linear", "inherit.steps": args.steps}
    rows = [
        Row("self-learning", {}),
        Row("online", taught),
        Row("overlap", taught | {"teacher.placement": "overlap"}),
        Row("ranks, 1 teacher", taught | {"teacher.placement": "ranks"}, 2, 4.0 * size.teacher),
        Row("cache, hidden fp32", taught | {"teacher.placement": "cache", "teacher.path": folder / "hidden"}),
        Row("cache, top-10", taught | {"teacher.placement": "cache", "teacher.path": folder / "topk"}),
    ]
    print("writing the caches", flush=True)
    cache(rows[-2], options, folder / "hidden", ["--kind", "hidden", "--dtype", "fp32"])
    cache(rows[-1], options, folder / "topk", ["--kind", "topk", "--topk", "10"])
    for turn, row in in_turns(rows, args.repeats):
        train(row, options, folder / f"run_{rows.index(row)}_{turn}", args.steps)
        if row is rows[-1]:
            keep(rows)
    return rows


def table(rows: list[Row]) -> str:
    """One line a row; seconds as median (fastest-slowest) and against self-learning in the same round."""
    columns = ["teacher", "bytes a labelled row", "MiB, student's rank", "MiB, teacher's rank", "s a step"]
    columns += ["of self-learning", "last loss", "last CE", "validation CE"]
    lines = (
        [
            row.name,
            f"{row.bytes_per_row:,.0f}",
            spread(row.student_mib, 0),
            spread(row.teacher_mib, 0),
            spread(row.seconds, 3),
            median_ratio(row.seconds, rows[0].seconds),
            *(f"{value:.6f}" for value in (row.loss, row.ce, row.valid_ce)),
        ]
        for row in rows
    )
    return markdown(columns, lines)


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    options = parser(__doc__)
    options.add_argument("--size", choices=sorted(SIZES), default="small", help="of the models and their rows")
    options.add_argument("--corpus", help="folder of a prepared corpus; without one the text is random")
    options.add_argument("--steps", type=int, default=40, help="steps of a row")
    options.add_argument("--teacher_steps", type=int, default=100, help="steps that the teacher is trained")
    options.add_argument("--repeats", type=int, default=3, help="rounds of all rows")
    args = options.parse_args()
    check_at_least(args, steps=2, teacher_steps=1, repeats=1)
    if args.corpus and not Path(args.corpus).is_dir():
        raise UserError(f"--corpus {args.corpus} is no folder; make one with tools/prepare_data.py")
    args.corpus = args.corpus and str(Path(args.corpus).resolve())
    out = args.out.resolve() if args.out else None
    os.chdir(ROOT)
    head = heading(size=f"{args.size}, {asdict(SIZES[args.size])}")
    with tempfile.TemporaryDirectory(prefix="bench_placements_") as folder:
        rows = measure(args, Path(folder), lambda rows: write_results(out, head, rows=rows))
    show(head, table(rows))


if __name__ == "__main__":
    sys.exit(main())
