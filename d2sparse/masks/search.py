"""The search for the k largest of many scores, by counting instead of sorting.

Scores are read as integers that sort alike. The search knows one threshold that k or
more of them reach, and one that fewer do. A pass over the scores counts how many reach
seven thresholds in between, which leaves an eighth of the range, until exactly k reach
one of them or nothing is left in between. Then those at the threshold are ties, and the
same search goes on among them by their rank.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.masks.layout import count_true, linear_index, ordered_bits, tie_order
from d2sparse.meshes import common_zero, on_auto_axes

_TRIED = 7  # Thresholds of a pass.
_FULL = 2**32 - 1  # Above all keys.
_MANY = 2**31 - 1  # More than ever compete.

_Range = tuple[jax.Array, jax.Array, jax.Array]


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
    starts = _starts(leaves, groups)

    def search(
        leaves: list[jax.Array], k: jax.Array, salts: jax.Array | None
    ) -> list[jax.Array]:
        def ranks(i: int) -> jax.Array:
            index = linear_index(leaves[i].shape) + starts[i]
            return tie_order(index, None if salts is None else salts[groups[i]])

        # Under `jax.shard_map` a loop carries what varies as all that it looks at.
        k = k + common_zero((leaves, k, salts))
        keys = [ordered_bits(leaf) for leaf in leaves]
        last, rank = _cut(keys, ranks, groups, units, k)
        return [
            (key > last[g]) | (key == last[g]) & (ranks(i) >= rank[g])
            for i, (key, g) in enumerate(zip(keys, groups, strict=True))
        ]

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


def _starts(leaves: Sequence[jax.Array], groups: Sequence[int]) -> np.ndarray:
    """The index of every leaf's first entry among all that compete with it."""
    seen, starts = np.zeros(max(groups) + 1, np.int64), []
    for leaf, group in zip(leaves, groups, strict=True):
        starts.append(seen[group])
        seen[group] += leaf.size
    return np.array(starts, np.uint32)


def _cut(
    keys: Sequence[jax.Array],
    ranks: Callable[[int], jax.Array],
    groups: Sequence[int],
    units: Sequence[int],
    k: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Key and rank of the last entry that is kept, uint32[groups] each.

    The key is above all of them where none is wanted. The rank is 0 where all that
    share the key are kept.
    """
    zero, full = jnp.zeros_like(k, jnp.uint32), jnp.full_like(k, _FULL, jnp.uint32)
    count = functools.partial(_counts, groups=groups, units=units)

    least = jnp.where(k > 0, zero, full)
    key, reached = _kth(functools.partial(count, keys), k, least, full)
    key = jnp.maximum(
        key, 1
    )  # A key of 0 is never kept, also where too few others are.

    def among_ties() -> jax.Array:
        _, above = count(keys, jnp.stack([key, key + 1], axis=1)).T
        tied = [
            jnp.where(x == key[g], ranks(i), 0)
            for i, (x, g) in enumerate(zip(keys, groups, strict=True))
        ]
        return _kth(functools.partial(count, tied), k - above, zero, full)[0]

    return key, jax.lax.cond(jnp.any(reached > k), among_ties, lambda: zero)


def _kth(
    count: Callable[[jax.Array], jax.Array],
    k: jax.Array,
    least: jax.Array,
    most: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The highest threshold of every group that k of its units or more reach.

    It may be a lower one where exactly k reach it, and is the least where fewer do.

    Args:
      count: uint32[groups, n] -> int32[groups, n], how many reach thresholds.
      k: int32[groups].
      least: uint32[groups], where the search begins.
      most: uint32[groups], above which fewer than k reach.

    Returns:
      `(threshold, reached)` of every group; reached is -1 where the threshold is still
      the least, whose number is not known.
    """

    def is_open(state: _Range) -> jax.Array:
        least, most, reached = state
        return jnp.any((reached != k) & (least < most))

    def narrowed(state: _Range) -> _Range:
        least, most, reached = state
        width = most - least
        step = width // (_TRIED + 1) + 1
        parts = np.arange(1, _TRIED + 1, dtype=np.uint32)[None]
        tried = least[:, None] + jnp.minimum(step[:, None] * parts, width[:, None])
        counts = count(tried)
        # The higher a threshold, the fewer reach it.
        enough = counts >= k[:, None]
        fewest = jnp.min(jnp.where(enough, counts, _MANY), axis=1)
        reached = jnp.where(enough[:, 0], fewest, reached)
        below = jnp.where(enough, most[:, None], tried - 1)  # May wrap below 0.
        most = jnp.minimum(most, jnp.min(below, axis=1))
        least = jnp.max(jnp.where(enough, tried, least[:, None]), axis=1)
        return least, most, reached

    unknown = 0 * k - 1
    least, _, reached = jax.lax.while_loop(is_open, narrowed, (least, most, unknown))
    return least, reached


def _counts(
    leaves: Sequence[jax.Array],
    thresholds: jax.Array,
    groups: Sequence[int],
    units: Sequence[int],
) -> jax.Array:
    """How many units of every group reach each of its thresholds.

    Args:
      leaves: uint32[...], what is counted.
      thresholds: uint32[groups, n].
      groups: of every leaf.
      units: of every leaf.

    Returns:
      int32[groups, n].
    """
    totals = [jnp.zeros_like(thresholds[0], jnp.int32) for _ in thresholds]
    for leaf, group, unit in zip(leaves, groups, units, strict=True):
        reached = [leaf >= threshold for threshold in thresholds[group]]
        totals[group] += unit * count_true(reached)
    return jnp.stack(totals)
