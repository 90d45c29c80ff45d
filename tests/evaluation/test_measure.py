"""Perplexities of finished models: those of training, domain by domain, and what adaptation forgets."""

import json
import math
import shutil
import sys

import pytest
from rich.console import Console

from ki_ds import config as configuration
from ki_ds.config import DataConfig
from ki_ds.errors import UserError
from ki_ds.evaluation.perplexity import measure, table
from tests.evaluation.data_sets import tool
from tests.tiny import records, run, tiny_corpus


@pytest.fixture(scope="module")
def adapted(base):
    """The base's mlm teacher, and what came of it on another domain."""
    other = tiny_corpus(base / "measure_other", seed=7, num_documents=60, tokenizer=base / "corpus" / "tokenizer")
    none = dict.fromkeys(("num_layers", "hidden_size", "num_heads", "ffn_size"))
    model = {"name": str(base / "mlm_teacher"), "init": "pretrained", **none, "num_positions": 512}
    sources = [{"path": str(other), "domain": "new"}]
    data = {"corpus": "", "sources": sources, "valid": {"new": str(other), "old": str(base / "corpus")}}
    return base / "mlm_teacher", run(base / "measure_adapted", base / "corpus", model=model, data=data)


@pytest.fixture
def command(monkeypatch, capsys):
    """The tool's main in this process, whose imports take seconds: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "ppl", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = tool().main()
        return (code, *capsys.readouterr())

    return call


@pytest.mark.parametrize("micro_batch_size", [1, 7])
@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_it_is_the_figure_of_training(base, task, micro_batch_size):
    folder = base / f"{task}_teacher"
    config = configuration.load(folder / "config.yaml")
    (found,) = measure(
        [str(folder)], config.data, task, index_dir=base / "i", micro_batch_size=micro_batch_size, show_progress=False
    )
    best = json.loads((folder / "best/valid.json").read_text())
    assert found.together.num_rows == best["num_rows"]
    assert found.together.ppl == pytest.approx(best["ppl"], rel=1e-5)
    assert found.tokenizer_checked


def test_domains_and_what_was_forgotten_in_one_table(base, adapted):
    before, after = map(str, adapted)
    config = configuration.load(adapted[1] / "config.yaml")
    found = measure([before, after], config.data, "mlm", index_dir=base / "i", show_progress=False)
    trained = min(records(adapted[1], "valid"), key=lambda record: record["ce"])
    for domain in ("new", "old"):
        assert found[1].domains[domain].ppl == pytest.approx(trained["domains"][domain]["ppl"], rel=1e-5)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table(found))
    changed = found[1].domains["old"].ppl / found[0].domains["old"].ppl - 1
    assert f"({changed:+.1%})" in captured.get()
    total = sum(part.ce_sum for part in found[0].domains.values()) / found[0].together.num_rows
    assert found[0].together.ppl == pytest.approx(math.exp(total))


def test_the_command(base, adapted, tmp_path, command):
    code, said, error = command(adapted[0])
    assert code == 0, error
    best = json.loads((adapted[0] / "best/valid.json").read_text())
    assert f"{best['ppl']:.2f}" in said
    corpora = [f"old={base / 'corpus'}", f"new={base / 'measure_other'}"]
    out = tmp_path / "ppl.json"
    code, _, error = command(*adapted, "--data", *corpora, "--task", "mlm", "--seq_len", 32, "--out", out)
    assert code == 0, error
    rows = json.loads(out.read_text())
    assert rows[0]["old"]["ppl"] == pytest.approx(best["ppl"], rel=1e-5)
    assert list(rows[1]) == ["model", "old", "new"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{base}/nothing", "--data", "{base}/corpus", "--task", "mlm"], "nothing does not exist"),
        (["{base}/mlm_teacher", "--data", "{base}/corpus"], "--data needs --task"),
        (["{base}/mlm_teacher", "--seq_len", "64"], "--seq_len=64 has no meaning without --data"),
        (["{base}/corpus"], "is no run of ours, whose data would be known"),
        (["{base}/mlm_teacher", "--data", "{base}/corpus", "--task", "causal"], "exceeds the 32"),
        (
            ["{base}/mlm_teacher", "--data", "{base}/corpus", "--task", "mlm"],
            "data.seq_len=512 exceeds the 32",
        ),
    ],
)
def test_bad_input_is_one_line(base, command, arguments, message):
    code, _, error = command(*(argument.format(base=base) for argument in arguments))
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_another_tokenizer_is_refused(base, tmp_path):
    other = tiny_corpus(tmp_path / "other", vocab_size=300)
    with pytest.raises(UserError, match="has another tokenizer"):
        measure(
            [str(base / "mlm_teacher")],
            DataConfig(corpus=str(other), seq_len=32),
            "mlm",
            index_dir=tmp_path,
            show_progress=False,
        )
    bare = tmp_path / "bare"
    shutil.copytree(base / "mlm_teacher/best", bare)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    data = DataConfig(corpus=str(base / "corpus"), seq_len=32)
    (found,) = measure([str(bare)], data, "mlm", index_dir=tmp_path, show_progress=False)
    assert not found.tokenizer_checked
