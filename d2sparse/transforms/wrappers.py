"""Optax optimisers under masks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2sparse import rules, tree
from d2sparse.masks import apply_masks
from d2sparse.rules import MaskRule
from d2sparse.schedules import When, every
from d2sparse.transforms.inputs import (
    as_key,
    is_abstract,
    is_placeholder,
    key_implementation,
    refuse_missing,
    refuse_none,
    refuse_pairs,
    widened,
)
from d2sparse.transforms.moments import refuse_unfit, renewed
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
    differently may round differently). A weight that grows starts from 0 with the
    moments that `inner.init` gives it, zero for most; copies of weights in the state,
    such as those of `schedule_free`, are 0 where the parameters are.
    `chain(clip_by_global_norm(1), sparsify(inner, ...))` clips by the norm of
    the dense gradient, with the clipping inside of `inner` by that of the live part.

    `update` takes two arguments of its own beside those it passes on to `inner`:

    * `refresh`: bool[], in place of `when(step)`. Under `jax.vmap` over runs pass it
      unbatched, or every run pays for a refresh at every step.
    * `growth_fn`: a function without arguments that returns gradients for the rule to
      use at a refresh, such as those of a larger batch. It is called only then, and
      never where the rule observes something else than the gradient.

    Args:
      inner: any Optax optimiser without masks of its own, except `sm3`, `lbfgs`,
        `flatten` and `lookahead`, which `init` refuses. Its `init` is called at every
        update.
      rule: how masks begin and change, such as `rigl(sparsity=0.9)`.
      when: step -> bool, when the masks are refreshed; `every(100)` if not given.
      key: seed or random key of the rule, of any algorithm; may be traced. The state
        holds its data as plain numbers.

    Returns:
      An Optax optimiser. It needs the parameters in `update`, and in an `optax.chain`
      it comes last: what scales or averages its updates revives pruned weights.

    Raises:
      ValueError: in `update` outside of compiled functions, where a refresh meets a
        NaN, or pruned weights are not 0 at the second update or a later refresh.
        Inside of them `check_refreshes` raises it from the state.

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
    of set to 0. Copies of weights in the state of `inner` hold the frozen values. What
    comes after it in a chain may move frozen weights, and nothing reports it. It
    serves RISE, which freezes the weights that a lottery ticket would
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
    name = "freeze" if freezes else "sparsify"

    def _beginning(params: PyTree, masks: PyTree) -> PyTree:
        return params if freezes else apply_masks(params, masks)

    def init(params: optax.Params) -> Any:
        if is_abstract(params):
            return jax.eval_shape(init, params)
        refuse_pairs(params)
        # A copy: the state may be donated, and the caller's key with it.
        root = jnp.copy(jax.random.key_data(as_key(key)))
        # The reserved number keeps the first mask apart from every refresh.
        first = jax.random.fold_in(as_key(key), 0xFFFFFFFF)
        # A placeholder stands for itself, in the masks as in the moments.
        masks = params if is_placeholder(params) else rules.begin(rule, params, first)
        # Where the parameters are, if they are sharded.
        masks = jax.tree.map(_placed_as, masks, params)
        begin = _beginning(params, masks)
        nobody = _no_nan(params)
        moments = inner.init(begin)
        refuse_unfit(inner, moments, masks)
        return state_type(
            step=jnp.zeros((), jnp.int32),
            key=root,
            masks=masks,
            inner=moments,
            observed=observe.init(jax.tree.map(widened, begin)),
            nan=nobody,
            revived=jnp.copy(nobody),
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
        params = refuse_none(params, name)
        refuse_missing(updates, params)
        seen, observed = updates, state.observed
        if rule.observe is not None:
            wide = jax.tree.map(widened, updates)
            seen, observed = observe.update(wide, observed, params)

        # Only masks pass through the branches: a cond around the optimiser would copy
        # its whole state.
        def refreshed() -> tuple[PyTree, jax.Array]:
            if growth_fn is None or rule.observe is not None:
                grads = seen
            else:
                grads = growth_fn()
            now = jax.random.wrap_key_data(state.key, impl=key_implementation(key))
            now = jax.random.fold_in(now, state.step)
            refuse_missing(grads, params)
            masks, nan = rules.refresh(
                rule, state.masks, params, grads, state.step, now
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
        # The first update may be the one that sets pruned weights to 0.
        known = (state.step == 1) | (due & (state.step > 1))
        revived = state.revived
        if not freezes:
            revived = _branch(
                known,
                lambda: state.revived | _are_revived(state.masks, params),
                lambda: state.revived,
                lambda found: found | _no_nan(params),
            )
        fresh = inner.init(_beginning(params, masks))
        changes, moments = inner.update(
            apply_masks(updates, masks),
            renewed(inner, state.inner, masks, fresh),
            params,
            **extra_args,
        )
        # Copies of weights in the state follow the parameters, whatever the inner
        # optimiser would have made of them.
        moments = renewed(inner, moments, masks, fresh)
        emit = _change_or_nothing if freezes else _change_or_removal
        emitted = jax.tree.map(emit, masks, changes, params)
        step = optax.safe_increment(state.step)
        state = state_type(step, state.key, masks, moments, observed, nan, revived)
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


def _are_revived(masks: PyTree, params: PyTree) -> jax.Array:
    """bool[leaves], which of them have pruned weights that are not 0."""
    pairs = zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True)
    found = [jnp.any((mask == 0) & (param != 0)) for mask, param in pairs]
    return jnp.stack(found) if found else jnp.zeros(0, bool)


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
