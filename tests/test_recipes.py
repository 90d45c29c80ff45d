import re

import pytest

from ki_ds.config import parse
from ki_ds.experiments.demo import demo_jobs
from ki_ds.experiments.recipes import experiments
from ki_ds.jobs.chain import RECIPES
from tests.tiny import ROOT

# Every recipe of a run, with what it is laid over. A base stands alone; those of experiments are in test_experiment.
STACKS = {
    "roberta.yaml": [],
    "gpt.yaml": [],
    "demo_mlm.yaml": [],
    "demo_mlm_teacher.yaml": ["demo_mlm.yaml"],
    "demo_mlm_inherit.yaml": ["demo_mlm.yaml"],
    "demo_causal.yaml": [],
    "demo_causal_teacher.yaml": ["demo_causal.yaml"],
    "demo_causal_inherit.yaml": ["demo_causal.yaml"],
    "handover_mlm.yaml": [],
    "handover_mlm_teacher.yaml": ["handover_mlm.yaml"],
    "handover_causal.yaml": [],
    "handover_causal_teacher.yaml": ["handover_causal.yaml"],
    "demo_smoke.yaml": ["demo_mlm.yaml"],
    "demo_smoke_inherit.yaml": ["demo_mlm.yaml", "demo_mlm_inherit.yaml", "demo_smoke.yaml"],
}


def arguments(recipes):
    return ["--run_dir", "run", "--data.corpus", "corpus"] + [
        part for name in recipes for part in ("--config", str(RECIPES / name))
    ]


def test_every_recipe_is_known_here():
    assert {p.name for p in RECIPES.glob("*.yaml")} == STACKS.keys() | {f"{name}.yaml" for name in experiments()}


@pytest.mark.parametrize("name", STACKS)
def test_every_recipe_describes_a_run(name):
    parse(arguments([*STACKS[name], name]))


@pytest.mark.parametrize("name", STACKS)
def test_an_overlay_changes_something(name):
    if below := STACKS[name]:
        assert parse(arguments([*below, name])) != parse(arguments(below))


@pytest.mark.parametrize("name", STACKS)
def test_files_that_a_recipe_names_exist(name):
    run = parse(arguments([*STACKS[name], name]))
    assert (ROOT / run.engine.ds_config).is_file()
    for mentioned in re.findall(r"(?:launchers|ds_configs|tools)/[\w/.]+\w", (RECIPES / name).read_text()):
        assert (ROOT / mentioned).exists(), mentioned
    for mentioned in re.findall(r"\w+\.yaml", (RECIPES / name).read_text()):
        assert (RECIPES / mentioned).exists(), mentioned


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_by_hand_a_recipe_is_the_demos_run(task):
    """`--config demo_TASK.yaml --config demo_TASK_inherit.yaml` goes on in the very folder that the demo made."""
    for job in demo_jobs(task, "full", 1):
        assert parse(arguments(job.recipes)) == parse(job.arguments())
