"""The benchmark of the data step runs on a little text and prints a table last."""

import importlib.util
import json
import sys

import pytest

from benchmarks import prepare
from ki_ds.data.tokenize import train_tokenizer
from tests import forked
from tests.tiny import ROOT, environment


@pytest.fixture
def inputs(tmp_path):
    """Text and a tokenizer as the command wants them."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat\nand so on\n\na dog\n\n" * 50)
    train_tokenizer([["the cat sat on the mat"]] * 3, 280, out_dir=tmp_path / "tokenizer")
    return ["--text", tmp_path / "text.txt", "--tokenizer", tmp_path / "tokenizer", "--repeats", "1"]


def test_it_measures_ours_and_skips_the_peer_by_name(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, inputs), "--megabytes", "0.001"])
    assert prepare.main() == 0
    out, err = capsys.readouterr()
    assert "skipped: datasets.map (pip install datasets)" in err
    name, *cells = [cell.strip() for cell in out.splitlines()[-1].strip("|").split("|")]
    assert name == "ours"
    assert all(float(cells[i]) > 0 for i in (1, 2, 4, 5, 7))


@pytest.mark.slow
def test_both_count_the_same_tokens(inputs, tmp_path):
    command = [sys.executable, "-m", "benchmarks.prepare", *inputs, "--out", tmp_path / "rows.json"]
    done = forked.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["ours", "datasets.map, rows are lines", "datasets.map, rows are documents"]
    assert rows["ours"]["num_tokens"] == rows["datasets.map, rows are lines"]["num_tokens"] > 0
    assert all(0 < row["pss"] <= row["rss"] for row in rows.values())
    assert done.stdout.splitlines()[-1].startswith("| datasets.map, rows are documents |")
