"""The benchmark of the data step runs at a small size and writes what it prints; its text is what it says."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data, text
from ki_ds.data.describe import inspect
from ki_ds.data.store import open_store

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = Path(os.environ.get("KI_DS_RELEASED", "/nowhere"))
released = pytest.mark.skipif(not CHECKOUT.is_dir(), reason="the released code (KI_DS_RELEASED) is not there")


@pytest.fixture
def bench(monkeypatch):
    """The tool as a module, with small texts."""
    monkeypatch.setattr(data, "LOADER_TOKENS", 200_000)
    monkeypatch.setattr(data, "START_TOKENS", {"20 MB": 100_000, "2 GB": 200_000})
    return data


@pytest.fixture
def command(bench, monkeypatch, capsys, tmp_path):
    def run(*args):
        options = ["--repeats", "1", "--seconds", "0.05", "--folder", tmp_path, "--out", tmp_path / "out.json", *args]
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, options)])
        code = bench.main()
        written = json.loads((tmp_path / "out.json").read_text()) if (tmp_path / "out.json").exists() else None
        return code, *capsys.readouterr(), written

    return run


def test_the_text_is_a_fairseq_folder_with_lines_like_prose(bench, tmp_path):
    bench.write_text(tmp_path, 300_000)
    bench.write_text(tmp_path, 20_000, split="valid")
    train, valid = inspect(tmp_path)
    assert (train.kind, train.dtype, train.vocab_size) == ("fairseq", "uint16", bench.VOCAB_SIZE)
    assert train.num_tokens == pytest.approx(300_000, rel=0.1)
    assert valid.num_tokens == pytest.approx(20_000, rel=0.2)
    assert 25 < train.median_length < 35
    assert (train.min_length, train.max_length) == (1, text.MAX_LINE)
    assert train.num_items / train.num_documents == pytest.approx(text.LINES_A_DOCUMENT, rel=0.1)
    store = open_store(tmp_path / "train")
    ends = np.cumsum(store.sizes) - 1
    assert (store.tokens[ends] == 2).all()
    inner = np.delete(store.tokens, ends)
    assert inner.min() >= 4
    assert inner.max() < text.SPECIAL_IDS.mask


@pytest.mark.slow
def test_loader_rows(command, tmp_path):
    code, out, _, written = command("--only", "128, in process")
    assert code == 0
    assert [row["name"] for row in written["rows"]] == ["mlm 128, in process", "causal 128, in process"]
    for row in written["rows"]:
        (result,) = row["results"]
        assert min(result["samples_per_second"], result["tokens_per_cpu_second"]) > 0
        assert 64 < result["tokens_per_second"] / result["samples_per_second"] <= 128
    assert "skipped: the released iterator (--released PATH" in out
    assert out.rstrip().splitlines()[-1].startswith("| causal 128, in process | ")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.slow
def test_start_rows(command):
    code, out, _, written = command("--only", "start, 2 GB", "--big")
    assert code == 0
    assert [row["name"] for row in written["rows"]] == ["start, 2 GB, no index", "start, 2 GB, again"]
    for row in written["rows"]:
        (result,) = row["results"]
        assert 0 < result["seconds"] < 60
        assert 20 < result["private_mib"] < result["resident_mib"]
    assert out.rstrip().splitlines()[-1].startswith("| start, 2 GB, again | ")


def test_the_ratio_is_that_of_the_same_setting(bench):
    rows = [
        bench.Row(
            "mlm 512, in process",
            {},
            [{"tokens_per_second": v, "samples_per_second": 1.0, "tokens_per_cpu_second": 7e3} for v in (50, 60, 99)],
        ),
        bench.Row("mlm 512, in process, released", {}, [{"tokens_per_second": v} for v in (9, 10, 12)]),
        bench.Row("start, 20 MB, again", {}, [{"seconds": 1.5, "resident_mib": 200.4, "private_mib": 100.0}]),
    ]
    assert bench.table(rows).split("\n")[2:] == [
        "| mlm 512, in process | 60 (50-99) | 6.0 | 7,000 (7,000-7,000) | 1 (1-1) |  |  |  |",
        "| mlm 512, in process, released | 10 (9-12) |  |  |  |  |  |  |",
        "| start, 20 MB, again |  |  |  |  | 1.50 | 200 | 100 |",
    ]


@released
def test_the_released_iterator_beside_ours(command):
    code, out, _, written = command("--only", "mlm 512, in process", "--released", CHECKOUT)
    assert code == 0
    ours, theirs = (row["results"][0] for row in written["rows"])
    for result in (ours, theirs):  # which comes batch by batch of equal lengths
        assert 400 < result["tokens_per_second"] / result["samples_per_second"] <= 512
    assert "skipped" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "repeats=0 and seconds=0.05 must be above 0"),
        (["--only", "start, 2 GB"], "no row has 'start, 2 GB' in its name"),
        (["--only", "gpu"], "no row has 'gpu' in its name"),
        (["--released", "{empty}"], "has no fairseq/data; name a checkout"),
        (["--released", "{broken}", "--only", "mlm 512, in process, released"], "failed: "),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, options, message):
    (tmp_path / "broken/fairseq/data").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "broken": tmp_path / "broken"}
    code, _, err, written = command(*(option.format(**places) for option in options))
    assert (code, err.count("\n"), written) == (2, 1, None)
    assert message in err
