"""Scales of activations, from statistics that add up over batches.

`merge` of the statistics of two batches is that of both. Magnitudes are counted in bins
of a fixed ratio, 32 to an octave, so that no range has to be known in advance: from
2^-24 to 2^16, what is smaller or larger counts in the first or last bin.
"""

from collections.abc import Callable
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp

from d2sparse.checks import check_choice, check_number
from d2sparse.quantisation.scales import ScaleName, ratio, search
from d2sparse.quantisation.uniform import code_range

_SMALLEST, _LARGEST, _PER_OCTAVE = -24, 16, 32  # The first two are exponents of 2.
_BINS = (_LARGEST - _SMALLEST) * _PER_OCTAVE
# At 8 bits a bin at the top is some codes wide: its numbers are spread over it.
_POINTS = 8

# (statistics, bits, signed) -> float[]
CalibratedScale = Callable[["Statistics", int, bool | jax.Array], jax.Array]


class Statistics(NamedTuple):
    """What is remembered of numbers.

    Attributes:
      counts: float32[bins], numbers by magnitude.
      zeros: float32[], numbers that are 0.
      total: float32[], sum of magnitudes.
      smallest: float32[], the lowest number; 0 if all are above.
      largest: float32[], the largest magnitude.
    """

    counts: jax.Array
    zeros: jax.Array
    total: jax.Array
    smallest: jax.Array
    largest: jax.Array


def observe(x: jax.Array) -> Statistics:
    """The statistics of an array.

    Args:
      x: float[...].

    >>> found = observe(jnp.array([1.0, -2.0, 0.0, 1.5]))
    >>> float(found.largest), float(found.smallest), float(found.zeros)
    (2.0, -2.0, 1.0)
    """
    wide = x.astype(jnp.float32).ravel()
    size = jnp.abs(wide)
    octave = jnp.log2(jnp.where(size > 0, size, 1)) - _SMALLEST
    bins = jnp.clip(jnp.floor(octave * _PER_OCTAVE), 0, _BINS - 1).astype(int)
    # int32 until the end: adding ones to a float32 stops at 2^24.
    counts = jnp.zeros(_BINS, jnp.int32).at[bins].add((size > 0).astype(jnp.int32))
    return Statistics(
        counts.astype(jnp.float32),
        jnp.sum(size == 0).astype(jnp.float32),
        jnp.sum(size),
        jnp.min(wide, initial=0),
        jnp.max(size, initial=0),
    )


def merge(one: Statistics, other: Statistics) -> Statistics:
    """The statistics of two arrays together.

    >>> both = merge(observe(jnp.ones(4)), observe(jnp.array([-2.0, 0.0, 1.0, 1.0])))
    >>> float(both.total), float(both.largest)
    (8.0, 2.0)
    """
    return Statistics(
        one.counts + other.counts,
        one.zeros + other.zeros,
        one.total + other.total,
        jnp.minimum(one.smallest, other.smallest),
        jnp.maximum(one.largest, other.largest),
    )


def absmax(
    statistics: Statistics, bits: int, signed: bool | jax.Array = True
) -> jax.Array:
    """The smallest scale that clipped nothing of what was seen.

    Args:
      statistics: from `observe` and `merge`.
      bits: 2 to 8.
      signed: whether there are negative codes; may be traced.

    Raises:
      ValueError: fewer or more bits.

    >>> float(absmax(observe(jnp.array([1.0, 7.5, 0.0, 0.5])), bits=4, signed=False))
    0.5
    """
    return statistics.largest / code_range(bits, signed)[1]


def percentile(percent: float = 99.9) -> CalibratedScale:
    """The scale at which the highest code is a percentile of the magnitudes.

    Args:
      percent: of the numbers that are not clipped, in [0, 100]; known to a bin, which
        is 2 % wide, and rounded up.

    Returns:
      `(statistics, bits, signed) -> float[]`.

    Raises:
      ValueError: not in [0, 100].

    >>> x = jnp.append(jnp.ones(99), 100.0)
    >>> 1 <= float(percentile(90)(observe(x), 2, True)) < 1.03
    True
    """
    check_number("percent", percent, 0, 100)

    def scale(
        statistics: Statistics, bits: int, signed: bool | jax.Array = True
    ) -> jax.Array:
        below = statistics.zeros + jnp.cumsum(statistics.counts)
        wanted = percent / 100 * below[-1]
        # The upper end of the first bin that reaches the percentile.
        number = jnp.argmax(below >= wanted).astype(jnp.float32) + 1
        end = jnp.exp2(number / _PER_OCTAVE + _SMALLEST)
        return jnp.minimum(end, statistics.largest) / code_range(bits, signed)[1]

    return scale


