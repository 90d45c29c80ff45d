"""What every benchmark shares: rows in turns, jobs of ranks, medians with their spread, Markdown tables, JSON.

Figures of one machine at one moment are compared with nothing but each other. So rows take turns, A B C A B C ...,
ratios are taken turn by turn before their median, and a table shows the median with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from ki_ds.errors import UserError
from ki_ds.ranks.world import free_port

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


class Named(Protocol):
    """A row of a table."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


# --- command lines ----------------------------------------------------------------------------------------------


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, with its docstring as help and the option `--out`."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="JSON file for the results")
    return options


def check_at_least(args: argparse.Namespace, **lowest: float) -> None:
    """Raise UserError for an option below its lowest value; None is no value."""
    for name, low in lowest.items():
        if (value := getattr(args, name)) is not None and value < low:
            raise UserError(f"--{name} {value} must be at least {low}")


def words(options: dict[str, Any]) -> list[str]:
    """Options as the words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


# --- jobs -------------------------------------------------------------------------------------------------------


def environment(*, rank: int = 0, num_ranks: int = 1, port: str = "", num_threads: int = 1) -> dict[str, str]:
    """The environment of one rank of a job on this host, in which this package and ours are found."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    paths = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    own = {name: str(value) for name, value in place.items()} | paths
    return {**os.environ, **own, "MASTER_PORT": port or free_port(), "OMP_NUM_THREADS": str(num_threads)}


def run_ranks(
    command: Sequence[str], *, num_ranks: int = 1, env: dict[str, str] | None = None
) -> list[tuple[str, float]]:
    """Run `python COMMAND...` once a rank; for each the last line that it printed and its peak of memory in MiB.

    Raises:
        UserError: a rank failed; it holds the last line.
    """
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(rank=rank, num_ranks=num_ranks, port=port) | (env or {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    ended, failed = [], False
    for process in processes:
        assert process.stdout is not None
        lines = [line for line in process.stdout.read().splitlines() if line.strip()] or ["no word"]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        failed |= process.returncode != 0
        ended.append((lines[-1], usage.ru_maxrss / 1024))
    if failed:
        last = next(line for process, (line, _) in zip(processes, ended, strict=True) if process.returncode)
        raise UserError(f"{' '.join(command[:3])} failed: {last.removeprefix('error: ')[:300]}")
    return ended


def in_turns(rows: Sequence[Row], repeats: int) -> Iterator[tuple[int, Row]]:
    """(turn, row) of all rows in turns, each named as it begins."""
    for repeat in range(repeats):
        for row in rows:
            print(f"{repeat + 1}/{repeats} {row.name}", flush=True)
            yield repeat, row


# --- figures ----------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """Median (smallest-largest)."""
    if not values:
        return ""
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}-{high})"


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Ratios turn by turn."""
    return [value / measure for value, measure in zip(values, base, strict=True)]


def median_ratio(values: Sequence[float], base: Sequence[float], digits: int = 2) -> str:
    """The median of the ratios, turn by turn."""
    return f"{statistics.median(ratios(values, base)):.{digits}f}"


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in lines)])


# --- results ----------------------------------------------------------------------------------------------------


def heading(**facts: Any) -> dict[str, Any]:
    """What a figure is worth nothing without: machine, versions, date, command, and the `facts` of this benchmark."""
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    date = datetime.now(UTC).date().isoformat()
    return {"machine": machine, "torch": torch.__version__, **facts, "date": date, "command": " ".join(sys.argv)}


def write_results(out: Path | None, head: dict[str, Any], **results: Iterable[Any]) -> None:
    """Write dataclasses (or dicts) by name as JSON; a run that is cut short keeps what was written last."""
    if out is not None:
        shown = {
            name: [each if isinstance(each, dict) else asdict(each) for each in items]
            for name, items in results.items()
        }
        out.write_text(json.dumps({**head, **shown}, indent=1, default=str) + "\n", encoding="utf-8")


def show(head: dict[str, Any], *parts: str) -> None:
    """Print the heading in a line and the tables."""
    print("\n" + ", ".join(f"{name} {value}" for name, value in head.items() if name != "command"))
    for part in parts:
        print("\n" + part)


@contextlib.contextmanager
def cores(number: int | None) -> Iterator[int]:
    """Run with the first `number` cores of this process (None: all); how many they are."""
    there = sorted(os.sched_getaffinity(0))
    if number and number > len(there):
        raise UserError(f"--cores {number} is more than the {len(there)} that are there")
    os.sched_setaffinity(0, there[:number])
    try:
        yield number or len(there)
    finally:
        os.sched_setaffinity(0, there)


Measured = TypeVar("Measured")


def timed(call: Callable[[], Measured], clock: Callable[[], float]) -> tuple[float, Measured]:
    """(seconds by `clock`, what the call returned)."""
    began = clock()
    value = call()
    return clock() - began, value
