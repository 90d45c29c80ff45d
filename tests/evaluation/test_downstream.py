"""Settings are chosen on the validation part, baselines are always there, and the command goes on where it was."""

import dataclasses
import json
import sys

import pytest
from rich.console import Console

from ki_ds.checkpoints.checkpoint import claimed
from ki_ds.errors import UserError
from ki_ds.evaluation import downstream as module
from ki_ds.evaluation.downstream import MAJORITY, choose, evaluate, majority_row, tables
from ki_ds.evaluation.finetune import RANDOM, Candidate, Outcome
from ki_ds.evaluation.scores import score
from ki_ds.evaluation.tasks import Example, Grid, Settings
from tests import forked
from tests.evaluation.data_sets import animals, graded, tool
from tests.tiny import ROOT, environment

GRID = Grid((1e-3, 1e-2), (4, 8))
MODELS = [Candidate(name, name, name, arch, name) for name, arch in (("one", "A"), ("two", "A"), ("three", "B"))]


def pretend(trials, _sets, _out, **_):
    """Outcomes that tell what they are of: lr 1e-2 with batch 4 is best on valid and worst on test."""
    found = {}
    for trial in trials:
        chosen = (trial.settings.lr, trial.settings.batch_size) == (1e-2, 4)
        base = {"one": 0.6, "two": 0.5, "three": 0.4}.get(trial.candidate.name, 0.3)
        metrics = ("accuracy", "macro_f1") if trial.data_name == "animals" else ("pearson", "spearman")
        valid = dict.fromkeys(metrics, base + (0.1 if chosen else 0.0))
        test = dict.fromkeys(metrics, (0.2 if chosen else 0.9) + trial.seed / 100)
        parts = {"valid": valid, "test": test} if trial.data_name == "animals" else {"valid": valid}
        found[trial] = Outcome(parts, 1, 2, 6.0, 0.25, 1_000_000)
    return found


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_trials", pretend)
    return evaluate(MODELS, [animals(), graded()], GRID, tmp_path)


def test_the_test_part_has_no_say_in_the_choice(rows):
    (row,) = (row for row in rows if row.model == "one" and row.data == "animals")
    assert row.settings == Settings(1e-2, 4)
    assert row.seeds == (1, 2)
    assert row.scores["test"]["accuracy"].values == pytest.approx((0.21, 0.22))
    assert row.seconds == 6.0 * 2 * 4  # all that was computed


def test_the_choice_is_by_the_mean_over_seeds():
    first, second = Settings(1e-3, 8), Settings(1e-2, 8)

    def some(*values):
        return [Outcome({"valid": {"f1": v}, "test": {"f1": 1 - v}}, 1, 1, 1.0, 0.0, 1) for v in values]

    assert choose({first: some(0.1, 0.9), second: some(0.6, 0.6)}, "f1") == second
    assert choose({first: some(0.6, 0.6), second: some(0.6, 0.6)}, "f1") == first


def test_baselines_are_in_every_table(rows, tmp_path):
    for data in ("animals", "pairs"):
        names = [row.model for row in rows if row.data == data]
        assert names == ["one", "two", "three", f"{RANDOM} as one", f"{RANDOM} as three", MAJORITY]
    written = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert [row["model"] for row in written] == [row.model for row in rows]
    assert written[0]["scores"]["test"]["accuracy"]["values"] == pytest.approx([0.21, 0.22])


def test_the_majority():
    data = animals()
    row = majority_row(data)
    most = max((0, 1), key=[e.label for e in data.parts["train"]].count)
    truth = [e.label for e in data.parts["test"]]
    assert row.scores["test"]["accuracy"].mean == truth.count(most) / len(truth)
    assert row.scores["test"]["macro_f1"].mean == score("macro_f1", [most] * len(truth), truth)
    assert majority_row(graded()).scores["valid"]["pearson"].mean == 0.0
    other = dataclasses.replace(data, parts={**data.parts, "train": [Example("x", None, 1 - most)]})
    assert majority_row(other).scores["test"]["accuracy"].mean == truth.count(1 - most) / len(truth)


def shown(found):
    console = Console(width=200)
    with console.capture() as captured:
        for table in found:
            console.print(table)
    return captured.get()


