"""Optax optimisers under masks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2sparse import rules, tree
from d2sparse.masks import apply_masks, is_gap
from d2sparse.rules import MaskRule
from d2sparse.schedules import When, every
from d2sparse.transforms.states import FreezeState, SparsifyState, check_refreshes
from d2sparse.tree import PyTree


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
    moments. `chain(clip_by_global_norm(1), sparsify(inner, ...))` clips by the norm of
    the dense gradient, with the clipping inside of `inner` by that of the live part.

    `update` takes two arguments of its own beside those it passes on to `inner`:

    * `refresh`: bool[], in place of `when(step)`. Under `jax.vmap` over runs pass it
      unbatched, or every run pays for a refresh at every step.
    * `growth_fn`: a function without arguments that returns gradients for the rule to
      use at a refresh, such as those of a larger batch. It is called only then, and
      never where the rule observes something else than the gradient.

    Args:
      inner: any Optax optimiser.
      rule: how masks begin and change, such as `rigl(sparsity=0.9)`.
      when: step -> bool, when the masks are refreshed; `every(100)` if not given.
      key: random key or seed of the rule; may be traced.

    Returns:
      An Optax optimiser. It needs the parameters in `update`, and in an `optax.chain`
      it comes last.

    Raises:
      ValueError: in `update` outside of compiled functions, where a refresh meets a
        NaN. Inside of them `check_refreshes` raises it from the state.

    >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    >>> from d2sparse.rules import static
    >>> from d2sparse.transforms import get_masks
    >>> tx = sparsify(optax.sgd(0.1), static(sparsity=0.75))
    >>> state = tx.init(params)
    >>> params = apply_masks(params, get_masks(state))
    >>> updates, state = tx.update(params, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> int((params["kernel"] != 0).sum())
    4
    """
    return _under_masks(inner, rule, when, key, SparsifyState)


