"""The table of what a save holds up: what it says, and that its rows train and save as they are named."""

import argparse
import json
import sys

import pytest

from benchmarks import save
from benchmarks.text import write_splits


@pytest.fixture
def bench(monkeypatch):
    """The tool as a module."""
    return save


@pytest.fixture
def command(bench, monkeypatch, capsys, tmp_path):
    def run(*args):
        options = ["--size", "tiny", "--repeats", "1", "--out", tmp_path / "out.json", *args]
        monkeypatch.setattr(sys, "argv", ["save.py", *map(str, options)])
        code = bench.main()
        written = json.loads((tmp_path / "out.json").read_text()) if (tmp_path / "out.json").exists() else None
        return code, *capsys.readouterr(), written

    return run


@pytest.mark.slow
def test_a_row_saves_as_often_as_it_says(bench, tmp_path):
    write_splits(tmp_path / "text", 20_000, vocab_size=640)
    row = bench.Row("in the background", {"train.save_in_background": True})
    args = argparse.Namespace(zero="zero1", saves=2, save_every=1)
    bench.train(row, bench.arguments(bench.SIZES["tiny"], row, tmp_path, args), tmp_path / "run")
    assert len(row.held) == 2
    assert sum(row.held) < row.wall[0]
    assert row.cpu[0] > 0
    assert row.rss_mib[0] > 100
    assert 0.5 < row.checkpoint_mb < 5


@pytest.mark.slow
def test_every_row_of_the_table(command):
    code, out, err, written = command("--saves", "2", "--save_every", "1", "--cores", "1")
    assert code == 0, err
    end, at_once, background = written["rows"]
    assert [len(row["held"]) for row in (end, at_once, background)] == [0, 2, 2]
    assert end["checkpoint_mb"] == pytest.approx(background["checkpoint_mb"], rel=1e-3)
    assert written["cores"] == 1
    assert out.rstrip().splitlines()[-1].startswith("| in the background |")


def test_the_table(bench):
    rows = [
        bench.Row("at the end only", {}, [], [10.0, 20.0], [8.0, 8.0], [500.0, 500.0], 490.0),
        bench.Row("at once", {}, [1.0, 2.0, 4.0], [12.0, 25.0], [10.0, 12.0], [500.0, 510.0], 490.0),
    ]
    assert bench.table(rows).splitlines()[2:] == [
        "| at the end only | 490 | 0 |  | 15.0 (10.0-20.0) | 1.00 | 8.0 (8.0-8.0) | 1.00 | 500 (500-500) |",
        "| at once | 490 | 3 | 2.00 (1.00-4.00) | 18.5 (12.0-25.0) | 1.23 | 11.0 (10.0-12.0) | 1.38 | 505 (500-510) |",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--saves", "0"], "--saves 0 must be"), (["--cores", "4096"], "--cores 4096 is more than the")],
)
def test_bad_input_is_one_line(command, options, message):
    code, _, err, written = command(*options)
    assert (code, err.count("\n"), written) == (2, 1, None)
    assert message in err
