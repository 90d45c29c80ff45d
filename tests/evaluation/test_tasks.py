"""The paper's settings, and what a data set's hash depends on."""

import dataclasses
import subprocess
import sys

import pytest

from ki_ds.evaluation.scores import GRADED, METRICS
from ki_ds.evaluation.tasks import GLUE, PAPER_GRIDS, SET_SEEDS, Example, Settings, TaskData, set_metrics
from tests.tiny import ROOT, environment

DATA = TaskData(
    "set",
    ("a", "b"),
    ("macro_f1", "accuracy"),
    {"train": [Example("x", None, 0), Example("y", "z", 1)], "valid": [Example("x", None, 1)]},
    seeds=3,
)


def test_table_8():
    glue, sets = (PAPER_GRIDS[name].settings() for name in ("glue", "classify"))
    assert {(s.lr, s.batch_size) for s in glue} == {(lr, size) for lr in (1e-5, 2e-5, 3e-5) for size in (16, 32)}
    assert [(s.lr, s.batch_size) for s in sets] == [(2e-5, 256)]
    assert {(s.epochs, s.warmup_ratio, s.weight_decay) for s in glue + sets} == {(10, 0.06, 0.1)}
    assert SET_SEEDS == 10
    assert {
        name: task.seeds for name, task in GLUE.items() if name in ("cola", "rte", "sst2", "stsb")
    } == dict.fromkeys(("cola", "rte", "sst2", "stsb"), 5)
    assert GLUE["mnli"].seeds == GLUE["qnli"].seeds == 3


def test_every_task_has_scores_of_its_kind():
    assert len(GLUE) == 8
    for task in GLUE.values():
        assert set(task.metrics) <= METRICS.keys()
        assert (task.labels is None) == all(metric in GRADED for metric in task.metrics)
    assert GLUE["cola"].metrics[0] == "matthews"
    assert GLUE["stsb"].metrics == ("pearson", "spearman")
    assert "f1" in GLUE["mrpc"].metrics


def test_scores_of_sets():
    assert set_metrics("chemprot") == set_metrics("ChemProt") == ("micro_f1", "macro_f1")
    assert set_metrics("citation_intent") == ("macro_f1", "accuracy")
    assert set_metrics("chemprot", "accuracy") == ("accuracy", "macro_f1")


def test_test_is_scored_where_it_is_labelled():
    assert DATA.scored_part == "valid"
    assert dataclasses.replace(DATA, parts={**DATA.parts, "test": DATA.parts["valid"]}).scored_part == "test"


def test_the_hash_depends_on_every_example_label_and_score():
    changed = [
        {"labels": ("a", "c")},
        {"metrics": ("accuracy",)},
        {"parts": {**DATA.parts, "valid": [Example("x", None, 0)]}},
        {"parts": {**DATA.parts, "train": DATA.parts["train"][:1]}},
        {"parts": {**DATA.parts, "train": [Example("x", "", 0), DATA.parts["train"][1]]}},
        {"parts": {**DATA.parts, "train": DATA.parts["train"][::-1]}},
        {"parts": {**DATA.parts, "test": DATA.parts["valid"]}},
    ]
    hashes = {DATA.sha256(), *(dataclasses.replace(DATA, **change).sha256() for change in changed)}
    assert len(hashes) == len(changed) + 1
    assert dataclasses.replace(DATA, seeds=7, notes=("x",)).sha256() == DATA.sha256()


def test_settings_of_a_grid_have_what_is_common():
    grid = dataclasses.replace(PAPER_GRIDS["glue"], lrs=(1e-3,), common={"epochs": 2, "max_train_samples": 8})
    assert grid.settings()[0] == Settings(1e-3, 16, epochs=2, max_train_samples=8)


def test_the_command_lines_help_needs_nothing_heavy():
    command = (
        "import sys, runpy; sys.argv = ['evaluate.py', '--help']\n"
        "try: runpy.run_path('tools/evaluate.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'sklearn', 'scipy', 'matplotlib', 'datasets', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("ppl", "glue", "classify", "along"):
        assert name in done.stdout


@pytest.mark.parametrize("name", GLUE)
def test_columns_and_places_agree(name):
    task = GLUE[name]
    assert task.columns[0]
    assert task.columns[2]
    if task.positions is not None:
        assert (task.positions[1] >= 0) == bool(task.columns[1])
