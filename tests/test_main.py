"""`ki-ds COMMAND` is the command's file under another name."""

import os
import subprocess
import sys

import pytest

from ki_ds.__main__ import COMMANDS, main
from tests.tiny import ROOT


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ki-ds", *arguments])
    return main(), *capsys.readouterr()


def test_every_command_is_listed_with_its_first_line(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys)
    assert code == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()[2:]}
    assert list(lines) == list(COMMANDS)
    assert (
        lines["prepare"] == "Turn text into a corpus folder: train and validation token stores, tokenizer, corpus.json."
    )
    assert all(len(line) > 20 for line in lines.values())


def test_no_tool_and_no_launcher_is_missing():
    made_for_this_project = {"architectures.py", "fault_matrix.py", "compare_schedules.py", "reproduce.py"}
    files = {path.name for folder in ("tools", "launchers") for path in (ROOT / folder).glob("*.[ps][yh]")}
    assert files - made_for_this_project == {name.rpartition("/")[2] for name in COMMANDS.values() if "." in name}


@pytest.mark.parametrize("arguments", [("prepar",), ("bench", "speed")])
def test_an_unknown_name_is_one_line_that_lists_the_known(monkeypatch, capsys, arguments):
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert f"'{arguments[-1]}' is no" in err


def test_a_tool_says_the_same_as_its_file(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capsys, "inspect", "--help")
    assert ended.value.code == 0
    by_name = capsys.readouterr().out
    command = [sys.executable, "tools/inspect_data.py", "--help"]
    assert by_name == subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_an_error_keeps_its_line_and_exit_code(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capsys, "inspect", "nowhere/train")
    assert ended.value.code == 2
    assert "nowhere/train" in capsys.readouterr().err


def test_launchers_are_run_by_bash_with_this_python(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(os, "execvpe", lambda *given: seen.append(given) or (_ for _ in ()).throw(SystemExit(0)))
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "train", "--optim.lr", "3e-4")
    ((program, words, environment),) = seen
    assert (program, words[1:]) == ("bash", [str(ROOT / "launchers/train_ki.sh"), "--optim.lr", "3e-4"])
    assert environment["PYTHON"] == sys.executable


def test_benchmarks_are_listed_and_run(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "bench")
    assert code == 0
    assert {"loss", "step", "growth"} <= {line.split()[0] for line in out.splitlines()[2:]}
    assert "harness" not in out
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capsys, "bench", "plan", "--help")
    assert ended.value.code == 0
    assert "--kept" in capsys.readouterr().out
