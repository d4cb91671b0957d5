"""How the entries of a leaf are read: as integers, in order, in pieces on a CPU."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["of"]
)
@dataclasses.dataclass(frozen=True)
class Lazy:
    """Scores that are computed from other arrays, entry by entry, where they are read.

    Written out whole, the scores of a large network are fresh memory, which on a CPU
    costs more than to count them.

    Attributes:
      arrays: each of the shape of the scores.
      of: `(*arrays) -> scores`, for whole arrays and for any part of them.

    >>> scores = Lazy((jnp.array([-2.0, 1.0]),), jnp.abs)
    >>> scores.shape, scores.value().tolist()
    ((2,), [2.0, 1.0])
    """

    arrays: tuple[jax.Array, ...]
    of: Callable[..., jax.Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the scores."""
        return self.arrays[0].shape

    @property
    def size(self) -> int:
        """Number of scores."""
        return self.arrays[0].size

    def value(self) -> jax.Array:
        """The scores, written out."""
        return self.of(*self.arrays)

    def flat(self, size: int) -> "Lazy":
        """The scores in a row, with arrays of at least a size, filled up by zeros."""
        missing = max(size - self.size, 0)
        rows = (x.reshape(-1) for x in self.arrays)
        return Lazy(tuple(jnp.pad(x, (0, missing)) for x in rows), self.of)

    def part(self, begin: jax.Array, size: int) -> jax.Array:
        """The scores `[begin, begin + size)` of those in a row."""
        parts = (jax.lax.dynamic_slice(x, (begin,), (size,)) for x in self.arrays)
        return self.of(*parts)


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


def may_be_cut() -> bool:
    """Whether leaves may be joined and read in pieces that fit in a cache.

    What is read at once is written out first, as integers or indices. On a CPU fresh
    memory costs more than the counting. With several devices a leaf may be sharded, and
    cutting it would gather it.

    >>> may_be_cut() == (jax.default_backend() == "cpu" and jax.device_count() == 1)
    True
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1
