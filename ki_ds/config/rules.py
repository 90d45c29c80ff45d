"""The rules between fields: which values go together, and which of them may change when a run goes on."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from ki_ds.config.fields import check_intervals, check_meaning, walk, without_meaning
from ki_ds.config.schema import DataConfig, RunConfig, SourceConfig, TeacherEntry, inherit_steps
from ki_ds.errors import UserError

_EXAMPLE = RunConfig(data=DataConfig(sources=[SourceConfig("")]), teachers=[TeacherEntry("")])  # has every field
_OPERATIONAL = {given.name.replace(".0.", ".") for given in walk(_EXAMPLE) if given.facts.operational}


def is_operational(name: str) -> bool:
    """Whether a field, by its name in `flatten`, may differ when a run goes on."""
    return re.sub(r"\.\d+", "", name) in _OPERATIONAL


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Fields that change what a run computes and differ: {name: (old value, new value)}."""
    before, after = _computed(old), _computed(new)
    idle = without_meaning(old).keys() & without_meaning(new).keys()
    pairs = {name: (before.get(name), after.get(name)) for name in {**before, **after} if name not in idle}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _computed(config: RunConfig) -> dict[str, Any]:
    """The fields that say what is computed; of corpora by domain the names, for what they hold is compared by hash."""
    values = {given.name: given.value for given in walk(config) if not given.facts.operational}
    return {name: sorted(value) if isinstance(value, dict) else value for name, value in values.items()}


def validate(config: RunConfig, *, saved: bool = False) -> None:
    """Return silently, or raise UserError for the first rule that the values break.

    Args:
        saved: fields without meaning may have any value.
    """
    _check_given(config)
    check_intervals(config)
    _check_inheritance(config)
    if not saved:
        check_meaning(config)
    if not config.run_dir:
        raise UserError("run_dir is empty; give the run a folder, e.g. --run_dir runs/base")
    _check_data(config.data)
    if config.teachers is not None:
        if config.teacher.path is not None:
            raise UserError(f"teacher.path={config.teacher.path} and teachers are both given; put it into the list")
        check_entries(config.teachers, list(dict.fromkeys(source.name for source in config.data.all_sources)))
    if config.train.keep_every and config.train.keep_every % config.train.save_every:
        raise UserError(
            f"train.keep_every={config.train.keep_every} is not a multiple of train.save_every="
            f"{config.train.save_every}, so that nothing is saved there; change one of them"
        )
    if config.train.global_batch_size % config.train.micro_batch_size:
        raise UserError(
            f"train.global_batch_size={config.train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={config.train.micro_batch_size}; change one of them"
        )


def _check_given(config: Any, prefix: str = "") -> None:
    """No field is null that needs a value: the parser takes null for any."""
    types = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        if value is None and type(None) not in get_args(types[item.name]):
            raise UserError(f"{name} is null, but needs a value; give one, or leave {name} out")
        for number, entry in enumerate(value if isinstance(value, list) else [value]):
            if dataclasses.is_dataclass(entry):
                _check_given(entry, f"{name}.{number}." if isinstance(value, list) else f"{name}.")


def _check_inheritance(config: RunConfig) -> None:
    inherit = config.inherit
    if inherit.schedule != "none" and config.teachers is None and config.teacher.path is None:
        raise UserError(
            f"inherit.schedule={inherit.schedule} needs a teacher; give teacher.path, or inherit.schedule none"
        )
    given = [name for name in ("steps", "slope") if getattr(inherit, name) is not None]
    if inherit.schedule in ("linear", "heaviside") and len(given) != 1:
        what = "neither inherit.steps nor inherit.slope" if not given else "both inherit.steps and inherit.slope"
        raise UserError(f"inherit.schedule={inherit.schedule} was given {what}; give exactly one of them")
    if inherit.schedule in ("linear", "heaviside") and inherit_steps(config) == 0:
        raise UserError(
            f"inherit.slope={inherit.slope} leaves no step of train.num_steps={config.train.num_steps} to inherit "
            "(T_inherit = T / slope); lower it, or take inherit.schedule none"
        )
    if inherit.schedule != "none" and inherit.start_step >= config.train.num_steps:
        raise UserError(
            f"inherit.start_step={inherit.start_step} is not before train.num_steps={config.train.num_steps}; lower it"
        )


def check_entries(entries: Sequence[TeacherEntry], domains: Sequence[str]) -> None:
    """Return silently, or raise UserError for the first rule that the list breaks.

    Args:
        domains: those that the run trains on.
    """
    if not entries:
        raise UserError("teachers is empty; give at least one entry, e.g. [{path: runs/wb, domains: [wb]}], or null")
    routed = entries[0].domains is not None
    owners: dict[str, str] = {}
    for number, entry in enumerate(entries):
        name = f"teachers.{number}"
        if not entry.path:
            raise UserError(f"{name}.path is empty; give a teacher's folder")
        if (entry.domains is not None) != routed:
            raise UserError(
                f"teachers.0 has {'' if routed else 'no '}domains, {name} has {'none' if routed else 'some'}; give "
                "every entry domains (each row its domain's teacher), or none (the average of all)"
            )
        _check_share(name, entry, routed=routed, alone=len(entries) == 1)
        if entry.domains == []:
            raise UserError(f"{name}.domains is empty; name at least one, or leave domains out of every entry")
        for domain in entry.domains or ():
            if domain not in domains:
                raise UserError(
                    f"{name}.domains names {domain}, which the run does not train on; take of {', '.join(domains)}"
                )
            if domain in owners:
                raise UserError(f"domain {domain} is given to {owners[domain]} and {name}; give it to one of them")
            owners[domain] = name


def _check_share(name: str, entry: TeacherEntry, *, routed: bool, alone: bool) -> None:
    if entry.share is None:
        return
    if routed or alone:
        why = "domains, which part the rows" if routed else "a teacher that is the only one"
        raise UserError(f"{name}.share={entry.share:g} has no meaning with {why}; leave it out")
    if not 0 < entry.share < math.inf:
        raise UserError(f"{name}.share={entry.share:g} is not positive; change it")


def _check_data(data: DataConfig) -> None:
    if bool(data.corpus) == (data.sources is not None):
        what = "both data.corpus and data.sources" if data.corpus else "neither data.corpus nor data.sources"
        raise UserError(f"{what} are given; give a corpus made by tools/prepare_data.py, or a list of sources")
    if data.sources == []:
        raise UserError("data.sources is empty; give at least one source, e.g. [{path: data/wb}]")
    weights = [source.weight for source in data.all_sources]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        raise UserError(f"data.sources have the weights {weights}; give every source one, or none")
    if data.valid == {}:
        raise UserError("data.valid is empty; give {domain: corpus}, or null for the sources' own validation parts")
    if data.keep_probability + data.random_probability > 1:
        raise UserError(
            f"data.keep_probability={data.keep_probability} and data.random_probability={data.random_probability} "
            "add up to more than 1; lower one of them"
        )
