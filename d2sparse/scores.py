"""Scores: how much does each weight matter?

A score takes `(params, grads, key)` and returns a tree of their structure; the largest
scores are kept. Every score has this signature, so that a rule can be given any.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from d2sparse.tree import PyTree

Score = Callable[[PyTree, PyTree, jax.Array], PyTree]


def magnitude(
    params: PyTree, grads: PyTree = None, key: jax.Array | None = None
) -> PyTree:
    """Absolute value of the weight, `|w|` (Han et al., arXiv 1506.02626).

    >>> magnitude({"w": jnp.array([-2.0, 1.0])})["w"].tolist()
    [2.0, 1.0]
    """
    del grads, key
    return jax.tree.map(jnp.abs, params)


def random(
    params: PyTree, grads: PyTree = None, key: jax.Array | None = None
) -> PyTree:
    """Uniform random numbers in [0, 1), independent in every leaf.

    Raises:
      ValueError: no key is given.

    >>> random({"w": jnp.zeros(2)}, None, jax.random.key(0))["w"].shape
    (2,)
    """
    del grads
    if key is None:
        raise ValueError("random scores need a key; pass `jax.random.key(seed)`")
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    return jax.tree.unflatten(
        structure,
        [jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves, strict=False)],
    )


def constant(
    params: PyTree, grads: PyTree = None, key: jax.Array | None = None
) -> PyTree:
    """The same score for every weight, so that what breaks ties decides.

    >>> constant({"w": jnp.array([-2.0, 1.0])})["w"].tolist()
    [0.0, 0.0]
    """
    del grads, key
    return jax.tree.map(jnp.zeros_like, params)


def gradient(params: PyTree, grads: PyTree, key: jax.Array | None = None) -> PyTree:
    """Absolute value of the gradient, `|g|`: how fast the weight would grow.

    The growth criterion of RigL (Evci et al., arXiv 1911.11134).

    >>> gradient(None, {"w": jnp.array([-2.0, 1.0])})["w"].tolist()
    [2.0, 1.0]
    """
    del params, key
    return jax.tree.map(jnp.abs, grads)


def saliency(params: PyTree, grads: PyTree, key: jax.Array | None = None) -> PyTree:
    """First-order change of the loss when the weight is removed, `|g * w|`.

    The Taylor criterion (Molchanov et al., arXiv 1611.06440); on the gradient of the
    whole data at initialisation it is the score of SNIP (Lee et al., arXiv 1810.02340).

    >>> params, grads = {"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([-2.0, 1.0])}
    >>> saliency(params, grads)["w"].tolist()
    [6.0, 1.0]
    """
    del key
    return jax.tree.map(lambda w, g: jnp.abs(g * w), params, grads)
