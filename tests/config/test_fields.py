"""No field is accepted and ignored: each always has a meaning, or is refused where it has none; intervals are held."""

import dataclasses
import re
from typing import get_args, get_type_hints

import pytest

from ki_ds.config import DataConfig, RunConfig, SourceConfig, TeacherEntry, differences, load, parse, save, validate
from ki_ds.config.fields import ALWAYS, check_intervals, check_meaning, walk, without_meaning
from ki_ds.errors import UserError

BASE = ["--run_dir", "runs/x", "--data.corpus", "corpus"]
TAUGHT = [*BASE, "--teacher.path", "t", "--inherit.schedule", "linear", "--inherit.steps", "5"]
RUNS = {
    name: parse(arguments)
    for name, arguments in {
        "alone": BASE,
        "causal": [*BASE, "--task", "causal"],
        "taught": TAUGHT,
        "without decay": [*BASE, "--optim.weight_decay", "0"],
        "with valid": [*BASE, "--data.valid", "{a: b}"],
        "short": [*BASE, "--train.num_steps", "1"],
        "no preset": [*BASE, "--model.name", "a/folder"],
    }.items()
}


def settings():
    """Every field of a run by its name, lists with one entry."""
    run = dataclasses.replace(RUNS["alone"], teachers=[TeacherEntry("t")])
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, sources=[SourceConfig("a")]))
    return {given.name.replace(".0.", "."): given for given in walk(run)}


SETTINGS = settings()
CONDITIONED = sorted(
    name for name, given in SETTINGS.items() if given.facts.when != (ALWAYS,) and not name.endswith(".path")
)
NUMBERS = sorted(name for name, given in SETTINGS.items() if given.facts.interval is not None)


def kinds(name):
    """The types, or the words, that a field of a group takes."""
    group = getattr(RUNS["alone"], name.split(".")[0]) if "." in name else RUNS["alone"]
    group = SourceConfig("a") if name.startswith("data.sources.") else group
    kind = get_type_hints(type(group))[name.rpartition(".")[2]]
    return get_args(kind) or (kind,)


def changed(name):
    """A value other than the default, which its type and interval allow."""
    given, kind = SETTINGS[name], kinds(name)[0]
    if isinstance(kind, str):
        return next(word for word in kinds(name) if word != given.default)
    if kind is bool:
        return not given.default
    low, high = given.facts.interval.low, given.facts.interval.high
    value = given.default / 2 if isinstance(given.default, float) and given.default else min(low + 2, (low + high) / 2)
    return kind(value)


def test_every_field_says_when_it_has_a_meaning():
    assert all(given.facts.when for given in SETTINGS.values())
    assert {"data.whole_words", "model.dropout", "teacher.topk", "inherit.tau"} <= set(CONDITIONED)


def test_every_number_has_its_interval():
    """But a share in an average, of which a rule of the list takes care."""
    numbers = {name for name, given in SETTINGS.items() if type(given.default) in (int, float)}
    assert numbers <= set(NUMBERS)


@pytest.mark.parametrize("name", CONDITIONED)
def test_outside_of_its_condition_a_field_is_refused(name):
    refused, value = 0, changed(name)
    assert value != SETTINGS[name].default
    line = rf"{name}={value} (has no meaning .*leave it out|needs a folder.*)|{name} can only change a preset .*"
    for run in RUNS.values():
        group, field = name.split(".")
        given = dataclasses.replace(run, **{group: dataclasses.replace(getattr(run, group), **{field: value})})
        if name not in without_meaning(given):
            continue
        refused += 1
        with pytest.raises(UserError) as caught:
            validate(given)
        assert re.fullmatch(line, str(caught.value))
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


def with_value(name, value):
    """The default run with one field set past all checks."""
    if name.startswith("data.sources."):
        source = dataclasses.replace(SourceConfig("a"), **{name.rpartition(".")[2]: value})
        return RunConfig(data=DataConfig(sources=[source]))
    group, _, field = name.rpartition(".")
    run = RunConfig()
    return dataclasses.replace(
        run, **({group: dataclasses.replace(getattr(run, group), **{field: value})} if group else {field: value})
    )


def test_the_defaults_are_within():
    check_intervals(RunConfig())


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_an_interval(name):
    interval = SETTINGS[name].facts.interval
    ends = {interval.low: interval.open_low, interval.high: interval.open_high}
    beyond = [interval.low - max(1e-3, abs(interval.low)), interval.high + max(1, interval.high)]
    for value in [end for end, is_open in ends.items() if not is_open]:
        check_intervals(with_value(name, value))
    where = name.replace("sources.", "sources.0.")
    for value in [*beyond, *(end for end, is_open in ends.items() if is_open), float("nan")]:
        with pytest.raises(UserError, match=rf"^{where}=.* is outside [\[(]") as caught:
            check_intervals(with_value(name, value))
        assert "\n" not in str(caught.value)
