"""Patterns: selections of weights that only live or fall together.

A pattern takes `(scores, counts, key)` as `select` does, so that a rule can be given
either. Budgets stay in weights and are rounded to what the pattern can hold. Rounding
never empties a leaf: a count that is known and rounds to no weight is refused, one that
is traced keeps the fewest weights that the pattern can. Under a rule the sparsity is
the same in every leaf (`uniform`) unless another distribution is given.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.checks import check_whole
from d2sparse.masks.algebra import count_live
from d2sparse.masks.layout import linear_index, ordered_bits, tie_order
from d2sparse.masks.selection import Selection, check_counts, select
from d2sparse.meshes import on_auto_axes
from d2sparse.tree import Count, Counts

Shape = tuple[int, ...]

_LOWEST = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """A selection of groups of weights, and how many weights its smallest step has.

    Attributes:
      choose: the selection; it rounds counts, down to none as well.
      step: `(path, shape) -> int`, the fewest weights above none that a leaf can keep.
        It raises a `ValueError` where the leaf cannot be cut into groups.

    >>> step = n_of_m(4).step("kernel", (8, 3))
    >>> step
    6
    """

    choose: Selection
    step: Callable[[str, Shape], int]

    def __call__(
        self,
        scores: Mapping[str, jax.Array],
        counts: Counts,
        key: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """The masks. Of a count above 0 at least one step is kept."""
        check_counts(scores, counts)
        shapes = {path: score.shape for path, score in scores.items()}
        return self.choose(scores, self.fit(shapes, counts), key)

    def fit(self, shapes: Mapping[str, Shape], counts: Counts) -> Counts:
        """Counts that leave weights in every leaf once they are rounded.

        Raises:
          ValueError: a known count above 0 is rounded to 0, which would cut the
            network; or a known count of all leaves is less than a step of each.
        """
        steps = {path: self.step(path, shape) for path, shape in shapes.items()}
        sizes = {path: math.prod(shape) for path, shape in shapes.items()}
        if isinstance(counts, Mapping):
            _refuse_lost(counts, steps, sizes)
            return self.lift(shapes, counts)
        fewest, total = sum(steps.values()), sum(sizes.values())
        count = _known(counts)
        if count is not None and 0 < count < fewest:
            raise ValueError(
                f"expected at least {fewest} weights for the leaves {sorted(shapes)}, "
                "so that each of them keeps the fewest that the pattern can (sparsity "
                f"{1 - fewest / total:.4g}), got {count}; lower the sparsity, "
                "choose another pattern, or leave leaves dense with `prunable`"
            )
        return counts

    def lift(
        self, shapes: Mapping[str, Shape], counts: Mapping[str, Count]
    ) -> dict[str, Count]:
        """Counts of which those above 0 are at least a step."""
        return {
            path: _at_least_if_any(counts[path], self.step(path, shape))
            for path, shape in shapes.items()
        }


def n_of_m(m: int, axis: int = -2) -> Pattern:
    """The n largest of every m neighbours along an axis: n:m sparsity.

    In every leaf n is `count * m / size`, rounded half up: sparsity 0.5 and `m=4` are
    2:4 under `uniform`, and other distributions make n differ between leaves. If one
    number is given for all leaves, their counts are first taken from the unstructured
    `select`, and n is at least 1. From Zhou et al. (arXiv 2102.04010).

    Args:
      m: number of neighbours in a group; every pair in a group is compared, so small.
      axis: axis that groups lie along; -2 holds the inputs of a kernel of shape
        (inputs, outputs), as Flax and Haiku have it, -1 those of a dense layer of
        Equinox or PyTorch, and -3 those of a projection to (heads, features).

    Returns:
      A selection. Ties go to the lower index, or to a random one by a key; NaN and
      `-inf` are never kept, even if fewer than n are left. It raises a `ValueError`
      where the axis of a leaf is not divisible by m, and where a known count rounds to
      no weight at all.

    Raises:
      ValueError: m is no whole number above 0.

    >>> scores = {"kernel": jnp.array([[1.0], [4.0], [3.0], [2.0]])}
    >>> n_of_m(4)(scores, {"kernel": 2}, None)["kernel"][:, 0].tolist()
    [False, True, True, False]
    """
    check_whole("m", m, least=1)
    check_whole("axis", axis, least=-9)

    def step(path: str, leaf: Shape) -> int:
        if not _has_axis(leaf, axis) or leaf[axis] % m:
            raise ValueError(
                f"n:m selection needs axis {axis} divisible by {m}, got shape "
                f"{leaf} at {path!r}; choose another axis or leave this leaf dense "
                "with `prunable`"
            )
        return math.prod(leaf) // m

    def selection(
        scores: Mapping[str, jax.Array], counts: Counts, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        steps = {path: step(path, score.shape) for path, score in scores.items()}
        count_key, key = (None, None) if key is None else jax.random.split(key)
        if not isinstance(counts, Mapping):
            together = select(scores, counts, count_key)
            counts = {
                path: _at_least_if_any(counts, steps[path], count_live(mask))
                for path, mask in together.items()
            }
        n = _whole(counts, steps)
        salts: Any = [None] * len(n)
        if key is not None:
            salts = jax.random.bits(key, (len(n),), jnp.uint32)
        return {
            path: _n_largest(score, n[path], salt, m, axis)
            for (path, score), salt in zip(scores.items(), salts, strict=True)
        }

    return Pattern(_on_auto_axes(selection), step)


def blocks(shape: tuple[int, int] = (32, 32)) -> Pattern:
    """Whole blocks of the last two axes, by the mean score of their entries.

    Positions on other axes, as those inside a convolution kernel, have blocks of their
    own. In every leaf `count / block size` blocks are kept, rounded half up. If one
    number is given for all leaves, all blocks compete, until it is met or exceeded by a
    part of a block; the best block of every leaf is kept in any case.

    Args:
      shape: rows (inputs) and columns (outputs) of a block.

    Returns:
      A selection. A block of NaN and `-inf` alone is never kept; single ones count as a
      score of 0 and are not kept with their block. Ties go to the lower index, or to a
      random block by a key. It raises a `ValueError` where a leaf cannot be cut into
      blocks, and where a known count rounds to no block at all.

    Raises:
      ValueError: the shape is no pair of whole numbers above 0.

    >>> scores = {"kernel": jnp.array([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 4.0]])}
    >>> blocks((2, 2))(scores, {"kernel": 4}, None)["kernel"][0].tolist()
    [False, False, True, True]
    """
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise ValueError(
            f"expected blocks of a shape such as (32, 32), got {shape!r}; they have "
            "rows and columns"
        )
    rows, columns = shape
    check_whole("rows of a block", rows, least=1)
    check_whole("columns of a block", columns, least=1)

    def block(path: str, leaf: Shape) -> Shape:
        if len(leaf) < 2 or leaf[-2] % rows or leaf[-1] % columns:
            raise ValueError(
                f"block selection needs the last two axes divisible by {rows} and "
                f"{columns}, got shape {leaf} at {path!r}; choose another shape of "
                "blocks or leave this leaf dense with `prunable`"
            )
        return (1,) * (len(leaf) - 2) + (rows, columns)

    return _cells(block)


def channels(axis: int = -1) -> Pattern:
    """Whole channels, or neurons: all entries that share an index on an axis.

    Scores, budgets, ties, NaN and `-inf` are treated as in `blocks`, a channel of a
    leaf being its block. The biases and normalisations of a channel stay: they are
    leaves of their own.

    Args:
      axis: axis of the channels; -1 holds the outputs of a kernel and -2 its inputs, as
        Flax and Haiku have it; in Equinox and PyTorch 0 and 1 do.

    Returns:
      A selection. It raises a `ValueError` where a leaf has no such axis, and where a
      known count rounds to no channel at all.

    >>> scores = {"kernel": jnp.array([[1.0, 2.0, 0.0], [0.0, 0.0, 4.0]])}
    >>> channels()(scores, {"kernel": 4}, None)["kernel"].tolist()
    [[False, True, True], [False, True, True]]
    """
    check_whole("axis", axis, least=-9)

    def channel(path: str, leaf: Shape) -> Shape:
        if not _has_axis(leaf, axis):
            raise ValueError(
                f"channel selection needs axis {axis}, got shape {leaf} at {path!r}; "
                "choose another axis or leave this leaf dense with `prunable`"
            )
        place = axis % len(leaf)
        return (*leaf[:place], 1, *leaf[place + 1 :])

    return _cells(channel)


def _has_axis(shape: Shape, axis: int) -> bool:
    return -len(shape) <= axis < len(shape)


def _cells(cell_of: Callable[[str, Shape], Shape]) -> Pattern:
    """Whole cells: the boxes, equal in a leaf, that tile it."""

    def step(path: str, leaf: Shape) -> int:
        return math.prod(cell_of(path, leaf))

    def selection(
        scores: Mapping[str, jax.Array], counts: Counts, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        cells = {path: cell_of(path, score.shape) for path, score in scores.items()}
        sizes = {path: math.prod(cell) for path, cell in cells.items()}
        means = {path: _means(score, cells[path]) for path, score in scores.items()}
        if isinstance(counts, Mapping):
            kept = select(means, _whole(counts, sizes), key)
        else:
            kept = _with_the_best(means, counts, key, sizes)
        return {p: _spread(kept[p], score, cells[p]) for p, score in scores.items()}

    return Pattern(_on_auto_axes(selection), step)


def _on_auto_axes(selection: Selection) -> Selection:
    """The selection, which cuts and joins axes, for leaves that are sharded too."""

    def on_any_axes(
        scores: Mapping[str, jax.Array], counts: Counts, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        # In lists: a dict that JAX takes apart comes back in the order of its keys.
        paths, leaves = list(scores), list(scores.values())
        wanted: Any = counts
        if by_leaf := isinstance(counts, Mapping):
            wanted = [counts[path] for path in paths]

        def select(
            leaves: list[jax.Array], counts: Any, key: jax.Array | None
        ) -> list[jax.Array]:
            named = dict(zip(paths, counts, strict=True)) if by_leaf else counts
            return list(
                selection(dict(zip(paths, leaves, strict=True)), named, key).values()
            )

        kept = on_auto_axes(select, leaves, leaves, wanted, key)
        return dict(zip(paths, kept, strict=True))

    return on_any_axes


def _with_the_best(
    means: Mapping[str, jax.Array],
    count: Count,
    key: jax.Array | None,
    sizes: Mapping[str, int],
) -> dict[str, jax.Array]:
    """Cells of one budget: the best of every leaf, and of the others those on top."""
    best_key, key = (None, None) if key is None else jax.random.split(key)
    best = select(means, dict.fromkeys(means, 1), best_key)
    first = {p: jnp.where(best[p], jnp.inf, mean) for p, mean in means.items()}
    kept = select(first, count, key, sizes)
    return {path: kept[path] | (best[path] & (count > 0)) for path in means}


def _refuse_lost(
    counts: Mapping[str, Count], steps: Mapping[str, int], sizes: Mapping[str, int]
) -> None:
    known = {path: _known(counts[path]) for path in steps}
    lost = [
        f"{n} weights at {path!r} (the fewest it can keep are {steps[path]}, sparsity "
        f"{1 - steps[path] / sizes[path]:.4g})"
        for path, n in known.items()
        if n is not None and n > 0 and not _nearest(n, steps[path])
    ]
    if lost:
        raise ValueError(
            "expected counts that leave weights in every leaf once they are rounded to "
            f"the pattern, got {', '.join(lost)}; lower the sparsity, choose another "
            "pattern or distribution, or leave these leaves dense with `prunable`"
        )


def _known(count: Count) -> int | None:
    """A count as a number, or None where it is traced or one for each of many runs."""
    if isinstance(count, jax.core.Tracer) or np.ndim(count):
        return None
    return int(count)


def _at_least_if_any(given: Count, least: int, count: Count | None = None) -> Count:
    """The count, which is at least so many where any are given."""
    count = given if count is None else count
    if isinstance(given, jax.Array) or isinstance(count, jax.Array):
        return jnp.where(jnp.asarray(given) > 0, jnp.maximum(count, least), count)
    return max(count, least) if given > 0 else count


def _whole(counts: Mapping[str, Count], steps: Mapping[str, int]) -> dict[str, Count]:
    """How many steps of weights every leaf keeps: the nearest number, half up."""
    return {path: _nearest(counts[path], step) for path, step in steps.items()}


def _nearest(count: Count, step: int) -> Count:
    # Not (count + step / 2) // step, which overflows for large leaves.
    rest = count % step
    return count // step + (rest >= step - rest)


@functools.partial(jax.jit, static_argnames=("m", "axis"))
def _n_largest(
    score: jax.Array, n: Count, salt: jax.Array | None, m: int, axis: int
) -> jax.Array:
    """Mask of the n largest of every m neighbours, by counting who is ahead of whom."""
    place, shape = axis % score.ndim, score.shape
    groups = (*shape[:place], shape[place] // m, m, *shape[place + 1 :])
    keys = ordered_bits(score).reshape(groups)
    order = tie_order(linear_index(groups), salt)
    ahead = jnp.zeros(groups, jnp.int32)
    for i in range(m):
        key = jax.lax.slice_in_dim(keys, i, i + 1, axis=place + 1)
        tie = jax.lax.slice_in_dim(order, i, i + 1, axis=place + 1)
        ahead += (key > keys) | ((key == keys) & (tie > order))
    return ((ahead < n) & (keys > 0)).reshape(shape)


@functools.partial(jax.jit, static_argnames="cell")
def _means(score: jax.Array, cell: Shape) -> jax.Array:
    """Mean scores of the cells, float32[cells]; `-inf` where no entry is eligible."""
    sides = _sides(score.shape, cell)
    axes = tuple(range(1, len(sides), 2))
    score = _as_float(score).reshape(sides)
    eligible = score > -jnp.inf
    score = jnp.where(eligible, score, 0.0)
    size, total = math.prod(cell), jnp.sum(score, axis=axes)
    # The sum of scores as low as float32 goes overflows, the mean does not.
    mean = jnp.where(
        jnp.isfinite(total), total / size, jnp.sum(score / size, axis=axes)
    )
    mean = jnp.maximum(mean, _LOWEST)
    return jnp.where(jnp.any(eligible, axis=axes), mean, -jnp.inf)


@functools.partial(jax.jit, static_argnames="cell")
def _spread(kept: jax.Array, score: jax.Array, cell: Shape) -> jax.Array:
    """The mask of the entries from that of the cells; it revives none."""
    sides = _sides(score.shape, cell)
    wide = jnp.expand_dims(kept, tuple(range(1, len(sides), 2)))
    live = _as_float(score) > -jnp.inf
    return jnp.broadcast_to(wide, sides).reshape(score.shape) & live


def _as_float(score: jax.Array) -> jax.Array:
    """The scores as float32. Bools say only who is eligible."""
    score = jnp.asarray(score)
    if score.dtype == bool:
        return jnp.where(score, jnp.float32(0.0), -jnp.inf)
    # Of a wider type too: a number below all of float32 is no `-inf`.
    as_float = jnp.maximum(score.astype(jnp.float32), _LOWEST)
    return jnp.where(score > -jnp.inf, as_float, -jnp.inf)


def _sides(shape: Shape, cell: Shape) -> Shape:
    """The shape with every axis cut in two: the cells, and the entries of a cell."""
    pairs = zip(shape, cell, strict=True)
    return tuple(side for n, length in pairs for side in (n // length, length))
