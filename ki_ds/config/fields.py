"""What is known of a field of a configuration, said beside the field and held for all of them alike.

When it has a meaning (an option without one is refused, never ignored), the numbers it may be, and whether it may
differ when a run goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ki_ds.config.paper import PRESETS
from ki_ds.errors import UserError


@dataclass(frozen=True)
class Condition:
    """What a field needs to have a meaning.

    Args:
        holds: whether a run has it.
        otherwise: the line for a field that was given where it does not hold; {name}, {value}, and {c} for the run.
    """

    holds: Callable[[Any], bool]
    otherwise: str


def _meaning(holds: Callable[[Any], bool], where: str, fix: str = "leave it out") -> Condition:
    return Condition(holds, f"{{name}}={{value}} has no meaning {where}; {fix}")


ALWAYS = Condition(lambda c: True, "")
RULED = ALWAYS  # as far as fields alone can say: an entry beside it, a corpus or a model decides
PRESET = Condition(
    lambda c: c.model.name in PRESETS,
    f"{{name}} can only change a preset ({', '.join(PRESETS)}), and model.name={{c.model.name}} is none",
)
MASKED = _meaning(lambda c: c.task == "mlm", "for task={c.task}")
LINES_KEPT = _meaning(
    lambda c: c.data.break_mode not in ("none", "none_doc", "auto" if c.task == "causal" else ""),
    "for task={c.task} with data.break_mode={c.data.break_mode}",
)
SHORT_BLOCKS = _meaning(
    lambda c: c.task == "causal" and c.data.break_mode in ("complete_doc", "none_doc", "eos"),
    "for task={c.task} with data.break_mode={c.data.break_mode}",
)
OWN_VALID = _meaning(lambda c: c.data.valid is None, "with data.valid")
PARTS = _meaning(
    lambda c: c.data.valid_fraction > 0 or any(s.half or s.fraction < 1 or s.max_tokens for s in c.data.all_sources),
    "where no half, fraction, max_tokens or data.valid_fraction takes a part",
)
TEACHER = _meaning(
    lambda c: c.teachers is not None or c.teacher.path is not None,
    "without a teacher",
    "give teacher.path, or leave it out",
)
PLACED = Condition(TEACHER.holds, "{name}={value} needs a folder; give teacher.path")
USED = Condition(
    lambda c: c.inherit.schedule != "none",
    "{name}={value} would never be used with inherit.schedule=none; give a schedule or no teacher",
)
NOT_CACHED = _meaning(lambda c: c.teacher.placement != "cache", "with teacher.placement=cache, whose K is its own")
NOT_SENT = _meaning(lambda c: c.teacher.placement != "ranks", "with teacher.placement=ranks, which send hidden states")
NOT_AUTO = Condition(
    lambda c: c.inherit.schedule != "auto",
    "{name}={value} hides the whole teacher from inherit.schedule=auto; leave it out, or take linear",
)
NOT_AVERAGED = Condition(
    lambda c: len(c.all_teachers) < 2 or c.all_teachers[0].domains is not None,
    "{name}={value}: K entries cannot be averaged over teachers; leave it out, or give each domains",
)
TOPK = _meaning(
    lambda c: c.teacher.topk is not None or c.teacher.placement == "cache",
    "without teacher.topk or teacher.placement=cache",
)
RANKS = _meaning(lambda c: c.teacher.placement == "ranks", "with teacher.placement={c.teacher.placement}")
INHERITS = _meaning(lambda c: c.inherit.schedule != "none", "with inherit.schedule={c.inherit.schedule}")
ENDS = _meaning(lambda c: c.inherit.schedule in ("linear", "heaviside"), "with inherit.schedule={c.inherit.schedule}")
CONSTANT = _meaning(lambda c: c.inherit.schedule == "constant", "with inherit.schedule={c.inherit.schedule}")
DECAY = _meaning(lambda c: c.optim.weight_decay > 0, "with optim.weight_decay={c.optim.weight_decay}")
BEFORE_END = _meaning(
    lambda c: (c.train.stop_at_step or 0) <= c.train.num_steps, "after train.num_steps={c.train.num_steps}"
)


@dataclass(frozen=True)
class Interval:
    """The numbers that a field may be, e.g. [0, 1); an end belongs to it unless it is open."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        return f"{'[('[self.open_low]}{self.low:g}, {self.high:g}{'])'[self.open_high]}"


@dataclass(frozen=True)
class Facts:
    """What stands beside a field; its arguments are those of `setting`."""

    when: tuple[Condition, ...]
    interval: Interval | None
    operational: bool


def setting(
    default: Any,
    *when: Condition,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    operational: bool = False,
) -> Any:
    """A field of a configuration.

    Args:
        default: MISSING for one that must be given.
        when: it has a meaning where all of these hold, and elsewhere must be left out; at least ALWAYS is said.
        at_least, above, at_most, below: the two ends of the interval of a number.
        operational: it says how a run is carried out, and not what it computes, so that it may differ when a run goes
            on; of a corpus' or teacher's path, because what lies there is compared by hash.
    """
    assert when
    low, high = above if at_least is None else at_least, below if at_most is None else at_most
    interval = None
    if low is not None and high is not None:
        interval = Interval(low, high, open_low=above is not None, open_high=below is not None)
    return dataclasses.field(default=default, metadata={"facts": Facts(when, interval, operational)})


@dataclass(frozen=True)
class Given:
    """A field of a run and its value."""

    name: str  # dotted, e.g. data.sources.0.weight
    value: Any
    default: Any  # MISSING where it must be given
    facts: Facts


def walk(config: Any, prefix: str = "") -> Iterator[Given]:
    """All fields of a configuration, those of its groups and lists of groups one by one."""
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{name}.")
        elif isinstance(value, list) and all(map(dataclasses.is_dataclass, value)):
            for number, entry in enumerate(value):
                yield from walk(entry, f"{name}.{number}.")
        else:
            yield Given(name, value, item.default, item.metadata["facts"])


def without_meaning(config: Any) -> dict[str, Condition]:
    """{dotted name: the first condition that does not hold} of the fields that have no meaning in a run."""
    failing = {field.name: [when for when in field.facts.when if not when.holds(config)] for field in walk(config)}
    return {name: conditions[0] for name, conditions in failing.items() if conditions}


def check_intervals(config: Any) -> None:
    """Return silently, or raise UserError for the first number that lies outside of its interval."""
    for field in walk(config):
        interval = field.facts.interval
        if interval is not None and field.value is not None and field.value not in interval:
            raise UserError(f"{field.name}={field.value} is outside {interval}; change it")


def check_meaning(config: Any) -> None:
    """Return silently, or raise UserError for the first field that was given and has no meaning."""
    idle = without_meaning(config)
    for field in walk(config):
        if field.name in idle and field.value != field.default:
            raise UserError(idle[field.name].otherwise.format(name=field.name, value=field.value, c=config))
