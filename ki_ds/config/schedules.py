"""Pure functions of t, the number of completed updates: alpha (how much is inherited) and the learning rate.

The schedule `auto` depends on more than t: `ki_ds.training.handover`.
"""

from ki_ds import config as configuration
from ki_ds.config import RunConfig


def linear_alpha(t: int, inherit_steps: int) -> float:
    """max(0, 1 - t / T_inherit): 1 at the first update, 0 from T_inherit on (section 2.2; released code)."""
    return max(0.0, 1.0 - t / inherit_steps)


def heaviside_alpha(t: int, inherit_steps: int) -> float:
    """1 before T_inherit, 0 from it on (Fig. 1b, "Heviside")."""
    return 1.0 if t < inherit_steps else 0.0


def alpha(
    t: int, *, schedule: str, inherit_steps: int | None = None, constant: float = 0.5, start_step: int = 0
) -> float:
    """The inheritance rate in [0, 1] before update t + 1.

    Args:
        t: completed updates.
        start_step: completed updates from which the schedule counts; before them alpha is 0.
        schedule: linear, heaviside, constant or none.
        inherit_steps: T_inherit; needed by linear and heaviside.
        constant: the rate of the constant schedule.
    """
    if t < start_step:
        return 0.0
    t -= start_step
    match schedule:
        case "linear":
            assert inherit_steps
            return linear_alpha(t, inherit_steps)
        case "heaviside":
            assert inherit_steps
            return heaviside_alpha(t, inherit_steps)
        case "constant":
            return constant
        case "none":
            return 0.0
    raise AssertionError(schedule)


def taught_steps(config: RunConfig) -> range:
    """The completed updates t at which alpha can be above 0; from their end on it is 0 for good."""
    inherit, num_steps = config.inherit, config.train.num_steps
    match inherit.schedule:
        case "none":
            return range(0)
        case "constant" if inherit.constant_alpha == 0:
            return range(0)
        case "constant" | "auto":
            return range(inherit.start_step, num_steps)
    steps = configuration.inherit_steps(config)
    assert steps
    return range(inherit.start_step, min(inherit.start_step + steps, num_steps))


def learning_rate(t: int, *, peak: float, num_steps: int, warmup_fraction: float) -> float:
    """The learning rate of update t + 1: linear warm-up to `peak`, then linear decay that would reach 0 at T.

    Args:
        t: completed updates, 0 <= t < num_steps.
        peak: the highest rate (Table 6), reached by the last warm-up update.
        num_steps: T, updates of the whole run.
        warmup_fraction: share of T that warms up (10% in the paper).
    """
    warmup = round(num_steps * warmup_fraction)
    if t < warmup:
        return peak * (t + 1) / warmup
    return peak * (num_steps - t) / (num_steps - warmup)
