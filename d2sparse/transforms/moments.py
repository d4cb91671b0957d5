"""What an optimiser's state holds of pruned weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2sparse.masks import is_gap
from d2sparse.transforms.states import mask_states
from d2sparse.tree import PyTree


def reset_moments(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    masks: PyTree,
    params: PyTree,
) -> optax.OptState:
    """An optimiser's state in which pruned weights have what `init` gives them.

    Moments become 0, or where they begin otherwise, such as the step sizes of `rprop`
    and the sums of `adagrad`; copies of weights, such as those of `schedule_free`,
    become the parameters that are given. Reaches everything in the state that is shaped
    like the parameters, for any Optax optimiser, through `optax.tree.map_params`;
    counts and factored moments stay.

    Args:
      inner: the optimiser the state belongs to.
      state: its state.
      masks: tree of bool like the parameters.
      params: what copies of pruned weights become: the parameters, masked or not.

    >>> tx = optax.trace(0.9)
    >>> params = {"w": jnp.ones(2)}
    >>> _, state = tx.update(params, tx.init(params))
    >>> masks = {"w": jnp.array([True, False])}
    >>> reset_moments(tx, state, masks, params).trace["w"].tolist()
    [1.0, 0.0]
    """
    return renewed(inner, state, masks, inner.init(params))


def renewed(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    masks: PyTree,
    fresh: optax.OptState,
) -> optax.OptState:
    """The state, and where the masks are False that which `init` has just made.

    >>> tx, masks = optax.trace(0.9), {"w": jnp.array([True, False])}
    >>> fresh = tx.init({"w": jnp.zeros(2)})
    >>> state = jax.tree.map(jnp.ones_like, fresh)
    >>> renewed(tx, state, masks, fresh).trace["w"].tolist()
    [1.0, 0.0]
    """

    def kept_of(moment: Any, mask: Any) -> Any:
        if is_gap(moment):
            return moment
        # A memory of several steps has them on its leading axes.
        fits = not is_gap(mask) and moment.shape[-mask.ndim or None :] == mask.shape
        return mask if fits else True

    def chosen(keep: Any, now: Any, begin: Any) -> Any:
        if keep is True:
            return now
        keep = jnp.broadcast_to(keep, now.shape)
        return jnp.where(keep, now, jnp.asarray(begin, now.dtype))

    kept = optax.tree.map_params(
        *(inner, kept_of, state, masks),
        transform_non_params=lambda _: True,
        is_leaf=is_gap,
    )
    return jax.tree.map(chosen, kept, state, fresh)


def refuse_unfit(
    inner: optax.GradientTransformation, state: optax.OptState, masks: PyTree
) -> None:
    """Raises if an inner optimiser cannot be under masks.

    Raises:
      ValueError: it has masks of its own, keeps two sets of weights, or its state
        cannot be mapped over.

    >>> tx, params = optax.sgd(0.1), {"w": jnp.zeros(2)}
    >>> refuse_unfit(tx, tx.init(params), {"w": jnp.ones(2, bool)})
    """
    if mask_states(state):
        raise ValueError(
            "expected an inner optimiser without masks, got one made by `sparsify` or "
            "`freeze`; make one rule of both, or give each its own leaves by "
            "`optax.partition`"
        )
    nodes = jax.tree.leaves(state, is_leaf=_is_lookahead)
    if any(_is_lookahead(node) for node in nodes):
        raise ValueError(
            "expected an inner optimiser of one set of weights, got `optax.lookahead`; "
            "leave it out and average by `average_weights(sparsify(...))`"
        )
    try:
        renewed(inner, state, masks, state)
    except Exception as error:
        raise ValueError(
            "expected an inner optimiser that maps over its own state with "
            "`optax.tree.map_params`, so that what it holds of pruned weights can be "
            f"reset, got {type(error).__name__}: {error}; take another optimiser than "
            "`sm3` and those with a line search, such as `lbfgs`, and leave out "
            "wrappers that change the tree of parameters, such as `optax.flatten`"
        ) from error


def _is_lookahead(node: Any) -> bool:
    return isinstance(node, optax.LookaheadState)
