"""The paper's experiments as data: a recipe names the runs that it compares, a scale says how large they are.

A recipe, `launchers/recipes/ID.yaml`, has a title, a family (roberta or gpt: the recipe whose settings hold for every
run), runs, and commands for afterwards. A scale, `launchers/recipes/scales/NAME.yaml`, is laid over any of them.
`plan_runs` makes jobs of both: each with the whole configuration of one training run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from ki_ds import config as configuration
from ki_ds.config import RunConfig
from ki_ds.config.paper import ADAPT_STEPS, NUM_STEPS, PRESETS, teaching_share
from ki_ds.errors import UserError
from ki_ds.jobs.chain import RECIPES, Job

PAPER_ADAPT_SHARE = ADAPT_STEPS / NUM_STEPS["mlm"]
ROOT = RECIPES.parent.parent
Tree = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training run of a recipe, and what the scale and the seed leave open of it.

    Args:
        model: a preset of Table 6.
        inherits: the run of the recipe that teaches it, or {domain: run}.
        adapts: the run of the recipe from whose weights it starts.
        data: the domain it trains on, or entries as of data.sources with domains as paths; max_tokens is that of the
            paper's scale and shrinks with the tokens that a run reads.
        valid: domains it is measured on; those it trains on.
        once: trained with the first seed only, for the students of all seeds.
        baseline: left out on request.
        times: factors on what the scale says: steps, batch, lr.
        set: fields of the configuration by their dotted names.
    """

    model: str
    inherits: str | dict[str, str] | None = None
    adapts: str | None = None
    data: str | list[Tree] = "WB"
    valid: list[str] | None = None
    once: bool = False
    baseline: bool = False
    times: dict[str, float] = field(default_factory=dict)
    set: Tree = field(default_factory=dict)

    @property
    def teachers(self) -> list[str]:
        """Names of the runs that teach it."""
        if self.inherits is None:
            return []
        return [self.inherits] if isinstance(self.inherits, str) else list(dict.fromkeys(self.inherits.values()))

    @property
    def sources(self) -> list[Tree]:
        """`data` as a list."""
        return [{"path": self.data}] if isinstance(self.data, str) else self.data

    @property
    def domains(self) -> list[str]:
        """Those that it reads, trained on or measured."""
        return list(dict.fromkeys([*(source["path"] for source in self.sources), *(self.valid or [])]))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An experiment of the paper.

    Args:
        title: of the report.
        family: roberta or gpt.
        runs: by name, in the order of the report; a teacher stands before its students.
        reads: domains that the commands of `then` need, beside those of the runs.
        report: {page: runs that are compared on it}, where not all can be on one.
        then: commands for afterwards, {label: arguments of a tool}; see `ki_ds.experiments.reproduce`.
    """

    title: str
    family: str = "roberta"
    runs: dict[str, Arm] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    report: dict[str, list[str]] = field(default_factory=dict)
    then: dict[str, str] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        """Every domain whose corpus is needed."""
        return list(dict.fromkeys([*(d for arm in self.runs.values() for d in arm.domains), *self.reads]))

    def without_baselines(self) -> Recipe:
        """The same without the runs that are there for comparison alone."""
        runs = {name: arm for name, arm in self.runs.items() if not arm.baseline}
        return dataclasses.replace(self, runs=runs)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the runs are.

    Args:
        settings: {task: groups of the configuration} laid over the family's.
        models: {preset: groups of the configuration}, e.g. smaller sizes.
        times: factors on the settings of all runs: steps, batch, lr.
        inherit_share: T_inherit of linear and Heaviside schedules as a share of the steps; null takes Table 7.
        adapt_share: steps of a run that adapts another one's weights, as a share of all (4k of 125k, section 4.4).
        vocab_size: {task: ids} of tokenizers that are trained, and of plans without a corpus.
        texts: {domain: texts} taken where none is given; `demo` is the demo's Wikipedia articles.
        valid_fraction: share of a text that is held out.
    """

    vocab_size: dict[str, int]
    settings: dict[str, Tree] = field(default_factory=dict)
    models: dict[str, Tree] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    inherit_share: float | None = None
    adapt_share: float = PAPER_ADAPT_SHARE
    texts: dict[str, str] = field(default_factory=dict)
    valid_fraction: float = 0.005


# --- reading ------------------------------------------------------------------------------------------------------


