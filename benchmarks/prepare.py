#!/usr/bin/env python3
"""Time and memory from text to token ids on disk, next to `datasets.map` with a fast tokenizer; one table last.

    python -m benchmarks.prepare --text FILE --tokenizer DIR [--num_workers N]

Each row is a process of its own on the same plain text (the first --megabytes of FILE), in turns, --repeats times.
"work" is the wall time after imports (and, for `datasets.map`, after its tokenizer is loaded) until the ids are on
disk, "CPU" the CPU time of all processes in that span, which other load on the machine disturbs least, "whole" the
wall time of the command. Ours also cleans, adds eos, splits off validation and hashes the files.
Memory is the largest sum over the process and all its descendants at one moment, read from /proc/PID/smaps_rollup
every 20 ms: PSS counts a shared page once, RSS in every process. Memory is given of the run that took least.
The peer takes text rows as lines or as documents (between blank lines), batches of its default 1,000 rows, and
num_proc = N; it is skipped by name when the package datasets is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.harness import heading, markdown, parser, show, write_results
from ki_ds.cli import ends_cleanly
from ki_ds.data.corpora import Corpus
from ki_ds.data.tokenize import load_tokenizer, save_tokenizer
from ki_ds.errors import UserError

CLOCK = """
import resource, sys, time
def clock():
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(part.ru_utime + part.ru_stime for part in usage)
def report(start, num_tokens):
    print(*(after - before for before, after in zip(start, clock())), num_tokens)
"""

OURS = """
from ki_ds.data.prepare import build_store
from ki_ds.data.tokenize import load_tokenizer
text, tokenizer, out, workers = sys.argv[1:]
load_tokenizer(tokenizer)
start = clock()
corpus = build_store([text], tokenizer, out, num_workers=int(workers), show_progress=False)
report(start, sum(count["tokens"] - count["items"] for count in corpus.info["counts"].values()))
"""

PEER = """
from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer
text, folder, out, workers, rows = sys.argv[1:]
disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(folder)
def encode(batch):
    return tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
start = clock()
data = load_dataset("text", data_files=text, sample_by=rows, split="train", cache_dir=out)
data = data.map(encode, batched=True, num_proc=int(workers), remove_columns=["text"])
report(start, len(data.data.column("input_ids").combine_chunks().values))
"""

Run = tuple[float, float, float, float, float, int]  # work, CPU and whole seconds, peak PSS and RSS in MiB, tokens


@dataclass(frozen=True)
class Row:
    """Medians over the repeats with the fastest and slowest, in seconds; memory in MiB."""

    name: str
    work_seconds: tuple[float, float, float]
    whole_seconds: float
    cpu_seconds: float
    pss: float
    rss: float
    num_tokens: int


def prepare_rows(
    text: Path, tokenizer: Path, *, num_workers: int = 2, megabytes: float = 10, repeats: int = 3
) -> list[Row]:
    """The rows of the table, ours first; the peer's are missing where `datasets` is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_text(text, folder / "text.txt", int(megabytes * 1e6))
        save_tokenizer(load_tokenizer(tokenizer), folder / "tokenizer")
        commands = {"ours": [OURS, str(folder / "text.txt"), str(tokenizer.resolve())]}
        if importlib.util.find_spec("datasets") is None:
            print("skipped: datasets.map (pip install datasets)", file=sys.stderr)
        else:
            for rows in ("line", "paragraph"):
                title = f"datasets.map, rows are {'lines' if rows == 'line' else 'documents'}"
                commands[title] = [PEER, str(folder / "text.txt"), str(folder / "tokenizer")]
        runs: dict[str, list[Run]] = {title: [] for title in commands}
        for repeat in range(repeats):
            for number, (title, command) in enumerate(commands.items()):
                rest = [] if title == "ours" else [("line", "paragraph")[number - 1]]
                arguments = [*command, str(folder / f"out{number}_{repeat}"), str(num_workers), *rest]
                runs[title].append(_measured([sys.executable, "-c", CLOCK + arguments[0], *arguments[1:]]))
    return [_row(title, measured) for title, measured in runs.items()]


def _write_text(source: Path, target: Path, num_characters: int) -> None:
    """The first documents of a source as plain text, up to about `num_characters`."""
    with target.open("w", encoding="utf-8") as file:
        for document in Corpus([source]):
            file.write(document.text.rstrip() + ("\n\n" if document.ends else "\n"))
            if file.tell() >= num_characters:
                break


def _measured(command: list[str]) -> Run:
    """The measures of a command that prints seconds and CPU seconds of its work and its number of tokens."""
    start = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    pss = rss = 0
    while process.poll() is None:
        sums = _memory(process)
        pss, rss = max(pss, sums[0]), max(rss, sums[1])
        time.sleep(0.02)
    whole = time.perf_counter() - start
    out, err = process.communicate()
    if process.returncode:
        raise UserError(f"a benchmark's process failed ({err.strip().splitlines()[-1]}); run it alone")
    work, cpu, num_tokens = out.split()[-3:]
    return float(work), float(cpu), whole, pss / 1024, rss / 1024, int(num_tokens)


def _memory(process: psutil.Process) -> tuple[int, int]:
    """(PSS, RSS) in KiB, summed over a process and its descendants."""
    pss = rss = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0, 0
    for member in family:
        try:
            lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has just ended
            continue
        sizes = {line.split()[0]: int(line.split()[1]) for line in lines}
        pss, rss = pss + sizes["Pss:"], rss + sizes["Rss:"]
    return pss, rss


def _row(title: str, runs: list[Run]) -> Row:
    work, cpu, whole, pss, rss, num_tokens = zip(*runs, strict=True)
    seconds = (statistics.median(work), min(work), max(work))
    return Row(title, seconds, statistics.median(whole), statistics.median(cpu), min(pss), min(rss), num_tokens[0])


def table(rows: list[Row]) -> str:
    """The rows, with ratios to the first."""
    columns = ["", "work, s (fastest-slowest)", "ratio", "CPU, s", "ratio", "whole, s"]
    columns += ["PSS, MiB", "ratio", "RSS, MiB", "ratio", "tokens"]

    def cells(row: Row) -> list[str]:
        first, (median, fastest, slowest) = rows[0], row.work_seconds
        return [
            row.name,
            f"{median:.2f} ({fastest:.2f}-{slowest:.2f})",
            f"{median / first.work_seconds[0]:.2f}",
            f"{row.cpu_seconds:.2f}",
            f"{row.cpu_seconds / first.cpu_seconds:.2f}",
            f"{row.whole_seconds:.2f}",
            f"{row.pss:.0f}",
            f"{row.pss / first.pss:.1f}",
            f"{row.rss:.0f}",
            f"{row.rss / first.rss:.1f}",
            f"{row.num_tokens:,}",
        ]

    return markdown(columns, map(cells, rows))


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    options = parser(__doc__)
    options.add_argument("--text", type=Path, required=True, help="any source of tools/prepare_data.py")
    options.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    options.add_argument("--num_workers", type=int, default=2, help="processes or threads")
    options.add_argument("--megabytes", type=float, default=10, help="millions of characters of text to take")
    options.add_argument("--repeats", type=int, default=3, help="runs of each row")
    args = options.parse_args()
    rows = prepare_rows(
        args.text, args.tokenizer, num_workers=args.num_workers, megabytes=args.megabytes, repeats=args.repeats
    )
    head = heading(num_workers=args.num_workers, megabytes=args.megabytes)
    write_results(args.out, head, rows=rows)
    show(head, table(rows))


if __name__ == "__main__":
    sys.exit(main())
