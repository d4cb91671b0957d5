"""The search for the k largest of many scores, by counting instead of sorting.

Scores are read as integers that sort alike. The search knows one threshold that k or
more of them reach, and one that fewer do. A pass over the scores counts how many reach
three thresholds in between, which leaves a quarter of the range, until exactly k reach
one of them or nothing is left in between. Then those at the threshold are ties, and the
same search goes on among them by their rank.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.masks.layout import (
    linear_index,
    may_be_joined,
    ordered_bits,
    tie_order,
)
from d2sparse.meshes import common_zero, on_auto_axes

_TRIED = 3  # Thresholds of a pass.
# Entries side by side, whose counts of up to 128 each share one float32.
_LANE, _BASE = 128, 256
# Lanes of a row where there are many scores, so that few rows are left to add up.
_MANY, _LANES = 1 << 20, 64
_FULL = 2**32 - 1  # Above all keys.

_Range = tuple[jax.Array, jax.Array, jax.Array]


class _Rows(NamedTuple):
    """Entries of one or many leaves, in rows of which each belongs to one leaf.

    Attributes:
      values: uint32[rows, ...], what is compared.
      groups: int[rows], the group of leaves that a row belongs to.
      units: int[rows], how much of the budget each of its entries takes.
      starts: uint32[rows], the index of its first entry among all of the group.
    """

    values: jax.Array
    groups: np.ndarray
    units: np.ndarray
    starts: np.ndarray


# Outside of a compiled function the loop would be compiled at every call.
@functools.partial(jax.jit, static_argnames=("groups", "units"))
def largest(
    scores: Sequence[jax.Array],
    groups: tuple[int, ...],
    k: jax.Array,
    salts: jax.Array | None = None,
    units: tuple[int, ...] | None = None,
) -> list[jax.Array]:
    """Masks of the largest scores of every group of leaves, k[group] of them.

    An entry of a leaf counts as its unit, 1 if not given. The search finds the entry
    that holds the k-th unit: what is kept may exceed k by less than one entry.

    All groups are searched in one loop, which ends as soon as none has entries left to
    choose from.

    Args:
      scores: float[...] or bool[...], of which True is eligible and all ties.
      groups: of every leaf, from 0.
      k: int32[groups].
      salts: uint32[groups] that ties are shuffled by; None leaves them to the lower
        index.
      units: of every leaf.

    Raises:
      ValueError: the leaves of a group hold 2**31 units or more.

    >>> (mask,) = largest([jnp.array([3.0, 1.0, 2.0, 3.0])], (0,), jnp.array([2]))
    >>> mask.tolist()
    [True, False, False, True]
    """
    if not scores:
        return []
    leaves, units = list(map(jnp.asarray, scores)), units or (1,) * len(scores)
    _refuse_too_many(leaves, groups, units)

    def search(
        leaves: list[jax.Array], k: jax.Array, salts: jax.Array | None
    ) -> list[jax.Array]:
        # Under `jax.shard_map` a loop carries what varies as all that it looks at.
        k = k + common_zero((leaves, k, salts))
        rows = _in_rows(leaves, groups, units)
        key, rank = _cut(rows, k, salts)
        masks = [
            (x.values > _each(key, x))
            | (x.values == _each(key, x)) & (_ranks(x, salts) >= _each(rank, x))
            for x in rows
        ]
        return _as_leaves(masks, [leaf.shape for leaf in leaves])

    return on_auto_axes(search, leaves, leaves, k, salts)


def _refuse_too_many(
    leaves: Sequence[jax.Array], groups: Sequence[int], units: Sequence[int]
) -> None:
    sizes = [leaf.size * unit for leaf, unit in zip(leaves, units, strict=True)]
    most = np.bincount(groups, sizes).max()
    if most >= 2**31:
        raise ValueError(
            "expected fewer than 2**31 scores to compete for one budget, got "
            f"{int(most)}; share the budget between leaves with a distribution"
        )


def _in_rows(
    leaves: Sequence[jax.Array], groups: Sequence[int], units: Sequence[int]
) -> list[_Rows]:
    """The keys of leaves: joined in short rows, or each leaf as a row of its own."""
    keys, starts = [ordered_bits(leaf) for leaf in leaves], _starts(leaves, groups)
    if not may_be_joined():
        each = zip(keys, groups, units, starts, strict=True)
        return [
            _Rows(jnp.atleast_1d(x)[None], *map(np.atleast_1d, about))
            for x, *about in each
        ]
    lanes = _LANES if sum(x.size for x in keys) >= _MANY else 1
    row = lanes * _LANE
    heights = [-(-x.size // row) for x in keys]
    table = jnp.zeros(row * sum(heights), jnp.uint32)
    # Not `concatenate`, whose kernel asks of every entry which leaf it is of.
    for key, top in zip(keys, np.cumsum([0, *heights]), strict=False):
        table = jax.lax.dynamic_update_slice(table, key.reshape(-1), (row * top,))
    within = np.concatenate([row * np.arange(height) for height in heights])
    return [
        _Rows(
            table.reshape(-1, lanes, _LANE),
            np.repeat(groups, heights),
            np.repeat(units, heights),
            (np.repeat(starts, heights) + within).astype(np.uint32),
        )
    ]


def _starts(leaves: Sequence[jax.Array], groups: Sequence[int]) -> np.ndarray:
    """The index of every leaf's first entry among all that compete with it."""
    seen, starts = np.zeros(max(groups) + 1, np.int64), []
    for leaf, group in zip(leaves, groups, strict=True):
        starts.append(seen[group])
        seen[group] += leaf.size
    return np.array(starts, np.uint32)


