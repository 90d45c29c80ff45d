"""The benchmark of the loss runs at its smallest size and writes what it prints."""

import json
import sys
from pathlib import Path

from tests import forked

ROOT = Path(__file__).resolve().parents[2]


def test_it_prints_a_table_and_writes_json(tmp_path):
    out = tmp_path / "loss.json"
    command = [sys.executable, "-m", "benchmarks.loss", "--size", "tiny", "--device", "cpu", "--repeats", "1"]
    done = forked.run(
        [*command, "--dtype", "float32", "--out", out], cwd=ROOT, capture_output=True, text=True, check=True
    )
    written = json.loads(out.read_text())
    rows = {row["name"]: row for row in written["results"]}
    assert {"ours, linear", "ours, top-10", "ours, full", "PyTorch eager", "bare GEMMs"} <= set(rows)
    assert rows["ours, linear"]["error"] < 1e-5
    assert rows["ours, full"]["error"] < 1e-5
    assert "skipped: torch.compile (needs a GPU)" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("| N 16")
