import re
from pathlib import Path

import pytest

from ki_ds.config.paper import PRESETS
from ki_ds.experiments import forecast
from ki_ds.experiments import recipes as experiment
from ki_ds.experiments.recipes import RECIPES, configuration_of
from ki_ds.experiments.reproduce import Request, plan
from ki_ds.jobs.chain import Place
from tests.experiments.test_reproduce import corpora, request

__all__ = ["corpora"]
EIGHT = Place("here", (), 8)


def forecasts(name, scale="paper", *, place=EIGHT, **values):
    request = Request(recipe=name, scale=scale, data={}, out=Path("nowhere"), **values)
    planned = plan(request, num_ranks=place.num_ranks, dry=True)
    return planned, forecast.forecast(planned, place, device="A100", peak_flops=None, mfu=0.4)


def cells(planned, plans):
    made = forecast.forecast_table(planned, [EIGHT], plans)
    return [dict(zip(forecast.COLUMNS, row, strict=True)) for row in zip(*(c.cells for c in made.columns), strict=True)]


@pytest.mark.parametrize("name", ["fig1a", "fig2a", "fig4c", "tab3", "tab9"])
def test_the_gpu_hours_in_a_recipe_are_those_of_its_plan(name):
    _, plans = forecasts(name)
    said = re.search(r"# GPU hours at the paper's scale: ([\d,]+)", (RECIPES / f"{name}.yaml").read_text())
    hours = forecast.device_hours(list(plans.values()))
    assert float(said.group(1).replace(",", "")) == pytest.approx(hours, abs=0.6)


def test_flops_are_six_a_parameter_and_token_and_two_for_the_teacher():
    _, plans = forecasts("fig1a")
    tokens = 125_000 * 2048 * 512
    base, taught = plans["seed1/base"], plans["seed1/base_to_large"]
    assert base.student_flops == pytest.approx(6 * base.dense_parameters * tokens)
    assert taught.student_flops == plans["seed1/large"].student_flops
    assert taught.teacher_flops == pytest.approx(2 * base.dense_parameters * tokens * 40 / 125)


def test_a_run_that_goes_on_from_another_has_its_size():
    _, plans = forecasts("tab3", "tiny")
    assert plans["seed1/base_cs_bio_40m"].parameters == plans["seed1/base"].parameters


def test_every_model_of_the_paper_is_planned_within_a_percent_of_table_6():
    _, plans = forecasts("fig2a")
    for name, millions in {"gpt_73m": 73, "gpt_124m": 124, "gpt_354m": 354, "gpt_1b": 1068}.items():
        assert name in PRESETS
        assert plans[f"seed1/{name}"].parameters == pytest.approx(millions * 1e6, rel=0.01)


def test_the_table_has_a_row_a_run_and_sums_what_is_left(tmp_path):
    planned, plans = forecasts("fig1a")
    rows = cells(planned, plans)
    assert [row["run"] for row in rows] == [job.name for job in planned.jobs] + ["left to do"]
    assert rows[2]["after"] == "base"
    assert rows[2]["taught"] == "40,000"
    assert rows[2]["state"] == "to do"
    assert float(rows[-1]["FLOPs"]) == pytest.approx(sum(each.flops for each in plans.values()), rel=1e-2)


def test_what_is_finished_is_not_left_to_do(tmp_path):
    planned = plan(Request(recipe="fig1a", scale="tiny", data={}, out=tmp_path), num_ranks=8, dry=True)
    plans = forecast.forecast(planned, EIGHT, device="gpu", peak_flops=None, mfu=0.4)
    done = planned.jobs[0].run_dir
    done.mkdir(parents=True)
    (done / "run.json").write_text('{"status": "finished"}')
    (planned.jobs[1].run_dir / "checkpoints" / "step_40").mkdir(parents=True)
    rows = cells(planned, plans)
    assert [row["state"] for row in rows] == ["finished", "from step 40", "to do", ""]
    assert rows[-1]["model"] == "2 runs"
    assert rows[-1]["hours"] == "?"
    assert forecast.device_hours(list(plans.values())) is None


def test_a_corpus_that_is_there_says_its_vocabulary(tmp_path, corpora):
    planned = plan(request(tmp_path, corpora))
    assert forecast._num_classes(planned, configuration_of(planned.jobs[0])) == 320
    planned, _ = forecasts("fig1a", "tiny")
    assert forecast._num_classes(planned, configuration_of(planned.jobs[0])) == 1024
    assert experiment.read_scale("tiny").vocab_size["mlm"] == 1024