def freeze(
    inner: optax.GradientTransformation,
    rule: MaskRule,
    when: When | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains the live weights alone; the others are frozen at the value they have.

    `sparsify` with one difference: where the mask is False nothing is changed, instead
    of set to 0. It serves RISE, which freezes the weights that a lottery ticket would
    lose (Tartaglione, ICIP 2022), and the backward set of Top-KAST (see `largest`).

    Arguments, `update` and errors are those of `sparsify`.

    >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
    >>> from d2sparse.rules import fixed
    >>> tx = freeze(optax.sgd(0.5), fixed({"kernel": jnp.array([[True, False]])}))
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()
    [[0.5, 2.0]]
    """
    return _under_masks(inner, rule, when, key, FreezeState)


def _under_masks(
    inner: optax.GradientTransformation,
    rule: MaskRule,
    when: When | None,
    key: jax.Array | int,
    state_type: type[Any],
) -> optax.GradientTransformationExtraArgs:
    """`sparsify` or `freeze`, by the type of the state."""
    _refuse_numbers(rule, when)
    inner = optax.with_extra_args_support(inner)
    observe = rule.observe or optax.identity()
    when = every(100) if when is None else when
    freezes = state_type is FreezeState

    def init(params: optax.Params) -> Any:
        # A copy: the state may be donated, and the caller's key with it.
        root = jnp.copy(_as_key(key))
        # The reserved number keeps the first mask apart from every refresh.
        masks = rules.begin(rule, params, jax.random.fold_in(root, 0xFFFFFFFF))
        # Where the parameters are, if they are sharded.
        masks = jax.tree.map(_placed_as, masks, params)
        begin = params if freezes else apply_masks(params, masks)
        return state_type(
            step=jnp.zeros((), jnp.int32),
            key=root,
            masks=masks,
            inner=inner.init(begin),
            observed=observe.init(begin),
            nan=_no_nan(params),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        refresh: jax.Array | bool | None = None,
        growth_fn: Callable[[], PyTree] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            name = "freeze" if freezes else "sparsify"
            raise ValueError(
                f"{name} needs the parameters: call `tx.update(grads, state, params)`"
            )
        seen, observed = observe.update(updates, state.observed, params)

        # Only masks pass through the branches: a cond around the optimiser would copy
        # its whole state.
        def refreshed() -> tuple[PyTree, jax.Array]:
            if growth_fn is None or rule.observe is not None:
                grads = seen
            else:
                grads = growth_fn()
            key = jax.random.fold_in(state.key, state.step)
            masks, nan = rules.refresh(
                rule, state.masks, params, grads, state.step, key
            )
            paths = list(tree.flatten(params))
            # Growth gradients may be those of more leaves than this wrapper sees.
            own = tree.pick(grads, paths)
            found = _has_nan(params) | _has_nan(list(own.values()))
            return masks, state.nan | found | _in_order(nan, paths)

        def placed(found: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
            masks, nan = found
            return jax.tree.map(_placed_as, masks, params), nan | _no_nan(params)

        due = when(state.step) if refresh is None else refresh
        masks, nan = _branch(due, refreshed, lambda: (state.masks, state.nan), placed)
        moments = mask_moments(inner, state.inner, masks)
        changes, moments = inner.update(
            apply_masks(updates, masks), moments, params, **extra_args
        )
        emit = _change_or_nothing if freezes else _change_or_removal
        emitted = jax.tree.map(emit, masks, changes, params)
        step = optax.safe_increment(state.step)
        state = state_type(step, state.key, masks, moments, observed, nan)
        if not isinstance(nan, jax.core.Tracer):
            check_refreshes(state)
        return emitted, state

    return optax.GradientTransformationExtraArgs(init, update)


def _refuse_numbers(rule: Any, when: Any) -> None:
    """Raises ValueError for a number in the place of a rule or of a schedule."""
    if not isinstance(rule, MaskRule):
        raise ValueError(
            f"expected a rule, such as `rigl(sparsity=0.9)`, got {rule!r}; they are in "
            "`d2sparse.rules`"
        )
    if when is not None and not callable(when):
        raise ValueError(
            f"expected when to refresh, as a function of the step, got {when!r}; pass "
            f"`every({when!r})`"
        )


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


def _branch(
    due: jax.Array | bool,
    refreshed: Callable[[], Any],
    kept: Callable[[], Any],
    placed: Callable[[Any], Any],
) -> Any:
    if isinstance(due, jax.core.Tracer):
        # Both are of one type, also on a mesh or inside of `jax.shard_map`.
        return jax.lax.cond(due, lambda: placed(refreshed()), lambda: placed(kept()))
    # In an eager loop a `cond` of new closures would be compiled at every step.
    return refreshed() if bool(due) else kept()


def _placed_as(mask: jax.Array, param: Any) -> jax.Array:
    """The mask where the parameter is: sharded as it is, varying over the same axes."""
    return mask & jnp.ones_like(param, bool)


def _no_nan(params: PyTree) -> jax.Array:
    """bool[leaves], all False, where a reduction of the parameters would be."""
    leaves = jax.tree.leaves(params)
    known = [x if isinstance(x, jax.Array) else jnp.zeros(()) for x in leaves]
    return jnp.zeros_like(_has_nan(known))


def _as_key(key: jax.Array | int) -> jax.Array:
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.key(key)


def _has_nan(leaves: PyTree) -> jax.Array:
    """bool[leaves]. A maximum, since `any` writes its bools out first on a CPU."""
    found = [
        jnp.isnan(jnp.max(leaf)) if leaf.size else jnp.zeros((), bool)
        for leaf in jax.tree.leaves(leaves)
    ]
    return jnp.stack(found) if found else jnp.zeros(0, bool)


def _in_order(nan: Mapping[str, jax.Array], paths: Sequence[str]) -> jax.Array:
    """bool[leaves] of what is known of some of them."""
    found = [jnp.asarray(nan.get(path, False)) for path in paths]
    return jnp.stack(found) if found else jnp.zeros(0, bool)


def _change_or_removal(
    mask: jax.Array, change: jax.Array, param: jax.Array
) -> jax.Array:
    return jnp.where(mask, change, -param)


def _change_or_nothing(
    mask: jax.Array, change: jax.Array, param: jax.Array
) -> jax.Array:
    del param
    return jnp.where(mask, change, jnp.zeros_like(change))
