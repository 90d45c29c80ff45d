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
        otherwise: what is said where it does not hold; `{c}` is the run: "has no meaning for task={c.task}".
        fix: what to do about it.
    """

    holds: Callable[[Any], bool]
    otherwise: str
    fix: str = "leave it out"


MASKED = Condition(lambda c: c.task == "mlm", "has no meaning for task={c.task}")
LINES_KEPT = Condition(
    lambda c: c.data.break_mode not in ("none", "none_doc", "auto" if c.task == "causal" else ""),
    "has no meaning for task={c.task} with data.break_mode={c.data.break_mode}",
)
SHORT_BLOCKS = Condition(
    lambda c: c.task == "causal" and c.data.break_mode in ("complete_doc", "none_doc", "eos"),
    "has no meaning for task={c.task} with data.break_mode={c.data.break_mode}",
)
OWN_VALID = Condition(lambda c: c.data.valid is None, "has no meaning with data.valid")
PARTS = Condition(
    lambda c: c.data.valid_fraction > 0 or any(s.half or s.fraction < 1 or s.max_tokens for s in c.data.all_sources),
    "has no meaning where no half, fraction, max_tokens or data.valid_fraction takes a part",
)
TEACHER = Condition(
    lambda c: c.teachers is not None or c.teacher.path is not None,
    "has no meaning without a teacher",
    "give teacher.path, or leave it out",
)
PLACED = Condition(TEACHER.holds, "needs a folder", "give teacher.path")
TOPK = Condition(
    lambda c: c.teacher.topk is not None or c.teacher.placement == "cache",
    "has no meaning without teacher.topk or teacher.placement=cache",
)
RANKS = Condition(
    lambda c: c.teacher.placement == "ranks", "has no meaning with teacher.placement={c.teacher.placement}"
)
INHERITS = Condition(
    lambda c: c.inherit.schedule != "none", "has no meaning with inherit.schedule={c.inherit.schedule}"
)
ENDS = Condition(
    lambda c: c.inherit.schedule in ("linear", "heaviside"), "has no meaning with inherit.schedule={c.inherit.schedule}"
)
CONSTANT = Condition(
    lambda c: c.inherit.schedule == "constant", "has no meaning with inherit.schedule={c.inherit.schedule}"
)
DECAY = Condition(lambda c: c.optim.weight_decay > 0, "has no meaning with optim.weight_decay={c.optim.weight_decay}")
BEFORE_END = Condition(
    lambda c: (c.train.stop_at_step or 0) <= c.train.num_steps,
    "has no meaning after train.num_steps={c.train.num_steps}",
)


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
            raise UserError(f"{name}={value} {idle[name].otherwise.format(c=config)}; {idle[name].fix}")
