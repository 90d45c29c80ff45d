"""The benchmark of the cache: its table, and that a cached answer is read faster than a teacher gives it."""

import json
import sys

import pytest

from benchmarks import cache


@pytest.fixture
def bench(monkeypatch, tmp_path, capsys):
    """The benchmark at its smallest: (exit code, stdout, stderr, what it wrote)."""

    def call(*arguments):
        out = tmp_path / "bench.json"
        small = ["--size", "tiny", "--num_batches", "2", "--repeats", "1", "--micro_batch_size", "2"]
        monkeypatch.setattr(sys, "argv", ["cache.py", *small, "--out", str(out), *arguments])
        code = cache.main()
        said = capsys.readouterr()
        return code, said.out, said.err, json.loads(out.read_text()) if out.exists() else None

    return call


def test_the_benchmark_prints_a_table_last(bench):
    code, said, _, written = bench()
    rows = {row["name"]: row for row in written["rows"]}
    assert code == 0
    assert len(rows) == 5
    assert said.rstrip().splitlines()[-5].startswith("| the teacher, online |  |")
    assert rows["cache, top-10"]["bytes_per_row"] > 40
    assert all(len(row["seconds"]) == 2 for row in rows.values())
    fastest = min(rows["the teacher, online"]["seconds"])
    assert min(rows["cache, top-10"]["seconds"]) < fastest


def test_the_benchmark_refuses_what_it_cannot_measure(bench):
    code, _, err, _ = bench("--repeats", "0")
    assert (code, err) == (2, "error: --repeats 0 must be at least 1\n")
