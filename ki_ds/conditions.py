"""In what settings a field of a configuration has a meaning: said beside the field, held for all of them alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ki_ds.errors import UserError


@dataclass(frozen=True)
class Condition:
    """What a field needs to have a meaning.

    Args:
        holds: whether a run has it.
        otherwise: of a run that has not; `{c}` is its configuration: "for task={c.task}".
        fix: what to do about it.
    """

    holds: Callable[[Any], bool]
    otherwise: str
    fix: str = "leave it out"


def only(default: Any, condition: Condition) -> Any:
    """A dataclass field that has a meaning only where the condition holds, and elsewhere must be left out."""
    return dataclasses.field(default=default, metadata={"only": condition})


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(dotted name, field, value) of all fields, those of groups and of lists of groups one by one."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{item.name}.")
        elif isinstance(value, list) and all(map(dataclasses.is_dataclass, value)):
            for number, entry in enumerate(value):
                yield from walk(entry, f"{prefix}{item.name}.{number}.")
        else:
            yield prefix + item.name, item, value


def without_meaning(config: Any) -> dict[str, Condition]:
    """{dotted name: the condition that does not hold} of the fields that have no meaning in a run."""
    conditions = {name: item.metadata["only"] for name, item, _ in walk(config) if "only" in item.metadata}
    return {name: condition for name, condition in conditions.items() if not condition.holds(config)}


def check_meaning(config: Any) -> None:
    """Return silently, or raise UserError for the first field that was given and has no meaning."""
    idle = without_meaning(config)
    for name, item, value in walk(config):
        if name in idle and value != item.default:
            raise UserError(f"{name}={value} has no meaning {idle[name].otherwise.format(c=config)}; {idle[name].fix}")
