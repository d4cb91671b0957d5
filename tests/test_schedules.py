"""Schedules against their closed forms, before, within and after their span."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import schedules

STEPS = range(30)


def fraction(step, begin, steps):
    return min(max((step - begin) / steps, 0.0), 1.0)


VALUES = [
    (schedules.constant(0.3), lambda step: 0.3),
    (schedules.linear(0.2, 0.9, 7), lambda step: 0.2 + 0.7 * fraction(step, 0, 7)),
    (
        schedules.linear(0.9, 0.0, 10, begin=5),
        lambda step: 0.9 - 0.9 * fraction(step, 5, 10),
    ),
    (
        schedules.cubic(0.9, 20),
        lambda step: 0.9 - 0.9 * (1 - fraction(step, 0, 20)) ** 3,
    ),
    (
        schedules.cubic(0.8, 10, begin=4, start=0.5),
        lambda step: 0.8 - 0.3 * (1 - fraction(step, 4, 10)) ** 3,
    ),
    (
        schedules.cosine(0.3, 24),
        lambda step: 0.15 * (1 + math.cos(math.pi * fraction(step, 0, 24))),
    ),
    (schedules.cosine(1.0, 1), lambda step: float(step == 0)),
]


@pytest.mark.parametrize(("schedule", "closed_form"), VALUES)
def test_values_equal_the_closed_form(schedule, closed_form):
    expected = [closed_form(step) for step in STEPS]
    swept = jax.jit(jax.vmap(schedule))(jnp.arange(len(STEPS)))
    assert swept.dtype == jnp.float32
    np.testing.assert_allclose(swept, expected, atol=1e-6)
    for step in (0, 4, 7, 14, 29):
        np.testing.assert_allclose(schedule(step), expected[step], atol=1e-6)


def test_ends_are_exact():
    assert schedules.cubic(0.9, 20)(0) == 0
    assert schedules.cubic(0.9, 20)(20) == jnp.float32(0.9)
    for start, end in [(0.0, 0.9), (0.05, 0.35), (0.1, 0.7), (0.9, 0.1)]:
        assert schedules.linear(start, end, 20)(20) == jnp.float32(end)
    assert schedules.cosine(0.3, 20)(0) == jnp.float32(0.3)
    assert schedules.cosine(0.3, 20)(20) == 0
    assert schedules.cosine(0.3, 20)(10**9) == 0


@pytest.mark.parametrize("value", [90.0, -0.1, math.nan, math.inf, np.float32(1.5)])
@pytest.mark.parametrize(
    "make",
    [
        schedules.constant,
        lambda value: schedules.cubic(value, 3),
        lambda value: schedules.linear(value, 0.5, 3),
    ],
)
def test_ends_that_are_no_fractions_are_refused(make, value):
    with pytest.raises(ValueError, match=r"fractions, in \[0, 1\], got the value"):
        make(value)


def test_ends_may_be_traced():
    sweep = jax.jit(jax.vmap(lambda end: schedules.cubic(end, 4)(jnp.int32(4))))
    np.testing.assert_array_equal(sweep(jnp.array([0.5, 0.9])), np.float32([0.5, 0.9]))


@pytest.mark.parametrize(
    "make",
    [
        lambda steps: schedules.linear(0.0, 1.0, steps),
        lambda steps: schedules.cubic(0.9, steps),
        lambda steps: schedules.cosine(0.3, steps),
    ],
)
@pytest.mark.parametrize("steps", [0, -3])
def test_spans_without_a_step_are_refused(make, steps):
    with pytest.raises(ValueError, match=f"at least 1 step, got {steps}"):
        make(steps)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (schedules.every(1), range(1, 30)),
        (schedules.every(7), [7, 14, 21, 28]),
        (schedules.every(7, stop=21), [7, 14]),
        (schedules.every(7, stop=22), [7, 14, 21]),
        (schedules.every(7, stop=0), []),
        (schedules.every(100), []),
        (schedules.at([0, 12]), [0, 12]),
        (schedules.at((5, 5, 3)), [3, 5]),
        (schedules.at(range(0, 9, 4)), [0, 4, 8]),
        (schedules.at(np.array([2, 40])), [2]),
        (schedules.at([]), []),
    ],
)
def test_refreshes_are_at_the_expected_steps(when, expected):
    swept = jax.jit(jax.vmap(when))(jnp.arange(len(STEPS)))
    assert swept.dtype == bool
    assert np.flatnonzero(swept).tolist() == list(expected)
    assert [step for step in STEPS if when(step)] == list(expected)
    assert when(jnp.int32(0)).shape == ()


@pytest.mark.parametrize("interval", [0, -1])
def test_an_interval_without_a_step_is_refused(interval):
    with pytest.raises(ValueError, match=f"at least 1 step, got {interval}"):
        schedules.every(interval)
