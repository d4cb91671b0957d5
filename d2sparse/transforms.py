"""Sparse training for any Optax optimiser.

`sparsify` lifts a mask rule into an `optax.GradientTransformation`. The masks live in
the optimiser's state; nothing else in a training loop changes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from d2sparse.masks import apply_masks, copy_masks, is_gap
from d2sparse.rules import MaskRule
from d2sparse.schedules import When, every
from d2sparse.tree import PyTree


class SparsifyState(NamedTuple):
    """State of `sparsify`.

    Attributes:
      step: int32[], the number of updates so far.
      key: the random key the rule draws from, never changed.
      masks: tree of bool like the parameters.
      inner: state of the inner optimiser.
    """

    step: jax.Array
    key: jax.Array
    masks: PyTree
    inner: optax.OptState


def sparsify(
    inner: optax.GradientTransformation,
    rule: MaskRule,
    when: When | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains with an inner optimiser under masks that a rule keeps up to date.

    At every update the masks are refreshed if it is time, from the weights and the
    dense gradient. The inner optimiser then sees masked gradients and masked moments,
    and what it returns is emitted where the mask is True, `-param` elsewhere. After
    `optax.apply_updates` pruned weights are exactly 0 and live ones have the bits the
    inner optimiser gives them (operation by operation: two programs that XLA fuses
    differently may round differently). A weight that grows starts from 0 with zero
    moments.

    `update` takes two arguments of its own beside those it passes on to `inner`:

    * `refresh`: bool[], in place of `when(step)`. Under `jax.vmap` over runs pass it
      unbatched, or every run pays for a refresh at every step.
    * `growth_fn`: a function without arguments that returns gradients for the rule to
      use at a refresh, such as those of a larger batch. It is called only then.

    Args:
      inner: any Optax optimiser.
      rule: how masks begin and change, such as `rigl(sparsity=0.9)`.
      when: step -> bool, when the masks are refreshed; `every(100)` if not given.
      key: random key or seed of the rule; may be traced.

    Returns:
      An Optax optimiser. It needs the parameters in `update`, and in an `optax.chain`
      it comes last.

    >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    >>> from d2sparse.rules import static
    >>> tx = sparsify(optax.sgd(0.1), static(sparsity=0.75))
    >>> state = tx.init(params)
    >>> params = apply_masks(params, get_masks(state))
    >>> updates, state = tx.update(params, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> int((params["kernel"] != 0).sum())
    4
    """
    inner = optax.with_extra_args_support(inner)
    when = every(100) if when is None else when

    def init(params: optax.Params) -> SparsifyState:
        # A copy: the state may be donated, and the caller's key with it.
        root = jnp.copy(_as_key(key))
        # The reserved number keeps the first mask apart from every refresh.
        masks = rule.init(params, jax.random.fold_in(root, 0xFFFFFFFF))
        live = apply_masks(params, masks)
        return SparsifyState(jnp.zeros((), jnp.int32), root, masks, inner.init(live))

    def update(
        updates: optax.Updates,
        state: SparsifyState,
        params: optax.Params | None = None,
        *,
        refresh: jax.Array | bool | None = None,
        growth_fn: Callable[[], PyTree] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SparsifyState]:
        if params is None:
            raise ValueError(
                "sparsify needs the parameters: call `tx.update(grads, state, params)`"
            )

        # Only masks pass through the branches: a cond around the optimiser would copy
        # its whole state.
        def refreshed() -> PyTree:
            grads = updates if growth_fn is None else growth_fn()
            key = jax.random.fold_in(state.key, state.step)
            return rule.update(state.masks, params, grads, state.step, key)

        due = when(state.step) if refresh is None else refresh
        masks = jax.lax.cond(due, refreshed, lambda: state.masks)
        moments = mask_moments(inner, state.inner, masks)
        changes, moments = inner.update(
            apply_masks(updates, masks), moments, params, **extra_args
        )
        emitted = jax.tree.map(_change_or_removal, masks, changes, params)
        step = optax.safe_increment(state.step)
        return emitted, SparsifyState(step, state.key, masks, moments)

    return optax.GradientTransformationExtraArgs(init, update)


def mask_moments(
    inner: optax.GradientTransformation, state: optax.OptState, masks: PyTree
) -> optax.OptState:
    """An optimiser's state with the moments of pruned weights set to 0.

    Reaches everything in the state that is shaped like the parameters, for any Optax
    optimiser, through `optax.tree.map_params`; counts and factored moments stay.

    Args:
      inner: the optimiser the state belongs to.
      state: its state.
      masks: tree of bool like the parameters.

    >>> tx = optax.trace(0.9)
    >>> state = tx.init({"w": jnp.ones(2)})
    >>> _, state = tx.update({"w": jnp.ones(2)}, state)
    >>> mask_moments(tx, state, {"w": jnp.array([True, False])}).trace["w"].tolist()
    [1.0, 0.0]
    """

    def masked(moment: Any, mask: Any) -> Any:
        if is_gap(moment) or moment.shape != mask.shape:
            return moment
        return apply_masks(moment, mask)

    return optax.tree.map_params(inner, masked, state, masks, is_leaf=is_gap)


def get_masks(opt_state: optax.OptState) -> PyTree:
    """The masks in an optimiser's state, however deep `sparsify` is nested in it.

    Where several branches of `optax.partition` are sparse, their masks are merged; a
    leaf that no branch masks holds `optax.MaskedNode`, which `apply_masks` passes over.

    Args:
      opt_state: state of an optimiser that holds one `sparsify`, or one per branch.

    Returns:
      Tree of bool like the parameters.

    Raises:
      ValueError: there is no `sparsify` in the state, or two mask the same leaf.

    >>> from d2sparse.rules import static
    >>> tx = optax.chain(optax.clip(1.0), sparsify(optax.sgd(0.1), static(0.5)))
    >>> get_masks(tx.init({"kernel": jnp.ones((2, 2))}))["kernel"].shape
    (2, 2)
    """
    found = [state.masks for state in sparse_states(opt_state)]
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
    >>> tx = sparsify(optax.sgd(0.1), static(0.5))
    >>> state = tx.init({"kernel": jnp.ones((2, 2))})
    >>> state = set_masks(state, {"kernel": jnp.eye(2, dtype=bool)})
    >>> get_masks(state)["kernel"].tolist()
    [[True, False], [False, True]]
    """
    get_masks(opt_state)  # Complains where there are none.

    def replaced(node: Any) -> Any:
        if not _is_ours(node):
            return node
        return node._replace(masks=copy_masks(masks, node.masks))

    return jax.tree.map(replaced, opt_state, is_leaf=_is_ours)


def sparse_states(opt_state: optax.OptState) -> list[SparsifyState]:
    """The states of every `sparsify` in an optimiser's state; none if it is dense.

    >>> sparse_states(optax.sgd(0.1).init({"kernel": jnp.ones((2, 2))}))
    []
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_ours)
    return [node for node in nodes if _is_ours(node)]


def _as_key(key: jax.Array | int) -> jax.Array:
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.key(key)


def _is_ours(node: Any) -> bool:
    return isinstance(node, SparsifyState)


def _change_or_removal(
    mask: jax.Array, change: jax.Array, param: jax.Array
) -> jax.Array:
    return jnp.where(mask, change, -param)


def _either(mask: Any, other: Any) -> Any:
    if not is_gap(mask) and not is_gap(other):
        raise ValueError(
            "expected at most one `sparsify` for every leaf, got two; take the masks "
            "of each network or optimiser from its own state"
        )
    return other if is_gap(mask) else mask
