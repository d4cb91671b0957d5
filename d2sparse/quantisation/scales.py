"""Scales of arrays: what one code stands for, one number a tensor or a channel.

Channels are the last axis, which counts the outputs of a layer in Flax: kernels of
convolutions are [height, width, in, out], those of dense layers [in, out]. Entries that
are 0 are pruned weights. They stay 0 under any scale, and no scale looks at them.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from d2sparse.checks import check_choice
from d2sparse.quantisation.uniform import (
    code_range,
    codes,
    fake_quantise,
    scale_type,
)

Per = Literal["channel", "tensor"]
ScaleName = Literal["absmax", "mse", "lsq"]

_FRACTIONS = 24  # Of the largest entry, at which the error of clipping is looked at.
_REFINEMENTS = 3  # Of the best one in the end.


def absmax(
    x: jax.Array, bits: int, per: Per = "channel", signed: bool = True
) -> jax.Array:
    """The smallest scale that clips nothing: the highest code is the largest entry.

    `s = max |x| / Q_P`.

    Args:
      x: float[..., channels].
      bits: 2 to 8.
      per: one scale a "channel" or one a "tensor".
      signed: whether there are negative codes; without, negative entries are clipped.

    Returns:
      float[1, ..., 1, channels], or float[] of a tensor.

    Raises:
      ValueError: fewer or more bits, or a channel of an array without other axes.

    >>> absmax(jnp.array([[1.0, -6.0], [-3.0, 0.0]]), bits=3).tolist()
    [[1.0, 2.0]]
    """
    size = _magnitude(x, signed)
    largest = jnp.max(size, axis=_axes(x, per), keepdims=per == "channel", initial=0)
    return largest / code_range(bits, signed)[1]


def mse(
    x: jax.Array, bits: int, per: Per = "channel", signed: bool = True
) -> jax.Array:
    """The scale of least squared error: a few large entries may be clipped.

    `argmin_s sum (x - q(x; s))^2`: the best of 24 fractions of the scale that clips
    nothing, each refined by `s = <x, c> / <c, c>` with the codes c, which never raises
    the error.

    Args:
      x: float[..., channels].
      bits: 2 to 8.
      per: one scale a "channel" or one a "tensor".
      signed: whether there are negative codes; without, negative entries are clipped.

    Returns:
      float[1, ..., 1, channels], or float[] of a tensor.

    Raises:
      ValueError: fewer or more bits, or a channel of an array without other axes.

    >>> x = jnp.array([[1.0], [1.1], [0.9], [-1.0], [1.3]])
    >>> bool(mse(x, bits=2)[0, 0] < absmax(x, bits=2)[0, 0])
    True
    """
    wide = x.astype(scale_type(x))
    axes, keep = _axes(x, per), per == "channel"

    def total(each: jax.Array) -> jax.Array:
        return jnp.sum(each, axis=axes, keepdims=keep)

    def error(scale: jax.Array) -> jax.Array:
        return total((wide - fake_quantise(wide, scale, bits, signed)) ** 2)

    def refine(scale: jax.Array) -> jax.Array:
        code = codes(wide, scale, bits, signed).astype(wide.dtype)
        return ratio(total(wide * code), total(code**2), scale)

    return search(absmax(wide, bits, per, signed), error, refine)


def lsq(
    x: jax.Array, bits: int, per: Per = "channel", signed: bool = True
) -> jax.Array:
    """Where a scale starts that is learned: `s = 2 mean |x| / sqrt(Q_P)`.

    The mean is over entries that are not 0 (LSQ, Esser et al., arXiv 1902.08153).

    Args:
      x: float[..., channels].
      bits: 2 to 8.
      per: one scale a "channel" or one a "tensor".
      signed: whether there are negative codes; without, negative entries are clipped.

    Returns:
      float[1, ..., 1, channels], or float[] of a tensor.

    Raises:
      ValueError: fewer or more bits, or a channel of an array without other axes.

    >>> lsq(jnp.array([[1.0], [-3.0], [0.0]]), bits=2).tolist()
    [[4.0]]
    """
    size, keep = _magnitude(x, signed), per == "channel"
    total = jnp.sum(size, axis=_axes(x, per), keepdims=keep)
    mean = total / jnp.maximum(survivors(size, per), 1)
    return 2 * mean / code_range(bits, signed)[1] ** 0.5


def survivors(x: jax.Array, per: Per = "channel") -> jax.Array:
    """How many entries are not 0, the `size` of `learned`.

    Args:
      x: float[..., channels].
      per: those of a "channel" or of the "tensor".

    Returns:
      float[1, ..., 1, channels], or float[] of a tensor.

    Raises:
      ValueError: a channel of an array without other axes.

    >>> survivors(jnp.array([[1.0, 0.0], [-3.0, 2.0]])).tolist()
    [[2.0, 1.0]]
    """
    count = jnp.sum(x != 0, axis=_axes(x, per), keepdims=per == "channel")
    return count.astype(scale_type(x))


def make_scale(name: str) -> Callable[..., jax.Array]:
    """The function of a name: "absmax", "mse" or "lsq".

    Args:
      name: one of these.

    Raises:
      ValueError: another name.

    >>> make_scale("mse") is mse
    True
    """
    check_choice("scale", name, get_args(ScaleName))
    return {"absmax": absmax, "mse": mse, "lsq": lsq}[name]


def search(
    largest: jax.Array,
    error: Callable[[jax.Array], jax.Array],
    refine: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The best of some fractions of the largest scale, each refined.

    Args:
      largest: float[...], scales that clip nothing.
      error: scales -> float[...], of each.
      refine: scales -> scales of no larger error.

    >>> best = search(jnp.array(4.0), lambda s: (s - 1) ** 2, lambda s: s)
    >>> float(best)
    1.0
    """

    def better(best: tuple[jax.Array, jax.Array], fraction: jax.Array) -> Any:
        scale = refine(largest * fraction)
        found = error(scale)
        wins = found < best[1]
        return (jnp.where(wins, scale, best[0]), jnp.where(wins, found, best[1])), None

    fractions = jnp.arange(1, _FRACTIONS + 1, dtype=largest.dtype) / _FRACTIONS
    (scale, _), _ = jax.lax.scan(better, (largest, error(largest)), fractions)
    return jax.lax.fori_loop(0, _REFINEMENTS, lambda _, s: refine(s), scale)


def ratio(above: jax.Array, below: jax.Array, otherwise: jax.Array) -> jax.Array:
    """A quotient, and something else where it would be divided by 0.

    Args:
      above: float[...].
      below: float[...], at least 0.
      otherwise: float[...].

    >>> ratio(jnp.array([1.0, 2.0]), jnp.array([2.0, 0.0]), jnp.ones(2)).tolist()
    [0.5, 1.0]
    """
    known = below > 0
    return jnp.where(known, above / jnp.where(known, below, 1), otherwise)


def _magnitude(x: jax.Array, signed: bool) -> jax.Array:
    wide = x.astype(scale_type(x))
    return jnp.abs(wide) if signed else jnp.maximum(wide, 0)


def _axes(x: jax.Array, per: Per) -> tuple[int, ...]:
    """The axes whose entries share a scale."""
    check_choice("per", per, get_args(Per))
    if per == "channel" and x.ndim < 2:
        raise ValueError(
            "expected an array [..., channels] for scales per channel, got the shape "
            f"{tuple(x.shape)}; take per='tensor'"
        )
    return tuple(range(x.ndim - (per == "channel")))