def test_tables(rows):
    text = shown(tables(rows, [animals(), graded()]))
    assert "test is scored, epoch and settings are chosen on the validation part" in text
    assert "valid is scored, epoch and settings are chosen on it, as in the paper" in text
    lines = [line.split() for line in text.splitlines() if line.strip().startswith("one ")]
    assert " ".join(lines[0]) == "one 21.5 ± 0.7 21.5 ± 0.7 70.0 ± 0.0 0.01 4 2 0.8 25%"
    assert "together" in text
    assert lines[-1][-1] == f"{(21.5 + 70) / 2:.1f}"
    assert "together" not in shown(tables(rows, [animals()]))


def test_two_evaluations_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_trials", pretend)
    with (
        claimed(tmp_path, what="--out"),
        pytest.raises(UserError, match=r"--out=.* is in use by a job that still runs"),
    ):
        evaluate(MODELS, [animals()], GRID, tmp_path)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of classes in JSON lines, and one task of GLUE."""
    root = tmp_path_factory.mktemp("downstream")
    data = animals(16)
    for part, name in (("train", "train"), ("valid", "dev"), ("test", "test")):
        lines = [json.dumps({"text": e.text, "label": data.labels[int(e.label)]}) for e in data.parts[part]]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (root / "SST-2").mkdir()
    for part, name in (("train", "train"), ("valid", "dev")):
        lines = ["sentence\tlabel", *(f"{e.text}\t{int(e.label)}" for e in data.parts[part])]
        (root / "SST-2" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return root


FAST = ["--epochs", 1, "--seeds", 2, "--lr", "1e-2", "--batch_size", 8]


def test_the_command_goes_on_where_it_was(base, folder, tmp_path, monkeypatch, capsys):
    arguments = ["classify", base / "mlm_teacher", "--data", folder, "--out", tmp_path, *FAST]
    first = forked.run(
        [sys.executable, "tools/evaluate.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
    )
    assert first.returncode == 0, first.stderr
    results = {file.name: file.read_bytes() for file in (tmp_path / "results").iterdir()}
    assert len(results) == 4  # the model and its random start, two seeds each
    for words in ("macro F1, test", RANDOM, MAJORITY, "16 train, 16 valid, 20 test"):
        assert words in first.stdout
    assert "Traceback" not in first.stderr
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    assert tool().main() == 0
    assert capsys.readouterr().out.split("16 train")[1] == first.stdout.split("16 train")[1]
    assert {file.name: file.read_bytes() for file in (tmp_path / "results").iterdir()} == results
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_command_on_glue(base, folder, tmp_path, monkeypatch, capsys):
    arguments = ["glue", base / "causal_teacher", "--task", "sst2", "--data", folder, "--out", tmp_path, *FAST]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    assert tool().main() == 0
    said = capsys.readouterr().out
    for words in ("SST-2 (16 train, 16 valid)", "accuracy, valid", RANDOM, MAJORITY):
        assert words in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "{base}/nothing", "--data", "{folder}"], "nothing cannot be read as a model"),
        (["classify", "{base}/mlm_teacher", "--data", "{base}/nothing"], "nothing does not exist"),
        (["classify", "{base}/mlm_teacher", "--data", "{base}/corpus"], "has no train.jsonl"),
        (["classify", "{base}/corpus/tokenizer", "--data", "{folder}"], "cannot be read as a model"),
        (
            ["glue", "{base}/mlm_teacher", "--task", "all", "--data", "{folder}"],
            "has no CoLA (CoLA/train.tsv); it has sst2",
        ),
        (["classify", "{base}/mlm_teacher", "--data", "{folder}", "--epochs", "0"], "--epochs=0 must be at least 1"),
        (["classify", "{base}/mlm_teacher", "--data", "{folder}", "--lr", "-1"], "--lr=-1 is not in (0, 1)"),
        (["classify", "{base}/mlm_teacher", "--data", "{folder}", "--batch_size", "33"], "--batch_size=33 is not a"),
        (
            ["classify", "{base}/mlm_teacher", "--data", "{folder}", "--warmup_ratio", "1"],
            "--warmup_ratio=1.0 is not in",
        ),
        (["along", "{base}/corpus", "--data", "{folder}"], "is no run of ours"),
        (
            ["along", "{base}/mlm_teacher", "--data", "{folder}", "--task", "sst2", "--metric", "f1"],
            "--metric=f1 has no meaning for GLUE",
        ),
        (["classify", "{base}/mlm_teacher", "--data", "{folder}", "--out", "/dev/null/x"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(base, folder, tmp_path, monkeypatch, capsys, arguments, message):
    given = [argument.format(base=base, folder=folder) for argument in arguments]
    given += ["--out", str(tmp_path)] if "--out" not in given else []
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *given])
    assert tool().main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))
