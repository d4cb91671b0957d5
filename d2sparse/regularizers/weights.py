"""Penalties on single weights: L1, L2 and DeepHoyer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from d2sparse import tree
from d2sparse.scores.local import widen
from d2sparse.tree import Prunable, PyTree


def l1(params: PyTree, prunable: Prunable = tree.is_kernel) -> jax.Array:
    """Sum of the absolute values, `sum |w|`.

    Args:
      params: weights.
      prunable: predicate on (path, leaf), which leaves are penalised.

    Returns:
      float[].

    >>> float(l1({"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.ones(2)}))
    7.0
    """
    return _total(lambda w: jnp.sum(_absolute(w)), params, prunable)


def l2(params: PyTree, prunable: Prunable = tree.is_kernel) -> jax.Array:
    """Half of the sum of squares, `sum w^2 / 2`, whose gradient is the weight.

    Args:
      params: weights.
      prunable: predicate on (path, leaf), which leaves are penalised.

    Returns:
      float[].

    >>> float(l2({"kernel": jnp.array([[3.0, -4.0]])}))
    12.5
    """
    return _total(lambda w: jnp.sum(jnp.square(w)) / 2, params, prunable)


def hoyer_square(params: PyTree, prunable: Prunable = tree.is_kernel) -> jax.Array:
    """Squared ratio of two norms, `(sum |w|)^2 / sum w^2` in every leaf, summed up.

    DeepHoyer (Yang et al., arXiv 1908.09979): of a leaf with k weights of one size and
    zeros it is k, so it counts weights, at any scale. It lets large weights grow and
    pulls those below `sum w^2 / sum |w|` to 0. A leaf of zeros counts 0.

    Args:
      params: weights.
      prunable: predicate on (path, leaf), which leaves are penalised.

    Returns:
      float[].

    >>> float(hoyer_square({"kernel": jnp.array([[3.0, -3.0, 0.0]])}))
    2.0
    """
    return _total(lambda w: ratio_of_norms(_absolute(w)), params, prunable)


def soft_threshold(
    params: PyTree, strength: float | jax.Array, prunable: Prunable = tree.is_kernel
) -> PyTree:
    """Proximal operator of `l1`: `sign(w) max(|w| - strength, 0)`.

    Args:
      params: weights.
      strength: at least 0.
      prunable: predicate on (path, leaf); other leaves stay.

    Returns:
      A tree like the parameters.

    >>> soft_threshold({"kernel": jnp.array([[3.0, -0.5]])}, 1.0)["kernel"].tolist()
    [[2.0, 0.0]]
    """

    def of_leaf(w: jax.Array) -> jax.Array:
        # NaN is neither: it stays, and is noticed.
        return jnp.where(jnp.abs(w) <= strength, 0, w - jnp.sign(w) * strength)

    return change_leaves(of_leaf, params, prunable)


def shrink(
    params: PyTree, strength: float | jax.Array, prunable: Prunable = tree.is_kernel
) -> PyTree:
    """Proximal operator of `l2`: `w / (1 + strength)`.

    Args:
      params: weights.
      strength: at least 0.
      prunable: predicate on (path, leaf); other leaves stay.

    Returns:
      A tree like the parameters.

    >>> shrink({"kernel": jnp.array([[3.0, -1.0]])}, 1.0)["kernel"].tolist()
    [[1.5, -0.5]]
    """
    return change_leaves(lambda w: w / (1 + strength), params, prunable)


def ratio_of_norms(sizes: jax.Array) -> jax.Array:
    """`(sum x)^2 / sum x^2` of numbers of at least 0; 0 if all of them are 0.

    >>> float(ratio_of_norms(jnp.array([2.0, 2.0, 0.0])))
    2.0
    """
    # Over the largest, which changes nothing: squares of small weights would be 0.
    largest = jax.lax.stop_gradient(jnp.max(sizes, initial=0))
    sizes = sizes / jnp.where(largest > 0, largest, 1)
    squares = jnp.sum(jnp.square(sizes))
    return jnp.square(jnp.sum(sizes)) / jnp.where(squares > 0, squares, 1)


def root(squares: jax.Array) -> jax.Array:
    """The square root of numbers of at least 0, whose derivative at 0 is 0.

    >>> root(jnp.array([4.0, 0.0])).tolist()
    [2.0, 0.0]
    """
    # That of the root is infinite there, also where it is not chosen.
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def change_leaves(
    change: Callable[[jax.Array], jax.Array], params: PyTree, prunable: Prunable
) -> PyTree:
    """The parameters with the leaves that the predicate chooses changed, in their type.

    >>> change_leaves(jnp.negative, {"kernel": jnp.ones((1, 2))}, tree.is_kernel)
    {'kernel': Array([[-1., -1.]], dtype=float32)}
    """
    leaves = tree.prunable_leaves(params, prunable)
    changed = {p: change(widen(w)).astype(w.dtype) for p, w in leaves.items()}
    return tree.replace(params, changed)


def _absolute(w: jax.Array) -> jax.Array:
    # The derivative of `abs` at 0 is 1, which would move every pruned weight.
    return jnp.where(w != 0, jnp.abs(w), 0)


def _total(
    penalty: Callable[[jax.Array], jax.Array], params: PyTree, prunable: Prunable
) -> jax.Array:
    """The sum over chosen leaves, in float32 at least."""
    leaves = tree.prunable_leaves(params, prunable).values()
    return sum((penalty(widen(w)) for w in leaves), start=jnp.zeros((), jnp.float32))
