"""How the entries of a leaf are read: as integers, in order, and counted."""

import math
from collections.abc import Sequence

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


def count_true(masks: Sequence[jax.Array]) -> jax.Array:
    """How many entries of each of several masks of one shape are True, int32[n].

    Args:
      masks: bool[...], two or more of them, so that one pass counts them.

    >>> x = jnp.arange(5)
    >>> count_true([x >= 1, x >= 3]).tolist()
    [4, 2]
    """
    if jax.device_count() > 1:
        # Of shards of a leaf the sums are added up. The results of one reduction of
        # several operands would be gathered one by one.
        return jnp.stack([jnp.sum(mask, dtype=jnp.int32) for mask in masks])
    # XLA on CPU computes the operands of such a reduction while it adds them. It writes
    # that of a reduction of one to memory first.
    ones, axes = [mask.astype(jnp.int32) for mask in masks], tuple(range(masks[0].ndim))
    return jnp.stack(jax.lax.reduce(ones, [jnp.int32(0)] * len(ones), _add, axes))


def _add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(a, b, strict=True)]