def mse(
    statistics: Statistics, bits: int, signed: bool | jax.Array = True
) -> jax.Array:
    """The scale of least squared error on the bins of the magnitudes.

    Args:
      statistics: from `observe` and `merge`.
      bits: 2 to 8.
      signed: whether there are negative codes; may be traced.

    Raises:
      ValueError: fewer or more bits.

    >>> x = jnp.append(jnp.ones(99), 2.0)
    >>> scale = jax.jit(lambda x: mse(observe(x), bits=2))(x)
    >>> 1 <= float(scale) < 1.05
    True
    """
    high = code_range(bits, signed)[1]
    places = (jnp.arange(_BINS * _POINTS, dtype=jnp.float32) + 0.5) / _POINTS
    points = jnp.exp2(places / _PER_OCTAVE + _SMALLEST)
    weights = jnp.repeat(statistics.counts, _POINTS)
    # Bins far above the largest number would only overflow.
    points = jnp.minimum(points, jnp.maximum(statistics.largest, 1e-30))

    def code(scale: jax.Array) -> jax.Array:
        return jnp.round(jnp.minimum(points / jnp.maximum(scale, 1e-30), high))

    def error(scale: jax.Array) -> jax.Array:
        return jnp.sum(weights * (points - scale * code(scale)) ** 2)

    def refine(scale: jax.Array) -> jax.Array:
        own = code(scale)
        power = jnp.sum(weights * own**2)
        return ratio(jnp.sum(weights * points * own), power, scale)

    return search(absmax(statistics, bits, signed), error, refine)


def lsq(
    statistics: Statistics, bits: int, signed: bool | jax.Array = True
) -> jax.Array:
    """Where a scale starts that is learned: `2 mean |x| / sqrt(Q_P)`, zeros included.

    LSQ, Esser et al., arXiv 1902.08153.

    Args:
      statistics: from `observe` and `merge`.
      bits: 2 to 8.
      signed: whether there are negative codes; may be traced.

    Raises:
      ValueError: fewer or more bits.

    >>> float(lsq(observe(jnp.array([1.0, -3.0, 1.0, -3.0])), bits=2))
    4.0
    """
    count = statistics.zeros + jnp.sum(statistics.counts)
    mean = statistics.total / jnp.maximum(count, 1)
    return 2 * mean / code_range(bits, signed)[1] ** 0.5


def named(name: ScaleName) -> CalibratedScale:
    """The function of a name: "absmax", "mse" or "lsq", as for scales of weights.

    Args:
      name: one of these.

    Raises:
      ValueError: another name.

    >>> named("mse") is mse
    True
    """
    check_choice("scale", name, get_args(ScaleName))
    return {"absmax": absmax, "mse": mse, "lsq": lsq}[name]


def dynamic(x: jax.Array, bits: int, signed: bool | jax.Array = True) -> jax.Array:
    """Scales of a batch without calibration: what clips nothing of each example.

    What an example becomes does not depend on the others in its batch.

    Args:
      x: float[batch, ...].
      bits: 2 to 8.
      signed: whether there are negative codes; may be traced.

    Returns:
      float[batch, 1, ..., 1], a constant of the gradient.

    Raises:
      ValueError: fewer or more bits.

    >>> dynamic(jnp.array([[1.0, -3.0], [6.0, 0.0]]), bits=3).tolist()
    [[1.0], [2.0]]
    """
    size = jnp.abs(jax.lax.stop_gradient(x))
    axes = tuple(range(1, x.ndim))
    largest = jnp.max(size, axis=axes, keepdims=True, initial=0)
    high = jnp.asarray(code_range(bits, signed)[1])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return largest.astype(wide) / high.astype(wide)
