"""The paper plan of many GPUs: its figures by hand."""

import importlib.util
import sys

import pytest

from ki_ds.config import ModelConfig
from ki_ds.planning.sizes import size_of
from tests.tiny import ROOT

TOKENS, RATE = 2048 * 512, 0.5 * 1e15  # a step's, and FLOP/s of a GPU in these tests


@pytest.fixture
def command(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("plan_scale", ROOT / "tools/plan_scale.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["plan_scale.py", "--peak_tflops", "1000", "--mfu", "0.5", *args])
        return module.main(), *capsys.readouterr()

    return run


def cells_of(out, name, gpus=None):
    """The cells behind the name (and the GPUs) of a row, in the first table or, without GPUs, in the second."""
    start = f"| {name} | {gpus} | " if gpus else f"| {name} | 0."
    (line,) = [line for line in out.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")][2 if gpus else 1 :]


def test_communication_beside_compute(command):
    code, out, _ = command("--gpus", "8", "64")
    assert code == 0
    student = size_of(ModelConfig(name="gpt_354m"), "causal", 50_265)
    teacher = size_of(ModelConfig(name="gpt_209m"), "causal", 50_265)
    whole, work = 2 * student.num_parameters, 6 * student.dense_parameters + 2 * teacher.dense_parameters
    sequences, compute, sent, moved, hidden, bare, *_ = cells_of(out, "gpt_354m <- gpt_209m", 64)
    assert sequences == "32 = 2 x 16"
    seconds = work * TOKENS / 64 / RATE
    assert compute == f"{1e3 * seconds:.0f}"
    passes = [3, 5, 4]  # all-reduce and all-gather; two all-reduces and one all-gather; two of each half
    assert sent == " / ".join(f"{each * whole * 63 / 64 / 1e9:.1f}" for each in passes)
    times = [each * whole * (7 / 8 / 450e9 + 7 / 64 / 50e9) for each in passes]
    assert moved == " / ".join(f"{1e3 * each:.0f}" for each in times)
    assert hidden == " / ".join([compute] * 3)
    assert bare == " / ".join(f"{1e3 * (seconds + each):.0f}" for each in times)
    alone = cells_of(out, "gpt_354m <- gpt_209m", 8)
    assert alone[2].startswith(f"{3 * whole * 7 / 8 / 1e9:.1f} / ")


def test_when_teacher_ranks_pay(command):
    """2 P_T / 6 P_S, of which the head stays with the students; hidden states, ten entries, all logits."""
    _, out, _ = command("--gpus", "8")
    student = size_of(ModelConfig(name="gpt_354m"), "causal", 50_265)
    teacher = size_of(ModelConfig(name="gpt_209m"), "causal", 50_265)
    share = 2 * teacher.dense_parameters / (6 * student.dense_parameters)
    head = 2 * teacher.vocab_size * teacher.hidden_size / (6 * student.dense_parameters)
    shown, signal, pace, link, *_, online, ranks, slowdown, pays = cells_of(out, "gpt_354m <- gpt_209m")
    assert shown == f"{share:.3f} ({head:.3f})"
    assert signal == "1,728 / 40 / 100,530"
    rows = RATE / (6 * student.dense_parameters)
    assert pace == f"{1728 * rows / 1e6:,.0f}"
    assert link == f"{1728 * rows * 4 / 50e9:.1%}"  # two teachers, four students each
    assert online == f"{1 + share:.3f}"
    assert ranks == f"{(1 + head) * 10 / 8:.3f} (2)"
    assert slowdown == f"{(1 + head) * 10 / 8 - share:.3f}"
    assert pays == "yes"
    assert cells_of(out, "roberta_large <- roberta_base")[1].startswith("230 / ")  # 15% of 2 x 768


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "12"], "powers of two"),
        (["--gpus", "4096"], "--gpus 4096 does not divide 2048 sequences"),
        (["--mfu", "0"], "--mfu 0 must be above 0"),
        (["--mfu", "1.5"], "a share of at most 1"),
    ],
)
def test_bad_input_is_one_line(command, options, message):
    code, out, err = command(*options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
