"""Schedules: how much, and when, as functions of the step.

A value schedule maps a step to a sparsity or to a drop fraction; a refresh schedule
maps a step to a bool. Steps count the optimiser's updates from 0 and may be traced.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.checks import is_number, is_whole

Step = int | jax.Array
Schedule = Callable[[Step], float | jax.Array]
When = Callable[[Step], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Ramp:
    """From one value to another, and constant before and after.

    `end + (start - end) * (1 - (step - begin) / steps)^power`. Who is given one can ask
    for its ends before any step is taken, as rules do.

    Attributes:
      start: the value up to step `begin`, in [0, 1] or traced.
      end: the value from step `begin + steps` on, likewise.
      steps: at least 1.
      begin: the step at which it begins to change.
      power: 1 for a line.

    Raises:
      ValueError: a value or the number of steps is out of its range.

    >>> float(Ramp(start=0.0, end=0.5, steps=4)(2))
    0.25
    """

    start: float | jax.Array
    end: float | jax.Array
    steps: int
    begin: int = 0
    power: int = 1

    def __post_init__(self) -> None:
        """Checks the ends that are known."""
        _check_steps(self.steps, begin=self.begin)
        for value in (self.start, self.end):
            _check_fraction(value)

    def __call__(self, step: Step) -> jax.Array:
        """The value at a step."""
        left = 1 - _progress(step, self.begin, self.steps)
        # From the end backwards: the end is met to the bit.
        return self.end + (self.start - self.end) * left**self.power


def constant(value: float | jax.Array) -> Schedule:
    """The same value at every step.

    Raises:
      ValueError: the value is known and outside of [0, 1].

    >>> float(constant(0.5)(10))
    0.5
    """
    return Ramp(value, value, 1)


def linear(start: float, end: float, steps: int, begin: int = 0) -> Schedule:
    """From `start` at step `begin` to `end` at step `begin + steps`, in a line.

    Raises:
      ValueError: an end is known and outside of [0, 1], or there is no step.

    >>> [float(linear(0.0, 0.8, 4)(step)) for step in (0, 2, 9)]
    [0.0, 0.4000000059604645, 0.800000011920929]
    """
    return Ramp(start, end, steps, begin)


def cubic(end: float, steps: int, begin: int = 0, start: float = 0.0) -> Schedule:
    """Fast at first, slow at the end: gradual pruning's polynomial.

    `end + (start - end) * (1 - (step - begin) / steps)^3`, constant outside of it. From
    Zhu and Gupta (arXiv 1710.01878).

    Raises:
      ValueError: an end is known and outside of [0, 1], or there is no step.

    >>> [round(float(cubic(0.8, 4)(step)), 3) for step in (0, 1, 2, 4, 9)]
    [0.0, 0.463, 0.7, 0.8, 0.8]
    """
    return Ramp(start, end, steps, begin, power=3)


def cosine(start: float, steps: int) -> Schedule:
    """From `start` to 0 along half a cosine: RigL's drop fraction.

    `start / 2 * (1 + cos(pi * step / steps))`, and 0 from `steps` on. From Dettmers and
    Zettlemoyer (arXiv 1907.04840), as RigL uses it (arXiv 1911.11134).

    Raises:
      ValueError: the start is known and outside of [0, 1], or there is no step.

    >>> [round(float(cosine(0.3, 4)(step)), 3) for step in (0, 2, 4, 9)]
    [0.3, 0.15, 0.0, 0.0]
    """
    _check_steps(steps)
    _check_fraction(start)
    return lambda step: start / 2 * (1 + jnp.cos(jnp.pi * _progress(step, 0, steps)))


def every(interval: int, stop: int | None = None) -> When:
    """At steps `interval`, `2 * interval`, ..., before step `stop`.

    Step 0 is left out: nothing has been learned yet. To refresh there, use `at([0])`.

    Raises:
      ValueError: the interval is no whole number of steps or not positive, or the stop
        is none.

    >>> [step for step in range(10) if every(3, stop=9)(step)]
    [3, 6]
    """
    _check_interval(interval, stop=stop)

    def when(step: Step) -> jax.Array:
        step = jnp.asarray(step)
        due = (step > 0) & (step % interval == 0)
        return due if stop is None else due & (step < stop)

    return when


def alternating(interval: int, stop: int, begin: int | None = None) -> When:
    """True in every second phase of `interval` steps from `begin` on, and from `stop`.

    The compressed phases of AC/DC (Peste et al., arXiv 2106.12379): dense up to `begin`
    (one interval if not given), then sparse and dense by turns, sparse at the end.

    Raises:
      ValueError: the interval is no whole number of steps or not positive, or the stop
        or the begin is none.

    >>> [int(alternating(2, stop=8)(step)) for step in range(10)]
    [0, 0, 1, 1, 0, 0, 1, 1, 1, 1]
    """
    _check_interval(interval, stop=stop, begin=begin)
    first = interval if begin is None else begin

    def when(step: Step) -> jax.Array:
        step = jnp.asarray(step)
        phase = (step - first) // interval
        return (step >= first) & (phase % 2 == 0) | (step >= stop)

    return when


def refresh_stop(steps: int) -> int:
    """The step from which masks stay: three quarters of the run, at least 1.

    >>> refresh_stop(1000)
    750
    """
    return max(steps * 3 // 4, 1)


def refresh_interval(samples: int, batch_size: int, stop: int) -> int:
    """Steps between two refreshes on few data.

    `max(ceil(samples / batch_size), 25, ceil(stop / 40))`: at least one pass over the
    data, so that the growth gradient has seen every sample; at least 25 steps, so that
    a weight that starts at 0 can outgrow the drop threshold; at most about 40 of them.

    Args:
      samples: number of training examples.
      batch_size: examples per step.
      stop: step from which the masks stay.

    >>> refresh_interval(samples=100, batch_size=32, stop=1500)
    38
    """
    return max(-(-samples // batch_size), 25, -(-stop // 40))


def at(steps: Sequence[int]) -> When:
    """At the given steps and at no other; `at([])` is never.

    Raises:
      ValueError: they are no sequence of whole numbers.

    >>> [step for step in range(10) if at([0, 4])(step)]
    [0, 4]
    """
    if not np.iterable(steps) or not all(is_whole(step) for step in steps):
        raise ValueError(
            f"expected whole numbers of steps, such as `at([0, 100])`, got {steps!r}"
        )
    chosen = [int(step) for step in steps]
    return lambda step: jnp.isin(jnp.asarray(step), jnp.asarray(chosen, jnp.int32))


def _progress(step: Step, begin: int, steps: int) -> jax.Array:
    return jnp.clip((jnp.asarray(step) - begin) / jnp.float32(steps), 0.0, 1.0)


def _check_fraction(value: float | jax.Array) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    if not is_number(value) or not 0 <= float(value) <= 1:
        raise ValueError(
            "expected a schedule of fractions, in [0, 1], got the value "
            f"{value!r}; write 90 % as 0.9"
        )


def _check_steps(steps: int, **others: int | None) -> None:
    if _is_no_step(steps) or steps < 1:
        raise ValueError(
            f"expected a schedule over whole steps, at least 1 step, got {steps!r}"
        )
    _check_whole(others)


def _check_interval(interval: int, **others: int | None) -> None:
    if _is_no_step(interval) or interval < 1:
        raise ValueError(
            f"expected an interval of whole steps, at least 1 step, got {interval!r}"
        )
    _check_whole(others)


def _check_whole(steps: Mapping[str, int | None]) -> None:
    for name, step in steps.items():
        if step is not None and _is_no_step(step):
            raise ValueError(f"expected a whole step as `{name}`, got {step!r}")


def _is_no_step(step: int) -> bool:
    return not isinstance(step, jax.core.Tracer) and not is_whole(step)
