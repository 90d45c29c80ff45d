import pytest
from hypothesis import given
from hypothesis import strategies as st

from ki_ds import schedules

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
        end = schedules.last_inheriting_step(schedule, inherit_steps, 10**9)
        assert schedules.alpha(end, schedule=schedule, inherit_steps=inherit_steps) == 0
        assert schedules.alpha(end - 1, schedule=schedule, inherit_steps=inherit_steps) > 0


def test_constant_and_none():
    assert schedules.alpha(7, schedule="constant", constant=0.3) == 0.3
    assert schedules.alpha(7, schedule="none") == 0
    assert schedules.last_inheriting_step("constant", None, 90) == 90
    assert schedules.last_inheriting_step("none", None, 90) == 0


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
