"""How the entries of a leaf are read: in row-major order, in pieces on a CPU."""

import math

import jax
import jax.numpy as jnp


def linear_index(shape: tuple[int, ...]) -> jax.Array:
    """Row-major index of every entry, uint32[shape], built without a reshape.

    >>> linear_index((2, 3)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]))
        index += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def pieces(size: int, piece: int) -> int:
    """In how many pieces of equal size, of about `piece` entries, a leaf is read.

    What is read at once is written out first, as integers or indices. On a CPU fresh
    memory costs more than the counting, so there pieces are read that fit in its cache.
    With several devices a leaf may be sharded, and cutting it would gather it.

    >>> pieces(1000, 4096)
    1
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return 1
    return math.gcd(size, 1 << (size // piece).bit_length())
