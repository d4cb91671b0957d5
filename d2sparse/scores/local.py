"""Scores that need no more than the weights and their gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from d2sparse.meshes import on_auto_axes
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

    def draw(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, max(len(leaves), 1))
        each = zip(keys, leaves, strict=False)
        return [jax.random.uniform(k, x.shape, jnp.float32) for k, x in each]

    return jax.tree.unflatten(structure, on_auto_axes(draw, leaves, key))


def constant(
    params: PyTree, grads: PyTree = None, key: jax.Array | None = None
) -> PyTree:
    """The same score for every weight, so that what breaks ties decides.

    It is a bool, True: of scores that are bools, those that are True tie, and the
    search for the largest goes straight to what breaks ties.

    >>> constant({"w": jnp.array([-2.0, 1.0])})["w"].tolist()
    [True, True]
    """
    del grads, key
    return jax.tree.map(lambda w: jnp.ones_like(w, bool), params)


def gradient(params: PyTree, grads: PyTree, key: jax.Array | None = None) -> PyTree:
    """Absolute value of the gradient, `|g|`: how fast the weight would grow.

    The growth criterion of RigL (Evci et al., arXiv 1911.11134).

    >>> gradient(None, {"w": jnp.array([-2.0, 1.0])})["w"].tolist()
    [2.0, 1.0]
    """
    del params, key
    _refuse_none(grads, "gradient")
    return jax.tree.map(jnp.abs, grads)


def saliency(params: PyTree, grads: PyTree, key: jax.Array | None = None) -> PyTree:
    """First-order change of the loss when the weight is removed, `|g * w|`.

    The Taylor criterion (Molchanov et al., arXiv 1611.06440). It keeps what the loss
    reacts to, up or down; `signed_saliency` keeps what the loss would miss. On a
    gradient over several batches it is `snip`.

    >>> params, grads = {"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([-2.0, 1.0])}
    >>> saliency(params, grads)["w"].tolist()
    [6.0, 1.0]
    """
    del key
    _refuse_none(grads, "saliency")
    return jax.tree.map(lambda w, g: jnp.abs(g * w), params, grads)


def signed_saliency(
    params: PyTree, grads: PyTree, key: jax.Array | None = None
) -> PyTree:
    """First-order rise of the loss when the weight is set to 0, `-g * w`.

    Negative where the loss would fall: such weights go first, where `saliency` keeps
    the large ones among them.

    >>> params, grads = {"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([-2.0, 1.0])}
    >>> signed_saliency(params, grads)["w"].tolist()
    [6.0, -1.0]
    """
    del key
    _refuse_none(grads, "signed_saliency")
    return jax.tree.map(lambda w, g: -g * w, params, grads)


def observed(params: PyTree, grads: PyTree, key: jax.Array | None = None) -> PyTree:
    """What the rule is shown in place of the gradient, as it is.

    For a rule that is given an accumulated statistic, such as that of `movement`.

    >>> observed(None, {"w": jnp.array([-2.0, 1.0])})["w"].tolist()
    [-2.0, 1.0]
    """
    del params, key
    _refuse_none(grads, "observed")
    return grads


def _refuse_none(grads: PyTree, name: str) -> None:
    if grads is None:
        raise ValueError(
            f"the score {name!r} needs gradients, got None; pass those of a loss, "
            "`jax.grad(loss)(params)`"
        )


class MovementState(NamedTuple):
    """State of `movement`.

    Attributes:
      total: the sum of `-g * w` so far, a tree of float32 or wider like the parameters.
    """

    total: PyTree


def movement() -> optax.GradientTransformation:
    """Accumulates movement, `sum_t -g_t * w_t`: large where weights leave 0.

    Each term is the `signed_saliency` of one step, so the sum remembers what one batch
    alone would decide by chance. Under gradient descent a weight that grows away from 0
    gains and one that shrinks towards 0 loses, whatever its size: movement pruning
    (Sanh et al., arXiv 2005.07683), whose scores, learned by a straight-through
    gradient, are this sum times the learning rate.

    It is no optimiser: its update returns the whole sum, to be shown to a rule in place
    of the gradient, with `observed` for a score. Half precision is summed in float32. A
    weight at 0 has no movement, so what is pruned keeps its sum as it was.

    Returns:
      An Optax transformation whose update needs the parameters.

    Raises:
      ValueError: at `update`, where the parameters are not given.

    >>> tx, params = movement(), {"w": jnp.array([3.0, 1.0])}
    >>> state, grads = tx.init(params), {"w": jnp.array([-2.0, 1.0])}
    >>> _, state = tx.update(grads, state, params)
    >>> moved, state = tx.update(grads, state, params)
    >>> observed(params, moved)["w"].tolist()
    [12.0, -2.0]
    """

    def init(params: optax.Params) -> MovementState:
        return MovementState(widen(jax.tree.map(jnp.zeros_like, params)))

    def update(
        updates: optax.Updates,
        state: MovementState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, MovementState]:
        if params is None:
            raise ValueError(
                "movement needs the parameters: call `tx.update(grads, state, params)`"
            )
        terms = signed_saliency(widen(params), widen(updates))
        total = jax.tree.map(jnp.add, state.total, terms)
        return total, MovementState(total)

    return optax.GradientTransformation(init, update)


# Scores of a weight that look at its gradient.
GRADIENT_SCORES: tuple[Score, ...] = (gradient, saliency, signed_saliency, observed)
# Scores of a weight that need no more than it and its gradient. Such a score can be
# taken of a part of a leaf, and never has to be written out whole.
LOCAL: tuple[Score, ...] = (magnitude, constant, *GRADIENT_SCORES)


def widen(tree: PyTree) -> PyTree:
    """The same numbers in float32 where they are of half precision.

    In half precision a long sum stops growing once it is large.

    >>> widen({"w": jnp.ones(2, jnp.bfloat16)})["w"].dtype
    dtype('float32')
    """
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), tree
    )
