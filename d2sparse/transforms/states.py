"""The masks in an optimiser's state: what holds them, finding and replacing them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import tree
from d2sparse.masks import copy_masks, is_gap
from d2sparse.tree import PyTree


class SparsifyState(NamedTuple):
    """State of `sparsify`.

    Attributes:
      step: int32[], the number of updates so far.
      key: the random key the rule draws from, never changed.
      masks: tree of bool like the parameters.
      inner: state of the inner optimiser.
      observed: state of what the rule observes, empty where that is the gradient.
      nan: bool[leaves], which leaves had a NaN in their weights, gradients or scores at
        a refresh; `check_refreshes` tells of them.
    """

    step: jax.Array
    key: jax.Array
    masks: PyTree
    inner: optax.OptState
    observed: optax.OptState
    nan: jax.Array


class FreezeState(NamedTuple):
    """State of `freeze`; the fields are those of `SparsifyState`."""

    step: jax.Array
    key: jax.Array
    masks: PyTree
    inner: optax.OptState
    observed: optax.OptState
    nan: jax.Array


def get_masks(opt_state: optax.OptState) -> PyTree:
    """The masks in an optimiser's state, however deep `sparsify` is nested in it.

    Where several branches of `optax.partition` are sparse, their masks are merged; a
    leaf that no branch masks holds `optax.MaskedNode`, which `apply_masks` passes over.
    In the state of a Flax `nnx.Optimizer` masks are variables of another type than
    parameters: `nnx.to_pure_dict` of both makes their trees alike.

    Args:
      opt_state: state of an optimiser that holds one `sparsify` or `freeze`, or one per
        branch.

    Returns:
      Tree of bool like the parameters.

    Raises:
      ValueError: there is no `sparsify` in the state, or two mask the same leaf.

    >>> from d2sparse.rules import static
    >>> from d2sparse.transforms import sparsify
    >>> tx = optax.chain(optax.clip(1.0), sparsify(optax.sgd(0.1), static(0.5)))
    >>> get_masks(tx.init({"kernel": jnp.ones((2, 2))}))["kernel"].shape
    (2, 2)
    """
    found = [state.masks for state in _mask_states(opt_state)]
    if not found:
        raise ValueError(
            "expected the state of an optimiser made by `sparsify`, got a state "
            "without masks; was it made by the wrapped optimiser's `init`?"
        )
    masks, *others = found
    for other in others:
        masks = jax.tree.map(_either, masks, other, is_leaf=is_gap)
    return masks


def set_masks(opt_state: optax.OptState, masks: PyTree) -> optax.OptState:
    """The state with other masks: to start from a ticket or a pattern of your own.

    Args:
      opt_state: state of an optimiser that holds one `sparsify`.
      masks: tree of bool like the parameters.

    Raises:
      ValueError: there is no `sparsify` in the state, or the masks do not fit.

    >>> from d2sparse.rules import static
    >>> from d2sparse.transforms import sparsify
    >>> tx = sparsify(optax.sgd(0.1), static(0.5))
    >>> state = tx.init({"kernel": jnp.ones((2, 2))})
    >>> state = set_masks(state, {"kernel": jnp.eye(2, dtype=bool)})
    >>> get_masks(state)["kernel"].tolist()
    [[True, False], [False, True]]
    """
    get_masks(opt_state)  # Complains where there are none.

    def replaced(node: Any) -> Any:
        if not _has_masks(node):
            return node
        return node._replace(masks=copy_masks(masks, node.masks))

    return jax.tree.map(replaced, opt_state, is_leaf=_has_masks)


def sparse_states(opt_state: optax.OptState) -> list[SparsifyState]:
    """The states of every `sparsify` in an optimiser's state; none if it is dense.

    >>> sparse_states(optax.sgd(0.1).init({"kernel": jnp.ones((2, 2))}))
    []
    """
    return [s for s in _mask_states(opt_state) if isinstance(s, SparsifyState)]


def check_refreshes(opt_state: optax.OptState) -> None:
    """Raises if a refresh of the masks has met a NaN.

    A compiled function cannot raise. There a score that is NaN counts as the lowest,
    the leaf is noted in the state, and this tells of it; NaN in weights and gradients
    is noted too. Of the scores of a rule of your own it tells where the rule's `update`
    is a `d2sparse.rules.Noting`. `d2sparse.train` leaves such updates out by itself.

    Args:
      opt_state: state of an optimiser, outside of compiled functions.

    Raises:
      ValueError: naming the leaves.

    >>> from d2sparse.rules import static
    >>> from d2sparse.transforms import sparsify
    >>> check_refreshes(sparsify(optax.sgd(0.1), static(0.5)).init(jnp.ones((2, 2))))
    """
    for state in _mask_states(opt_state):
        # Runs that are vmapped have one row each.
        nan = np.asarray(state.nan).reshape(-1, state.nan.shape[-1]).any(axis=0)
        if nan.any():
            paths = np.array(list(tree.flatten(state.masks)))[nan].tolist()
            raise ValueError(
                "expected weights, gradients and scores without NaN at a refresh of "
                f"the masks, got NaN in {paths}; lower the learning rate, clip the "
                "gradient, or look for a division by zero in the loss or the score"
            )


def refreshes_are_sound(opt_state: optax.OptState) -> jax.Array:
    """Whether no refresh of the masks has met a NaN: bool[], in compiled functions too.

    >>> bool(refreshes_are_sound(optax.sgd(0.1).init(jnp.ones(2))))
    True
    """
    found = [jnp.any(state.nan) for state in _mask_states(opt_state)]
    return ~jnp.any(jnp.stack(found)) if found else jnp.ones((), bool)


def _mask_states(opt_state: optax.OptState) -> list[Any]:
    nodes = jax.tree.leaves(opt_state, is_leaf=_has_masks)
    return [node for node in nodes if _has_masks(node)]


def _has_masks(node: Any) -> bool:
    return isinstance(node, SparsifyState | FreezeState)


def _either(mask: Any, other: Any) -> Any:
    if not is_gap(mask) and not is_gap(other):
        raise ValueError(
            "expected at most one `sparsify` for every leaf, got two; take the masks "
            "of each network or optimiser from its own state"
        )
    return other if is_gap(mask) else mask
