"""Curvature of a loss: the eigenvalue of its Hessian that is largest in magnitude."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from d2sparse.checks import check_function, check_key, check_number, check_whole
from d2sparse.scores.local import widen
from d2sparse.tree import PyTree


class TopEigenvalue(NamedTuple):
    """What power iteration found.

    Attributes:
      value: the eigenvalue, with its sign.
      vector: like the parameters, of length 1.
      residual: `|H v - value v|`. Some eigenvalue is no farther from the value.
      steps: products with the Hessian that were made.
    """

    value: jax.Array
    vector: PyTree
    residual: jax.Array
    steps: jax.Array


class _Search(NamedTuple):
    found: TopEigenvalue
    product: PyTree  # With the vector.
    size: jax.Array  # Of the product.


def top_hessian_eigenvalue(
    loss: Callable[[PyTree], jax.Array],
    params: PyTree,
    key: jax.Array,
    *,
    steps: int = 100,
    tolerance: float | jax.Array = 1e-2,
) -> TopEigenvalue:
    """Top eigenvalue of a loss's Hessian by power iteration, as a measure of sharpness.

    From a random v, `v <- H v / |H v|` until `|H v - value v| <= tolerance |H v|` with
    `value = v^T H v`, whose error is of second order in that residual. The Hessian is
    never formed: a step costs about two gradients. Steps are in proportion to
    1 / log(|first| / |second eigenvalue|); where the two largest are of opposite sign
    and equal, the residual stays large and says so.

    The loss is the mean over the set that the curvature is asked of, with statistics of
    normalisations as in evaluation; that of a sum grows with the set. Of sparse
    parameters `lambda params: loss(apply_masks(params, masks))` has the curvature
    within the live weights. Parameters of half precision are taken in float32.

    Args:
      loss: params -> scalar.
      params: tree of float[...].
      key: a random key, for the first vector.
      steps: at most; static or traced.
      tolerance: of the residual, relative; may be traced.

    Returns:
      The eigenvalue, its vector, and how well it is known.

    Raises:
      ValueError: the loss is no function, there is no parameter, the key is none, or a
        number is outside of its range.

    >>> def loss(params):
    ...     return 3 * jnp.sum(params["a"] ** 2) - 0.5 * jnp.sum(params["b"] ** 2)
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    >>> found = top_hessian_eigenvalue(loss, params, jax.random.key(0))
    >>> print(found.value.round(2))
    6.0
    """
    check_function("loss", loss, "params", "lambda params: mean_loss(params, batch)")
    check_key(key)
    check_whole("steps", steps, least=1)
    check_number("tolerance", tolerance, 0, 1)
    params = widen(params)
    leaves, structure = jax.tree.flatten(params)
    if not leaves:
        raise ValueError(
            "expected parameters with at least one array, got an empty tree; a loss of "
            "nothing has no curvature"
        )

    def step(search: _Search) -> _Search:
        vector = _scaled(search.product, search.size)
        product = jax.jvp(jax.grad(loss), (params,), (vector,))[1]
        value = _dot(vector, product)
        rest = jax.tree.map(lambda hv, v: hv - value * v, product, vector)
        residual = jnp.sqrt(_dot(rest, rest))
        found = TopEigenvalue(value, vector, residual, search.found.steps + 1)
        return _Search(found, product, jnp.sqrt(_dot(product, product)))

    def unfinished(search: _Search) -> jax.Array:
        # False of NaN as well, which no further step would mend.
        inexact = search.found.residual > tolerance * search.size
        return inexact & (search.found.steps < steps)

    keys = jax.random.split(key, len(leaves))
    draws = [
        jax.random.normal(own, leaf.shape, leaf.dtype)
        for own, leaf in zip(keys, leaves, strict=True)
    ]
    first = jax.tree.unflatten(structure, draws)
    size = jnp.sqrt(_dot(first, first))
    none = TopEigenvalue(
        jnp.zeros_like(size), first, jnp.full_like(size, jnp.inf), jnp.int32(0)
    )
    return jax.lax.while_loop(unfinished, step, _Search(none, first, size)).found


def _scaled(tree: PyTree, size: jax.Array) -> PyTree:
    """A tree of length 1; one of zeros stays."""
    size = jnp.where(size > 0, size, 1)
    return jax.tree.map(lambda leaf: (leaf / size).astype(leaf.dtype), tree)


def _dot(a: PyTree, b: PyTree) -> jax.Array:
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))
