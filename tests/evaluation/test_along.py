"""Checkpoints of runs against their steps: the right weights, means over sets, a table and a plot."""

import json

import pytest
from rich.console import Console

from ki_ds.errors import UserError
from ki_ds.evaluation import downstream as module
from ki_ds.evaluation.downstream import (
    MAJORITY,
    Curve,
    Row,
    checkpoints,
    curve_table,
    evaluate_along,
    reached,
    score_name,
)
from ki_ds.evaluation.finetune import RANDOM
from ki_ds.evaluation.scores import Spread
from ki_ds.evaluation.tasks import Grid
from ki_ds.models.presets import weights_sha256
from tests.evaluation.data_sets import animals, graded
from tests.tiny import run

GRID = Grid((1e-2,), (8,), {"epochs": 1})


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Two runs with all their checkpoints."""
    folder = tmp_path_factory.mktemp("along")
    train = {"keep_checkpoints": 9}
    return [run(folder / name, base / "corpus", train=train, seed=seed) for name, seed in (("self", 1), ("other", 2))]


def test_the_checkpoints_of_a_run(runs, base):
    found = checkpoints(str(runs[0]))
    assert [step for step, _ in found] == [2, 4, 6]
    assert found[0][1].name == "step_00000002"
    with pytest.raises(UserError, match="is no run of ours"):
        checkpoints(str(base / "corpus"))


def test_damaged_and_missing_checkpoints(base, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no checkpoint yet; train it, with train\.keep_checkpoints"):
        checkpoints(str(tmp_path))
    (tmp_path / "checkpoints/step_00000002").mkdir(parents=True)
    with pytest.raises(UserError, match="step_00000002 is damaged: no readable manifest"):
        checkpoints(str(tmp_path))


def pretend(candidates, sets, *_args, **_):
    """The score of a checkpoint is its step in hundredths, higher for the run "other"."""
    rows = []
    for data in sets:
        for candidate in candidates:
            value = int(candidate.name.split()[-1]) / 100 + (0.02 if candidate.name.startswith("other") else 0)
            seeds = 3 if data.name == "animals" else 2
            spread = Spread(tuple(value + seed / 500 for seed in range(seeds)))
            scores = {data.scored_part: {data.metrics[0]: spread}}
            rows.append(Row(candidate.name, data.name, None, (), scores))
        for name in (RANDOM, MAJORITY):
            scores = {data.scored_part: {data.metrics[0]: Spread((0.01,) if name == MAJORITY else (0.01, 0.02))}}
            rows.append(Row(name, data.name, None, (), scores))
    return rows


@pytest.fixture
def curves(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "evaluate", pretend)
    return evaluate_along([str(run) for run in runs], [animals(), graded()], GRID, tmp_path)


def test_curves(curves, tmp_path):
    assert [curve.name for curve in curves] == ["self", "other", RANDOM, MAJORITY]
    assert curves[0].points[4].values == pytest.approx((0.04, 0.042))  # the seeds that both sets have
    assert curves[1].points.keys() == {2, 4, 6}
    assert (tmp_path / "along.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "along.json").read_text())
    assert written["score"] == "mean of 2 tasks"
    assert [point["step"] for point in written["curves"]["self"]] == [2, 4, 6]


def test_the_table_and_what_was_reached_when(curves):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(curve_table(curves, [animals(), graded()]))
    lines = [line.split() for line in captured.get().splitlines()]
    assert ["4", "4.1", "±", "0.1", "6.1", "±", "0.1"] in lines
    assert any(line[:2] == ["random", "initialisation"] for line in lines)
    assert reached(curves) == ["other reaches self's 6.1 of step 6 at step 4 (-33.3%), as far as its checkpoints tell"]
    assert reached(curves[1::-1]) == ["self does not reach other's 8.1 of step 6"]


def test_the_name_of_a_score():
    assert score_name([animals()]) == "animals, accuracy (test)"
    assert Curve("x", {}).points == {}


def test_each_checkpoint_is_its_own_model(runs, tmp_path, monkeypatch):
    seen = {}

    def watched(candidates, *args, **options):
        seen.update({candidate.name: candidate for candidate in candidates})
        return pretend(candidates, *args, **options)

    monkeypatch.setattr(module, "evaluate", watched)
    evaluate_along([str(runs[0])], [animals()], GRID, tmp_path)
    assert [*seen] == ["self, step 2", "self, step 4", "self, step 6"]
    assert len({candidate.weights for candidate in seen.values()}) == 3
    assert len({candidate.architecture for candidate in seen.values()}) == 1
    folder = runs[0] / "checkpoints/step_00000004/hf"
    assert seen["self, step 4"].weights == weights_sha256(str(folder))


def test_it_is_what_evaluate_gives(runs, tmp_path):
    found = evaluate_along([str(runs[0])], [animals(8)], GRID, tmp_path, num_seeds=1, show_progress=False)
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    by_name = {row["model"]: row["scores"]["test"]["accuracy"]["mean"] for row in rows}
    assert {f"self, step {step}": point.mean for step, point in found[0].points.items()} == {
        name: value for name, value in by_name.items() if name.startswith("self")
    }
    assert found[-1].points[0].mean == by_name[MAJORITY]
