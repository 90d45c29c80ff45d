"""No field of a configuration is accepted and ignored: each always has a meaning, or is refused where it has none."""

import dataclasses
from typing import get_args, get_type_hints

import pytest

from ki_ds.config import RunConfig, SourceConfig, differences, load, parse, save, validate
from ki_ds.config.conditions import check_meaning, walk, without_meaning
from ki_ds.config.ranges import RANGES
from ki_ds.config.teacher_entries import TeacherEntry
from ki_ds.errors import UserError
from ki_ds.models.presets import _PRESET_ONLY

# What has a meaning in every run. A new field stands here, or has its condition beside it.
ALWAYS = {
    *("run_dir", "task", "seed"),
    *("data.corpus", "data.sources.path", "data.sources.domain", "data.sources.weight", "data.sources.half"),
    *("data.sources.fraction", "data.sources.max_tokens", "data.valid", "data.seq_len", "data.break_mode"),
    *("data.num_workers", "data.index_dir", "data.max_valid_samples"),
    *("model.name", "model.init", "inherit.schedule", "loss.backend", "loss.chunk_rows", "loss.label_smoothing"),
    "loss.z_weight",
    *("optim.lr", "optim.beta1", "optim.beta2", "optim.eps", "optim.weight_decay", "optim.warmup_fraction"),
    *("optim.max_grad_norm", "engine.ds_config", "engine.precision", "engine.activation_checkpointing"),
    *("engine.compile", "engine.watchdog_seconds", "engine.connect_seconds", "engine.num_threads"),
    *("train.num_steps", "train.global_batch_size", "train.micro_batch_size", "train.eval_micro_batch_size"),
    *("train.eval_every", "train.save_every", "train.log_every", "train.save_in_background", "train.keep_checkpoints"),
    *("train.bad_step", "train.spike_sigmas", "train.changed_config"),
    *("monitor.tensorboard", "monitor.csv", "monitor.wandb_project", "monitor.profile_steps", "monitor.progress"),
}
# Refused by a rule of their own: who else is given decides, or what a corpus or a model brings.
OWN_RULES = {
    *("teacher.path", "teachers.path", "teachers.domains", "teachers.share", "data.tokenizer", "train.keep_every"),
    *(f"model.{name}" for name in _PRESET_ONLY),
}
BASE = ["--run_dir", "runs/x", "--data.corpus", "corpus"]
TAUGHT = [*BASE, "--teacher.path", "t", "--inherit.schedule", "linear", "--inherit.steps", "5"]
SETTINGS = {
    "alone": BASE,
    "causal": [*BASE, "--task", "causal"],
    "taught": TAUGHT,
    "without decay": [*BASE, "--optim.weight_decay", "0"],
    "with valid": [*BASE, "--data.valid", "{a: b}"],
    "short": [*BASE, "--train.num_steps", "1"],
}


def fields():
    """Every field of a run by its name, lists with one entry."""
    run = dataclasses.replace(parse(BASE), teachers=[TeacherEntry("t")])
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, sources=[SourceConfig("a")]))
    return {name.replace(".0.", "."): item for name, item, _ in walk(run)}


CONDITIONED = sorted(name for name, item in fields().items() if "only" in item.metadata)


def changed(name, item):
    """A value other than the default, which its type and range allow."""
    group = type(parse(BASE)) if "." not in name else type(getattr(parse(BASE), name.split(".")[0]))
    kinds = get_args(get_type_hints(group)[item.name]) or (get_type_hints(group)[item.name],)
    if isinstance(kinds[0], str):
        return next(kind for kind in kinds if kind != item.default)
    if kinds[0] is bool:
        return not item.default
    low, high, _ = RANGES[name]
    value = item.default / 2 if isinstance(item.default, float) and item.default else min(low + 2, (low + high) / 2)
    return kinds[0](value)


def test_every_field_has_a_meaning_always_or_says_when():
    assert not ALWAYS & OWN_RULES
    assert set(fields()) == ALWAYS | OWN_RULES | set(CONDITIONED)
    assert not set(CONDITIONED) & (ALWAYS | OWN_RULES)


@pytest.mark.parametrize("name", CONDITIONED)
def test_outside_of_its_condition_a_field_is_refused(name):
    item, refused = fields()[name], 0
    value = changed(name, item)
    assert value != item.default
    for arguments in SETTINGS.values():
        run = parse(arguments)
        check_meaning(run)
        group, field = name.split(".")
        given = dataclasses.replace(run, **{group: dataclasses.replace(getattr(run, group), **{field: value})})
        if name not in without_meaning(given):
            continue
        refused += 1
        with pytest.raises(
            UserError, match=rf"^{name}={value} (has no meaning .*leave it out|needs a folder.*)$"
        ) as caught:
            parse([*arguments, f"--{name}", str(value).lower()])
        assert "\n" not in str(caught.value)
        validate(given, saved=True)  # a file of an earlier version is still read
    assert refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--teacher.dtype", "fp16"], "teacher.dtype=fp16 has no meaning without a teacher"),
        (["--inherit.tau", "1"], "inherit.tau=1.0 has no meaning with inherit.schedule=none"),
        (["--data.subset_seed", "3"], "data.subset_seed=3 has no meaning where no half"),
        (["--train.stop_at_step", "125001"], "train.stop_at_step=125001 has no meaning after train.num_steps=125000"),
        (["--task", "causal", "--data.long_lines", "drop"], "data.long_lines=drop has no meaning for task=causal"),
    ],
)
def test_the_line_says_why(arguments, words):
    with pytest.raises(UserError) as caught:
        parse([*BASE, *arguments])
    assert str(caught.value).startswith(words)


def test_within_their_conditions_they_are_accepted():
    parse([*TAUGHT, "--teacher.dtype", "fp16", "--inherit.tau", "1"])
    parse([*BASE, "--data.valid_fraction", "0.1", "--data.subset_seed", "3"])
    half = ["--data.sources", "[{path: a, half: A}]", "--data.subset_seed", "3"]
    assert parse(["--run_dir", "runs/x", *half]).data.subset_seed == 3


def test_what_has_no_meaning_in_either_run_is_no_difference(tmp_path):
    """A run of an earlier version, whose file has a temperature without a teacher, goes on."""
    alone = parse(BASE)
    old = dataclasses.replace(alone, inherit=dataclasses.replace(alone.inherit, tau=1.0))
    save(old, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml", saved=True) == old
    with pytest.raises(UserError, match=r"inherit.tau=1.0 has no meaning"):
        load(tmp_path / "config.yaml")
    assert differences(old, alone) == {}
    taught = parse(TAUGHT)
    warmer = dataclasses.replace(taught, inherit=dataclasses.replace(taught.inherit, tau=1.0))
    assert differences(warmer, taught) == {"inherit.tau": (1.0, 2.0)}


def test_the_defaults_have_a_meaning():
    check_meaning(RunConfig())
