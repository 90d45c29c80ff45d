"""The benchmark of whole steps: its rows compute the same thing, its accounts are right, its table is what it says."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import step

CHECKOUT = Path(os.environ.get("KI_DS_RELEASED", "/nowhere"))
released = pytest.mark.skipif(not CHECKOUT.is_dir(), reason="the released code (KI_DS_RELEASED) is not there")


@pytest.fixture
def bench(monkeypatch):
    """The tool as a module."""
    monkeypatch.delenv("KI_DS_RELEASED", raising=False)
    return step


@pytest.fixture
def command(bench, monkeypatch, capfd, tmp_path):
    def run(*args):
        options = ["--size", "tiny", "--turns", "2", "--steps", "1", "--profile_steps", "1", "--num_threads", "1"]
        options += ["--out", tmp_path / "out.json", *args]
        monkeypatch.setattr(sys, "argv", ["step.py", *map(str, options)])
        code = bench.main()
        written = json.loads((tmp_path / "out.json").read_text()) if (tmp_path / "out.json").exists() else None
        return code, *capfd.readouterr(), written

    return run


@pytest.mark.slow
def test_ours_and_the_plain_loop_compute_the_same(command, tmp_path):
    """Same weights, batches and objective; a profile of each with its trace; the table last."""
    code, out, _, written = command("--only", "inheriting|masked rows|GEMM", "--profile", tmp_path / "traces")
    assert code == 0
    ours, loop, gemm = written["rows"]
    assert [row["name"] for row in written["rows"]] == ["ours, inheriting", "PyTorch loop, masked rows", "bare GEMM"]
    assert ours["losses"] == pytest.approx(loop["losses"], rel=1e-5)
    assert len(set(ours["losses"])) == written["num_warm_steps"]
    for row in (ours, loop):
        assert row["tokens"] == 4 * 32
        assert len(row["seconds"]) == 2
        assert row["peak_mib"] > 1
        for name in ("data", "teacher", "student forward", "loss", "backward", "optimizer"):
            assert row["parts"][name] > 0, name
    assert 1e8 < 2 * 2048**3 / min(gemm["seconds"]) < 1e15
    lines = out.rstrip().splitlines()
    assert lines[-1].startswith("| bare GEMM |")
    assert "an online teacher's memory: 0.1 MiB of weights + " in out
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == [
        "PyTorch_loop_masked_rows.json",
        "ours_inheriting.json",
    ]


@pytest.mark.slow
def test_every_row_of_a_masked_model(command):
    code, out, _, written = command()
    assert code == 0
    assert "skipped: released trainer (--released PATH takes a checkout" in out
    rows = {row["name"]: row for row in written["rows"]}
    assert rows["PyTorch loop, all logits"]["losses"] == pytest.approx(rows["ours, inheriting"]["losses"], rel=1e-5)
    assert rows["HF Trainer"]["losses"] == pytest.approx(rows["ours, inheriting"]["losses"], rel=0.05)  # other order
    assert "inheriting over self-learning: time " in out


@released
@pytest.mark.slow
def test_the_released_trainer_beside_ours(command):
    code, _, _, written = command("--only", "released|inheriting", "--released", CHECKOUT)
    assert code == 0
    assert [row["name"] for row in written["rows"]] == ["ours, inheriting", "released trainer"]
    assert all(row["tokens"] == 4 * 32 for row in written["rows"])


def test_the_account_of_a_forward(bench):
    """Counted by hand: 4 x 32 tokens, of which 15% are labelled; d 32, FFN 64, two layers, 640 classes."""
    size = bench.SIZES["tiny"]
    lm = bench.build(size, size.student, seed=1)
    found = bench.account(lm, size)
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 2 * 2 * 32
    head = 640 * 32 + 640 + 32 * 32 + 32 + 2 * 32
    assert found.body == 2 * 128 * (2 * layer + 2 * 32)
    assert found.head == pytest.approx(2 * 0.15 * 128 * head)
    assert found.attention == 2 * 2 * 2 * 32 * 128 * 32
    assert found.dense_parameters == 2 * layer + 2 * 32 + head
    causal = bench.SIZES["cpu_causal"]
    account = bench.account(bench.build(causal, causal.student, seed=1), causal)
    assert account.head == 2 * 16 * 128 * 50304 * 256
    assert account.attention == 0.5 * 2 * 2 * 4 * 256 * 16 * 128 * 128


def test_memory_of_a_teacher(bench):
    size = bench.SIZES["cpu"]
    student = bench.build(size, size.student, seed=1)
    teacher = bench.Account(1.0, 1.0, 1.0, 1, 4 * 2**20)
    weights, chunk = bench.teacher_memory(teacher, student, size)
    assert weights == 4.0
    assert chunk == 307 * 50304 * 4 / 2**20


def test_ratios_are_taken_turn_by_turn(bench):
    rows = {
        name: bench.Row(name, seconds, [s / 2 for s in seconds], 1000.0, 10.0)
        for name, seconds in {
            "ours, inheriting": [0.2, 0.4, 0.6],
            "ours, self-learning": [0.1, 0.4, 0.5],
            "HF Trainer": [0.4, 1.2, 0.6],
            "bare GEMM": [0.1, 0.1, 0.1],
        }.items()
    }
    student, teacher = bench.Account(6e9, 1e9, 1e9, 3000, 0), bench.Account(1e9, 0.0, 0.2e9, 900, 0)
    lines = bench.ratio_lines(rows, student, teacher)
    assert lines == [
        "inheriting over self-learning: time 1.200 (1.000-2.000), CPU 1.200 (1.000-2.000)",
        "  FLOPs, nominal 1 + 2 P_T / 6 P_S: 1.100; times 1.05: 1.155",
        "  FLOPs, as computed (heads on labelled rows): 1.050; times 1.05: 1.103",
        "HF Trainer over ours, inheriting: time 2.00 (1.00-3.00), CPU 2.00 (1.00-3.00)",
    ]
    table = bench.table(list(rows.values()), student, teacher, 1e12).splitlines()
    assert table[2] == "| ours, inheriting | 400.0 (200.0-600.0) | 200.0 | 2,500 | 1.00 | 6.0% | 6.3% | 10 |"
    assert table[4] == "| HF Trainer | 600.0 (400.0-1,200.0) | 300.0 | 1,667 | 0.50 | 4.0% | 4.2% | 10 |"
    assert table[5].startswith("| bare GEMM | 100.0 (100.0-100.0) | 50.0 | 0.172 TFLOP/s |")


def test_rows_that_cannot_run_are_skipped_by_name(bench, capfd):
    causal, masked = bench.SIZES["cpu_causal"], bench.SIZES["cpu"]
    assert bench.unavailable("PyTorch loop, masked rows", causal, None) == "every row of a causal model is labelled"
    assert bench.unavailable("released trainer", causal, Path("x")) == "compared on a CPU, for mlm in fp32"
    assert "--released PATH" in bench.unavailable("released trainer", masked, None)
    assert bench.unavailable("HF Trainer", masked, None) is None
    job = {"num_threads": 1, "folder": "/nowhere"}
    assert bench.start_workers(["bare GEMM"], job, masked, None) == []
    assert "skipped: bare GEMM (KeyError: 'precision')" in capfd.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_sizes_of_a_gpu_are_skipped_without_one(command):
    code, out, _, written = command("--size", "gpt_354m")
    assert (code, written) == (0, None)
    assert "skipped: gpt_354m (needs a GPU)" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--turns", "0"], "--turns 0 must be at least 1"),
        (["--only", "jax"], "no row has 'jax' in its name"),
        (["--released", "/nowhere"], "has no fairseq/trainer.py; name a checkout"),
    ],
)
def test_bad_input_is_one_line(command, options, message):
    code, _, err, written = command(*options)
    assert (code, err.count("\n"), written) == (2, 1, None)
    assert message in err
