"""The uniform quantiser: numbers are rounded to whole multiples of a scale.

`q(x) = s * round(clip(x / s, low, high))`. Signed codes are symmetric, of 2 to 8 bits
-1..1, -3..3, ..., -127..127, so that 0 is a code and a network and its mirror image
have the same; unsigned codes, of what is never negative, are 0..2^bits - 1. Half-way
cases go to the even code. Whatever the type of the input, the arithmetic is in at least
32 bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse.checks import is_whole

FEWEST, MOST = 2, 8


def code_range(bits: int, signed: bool | jax.Array = True) -> tuple[Any, Any]:
    """The lowest and the highest code, Q_N and Q_P of the literature.

    Args:
      bits: 2 to 8.
      signed: whether there are negative codes; may be traced.

    Raises:
      ValueError: fewer or more bits.

    >>> code_range(8), code_range(2), code_range(4, signed=False)
    ((-127, 127), (-1, 1), (0, 15))
    """
    check_bits(bits)
    half, full = 2 ** (int(bits) - 1) - 1, 2 ** int(bits) - 1
    if isinstance(signed, jax.Array):
        return jnp.where(signed, -half, 0), jnp.where(signed, half, full)
    return (-half, half) if signed else (0, full)


def fake_quantise(
    x: jax.Array,
    scale: jax.Array,
    bits: int,
    signed: bool | jax.Array = True,
    pass_outside: bool = False,
) -> jax.Array:
    """Numbers rounded to multiples of a scale, with a gradient as if they were not.

    The gradient passes the rounding unchanged (straight through, Bengio et al.,
    arXiv 1308.3432) and is 0 where a number is clipped. Numbers at the ends of the
    range are in it, the largest weight under `absmax` among them. The gradient of the
    scale is that of learned step sizes (LSQ, Esser et al., arXiv 1902.08153):
    `round(x / s) - x / s` in the range and the lowest or highest code outside. See
    `learned` for the size of its steps.

    Args:
      x: float[...], of any precision, which the result has as well.
      scale: float[], or float[1, ..., 1, channels]: what one code stands for. What is
        less than the smallest normal number counts as that, so that zeros stay zeros.
      bits: 2 to 8.
      signed: whether there are negative codes; may be traced.
      pass_outside: whether the gradient of clipped numbers passes as well.

    Raises:
      ValueError: fewer or more bits.

    >>> x, scale = jnp.array([0.3, -0.9, 5.0, 0.0]), jnp.array(0.5)
    >>> fake_quantise(x, scale, bits=3).tolist()
    [0.5, -1.0, 1.5, 0.0]
    >>> jax.grad(lambda x: fake_quantise(x, scale, 3).sum())(x).tolist()
    [1.0, 1.0, 0.0, 1.0]
    """
    low, high = code_range(bits, signed)
    wide = jnp.asarray(scale, scale_type(x))
    return _fake(pass_outside, x, wide, jnp.asarray(low), jnp.asarray(high))


def codes(x: jax.Array, scale: jax.Array, bits: int, signed: bool = True) -> jax.Array:
    """The whole numbers that stand for numbers: `round(clip(x / s, low, high))`.

    Args:
      x: float[...].
      scale: float[], or float[1, ..., 1, channels].
      bits: 2 to 8.
      signed: whether there are negative codes.

    Returns:
      int8[...], or uint8[...] if unsigned. Those of NaN mean nothing.

    Raises:
      ValueError: fewer or more bits.

    >>> codes(jnp.array([0.3, -0.9, 5.0]), jnp.array(0.5), bits=3).tolist()
    [1, -2, 3]
    """
    low, high = code_range(bits, signed)
    found = _rounded(x, jnp.asarray(scale, scale_type(x)), low, high)[1]
    return found.astype(jnp.int8 if signed else jnp.uint8)


def dequantise(
    codes: jax.Array, scale: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """The numbers that codes stand for: `s * code`, those of `fake_quantise`.

    Args:
      codes: int8[...] or uint8[...].
      scale: float[], or float[1, ..., 1, channels], the one they were made with.
      dtype: of the numbers.

    >>> dequantise(jnp.array([1, -2, 3], jnp.int8), jnp.array(0.5)).tolist()
    [0.5, -1.0, 1.5]
    """
    wide = _positive(jnp.asarray(scale, jnp.promote_types(dtype, jnp.float32)))
    return (codes.astype(wide.dtype) * wide).astype(dtype)


def learned(
    scale: jax.Array,
    size: int | jax.Array,
    bits: int,
    signed: bool | jax.Array = True,
) -> jax.Array:
    """A scale that is trained: its gradient is divided by `sqrt(size * Q_P)`.

    Without it the steps of a scale would be too large beside those of the weights, the
    more the more numbers share it (LSQ, Esser et al., arXiv 1902.08153).

    Args:
      scale: float[...], what is trained; start from `lsq`.
      size: numbers that share it, or float[1, ..., 1, channels]: surviving weights
        (`survivors`), or the features of one example. The paper counts them all; code
        released for "Quantization Variation" has the sum of their magnitudes instead.
      bits: 2 to 8; Q_P is the highest code.
      signed: whether there are negative codes; may be traced.

    Raises:
      ValueError: fewer or more bits.

    >>> scale = jnp.array(0.5)
    >>> bool(learned(scale, 100, bits=2) == scale)
    True
    >>> round(float(jax.grad(lambda s: learned(s, 100, bits=2))(scale)), 6)
    0.1
    """
    shared = jnp.maximum(jnp.asarray(size, scale.dtype), 1)
    highest = jnp.asarray(code_range(bits, signed)[1], scale.dtype)
    fixed = jax.lax.stop_gradient(scale)
    return fixed + (scale - fixed) * jax.lax.rsqrt(shared * highest)


def scale_type(x: jax.Array) -> Any:
    """The type of the scales of an array: its own, or float32 if that is less.

    >>> scale_type(jnp.ones(2, jnp.bfloat16)).name
    'float32'
    """
    return jnp.promote_types(x.dtype, jnp.float32)


def check_bits(bits: Any) -> None:
    """Raises where a number of bits is not in 2 to 8.

    Raises:
      ValueError: naming it.

    >>> check_bits(4)
    """
    if isinstance(bits, bool) or not is_whole(bits) or not FEWEST <= bits <= MOST:
        raise ValueError(
            f"expected {FEWEST} to {MOST} bits, got {bits!r}; leave out of the "
            "quantisation what shall keep its precision"
        )


def _positive(scale: jax.Array) -> jax.Array:
    return jnp.maximum(scale, jnp.finfo(scale.dtype).tiny)


def _rounded(
    x: jax.Array, scale: jax.Array, low: Any, high: Any
) -> tuple[jax.Array, jax.Array]:
    """Numbers in units of their scale, and their codes."""
    units = x.astype(scale.dtype) / _positive(scale)
    return units, jnp.round(jnp.clip(units, low, high))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fake(
    pass_outside: bool, x: jax.Array, scale: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    del pass_outside
    return (_rounded(x, scale, low, high)[1] * _positive(scale)).astype(x.dtype)


@_fake.defjvp
def _fake_jvp(pass_outside: bool, primals: Any, tangents: Any) -> Any:
    x, scale, low, high = primals
    units, code = _rounded(x, scale, low, high)
    # absmax / (absmax / high) may be above high by rounding.
    slack = 4 * jnp.finfo(units.dtype).eps * high.astype(units.dtype)
    inside = (units >= low - slack) & (units <= high + slack)
    passes = jnp.ones_like(inside) if pass_outside else inside
    # A scale that training drove below 0 counts as tiny, and its gradient leads back.
    of_scale = jnp.where(inside, code - units, code) * tangents[1]
    tangent = jnp.where(passes, tangents[0].astype(units.dtype), 0) + of_scale
    return (code * _positive(scale)).astype(x.dtype), tangent.astype(x.dtype)
