"""Optimal transport between a block's input and output: blocks that can be left out.

A block whose output is distributed as its input may be replaced by the identity. LaCoOT
(arXiv 2406.08933) adds to the loss, times a strength, the mean over blocks of

    MSW(X, Y) = max_theta sqrt(mean_i (sort(X theta)_i - sort(Y theta)_i)^2),

the 2-Wasserstein distance between the projections of a batch X of inputs and Y of
outputs on a direction, for the direction of many where it is largest. What is sorted
are distributions: a block that only exchanges the examples of a batch has distance 0
and is not the identity. `paired=True` does not sort: it compares each example with
itself, is at least as large, and is 0 only where no direction shows a difference.

Random directions in d dimensions see a difference of about `|X - Y| / sqrt(d)`: how
strong the penalty must be depends on the size of the features.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from d2sparse.checks import check_choice, check_key, check_whole
from d2sparse.regularizers.weights import root

Pairs = (
    Mapping[str, tuple[jax.Array, jax.Array]] | Collection[tuple[jax.Array, jax.Array]]
)


def directions(key: jax.Array, number: int, features: int) -> jax.Array:
    """Random directions, uniform on the sphere.

    Args:
      key: a random key.
      number: of directions; static.
      features: numbers of an example; static.

    Returns:
      float32[number, features], rows of length 1.

    Raises:
      ValueError: a number is below 1, or the key is none.

    >>> theta = directions(jax.random.key(0), 3, features=4)
    >>> print(jnp.linalg.norm(theta, axis=1).round(5))
    [1. 1. 1.]
    """
    check_key(key)
    check_whole("number", number, least=1)
    check_whole("features", features, least=1)
    normal = jax.random.normal(key, (number, features), jnp.float32)
    return normal / jnp.linalg.norm(normal, axis=1, keepdims=True)


def sliced_wasserstein(
    x: jax.Array,
    y: jax.Array,
    directions: jax.Array,
    *,
    reduce: Literal["max", "mean"] = "max",
    paired: bool = False,
) -> jax.Array:
    """Sliced 2-Wasserstein distance between two batches, in given directions.

    Where the distance is 0 so is its gradient. Given a batch twice, it is the same.

    Args:
      x: `float[batch, ...]`, examples of any shape and number.
      y: of the same shape.
      directions: `float[number, features]` of length 1, from `directions`.
      reduce: "max" over the directions, or the root of the "mean" of squares over them.
      paired: compare each example with itself and not the distributions.

    Returns:
      A scalar, of float32 or wider.

    Raises:
      ValueError: the shapes differ, there is no example, the directions have another
        number of features, or another `reduce`.

    >>> x, axes = jnp.array([[0.0, 1.0], [2.0, 1.0]]), jnp.eye(2)
    >>> float(sliced_wasserstein(x, x + jnp.array([[3.0, 0.0]]), axes))
    3.0
    >>> swapped = x[::-1]
    >>> float(sliced_wasserstein(x, swapped, axes))
    0.0
    >>> float(sliced_wasserstein(x, swapped, axes, paired=True))
    2.0
    """
    check_choice("reduce", reduce, ("max", "mean"))
    _check_batches(x, y, directions)

    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, y = (jnp.reshape(batch, (len(batch), -1)).astype(wide) for batch in (x, y))

    def project(rows: jax.Array) -> jax.Array:
        # Small differences of large numbers: not in the 16 bits of accelerators.
        return jnp.matmul(rows, directions.T, precision="highest")

    if paired:
        difference = project(x - y)
    else:
        difference = jnp.sort(project(x), axis=0) - jnp.sort(project(y), axis=0)
    squares = jnp.mean(difference**2, axis=0)
    square = jnp.max(squares) if reduce == "max" else jnp.mean(squares)
    return root(square)


def layer_collapse(
    pairs: Pairs, key: jax.Array, number: int = 50, *, paired: bool = False
) -> jax.Array:
    """The penalty of LaCoOT: mean over blocks of the max-sliced distance.

    Args:
      pairs: of each block its input and output, `float[batch, ...]` of equal shapes; by
        name or one after another.
      key: a random key, new in every step; blocks draw directions of their own.
      number: of directions of every block; static.
      paired: as in `sliced_wasserstein`.

    Returns:
      A scalar, to be added to the loss times a strength.

    Raises:
      ValueError: there is no block, or as in `sliced_wasserstein`.

    >>> x = jnp.ones((4, 2))
    >>> float(layer_collapse({"block1": (x, x), "block2": (x, x)}, jax.random.key(0)))
    0.0
    """
    named = pairs if isinstance(pairs, Mapping) else dict(enumerate(pairs))
    distances = list(block_distances(named, key, number, paired=paired).values())
    return sum(distances[1:], distances[0]) / len(distances)


def block_distances(
    pairs: Mapping[Any, tuple[jax.Array, jax.Array]],
    key: jax.Array,
    number: int = 50,
    *,
    paired: bool = False,
) -> dict[Any, jax.Array]:
    """The max-sliced distance of every block, in directions of its own.

    Args:
      pairs: by block, as for `layer_collapse`.
      key: a random key.
      number: of directions of every block; static.
      paired: as in `sliced_wasserstein`.

    Returns:
      By block, a scalar.

    Raises:
      ValueError: as for `layer_collapse`.

    >>> x = jnp.ones((4, 2))
    >>> print(block_distances({"block1": (x, x)}, jax.random.key(0))["block1"])
    0.0
    """
    check_key(key)
    if not pairs:
        raise ValueError(
            "expected the input and output of at least one block, got none; name "
            "blocks that keep the shape of their input"
        )

    def distance(own: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        theta = directions(own, number, math.prod(x.shape[1:]))
        return sliced_wasserstein(x, y, theta, paired=paired)

    keys = jax.random.split(key, len(pairs))
    return {
        block: distance(own, *pair)
        for own, (block, pair) in zip(keys, pairs.items(), strict=True)
    }


def _check_batches(x: jax.Array, y: jax.Array, directions: jax.Array) -> None:
    if x.shape != y.shape or x.ndim < 2 or not x.size:
        raise ValueError(
            "expected a block's input and output, both float[batch, ...], of the same "
            f"shape, got {x.shape} and {y.shape}; leave out blocks that change it"
        )
    features = math.prod(x.shape[1:])
    if directions.ndim != 2 or directions.shape[1] != features:
        raise ValueError(
            f"expected directions of shape [number, {features}] for examples of shape "
            f"{x.shape[1:]}, got {directions.shape}; draw them for `x[0].size` features"
        )