def experiments() -> list[str]:
    """The ids of all recipes of experiments."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if "\nruns:" in path.read_text(encoding="utf-8"))


def scales() -> list[str]:
    """The names of all scales."""
    return sorted(path.stem for path in (RECIPES / "scales").glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """The recipe of an experiment. UserError when there is none of that name, or it breaks a rule."""
    path = RECIPES / f"{name}.yaml"
    if name not in experiments():
        raise UserError(f"{name} is no experiment; take one of {', '.join(experiments())}")
    given = _read(path)
    arms = {key: _made(Arm, value, f"{path.name}: {key}") for key, value in given.pop("runs").items()}
    recipe = _made(Recipe, given | {"runs": arms}, path.name)
    seen: list[str] = []
    for key, arm in recipe.runs.items():
        if arm.model not in PRESETS:
            raise UserError(f"{path.name}: {key} has model={arm.model}, no preset; take one of {', '.join(PRESETS)}")
        for needed in _needs(arm):
            if needed not in seen:
                raise UserError(f"{path.name}: {key} needs {needed}, which is no run above it; move or name it")
        seen.append(key)
    return recipe


def read_scale(name: str) -> Scale:
    """A scale of this project, or a YAML file of one's own. UserError when there is none, or it breaks a rule."""
    path = Path(name) if name.endswith(".yaml") else RECIPES / "scales" / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"{name} is no scale; take one of {', '.join(scales())}, or a YAML file of your own")
    scale = _made(Scale, _read(path), path.name)
    known: dict[str, list[str]] = {"settings": [*NUM_STEPS], "vocab_size": [*NUM_STEPS], "models": [*PRESETS]}
    for field_name, names in known.items():
        if strangers := getattr(scale, field_name).keys() - set(names):
            raise UserError(f"{path.name}: {field_name} has {min(strangers)}; take of {', '.join(names)}")
    if missing := NUM_STEPS.keys() - scale.vocab_size.keys():
        raise UserError(f"{path.name}: vocab_size lacks {min(missing)}; give the ids of its tokenizer")
    return scale


def _read(path: Path) -> Tree:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no YAML ({' '.join(str(error).split())}); restore it") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no fields; restore it")
    return found


def _made(kind: Any, values: Tree, where: str) -> Any:
    """A dataclass of this module from a file's values, whose keys and types are checked."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    try:
        return kind(**vars(parser.instantiate(parser.parse_object(values))))
    except jsonargparse.ArgumentError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: {reason}; {kind.__name__} in ki_ds/experiments/recipes.py has the fields") from None


def _needs(arm: Arm) -> list[str]:
    return [*arm.teachers, *([arm.adapts] if arm.adapts else [])]


# --- from recipe and scale to jobs ----------------------------------------------------------------------------------


def plan_runs(
    recipe: Recipe, scale: Scale, *, corpora: Mapping[str, Path], seeds: Sequence[int], out: Path, num_ranks: int = 1
) -> list[Job]:
    """The jobs of an experiment, each after those that it needs.

    Args:
        corpora: {domain: corpus}, prepared or to be.
        seeds: students of each; the first is that of the runs that are trained once.
        out: the runs are in OUT/seedN/NAME, the same for every experiment that names them.
        num_ranks: of each job; micro-batches are no larger than a rank's share of the global batch.
    """
    jobs = []
    for seed in seeds:
        for name, arm in recipe.runs.items():
            if arm.once and seed != seeds[0]:
                continue
            folders = {each: _folder(recipe, each, seed, seeds, out) for each in recipe.runs}
            groups = _configuration(recipe, name, scale, corpora=corpora, folders=folders)
            groups["seed"] = seed
            train = groups["train"]
            share = max(1, train["global_batch_size"] // num_ranks)
            train["micro_batch_size"] = min(train["micro_batch_size"], share)
            after = tuple(str(folders[each]) for each in _needs(arm))
            jobs.append(Job(str(folders[name].relative_to(out)), folders[name], groups=groups, after=after))
    return jobs


def _folder(recipe: Recipe, name: str, seed: int, seeds: Sequence[int], out: Path) -> Path:
    return out / f"seed{seeds[0] if recipe.runs[name].once else seed}" / name


def _configuration(
    recipe: Recipe, name: str, scale: Scale, *, corpora: Mapping[str, Path], folders: Mapping[str, Path]
) -> Tree:
    """The groups of a run's configuration, without its seed."""
    arm = recipe.runs[name]
    groups = _read(RECIPES / f"{recipe.family}.yaml")
    paper_tokens = _tokens(groups)
    groups["model"]["name"], groups["optim"]["lr"] = arm.model, PRESETS[arm.model].peak_lr
    groups = _laid_over(groups, scale.settings.get(groups["task"], {}))
    groups = _laid_over(groups, scale.models.get(arm.model, {}))
    for factors in (scale.times, arm.times, {"steps": scale.adapt_share} if arm.adapts else {}):
        _multiply(groups, factors, where=name)
    shrunk = _tokens(groups) / paper_tokens / (PAPER_ADAPT_SHARE if arm.adapts else 1)
    groups = _laid_over(groups, {"data": _data(arm, corpora, shrunk)})
    if not arm.teachers:  # a scale's settings of teaching are not for it
        groups = {group: values for group, values in groups.items() if group not in ("teacher", "inherit")}
    groups = _laid_over(groups, _teaching(recipe, name, scale, groups, folders))
    if arm.adapts:
        groups["model"] = {"name": str(folders[arm.adapts] / "best"), "init": "pretrained"}
    for key, value in arm.set.items():
        groups = _laid_over(groups, _nested(key, value))
    groups["run_dir"] = str(folders[name])
    groups["engine"]["ds_config"] = str(ROOT / groups["engine"]["ds_config"])
    return groups


