"""Distributions: how a budget of weights is shared between the leaves.

A distribution takes `(shapes, sparsity)` and returns how many weights to keep: a number
for every path, or one number for which all leaves compete. Numbers, not fractions: a
total is exact only in integers. The sparsity may be traced; it is then a float32, and
above some 10^6 weights the total may differ from that of a Python float by rounding.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.tree import Count, Counts

Shapes = Mapping[str, tuple[int, ...]]
Sparsity = float | jax.Array
Distribution = Callable[[Shapes, Sparsity], Counts]


def global_(shapes: Shapes, sparsity: Sparsity) -> Count:
    """One budget for all leaves: every weight competes with every other.

    >>> int(global_({"a": (2, 5), "b": (10, 9)}, 0.9))
    10
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    return _keep(total, check_sparsity(sparsity))


def uniform(shapes: Shapes, sparsity: Sparsity) -> dict[str, Count]:
    """The same sparsity in every leaf, the total exact by largest remainder.

    >>> {path: int(n) for path, n in uniform({"a": (2, 5), "b": (10, 9)}, 0.9).items()}
    {'a': 1, 'b': 9}
    """
    return _share(shapes, sparsity, [1.0 for _ in shapes])


def er(shapes: Shapes, sparsity: Sparsity) -> dict[str, Count]:
    """Erdos-Renyi: density proportional to (inputs + outputs) / (inputs * outputs).

    Inputs and outputs are the last two axes, so the spatial axes of a convolution do
    not count. From SET (Mocanu et al., arXiv 1707.04780).

    >>> {path: int(n) for path, n in er({"a": (4, 4), "b": (16, 16)}, 0.75).items()}
    {'a': 14, 'b': 54}
    """
    return _share(shapes, sparsity, [_density_er(s[-2:]) for s in shapes.values()])


def erk(shapes: Shapes, sparsity: Sparsity) -> dict[str, Count]:
    """Erdos-Renyi-kernel: density proportional to (sum of axes) / (product of axes).

    Leaves whose density would exceed 1 are kept dense and the rest of the budget is
    shared between the others. The total is exact, by largest remainder. From RigL
    (Evci et al., arXiv 1911.11134).

    >>> shapes = {"conv": (3, 3, 4, 8), "head": (8, 2)}
    >>> {path: int(n) for path, n in erk(shapes, 0.5).items()}
    {'conv': 136, 'head': 16}
    """
    return _share(shapes, sparsity, [_density_er(s) for s in shapes.values()])


def check_sparsity(sparsity: Sparsity) -> Sparsity:
    """The sparsity itself, if it is in [0, 1) or traced.

    Raises:
      ValueError: the sparsity is outside [0, 1).

    >>> check_sparsity(0.9)
    0.9
    """
    known = not isinstance(sparsity, jax.core.Tracer)
    if known and not 0 <= float(sparsity) < 1:
        raise ValueError(
            f"expected a sparsity in [0, 1), the fraction of zeros, got {sparsity}; "
            "a density d is the sparsity 1 - d"
        )
    return sparsity


def _density_er(axes: tuple[int, ...]) -> float:
    return sum(axes) / math.prod(axes)


def _array_module(sparsity: Sparsity) -> Any:
    return jnp if isinstance(sparsity, jax.Array) else np


def _keep(total: int, sparsity: Sparsity) -> Count:
    xp = _array_module(sparsity)
    return xp.round((1 - sparsity) * total).astype(int)


def _share(
    shapes: Shapes, sparsity: Sparsity, weights: list[float]
) -> dict[str, Count]:
    """Keeps weights in proportion to `weights`, no leaf above its size."""
    xp = _array_module(check_sparsity(sparsity))
    sizes = np.array([math.prod(shape) for shape in shapes.values()])
    total = _keep(int(sizes.sum()), sparsity)
    ideal = _densities(sizes, np.array(weights), total, xp) * sizes
    counts = _largest_remainder(ideal, sizes, total, xp)
    return dict(zip(shapes, counts, strict=True))


def _densities(sizes: np.ndarray, weights: np.ndarray, total: Any, xp: Any) -> Any:
    """min(1, scale * weight), with the scale at which the total is met.

    With the leaves in falling order of weight, those that saturate come first. For each
    number of saturated leaves the scale is known; the right number is the first at
    which the next leaf does not saturate.
    """
    order = np.argsort(-weights, kind="stable")
    size, weight = sizes[order], weights[order]
    saturated = np.cumsum(size) - size
    rest = np.cumsum((size * weight)[::-1])[::-1]
    scale = (total - saturated) / rest
    fits = scale * weight <= 1
    chosen = xp.where(xp.any(fits), xp.argmax(fits), len(size) - 1)
    return xp.minimum(1.0, scale[chosen] * weights)


def _largest_remainder(ideal: Any, sizes: np.ndarray, total: Any, xp: Any) -> Any:
    """Integers that sum to the total, each the floor of its ideal or one more."""
    counts = xp.minimum(xp.floor(ideal), sizes).astype(xp.int32)
    remainder = xp.where(counts < sizes, ideal - counts, -1.0)
    rank = xp.argsort(xp.argsort(-remainder, stable=True), stable=True)
    counts = xp.minimum(counts + (rank < total - xp.sum(counts)), sizes)
    return hand_out(total - xp.sum(counts), counts, sizes, xp).astype(xp.int32)


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
