"""Proximal steps after the update of any optimiser: exact zeros without masks."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from d2sparse import regularizers
from d2sparse.checks import check_function, check_whole
from d2sparse.regularizers import Groups
from d2sparse.schedules import Step
from d2sparse.transforms.decays import Strength, as_schedule
from d2sparse.transforms.inputs import is_abstract, refuse_missing, refuse_none
from d2sparse.tree import PyTree

Prox = Callable[[PyTree, float | jax.Array], PyTree]


class ProximalState(NamedTuple):
    """State of `proximal` and `group_budget`.

    Attributes:
      step: int32[], the number of updates so far.
      inner: state of the inner optimiser.
    """

    step: jax.Array
    inner: optax.OptState


def proximal(
    inner: optax.GradientTransformation, prox: Prox, strength: Strength
) -> optax.GradientTransformationExtraArgs:
    """Takes a proximal step of a penalty after every update of the inner optimiser.

    `w <- prox(w + u, strength)` with the update `u`: weights, groups or singular values
    become exactly 0, where a penalty in the loss would leave them small. Weights that
    the operator leaves alone have the update of `inner` bit for bit.

    The strength is *not* multiplied by the learning rate. Proximal gradient descent on
    `loss + c * penalty` at rate `r` is `proximal(sgd(r), prox, r * c)`; with a schedule
    of the rate, `lambda step: c * rate(step)`. With momentum or adaptive rates it is
    the same step after another update, in plain Euclidean distance.

    Args:
      inner: any Optax optimiser. Zeros may come alive again; to prune for good, put
        this inside of `sparsify`.
      prox: (params, strength) -> params, such as `regularizers.soft_threshold` or
        `functools.partial(regularizers.group_soft_threshold, groups=...)`.
      strength: at least 0; a number, traced or not, or a schedule of the step.

    Returns:
      An Optax optimiser. It needs the parameters in `update`, passes further arguments
      on, and in an `optax.chain` it comes last.

    Raises:
      ValueError: the strength is known and below 0, or `prox` is no such function.

    >>> tx = proximal(optax.sgd(1.0), regularizers.soft_threshold, strength=0.5)
    >>> params = {"kernel": jnp.array([[1.0, 1.0]])}
    >>> grads = {"kernel": jnp.array([[0.75, -1.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()
    [[0.0, 1.5]]
    """
    example = "regularizers.soft_threshold"
    check_function("prox", prox, "params, strength", example)
    at = as_schedule("strength", strength, most=math.inf)
    return _followed(inner, lambda params, step: prox(params, at(step)), "proximal")


def group_budget(
    inner: optax.GradientTransformation,
    groups_kept: int | jax.Array | Callable[[Step], int | jax.Array],
    strength: Strength,
    groups: Groups | Callable[[PyTree], Groups] = regularizers.neurons,
) -> optax.GradientTransformationExtraArgs:
    """Group lasso up to a budget of groups that all layers share.

    After the update `u`, with `v_g = w_g + u_g` and `r_g = |v_g| / sqrt(size_g)`, the
    root mean square of a group,

        w_g <- v_g max(0, 1 - t / r_g),    t = min(strength, r_out),

    with `r_out` the largest `r` outside of the `groups_kept` largest of all layers
    together: the least threshold at which no more than these stay. The largest group of
    every layer is among those that stay, and is not thresholded: no layer is emptied.

    As long as too many groups are alive this is the group lasso at the strength that is
    given, whose pressure decides between groups. Once the rest are 0 the threshold
    falls to what they would come back by, mostly to 0, and those that are left train
    without shrinking. So the strength sets how soon the budget is met, and the budget
    how far it goes. At a strength below `r_out` it is not met yet; a strength that
    grows meets it in the end. `float("inf")` meets it at once, by how the layers are
    initialised: layers of smaller weights lose almost all of their groups.

    Args:
      inner: any Optax optimiser, which sees all gradients.
      groups_kept: at least one per layer; a whole number, traced or not, or a schedule
        of the step.
      strength: at least 0; a number, traced or not, or a schedule of the step. As in
        `proximal`, the learning rate is no part of it.
      groups: sets of groups, a layer each, see `regularizers`; or params -> groups,
        such as `functools.partial(regularizers.neurons, bias=True, prunable=...)`. The
        default is the neurons of all kernels, those of the output layer too, whose
        neurons are the classes: leave it out. Without its bias a neuron of no weights
        is a constant, and may come back.

    Returns:
      An Optax optimiser. It needs the parameters in `update`, passes further arguments
      on, and in an `optax.chain` it comes last.

    Raises:
      ValueError: the strength is known and below 0; in `update`, where the budget would
        empty a layer, or the groups do not fit the parameters.

    >>> tx = group_budget(optax.sgd(0.0), groups_kept=3, strength=10.0)
    >>> params = {"a": jnp.array([[1.0, 2.0, 4.0]]), "b": jnp.array([[0.5, 0.25]])}
    >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> params["a"].tolist(), params["b"].tolist()  # The threshold is 1.
    ([[0.0, 1.0, 4.0]], [[0.5, 0.0]])
    """
    at = as_schedule("strength", strength, most=math.inf)

    def prox(params: PyTree, step: jax.Array) -> PyTree:
        found = groups(params) if callable(groups) else groups
        sizes = regularizers.group_sizes(params, found)
        norms = regularizers.group_norms(params, found)
        kept = groups_kept(step) if callable(groups_kept) else groups_kept
        _check_budget(kept, {name: norm.size for name, norm in norms.items()})
        means = {name: norms[name] / math.sqrt(sizes[name]) for name in found}
        largest = {n: jnp.arange(r.size) == jnp.argmax(r) for n, r in means.items()}
        threshold = jnp.minimum(at(step), _outside(means, largest, kept))
        factors = {
            name: jnp.where(largest[name], 1, regularizers.soft_factors(r, threshold))
            for name, r in means.items()
        }
        return regularizers.scale_groups(params, found, factors)

    return _followed(inner, prox, "group_budget")


def _outside(
    means: Mapping[str, jax.Array],
    largest: Mapping[str, jax.Array],
    kept: int | jax.Array,
) -> jax.Array:
    """The largest mean outside of the budget, of which every set has its largest."""
    # These count as 0, so there are always enough zeros at the end.
    others = [jnp.where(largest[name], 0, r) for name, r in means.items()]
    ordered = jnp.sort(jnp.concatenate(others), descending=True)
    first = jnp.clip(jnp.asarray(kept, jnp.int32) - len(means), 0, ordered.size - 1)
    return ordered[first]


def _check_budget(kept: int | jax.Array, counts: Mapping[str, int]) -> None:
    check_whole("groups_kept", kept, least=1)
    if not isinstance(kept, jax.core.Tracer) and kept < len(counts):
        raise ValueError(
            f"expected a budget of at least {len(counts)} groups, one for every layer "
            f"of {sorted(counts)}, got groups_kept={kept}; raise it or leave layers "
            "out of `groups`"
        )


def _followed(
    inner: optax.GradientTransformation,
    prox: Callable[[PyTree, jax.Array], PyTree],
    name: str,
) -> optax.GradientTransformationExtraArgs:
    """The inner optimiser, and after its update an operator of (params, step)."""
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> ProximalState:
        if is_abstract(params):
            return jax.eval_shape(init, params)
        return ProximalState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ProximalState]:
        params = refuse_none(params, name)
        refuse_missing(updates, params)
        changes, moments = inner.update(updates, state.inner, params, **extra_args)
        before = optax.apply_updates(params, changes)
        after = prox(before, state.step)
        emitted = jax.tree.map(_emitted, changes, params, before, after)
        return emitted, ProximalState(optax.safe_increment(state.step), moments)

    return optax.GradientTransformationExtraArgs(init, update)


def _emitted(
    change: jax.Array, param: jax.Array, before: jax.Array, after: jax.Array
) -> jax.Array:
    """The update that ends after the operator, and the inner one where it did nothing.

    In the type of the parameters if it is the wider one, or zeros would not be exact.
    """
    return jnp.where(after == before, change, after - param)