def _tokens(groups: Tree) -> float:
    """Tokens that a run reads."""
    return groups["train"]["num_steps"] * groups["train"]["global_batch_size"] * groups["data"]["seq_len"]


def _data(arm: Arm, corpora: Mapping[str, Path], shrunk: float) -> Tree:
    sources = [{**source, "path": str(corpora[source["path"]]), "domain": source["path"]} for source in arm.sources]
    for source in sources:
        if "max_tokens" in source:
            source["max_tokens"] = round(source["max_tokens"] * shrunk)
    trained = list(dict.fromkeys(source["path"] for source in arm.sources))
    return {"sources": sources, "valid": {domain: str(corpora[domain]) for domain in arm.valid or trained}}


def _teaching(recipe: Recipe, name: str, scale: Scale, groups: Tree, folders: Mapping[str, Path]) -> Tree:
    """Who teaches the run, and for how long."""
    arm = recipe.runs[name]
    if arm.inherits is None:
        return {}
    if isinstance(arm.inherits, str):
        found: Tree = {"teacher": {"path": str(folders[arm.inherits])}}
    else:
        entries = [{"path": str(folders[run]), "domains": [domain]} for domain, run in arm.inherits.items()]
        found = {"teachers": entries}
    found["inherit"] = {"schedule": "linear"}
    if arm.set.get("inherit.schedule", "linear") in ("linear", "heaviside") and "inherit.slope" not in arm.set:
        share = scale.inherit_share or teaching_share(list(_generations(recipe, name)), groups["task"])
        if share is None:
            raise UserError(f"{name}: Table 7 has no such pair; give the run inherit.slope in its recipe")
        found["inherit"]["steps"] = round(share * groups["train"]["num_steps"])
    return found


def _generations(recipe: Recipe, name: str | None) -> Iterator[str]:
    """Presets of a run, its teacher, the teacher's teacher, and so on."""
    while name is not None:
        yield recipe.runs[name].model
        name = next(iter(recipe.runs[name].teachers), None)


def _multiply(groups: Tree, factors: Mapping[str, float], *, where: str) -> None:
    places = {"steps": ("train", "num_steps"), "batch": ("train", "global_batch_size"), "lr": ("optim", "lr")}
    for name, factor in factors.items():
        if name not in places:
            raise UserError(f"{where}: times has {name}; take steps, batch or lr")
        group, key = places[name]
        value = groups[group][key] * factor
        groups[group][key] = value if name == "lr" else max(1, round(value))


def _nested(key: str, value: object) -> Tree:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _laid_over(below: Tree, above: Tree) -> Tree:
    """Groups of `above` over those of `below`, field by field; neither is changed."""
    both = {**below, **above}
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict) and key != "valid":
            both[key] = _laid_over(below[key], value)
    return {key: dict(value) if isinstance(value, dict) else value for key, value in both.items()}


def configuration_of(job: Job) -> RunConfig:
    """The validated configuration of a planned job. UserError as `config.parse`."""
    assert job.groups is not None
    return configuration.of_groups(job.groups)