def _as_leaves(
    rows: Sequence[jax.Array], shapes: Sequence[tuple[int, ...]]
) -> list[jax.Array]:
    """What belongs to each leaf, in its shape: the reverse of `_in_rows`."""
    if not may_be_joined():
        return [x[0].reshape(shape) for x, shape in zip(rows, shapes, strict=True)]
    flat, row = rows[0].reshape(-1), rows[0][0].size
    begin, leaves = 0, []
    for shape in shapes:
        size = math.prod(shape)
        leaves.append(flat[begin : begin + size].reshape(shape))
        begin += size + -size % row
    return leaves


def _ranks(rows: _Rows, salts: jax.Array | None) -> jax.Array:
    """What ties are broken by, uint32[rows, ...]."""
    index = linear_index(rows.values.shape[1:])[None] + _over(rows, rows.starts)
    return tie_order(index, None if salts is None else _each(salts, rows))


def _each(of_groups: jax.Array, rows: _Rows) -> jax.Array:
    """What is known of every group, at its rows: [rows, 1, ...]."""
    return _over(rows, of_groups[rows.groups])


def _over(rows: _Rows, values: jax.Array | np.ndarray) -> jax.Array:
    return jnp.expand_dims(values, tuple(range(1, rows.values.ndim)))


def _cut(
    rows: Sequence[_Rows], k: jax.Array, salts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Key and rank of the last entry that is kept, uint32[groups] each.

    The key is above all of them where none is wanted. The rank is 0 where all that
    share the key are kept.
    """
    zero, full = jnp.zeros_like(k, jnp.uint32), jnp.full_like(k, _FULL, jnp.uint32)
    least = jnp.where(k > 0, zero + 1, full)
    most = jnp.where(k > 0, _highest(rows, len(k)), full)
    key, reached = _kth(rows, k, least, most, _reaching(rows, least))

    def among_ties() -> jax.Array:
        above = _reaching(rows, key + 1)
        tied = [
            x._replace(values=jnp.where(x.values == _each(key, x), _ranks(x, salts), 0))
            for x in rows
        ]
        return _kth(tied, k - above, zero, full, reached - above)[0]

    return key, jax.lax.cond(jnp.any(reached > k), among_ties, lambda: zero)


def _kth(
    rows: Sequence[_Rows],
    k: jax.Array,
    least: jax.Array,
    most: jax.Array,
    reached: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The highest threshold of every group that k of its units or more reach.

    It may be a lower one where exactly k reach it.

    Args:
      rows: what is searched.
      k: int32[groups].
      least: uint32[groups], which k or more reach.
      most: uint32[groups], above which fewer do.
      reached: int32[groups], how many reach the least; if no more than k, the search
        of the group has ended.

    Returns:
      `(threshold, reached)` of every group.
    """

    def is_open(state: _Range) -> jax.Array:
        least, most, reached = state
        return jnp.any((reached > k) & (least < most))

    def narrowed(state: _Range) -> _Range:
        least, most, reached = state
        width = most - least
        step = width // (_TRIED + 1) + 1
        tried = [least + jnp.minimum(step * i, width) for i in range(1, _TRIED + 1)]
        counts = _counts(rows, jnp.stack(tried, axis=1))
        for i, threshold in enumerate(tried):
            enough = (counts[:, i] >= k) & (reached > k)
            least = jnp.where(enough, threshold, least)
            reached = jnp.where(enough, counts[:, i], reached)
            most = jnp.where(counts[:, i] < k, jnp.minimum(most, threshold - 1), most)
        return least, most, reached

    least, _, reached = jax.lax.while_loop(is_open, narrowed, (least, most, reached))
    return least, reached


def _highest(rows: Sequence[_Rows], number: int) -> jax.Array:
    """The highest value of every group, uint32[groups]."""
    inner = [jnp.max(x.values, tuple(range(1, x.values.ndim)), initial=0) for x in rows]
    return jax.ops.segment_max(
        jnp.concatenate(inner), np.concatenate([x.groups for x in rows]), number
    )


def _reaching(rows: Sequence[_Rows], thresholds: jax.Array) -> jax.Array:
    """How many units of every group reach its threshold, int32[groups]."""
    return _counts(rows, thresholds[:, None])[:, 0]


def _counts(rows: Sequence[_Rows], thresholds: jax.Array) -> jax.Array:
    """How many units of every group reach each of its thresholds.

    Args:
      rows: what is counted.
      thresholds: uint32[groups, n].

    Returns:
      int32[groups, n].
    """
    inner = [_counts_of_rows(x, thresholds[x.groups]) for x in rows]
    groups = np.concatenate([x.groups for x in rows])
    return jax.ops.segment_sum(jnp.concatenate(inner), groups, len(thresholds))


def _counts_of_rows(rows: _Rows, thresholds: jax.Array) -> jax.Array:
    """int32[rows, n] of rising thresholds, uint32[rows, n]."""
    number, axes = thresholds.shape[1], tuple(range(1, rows.values.ndim))
    reached = [rows.values >= _over(rows, thresholds[:, i]) for i in range(number)]
    if 0 < rows.values.shape[-1] < _BASE:
        # Digits of one float, which is exact: XLA adds those faster than integers.
        weight = jnp.zeros((), jnp.float32)
        for i in reversed(range(number)):
            weight = jnp.where(reached[i], float(_BASE**i) + weight, 0.0)
        sums = jnp.sum(weight, axis=-1).astype(jnp.int32)
        shares = [sums // _BASE**i % _BASE for i in range(number)]
        counts = [jnp.sum(x, axes[:-1], jnp.int32) for x in shares]
    else:
        counts = [jnp.sum(x, axes, jnp.int32) for x in reached]
    return jnp.stack(counts, axis=1) * jnp.asarray(rows.units, jnp.int32)[:, None]
