"""The benchmark of the data step runs on a little text and prints a table last."""

import json
import subprocess
import sys

from ki_ds.data.corpora import Document
from ki_ds.data.tokenize import train_tokenizer
from tests.tiny import ROOT, environment


def test_it_prints_a_table_and_writes_json(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat\nand so on\n\na dog\n\n" * 50)
    train_tokenizer([Document(("the cat sat on the mat",), "d")] * 3, 280, out_dir=tmp_path / "tokenizer")
    command = [sys.executable, ROOT / "tools/bench_prepare.py", "--text", tmp_path / "text.txt", "--repeats", "1"]
    rest = ["--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "rows.json", "--megabytes", "0.002"]
    done = subprocess.run([*command, *rest], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["ours", "datasets.map, rows are lines", "datasets.map, rows are documents"]
    assert rows["ours"]["num_tokens"] == rows["datasets.map, rows are lines"]["num_tokens"] > 0
    assert all(0 < row["pss"] <= row["rss"] for row in rows.values())
    assert done.stdout.splitlines()[-1].startswith("| datasets.map, rows are documents |")
