"""Shares by one number for every leaf: uniform, Erdos-Renyi; or no shares at all."""

import math
from typing import Any

import numpy as np

from d2sparse.distributions.budget import (
    Shapes,
    Sparsity,
    array_module,
    check_sparsity,
    keep,
    largest_remainder,
    sizes,
)
from d2sparse.tree import Count


def global_(shapes: Shapes, sparsity: Sparsity) -> Count:
    """One budget for all leaves: every weight competes with every other.

    >>> int(global_({"a": (2, 5), "b": (10, 9)}, 0.9))
    10
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    return keep(total, check_sparsity(sparsity))


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


def _density_er(axes: tuple[int, ...]) -> float:
    # A scalar counts as one of shape (1,); a leaf without entries has no share.
    return (sum(axes) or 1) / (math.prod(axes) or 1)


def _share(
    shapes: Shapes, sparsity: Sparsity, weights: list[float]
) -> dict[str, Count]:
    """Keeps weights in proportion to `weights`, no leaf above its size."""
    xp = array_module(check_sparsity(sparsity))
    limits = sizes(shapes)
    total = keep(int(limits.sum()), sparsity)
    ideal = _densities(limits, np.array(weights), total, xp) * limits
    counts = largest_remainder(ideal, limits, total, xp)
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
    scale = (total - saturated) / np.maximum(rest, 1)  # 0 where no entries are left
    fits = scale * weight <= 1
    chosen = xp.where(xp.any(fits), xp.argmax(fits), len(size) - 1)
    return xp.minimum(1.0, scale[chosen] * weights)
