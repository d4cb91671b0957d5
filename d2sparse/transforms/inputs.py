"""What `sparsify` is given: seeds and keys, placeholders, gradients; their types."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import tree
from d2sparse.tree import PyTree


def as_key(key: jax.Array | int) -> jax.Array:
    """A typed key, of a seed, of a typed key or of the data of one, as `PRNGKey` gives.

    Raises:
      ValueError: it is none of them, or several keys.

    >>> as_key(0) == as_key(jax.random.PRNGKey(0))
    Array(True, dtype=bool)
    """
    found: Any = None
    if _is_typed(key):
        found = key
    elif not isinstance(key, int | np.generic | np.ndarray | jax.Array):
        pass  # A word, or anything else that is neither a number nor an array.
    elif jnp.ndim(key) == 1 and jnp.result_type(key) == jnp.uint32:
        found = jax.random.wrap_key_data(jnp.asarray(key))
    elif jnp.ndim(key) == 0 and jnp.issubdtype(jnp.result_type(key), jnp.integer):
        found = jax.random.key(key)
    if found is None or jnp.ndim(found):
        raise ValueError(
            f"expected a seed or one key such as `jax.random.key(0)`, got {key!r}; "
            "of several keys pass one to each run, by `jax.vmap`"
        )
    return cast(jax.Array, found)


def key_implementation(key: jax.Array | int) -> Any:
    """The algorithm of a typed key; None, which is the default one, of anything else.

    >>> key_implementation(jax.random.key(0, impl="rbg"))
    'rbg'
    """
    return jax.random.key_impl(cast(jax.Array, key)) if _is_typed(key) else None


def _is_typed(key: Any) -> bool:
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def is_abstract(params: PyTree) -> bool:
    """Whether parameters are known by shape and type alone.

    >>> is_abstract({"w": jax.ShapeDtypeStruct((2,), "float32")})
    True
    """
    leaves = jax.tree.leaves(params)
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def is_placeholder(params: PyTree) -> bool:
    """Whether `optax.tree.map_params` asks which parts of a state are parameters.

    It calls `init` with a node of its own, which has no leaves. An empty container is
    no placeholder: it has no leaf that could be pruned.

    >>> is_placeholder({}), is_placeholder({"w": jnp.zeros(2)})
    (False, False)
    """
    structure: Any = jax.tree.structure(params)
    is_container = params is None or isinstance(params, dict | list | tuple)
    return structure.num_nodes == 1 and not structure.num_leaves and not is_container


def refuse_none(params: PyTree | None, name: str) -> PyTree:
    """The parameters that an update was given.

    Raises:
      ValueError: it was given none; naming the transformation.

    >>> refuse_none({"w": 1.0}, "sparsify")
    {'w': 1.0}
    """
    if params is None:
        raise ValueError(
            f"{name} needs the parameters: call `tx.update(grads, state, params)`"
        )
    return params


def refuse_missing(grads: PyTree, params: PyTree) -> None:
    """Raises if a leaf of the parameters has no gradient.

    Raises:
      ValueError: naming the leaves.

    >>> refuse_missing({"w": 1.0}, {"w": 1.0})
    """
    found: Any = jax.tree.structure(grads)
    if found == jax.tree.structure(params):
        return
    if missing := sorted(set(tree.flatten(params)) - set(tree.flatten(grads))):
        raise ValueError(
            f"expected a gradient for every leaf, got none or None at {missing}; "
            "differentiate with respect to all parameters, or leave these leaves to "
            "another optimiser by `optax.partition`"
        )


def refuse_pairs(params: PyTree) -> None:
    """Raises for the pairs of weights of `optax.lookahead`.

    Its gradients are those of one of them; the other would be masked on its own.

    Raises:
      ValueError: saying what to use instead.

    >>> refuse_pairs({"w": jnp.zeros(2)})
    """
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "expected parameters, got `optax.LookaheadParams`, whose slow weights "
            "would not be masked as the fast ones are; leave `optax.lookahead` out and "
            "average by `average_weights(sparsify(...))`"
        )


def widened(leaf: Any) -> jax.Array:
    """The leaf in float32 at least, so that a long sum does not lose small terms.

    Integers stay.

    >>> widened(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.asarray(leaf)
    return jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32))
