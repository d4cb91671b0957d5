"""How the entries of a leaf are read: as integers, in order, and joined to others."""

import math

import jax
import jax.numpy as jnp


def ordered_bits(scores: jax.Array) -> jax.Array:
    """uint32 keys that sort as the scores do; 0 for what must never be kept.

    Of bools, which say only who is eligible, all keys are 0 or 1.

    >>> keys = ordered_bits(jnp.array([-jnp.inf, -1.0, 2.0, jnp.nan])).tolist()
    >>> keys[0], keys[3], 0 < keys[1] < keys[2]
    (0, 0, True)
    """
    if scores.dtype == bool:
        return scores.astype(jnp.uint32)
    # Of a wider type too: a number below all of float32 is no `-inf`.
    eligible = scores > -jnp.inf
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    bits = jnp.where(bits == sign, jnp.uint32(0), bits)  # -0.0 and 0.0 are one score
    keys = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where(eligible, keys, jnp.uint32(0))


def tie_order(index: jax.Array, salt: jax.Array | None) -> jax.Array:
    """Distinct uint32 by which ties are broken: falling with the index, or shuffled.

    Shuffled by the finaliser of MurmurHash3, a permutation of uint32 that looks random
    and costs a fraction of random numbers from `jax.random`.

    Args:
      index: uint32[...].
      salt: uint32[], which shuffle; None leaves ties to the lower index.

    >>> order = tie_order(jnp.arange(4, dtype=jnp.uint32), None)
    >>> bool(jnp.all(order[:-1] > order[1:]))
    True
    """
    if salt is None:
        return ~index
    x = index ^ salt
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


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


def may_be_joined() -> bool:
    """Whether leaves may be joined to one array and cut into rows of it.

    With several devices a leaf may be sharded, and to join it with others would gather
    it.

    >>> may_be_joined() == (jax.device_count() == 1)
    True
    """
    return jax.device_count() == 1
