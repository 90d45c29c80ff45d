#!/usr/bin/env python3
"""The promises of docs/reliability.md, tested one row after another, as one table with the figures measured: see
`make test-faults`. `--short` leaves out what is marked slow."""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ki_ds.cli import ends_cleanly
from ki_ds.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# row: promise, what of the test suite holds it (pytest's names, or -k expressions behind a blank)
ROWS: dict[int, tuple[str, list[str]]] = {
    1: (
        "resume is bitwise the same run",
        ["tests/training/test_loop.py -k bitwise", "tests/checkpoints/test_saver.py -k 'as_it_was or two_ranks'"],
    ),
    2: (
        "other ranks or stage on resume",
        ["tests/engine/test_state.py", "tests/training/test_loop.py -k another_", "tests/data/test_batches.py"],
    ),
    3: ("other loader workers", ["tests/data/test_batches.py -k worker"]),
    4: (
        "SIGKILL during a save",
        ["tests/checkpoints/test_checkpoint.py -k killed", "tests/checkpoints/test_saver.py -k dies"],
    ),
    5: (
        "bit rot in a checkpoint",
        ["tests/checkpoints/test_checkpoint.py -k flipped", "tests/training/test_loop.py -k damaged"],
    ),
    6: ("missing or cut files", ["tests/checkpoints/test_checkpoint.py -k 'truncated or intact'"]),
    7: (
        "disk full",
        [
            "tests/checkpoints/test_checkpoint.py -k 'full or error'",
            "tests/checkpoints/test_saver.py -k 'full or error'",
        ],
    ),
    8: (
        "SIGTERM, SIGUSR1, Ctrl-C",
        [
            "tests/ranks/test_preemption.py",
            "tests/ranks/test_watchdog.py -k signalled",
            "tests/checkpoints/test_saver.py -k signal",
        ],
    ),
    9: (
        "a rank or host dies, stops, hangs",
        ["tests/ranks/test_watchdog.py -k 'not signalled'", "tests/jobs/test_supervisor.py", "tests/multinode"],
    ),
    10: ("NaN, Inf, spikes", ["tests/engine/test_guard.py"]),
    11: ("straggler named", ["tests/ranks/test_stragglers.py"]),
    12: ("hostile pickle", ["tests/convert/test_safe_pickle.py", "tests/checkpoints/test_checkpoint.py -k unpickled"]),
    13: (
        "malformed input",
        [
            *("tests/data/test_store_fuzz.py", "tests/test_settings_fuzz.py", "tests/teachers/test_cache_files.py"),
            *("tests/config/test_schema.py", "tests/jobs/test_preflight.py"),
        ],
    ),
    14: ("data or tokenizer changed", ["tests/training/test_setup.py -k 'change or vocabulary'"]),
    15: ("foreign teacher cache", ["tests/teachers/test_cache.py", "tests/teachers/test_cache_files.py"]),
    16: ("the teacher stays as it is", ["tests/teachers/test_online.py"]),
    17: ("a teacher fails", ["tests/teachers/test_ranks.py"]),
}


def test(selection: str, *, short: bool) -> tuple[int, int, int, list[str]]:
    """(passed, failed, skipped, figures) of one selection of tests."""
    file, _, expression = selection.partition(" -k ")
    marks = "not gpu" + (" and not slow" if short else "")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", marks, f"--junitxml={report}", file]
        command += ["-k", expression.strip("'")] if expression else []
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if not report.exists():
            raise UserError(f"{selection} could not be run; see `python -m pytest {selection}`")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    for case in failed:
        print(f"  not kept: {file}, {case.get('name')}", flush=True)
    skipped = sum(case.find("skipped") is not None for case in cases)
    figures = [p.get("value", "") for case in cases for p in case.iter("property") if p.get("name") == "figure"]
    return len(cases) - len(failed) - skipped, len(failed), skipped, figures


@ends_cleanly
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="without the tests that are marked slow")
    parser.add_argument("--rows", type=int, nargs="+", choices=sorted(ROWS), default=sorted(ROWS), help="only these")
    arguments = parser.parse_args()
    table = Table("row", "promise", "kept", "figures", "s", show_lines=True)
    all_kept = True
    for row in arguments.rows:
        promise, selections = ROWS[row]
        began = time.monotonic()
        found = [test(selection, short=arguments.short) for selection in selections]
        passed, bad, skipped = (sum(numbers) for numbers in list(zip(*found, strict=True))[:3])
        figures = [figure for each in found for figure in each[3]]
        kept = f"{passed}/{passed + bad}" + (f", {skipped} skipped" if skipped else "")
        all_kept &= passed > 0 and not bad
        print(f"row {row}: {promise}: {kept} tests", flush=True)
        table.add_row(str(row), promise, kept, "\n".join(figures), f"{time.monotonic() - began:.0f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0 if all_kept else 1


if __name__ == "__main__":
    sys.exit(main())
