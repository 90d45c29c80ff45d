import itertools
import re
from pathlib import Path

import pytest

from ki_ds import config as configuration
from ki_ds.config import inherit_steps
from ki_ds.config.paper import PRESETS, TEACHING_STEPS
from ki_ds.errors import UserError
from ki_ds.experiments import recipes as experiment
from ki_ds.experiments.recipes import configuration_of, experiments, plan_runs, read_recipe, read_scale, scales
from ki_ds.jobs.chain import RECIPES

IDS = [f"fig{part}" for part in ["1a", "1b", "1c", "2a", "2b", "2c", "3a", "3b", "3c", "4a", "4b", "4c", "5a"]]
IDS += [f"tab{number}" for number in (2, 3, 4, 9, 10)] + ["glue"]


PARSED: dict = {}  # experiments share runs (a test holds that), so that each is parsed once


def planned(name, scale="paper"):
    """{run: configuration}, in order."""
    recipe = read_recipe(name)
    corpora = {domain: Path("/corpora") / domain for domain in recipe.domains}
    jobs = plan_runs(recipe, read_scale(scale), corpora=corpora, seeds=(1,), out=Path("out"))
    for job in jobs:
        if (scale, job.name) not in PARSED:
            PARSED[scale, job.name] = configuration_of(job)
    return {job.run_dir.name: PARSED[scale, job.name] for job in jobs}


def test_every_experiment_of_the_paper_has_a_recipe():
    assert experiments() == sorted(IDS)
    assert scales() == ["one_gpu", "paper", "tiny"]


