"""Budgets of weights: how many are kept, and integers that sum to it exactly."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.checks import check_function, is_number
from d2sparse.tree import Count, Counts

Shapes = Mapping[str, tuple[int, ...]]
Sparsity = float | jax.Array
Distribution = Callable[[Shapes, Sparsity], Counts]


def check_sparsity(sparsity: Sparsity) -> Sparsity:
    """The sparsity itself, if it is a number in [0, 1) or traced.

    Raises:
      ValueError: the sparsity is no number, or outside [0, 1).

    >>> check_sparsity(0.9)
    0.9
    """
    known = not isinstance(sparsity, jax.core.Tracer)
    if known and sparsity is not None and not is_number(sparsity):
        raise ValueError(
            f"expected one number as the sparsity, got {sparsity!r}; for several, vmap "
            "over them, and for a schedule take a rule such as `gradual`"
        )
    if known and (sparsity is None or not 0 <= float(sparsity) < 1):
        raise ValueError(
            f"expected a sparsity in [0, 1), the fraction of zeros, got {sparsity}; "
            "a density d is the sparsity 1 - d"
        )
    return sparsity


def share_budget(
    distribution: Distribution, shapes: Shapes, sparsity: Sparsity
) -> Counts:
    """How many weights a distribution keeps, which is more than none.

    The whole network is not empty, while the sparsity is known. A leaf may be: where a
    table says so, where there are fewer live weights than leaves, or where all leaves
    compete and one loses all its weights ("layer collapse").

    Raises:
      ValueError: the sparsity is outside [0, 1), it rounds to no live weight at all,
        the distribution cannot reach it, or what it returns are not numbers of weights
        for these leaves.

    >>> from d2sparse.distributions import uniform
    >>> {p: int(n) for p, n in share_budget(uniform, {"w": (4, 4)}, 0.75).items()}
    {'w': 4}
    """
    check_function("distribution", distribution, "shapes, sparsity", "erk")
    check_sparsity(sparsity)
    total = int(sizes(shapes).sum())
    known = not isinstance(sparsity, jax.core.Tracer)
    if known and total and not int(keep(total, sparsity)):
        raise ValueError(
            f"expected a sparsity of at most {1 - 1 / total:.9g}, at which 1 of "
            f"{total} prunable weights is live, got {sparsity}, at which none is; "
            "lower it"
        )
    counts = distribution(shapes, sparsity)
    _check_counts(counts, shapes)
    return counts


def _check_counts(counts: Counts, shapes: Shapes) -> None:
    """Raises where a distribution returns something else than numbers of weights."""
    each = counts if isinstance(counts, Mapping) else {"": counts}
    most = {path: math.prod(shape) for path, shape in shapes.items()}
    if not isinstance(counts, Mapping):
        most = {"": sum(most.values())}
    if sorted(each) != sorted(most):
        raise ValueError(
            "expected a distribution to return a number for every leaf of "
            f"{sorted(most)}, or one number for all of them, got numbers for "
            f"{sorted(each)}"
        )
    for path, count in each.items():
        traced = isinstance(count, jax.core.Tracer)
        if not traced and not (is_number(count) and count == int(count)):
            raise ValueError(
                "expected a distribution to return how many weights a leaf keeps, an "
                f"integer, got {count!r} at {path!r}"
            )
        if not traced and not 0 <= int(count) <= most[path]:
            raise ValueError(
                f"expected a distribution to keep from 0 to {most[path]} weights, got "
                f"{int(count)} at {path!r}"
            )


def array_module(sparsity: Sparsity) -> Any:
    """`jax.numpy` for arrays of JAX, traced ones too; `numpy` for numbers.

    >>> array_module(0.9).__name__
    'numpy'
    """
    return jnp if isinstance(sparsity, jax.Array) else np


def sizes(shapes: Shapes) -> np.ndarray:
    """Numbers of weights, int[leaves].

    >>> sizes({"a": (2, 5), "b": ()}).tolist()
    [10, 1]
    """
    return np.array([math.prod(shape) for shape in shapes.values()], int)


def keep(total: int, sparsity: Sparsity) -> Count:
    """How many of `total` weights a sparsity keeps, rounded.

    Raises:
      ValueError: 2**31 weights or more, and the sparsity is an array of JAX.

    >>> int(keep(100, 0.9))
    10
    """
    xp = array_module(sparsity)
    if xp is jnp and total >= 2**31:
        raise ValueError(
            "expected fewer than 2**31 weights for a sparsity that is traced, got "
            f"{total}; pass the sparsity as a Python float"
        )
    return xp.round((1 - sparsity) * total).astype(int)


def largest_remainder(ideal: Any, limits: np.ndarray, total: Any, xp: Any) -> Any:
    """Integers that sum to the total, each the floor of its ideal or one more.

    Args:
      ideal: float[leaves], with the sum `total` up to rounding.
      limits: int[leaves], the largest counts.
      total: int, at most the sum of the limits.
      xp: `jax.numpy`, or `numpy` where nothing is traced.

    Returns:
      int[leaves].

    >>> largest_remainder(np.array([1.5, 1.7]), np.array([9, 9]), 3, np).tolist()
    [1, 2]
    """
    counts = xp.minimum(xp.floor(ideal), limits).astype(int)
    remainder = xp.where(counts < limits, ideal - counts, -1.0)
    # A sort by one key is stable, in every version of NumPy.
    rank = xp.argsort(xp.lexsort((-remainder,)))
    counts = xp.minimum(counts + (rank < total - xp.sum(counts)), limits)
    return hand_out(total - xp.sum(counts), counts, limits, xp).astype(int)


def hand_out(change: Any, counts: Any, limits: Any, xp: Any = jnp) -> Any:
    """Adds `change` to the counts, leaf after leaf, as far as the limits allow.

    What rounding left over is handed out, or taken back where `change` is negative.

    Args:
      change: int, how much the sum of the counts is to change.
      counts: int[leaves].
      limits: int[leaves], the largest counts.
      xp: `jax.numpy`, or `numpy` where nothing is traced.

    Returns:
      int[leaves], between 0 and the limits.

    >>> hand_out(3, np.array([1, 0]), np.array([2, 9]), np).tolist()
    [2, 2]
    """
    room = xp.where(change > 0, limits - counts, counts)
    earlier = xp.cumsum(room) - room
    return counts + xp.sign(change) * xp.clip(xp.abs(change) - earlier, 0, room)
