"""The examples run as they stand and show what they say."""

import re
import runpy
import sys

import pytest

from tests.tiny import ROOT, inherit, run

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def shown(name, capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def test_each_is_tested_here():
    assert EXAMPLES == ["own_loop.py", "own_teacher.py", "read_run.py"]
    assert all((ROOT / "examples" / name).read_text().count("\n") <= 45 for name in EXAMPLES)


@pytest.mark.parametrize("name", ["own_loop.py", "own_teacher.py"])
def test_a_loop_of_ones_own_learns(name, capsys, monkeypatch):
    losses = [float(text) for text in re.findall(r"cross-entropy ([\d.]+)", shown(name, capsys, monkeypatch))]
    assert len(losses) >= 4
    assert losses[-1] < losses[0] / 4


def test_runs_are_read(base, capsys, monkeypatch):
    alone = run(base / "alone", base / "corpus", train={"num_steps": 4, "eval_every": 2})
    inheriting = inherit(
        base, "inheriting", train={"num_steps": 8, "eval_every": 2}, inherit={"schedule": "linear", "steps": 6}
    )
    out = shown("read_run.py", capsys, monkeypatch, alone, inheriting)
    assert re.search(r"^alone: [\d,]+ parameters, seed 1$", out, re.M)
    assert len(re.findall(r"^  step ", out, re.M)) == 3 + 5
    assert re.search(r"(after \d+ steps: -?\d+% of the FLOPs saved|never reaches)", out.splitlines()[-1])