@pytest.mark.parametrize("name", IDS)
def test_a_recipe_says_what_it_is_how_it_is_run_and_what_the_paper_found(name):
    head = [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert re.match(r"# (Figure|Table)s? \d", head[0])
    assert f"launchers/reproduce.sh {name} " in head[1]
    assert head[2].startswith("# The paper: ")
    assert any(re.fullmatch(r"# GPU hours at the paper's scale: .*\d.*", line) for line in head)


@pytest.mark.parametrize(("name", "scale"), itertools.product(IDS, ("paper", "tiny")))
def test_every_run_of_every_recipe_is_a_valid_configuration(name, scale):
    recipe, runs = read_recipe(name), planned(name, scale)
    assert runs.keys() == recipe.runs.keys()
    for arm, config in zip(recipe.runs.values(), runs.values(), strict=True):
        assert len(config.all_teachers) == len(arm.teachers)
        assert (config.model.init == "pretrained") == bool(arm.adapts)
        if not arm.adapts:
            assert config.model.name in PRESETS


@pytest.mark.parametrize("scale", ["paper", "one_gpu", "tiny"])
def test_a_run_of_one_name_is_the_same_in_every_experiment(scale):
    seen: dict = {}
    for name in IDS:
        recipe = read_recipe(name)
        corpora = {domain: Path("/corpora") / domain for domain in recipe.domains}
        for job in plan_runs(recipe, read_scale(scale), corpora=corpora, seeds=(1, 2), out=Path("out")):
            assert seen.setdefault(job.run_dir, (job.groups, job.after)) == (job.groups, job.after), (name, job.name)


def test_at_the_papers_scale_runs_are_the_papers():
    for name, row in (("fig1a", "base_to_large"), ("fig2a", "gpt_73m_124m")):
        config = planned(name)[row]
        assert config.train.global_batch_size == 2048
        assert config.data.seq_len == 512
        assert config.optim.lr == PRESETS[config.model.name].peak_lr
        assert (config.optim.beta2, config.optim.eps, config.optim.weight_decay) == (0.98, 1e-6, 0.01)
        assert config.inherit.tau == 2.0
        assert config.train.num_steps == {"mlm": 125_000, "causal": 62_500}[config.task]


@pytest.mark.parametrize(
    ("name", "run", "steps"),
    [
        ("fig1a", "base_to_large", 40_000),
        ("fig1b", "medium_to_base_heaviside", 35_000),
        ("fig2a", "gpt_73m_124m", 10_000),
        ("fig2a", "gpt_73m_124m_209m_354m_773m_1b", 20_000),
        ("fig2b", "base_to_base_plus", 55_000),
        ("fig2b", "base_plus_to_large", 65_000),
        ("fig2b", "base_to_base_plus_to_large", 75_000),
        ("fig2c", "h10_to_base", 65_000),
        ("fig5a", "d384_to_base", 28_000),
        ("fig4c", "medium_to_base_batch256", 280_000),  # 35k of 125k, of 1,000k steps
        ("tab2", "medium_cs_to_base_cs_40m", 4_000),
    ],
)
def test_the_steps_of_teacher_guided_learning_are_those_of_table_7(name, run, steps):
    assert inherit_steps(planned(name)[run]) == steps


def test_every_pair_of_table_7_is_in_an_experiment():
    found = set()
    for name in ("fig1a", "fig1b", "fig2a", "fig2b", "fig2c", "fig5a"):
        recipe = read_recipe(name)
        for key, arm in recipe.runs.items():
            if arm.inherits:
                generations = tuple(experiment._generations(recipe, key))
                found |= {generations[:length] for length in range(2, len(generations) + 1)}
    assert found >= TEACHING_STEPS.keys()


def test_figure_4c_keeps_the_tokens_and_takes_the_papers_rates():
    runs = planned("fig4c")
    rows = [("base_batch256", 256, 1e-4), ("base_batch512", 512, 2.5e-4), ("base_batch1024", 1024, 3.8e-4)]
    for name, batch, lr in rows:
        config = runs[name]
        assert config.train.global_batch_size == batch
        assert config.optim.lr == pytest.approx(lr)
        assert config.train.global_batch_size * config.train.num_steps == 2048 * 125_000


def test_parts_of_a_domain_are_read_as_often_at_every_scale():
    for scale in ("paper", "tiny"):
        config = planned("tab2", scale)["base_cs_40m"]
        tokens = config.train.num_steps * config.train.global_batch_size * config.data.seq_len
        assert tokens / config.data.all_sources[0].max_tokens == pytest.approx(4000 * 2048 * 512 / 40e6, rel=1e-2)


def test_each_domain_has_its_own_teacher_in_table_3():
    config = planned("tab3")["experts_to_base_cs_bio_40m"]
    taught = {tuple(entry.domains): Path(entry.path).name for entry in config.all_teachers}
    assert taught == {("CS",): "medium_cs", ("BIO",): "medium_bio"}
    assert list(config.data.valid) == ["CS", "BIO", "WB"]
    assert config.model.name == "out/seed1/base/best"


def test_students_of_every_seed_share_the_teachers_that_are_trained_once():
    recipe = read_recipe("fig1b")
    jobs = plan_runs(recipe, read_scale("tiny"), corpora={"WB": Path("wb")}, seeds=(1, 2, 3), out=Path("out"))
    names = [job.name for job in jobs]
    assert len(names) == len(set(names)) == 1 + 3 * 4
    assert [name for name in names if name.endswith("/medium")] == ["seed1/medium"]
    third = next(job for job in jobs if job.name == "seed3/medium_to_base")
    assert third.after == ("out/seed1/medium",)
    assert configuration_of(third).teacher.path == "out/seed1/medium"
    assert configuration_of(third).seed == 3


def test_without_baselines_the_chain_of_gpt_has_its_links_alone():
    recipe = read_recipe("fig2a").without_baselines()
    assert list(recipe.runs) == [
        "gpt_73m",
        "gpt_73m_124m",
        "gpt_73m_124m_209m",
        "gpt_73m_124m_209m_354m",
        "gpt_73m_124m_209m_354m_773m",
        "gpt_73m_124m_209m_354m_773m_1b",
    ]


def test_the_order_of_sizes_is_kept_at_every_scale():
    presets = ["roberta_medium", "roberta_base", "roberta_base_plus", "roberta_large"]
    for rows in (presets, [f"gpt_{size}" for size in ("73m", "124m", "209m", "354m", "773m", "1b")]):
        sizes = [read_scale("tiny").models[name]["model"] for name in rows]
        volumes = [size["num_layers"] * size["hidden_size"] ** 2 for size in sizes]
        assert volumes == sorted(set(volumes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x\nruns:\n  a: {model: roberta_huge}", "a has model=roberta_huge, no preset"),
        ("title: x\nruns:\n  a: {model: roberta_base, inherits: b}", "a needs b, which is no run above it"),
        ("title: x\nruns:\n  a: {model: roberta_base, teacher: b}", "mine.yaml: a: .*teacher"),
        ("title: x\nruns: {}\nextra: 1", "mine.yaml: .*extra"),
    ],
)
def test_a_broken_recipe_is_refused_in_a_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setattr(experiment, "RECIPES", tmp_path)
    with pytest.raises(UserError, match=message):
        read_recipe("mine")


def test_what_a_scale_cannot_scale_is_refused(tmp_path):
    recipe = read_recipe("fig1a")
    scale = experiment.Scale(vocab_size={"mlm": 100}, times={"layers": 2})
    with pytest.raises(UserError, match="times has layers; take steps, batch or lr"):
        plan_runs(recipe, scale, corpora={"WB": tmp_path}, seeds=(1,), out=tmp_path)
    pair = experiment.Recipe(
        title="x",
        runs={
            "a": experiment.Arm(model="roberta_large"),
            "b": experiment.Arm(model="roberta_base", inherits="a"),
        },
    )
    with pytest.raises(UserError, match="Table 7 has no such pair"):
        plan_runs(pair, read_scale("paper"), corpora={"WB": tmp_path}, seeds=(1,), out=tmp_path)


@pytest.mark.parametrize(("what", "known"), [(read_recipe, "fig1a, fig1b"), (read_scale, "one_gpu, paper, tiny")])
def test_an_unknown_name_is_told_the_known_ones(what, known):
    with pytest.raises(UserError, match=f"fig9z is no .*; take one of {known}"):
        what("fig9z")


def test_a_recipe_of_runs_is_no_run(capsys):
    """`--config fig1a.yaml` is a mistake that is easily made."""
    with pytest.raises(UserError, match="runs"):
        configuration.parse(["--config", str(RECIPES / "fig1a.yaml")])


def test_a_micro_batch_is_no_larger_than_a_ranks_share():
    recipe, scale = read_recipe("fig1a"), read_scale("tiny")
    for num_ranks, micro in ((1, 16), (2, 8), (8, 2), (32, 1)):
        jobs = plan_runs(recipe, scale, corpora={"WB": Path("wb")}, seeds=(1,), out=Path("o"), num_ranks=num_ranks)
        assert {job.groups["train"]["micro_batch_size"] for job in jobs} == {micro}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "holds no fields"),
        ("a: [", "is no YAML"),
        ("{}", "vocab_size"),
        ("vocab_size: {mlm: 10}", "vocab_size lacks causal"),
        ("vocab_size: {mlm: 10, causal: 10}\ninherit_share: much", "inherit_share"),
        ("vocab_size: {mlm: 10, causal: 10}\nlayers: 2", "layers"),
        ("vocab_size: {mlm: 10, causal: 10}\nmodels: {roberta_huge: {}}", "models has roberta_huge; take of"),
        ("vocab_size: {mlm: 10, causal: 10}\nsettings: {mml: {}}", "settings has mml; take of mlm, causal"),
    ],
)
def test_a_broken_scale_is_refused_in_a_line(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_scale(str(tmp_path / "mine.yaml"))
