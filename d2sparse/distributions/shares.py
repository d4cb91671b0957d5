"""Shares by one number for every leaf: uniform, Erdos-Renyi; or no shares at all."""

import math
from typing import Any

import numpy as np

from d2sparse.distributions.budget import (
    Shapes,
    Sparsity,
    array_module,
    check_sparsity,
    hand_out,
    keep,
    largest_remainder,
    sizes,
)
from d2sparse.tree import Count


def global_(shapes: Shapes, sparsity: Sparsity) -> Count:
    """One budget for all leaves: every weight competes with every other.

    Nothing holds a leaf back: at high sparsity one whose scores are small can lose all
    of its weights, and unless another path leads around it so does the network ("layer
    collapse", Tanaka et al., arXiv 2006.05467). `masks.count` tells; `erk` and
    `uniform` keep a weight in every leaf, and so does SynFlow in many iterations.

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

    Inputs and outputs are the last two axes, or the first two of a leaf that is called
    `weight`, as in Equinox and PyTorch, so the spatial axes of a convolution do not
    count. Heads and features of attention are one axis, as in `erk`. From SET (Mocanu
    et al., arXiv 1707.04780).

    >>> {path: int(n) for path, n in er({"a": (4, 4), "b": (16, 16)}, 0.75).items()}
    {'a': 14, 'b': 54}
    """
    return _share(shapes, sparsity, [_density_er(s) for s in _planes(shapes)])


def erk(shapes: Shapes, sparsity: Sparsity) -> dict[str, Count]:
    """Erdos-Renyi-kernel: density proportional to (sum of axes) / (product of axes).

    Leaves whose density would exceed 1 are kept dense and the rest of the budget is
    shared between the others. The total is exact, by largest remainder. From RigL
    (Evci et al., arXiv 1911.11134).

    Of attention as Flax has it (`query`, `key`, `value` and `out` side by side) heads
    and features are one axis: the layer multiplies a matrix. Of leaves that are stacked
    over layers the layers count as an axis, unless `rules.per_layer` takes them apart.

    >>> shapes = {"conv": (3, 3, 4, 8), "head": (8, 2)}
    >>> {path: int(n) for path, n in erk(shapes, 0.5).items()}
    {'conv': 136, 'head': 16}
    """
    return _share(
        shapes, sparsity, [_density_er(s) for s in _matrices(shapes).values()]
    )


def _matrices(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes, in which projections to and from the heads of attention are matrices.

    They are known by their names and by one another: a convolution over one axis has
    three axes too.
    """
    found = dict(shapes)
    for path, shape in shapes.items():
        *above, layer, name = ("/" + path).split("/")
        block = {
            other: shapes.get("/".join([*above, other, name])[1:], ())
            for other in ("query", "key", "value", "out")
        }
        if layer not in block or {len(other) for other in block.values()} != {3}:
            continue
        heads = (math.prod(shape[:2]), shape[2])
        found[path] = heads if layer == "out" else (shape[0], math.prod(shape[1:]))
    return found


def _planes(shapes: Shapes) -> list[tuple[int, ...]]:
    """The axes of inputs and outputs of every leaf."""
    return [
        s[:2] if path.rpartition("/")[2] == "weight" else s[-2:]
        for path, s in _matrices(shapes).items()
    ]


def _density_er(axes: tuple[int, ...]) -> float:
    # A scalar counts as one of shape (1,); a leaf without entries has no share.
    return (sum(axes) or 1) / (math.prod(axes) or 1)


def _share(
    shapes: Shapes, sparsity: Sparsity, weights: list[float]
) -> dict[str, Count]:
    """Keeps weights in proportion to `weights`: no leaf above its size, or empty."""
    xp = array_module(check_sparsity(sparsity))
    limits = sizes(shapes)
    total = keep(int(limits.sum()), sparsity)
    ideal = _densities(limits, np.array(weights), total, xp) * limits
    counts = largest_remainder(ideal, limits, total, xp)
    counts = _fill_empty(counts, limits, total, xp)
    return dict(zip(shapes, counts, strict=True))


def _fill_empty(counts: Any, limits: np.ndarray, total: Any, xp: Any) -> Any:
    """One weight in every leaf that rounding emptied, taken from the largest.

    Where there are fewer weights than leaves, the counts stay.
    """
    floor = np.minimum(limits, 1)
    filled = xp.maximum(counts, floor)
    order = xp.lexsort((-filled,))
    spare = (filled - floor)[order]
    left = hand_out(total - xp.sum(filled), spare, spare, xp)[xp.argsort(order)]
    enough = total >= int(floor.sum())
    return xp.where(enough, left + floor, counts).astype(counts.dtype)


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
