import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_ds.config import InheritConfig, RunConfig, TrainConfig, schedules

STEPS = st.integers(1, 10**6)


@pytest.mark.parametrize(("t", "expected"), [(0, 1.0), (13, 1 - 13 / 40), (39, 1 / 40), (40, 0.0), (100, 0.0)])
def test_linear_is_the_released_codes(t, expected):
    assert schedules.linear_alpha(t, 40) == pytest.approx(expected, abs=1e-15)


def test_heaviside_switches_at_t_inherit():
    assert [schedules.heaviside_alpha(t, 40) for t in (0, 39, 40, 41)] == [1, 1, 0, 0]


@given(st.integers(0, 10**6), STEPS)
def test_alpha_lies_in_0_1_never_rises_and_ends_at_0(t, inherit_steps):
    for schedule in ("linear", "heaviside"):
        now, later = (schedules.alpha(s, schedule=schedule, inherit_steps=inherit_steps) for s in (t, t + 1))
        assert 1 >= now >= later >= 0
        assert schedules.alpha(0, schedule=schedule, inherit_steps=inherit_steps) == 1


def test_constant_and_none():
    assert schedules.alpha(7, schedule="constant", constant=0.3) == 0.3
    assert schedules.alpha(7, schedule="none") == 0


@given(
    schedule=st.sampled_from(["linear", "heaviside", "constant", "none"]),
    inherit_steps=st.integers(1, 120),
    start=st.integers(0, 99),
)
def test_taught_steps_are_those_with_alpha(schedule, inherit_steps, start):
    start = 0 if schedule == "none" else start
    counted = {"inherit_steps": inherit_steps} if schedule in ("linear", "heaviside") else {}
    inherit = InheritConfig(schedule=schedule, steps=counted.get("inherit_steps"), start_step=start)
    config = RunConfig(inherit=inherit, train=TrainConfig(num_steps=100))
    alphas = [schedules.alpha(t, schedule=schedule, start_step=start, **counted) for t in range(100)]
    assert [t for t in range(100) if alphas[t] > 0] == list(schedules.taught_steps(config))
    alone = [schedules.alpha(t, schedule=schedule, **counted) for t in range(100 - start)]
    assert alphas == [0.0] * start + alone


@given(STEPS, st.floats(0, 0.9))
def test_learning_rate_rises_to_its_peak_then_falls_towards_0(num_steps, fraction):
    rate = lambda t: schedules.learning_rate(t, peak=2.0, num_steps=num_steps, warmup_fraction=fraction)  # noqa: E731
    warmup = round(num_steps * fraction)
    assert 0 < rate(num_steps - 1) <= 2.0
    if warmup:
        assert rate(warmup - 1) == pytest.approx(2.0)
        assert rate(0) == pytest.approx(2.0 / warmup)
    if warmup < num_steps:
        assert rate(warmup) == pytest.approx(2.0)
        assert rate(num_steps - 1) == pytest.approx(2.0 / (num_steps - warmup))
