"""The table of the teacher's placements: what it says, and that every placement trains to the same losses."""

import json
import sys

import pytest

from benchmarks import placements
from tests.tiny import ROOT


@pytest.fixture
def bench(monkeypatch):
    """The tool as a module."""
    monkeypatch.chdir(ROOT)  # where it goes itself
    return placements


@pytest.fixture
def command(bench, monkeypatch, capsys, tmp_path):
    def run(*args):
        options = ["--size", "tiny", "--repeats", "1", "--out", tmp_path / "out.json", *args]
        monkeypatch.setattr(sys, "argv", ["placements.py", *map(str, options)])
        code = bench.main()
        written = json.loads((tmp_path / "out.json").read_text()) if (tmp_path / "out.json").exists() else None
        return code, *capsys.readouterr(), written

    return run


@pytest.mark.slow
def test_every_placement_trains_to_the_same_losses(command):
    code, out, _, written = command("--steps", "4", "--teacher_steps", "4")
    assert code == 0
    alone, online, overlap, ranks, hidden, topk = written["rows"]
    assert [row["loss"] for row in (overlap, ranks, hidden)] == [online["loss"]] * 3
    assert [row["valid_ce"] for row in (overlap, ranks, hidden)] == [online["valid_ce"]] * 3
    assert topk["valid_ce"] == pytest.approx(online["valid_ce"], rel=0.05)
    assert len({row["valid_ce"] for row in (alone, online, topk)}) == 3
    assert [len(row["teacher_mib"]) for row in written["rows"]] == [0, 0, 0, 1, 0, 0]
    assert ranks["bytes_per_row"] == 16 * 4
    assert hidden["bytes_per_row"] > 16 * 4
    assert 40 <= topk["bytes_per_row"] < hidden["bytes_per_row"]
    assert all(row["seconds"][0] > 0 for row in written["rows"])
    assert out.rstrip().splitlines()[-1].startswith("| cache, top-10 | ")


def test_the_table(bench):
    rows = [
        bench.Row("self-learning", {}, 1, 0.0, [0.2, 0.4], [700.0], [], 6.0, 6.0, 6.5),
        bench.Row("ranks, 1 teacher", {}, 2, 512.0, [0.3, 0.4], [710.0], [600.0], 5.0, 6.1, 6.25),
    ]
    assert bench.table(rows).splitlines()[2:] == [
        "| self-learning | 0 | 700 |  | 0.300 (0.200-0.400) | 1.00 | 6.000000 | 6.000000 | 6.500000 |",
        "| ranks, 1 teacher | 512 | 710 | 600 | 0.350 (0.300-0.400) | 1.25 | 5.000000 | 6.100000 | 6.250000 |",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--steps", "1"], "--steps 1 must be at least 2"), (["--corpus", "/nowhere"], "--corpus /nowhere is no folder")],
)
def test_bad_input_is_one_line(command, options, message):
    code, _, err, written = command(*options)
    assert (code, err.count("\n"), written) == (2, 1, None)
    assert message in err
