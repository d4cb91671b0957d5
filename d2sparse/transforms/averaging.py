"""The average of the weights over the end of a training, for any Optax optimiser."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from d2sparse.transforms.inputs import (
    is_abstract,
    is_placeholder,
    refuse_none,
    widened,
)
from d2sparse.transforms.states import zero_pruned
from d2sparse.tree import PyTree


class AverageState(NamedTuple):
    """State of `average_weights`.

    Attributes:
      step: int32[], the number of updates so far.
      average: the average, a tree like the parameters, in float32 at least.
      types: for every leaf a number of its type, in which `get_average` returns it.
      inner: state of the inner optimiser.
    """

    step: jax.Array
    average: PyTree
    types: tuple[jax.Array, ...]
    inner: optax.OptState


def average_weights(
    inner: optax.GradientTransformation,
    begin: int = 0,
    horizon: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps an average of the weights beside a training that it leaves as it is.

    With `n` the number of updates from `begin` on, the present one included,
    `average <- a average + (1 - a) params` where `a = 1 - 1 / n`: the plain mean of the
    tail (Izmailov et al., arXiv 1803.05407); or with a horizon
    `a = min(1 - 1 / horizon, 1 - 1 / n)`, an exponential average that is not biased by
    where it begins. Before `begin` the average is the parameters themselves. It is kept
    in float32, of float64 weights in float64: in half precision an average of many
    weights would not move. `get_average` returns it in the type of the weights.

    Around `sparsify` the average is 0 wherever the weight is pruned, at every step. A
    weight that grows enters with average 0, so let the masks rest before `begin`.
    Statistics of normalisations belong to other weights than the average: take them
    anew, see `d2sparse.train.Program`. An average needs a learning rate that does not
    fall to 0 before it has begun.

    Args:
      inner: any Optax optimiser, such as one made by `sparsify`; what comes after it in
        a chain is not averaged, so put this last.
      begin: how many updates come before the average.
      horizon: how many updates it reaches back, at least 1; None for all of them.

    Returns:
      An Optax optimiser with the updates of `inner`. It needs the parameters in
      `update` and passes further arguments on.

    Raises:
      ValueError: `begin` or `horizon` is out of its range.

    >>> tx = average_weights(optax.sgd(1.0))
    >>> params = {"w": jnp.zeros(())}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update({"w": jnp.array(-1.0)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(params["w"], get_average(state)["w"])  # Of 1, 2 and 3.
    3.0 2.0
    """
    if begin < 0 or (horizon is not None and not horizon >= 1):
        raise ValueError(
            "expected begin of at least 0 and a horizon of at least 1 step, got "
            f"begin={begin}, horizon={horizon}"
        )
    inner = optax.with_extra_args_support(inner)
    longest = 1.0 if horizon is None else 1 - 1 / horizon

    def init(params: optax.Params) -> AverageState:
        if is_abstract(params):
            return jax.eval_shape(init, params)
        inner_state = inner.init(params)
        # A copy: the state may be donated, and the parameters with it.
        average = jax.tree.map(lambda x: jnp.copy(widened(x)), params)
        if not is_placeholder(params):
            average = zero_pruned(average, inner_state)
        types: Any = tuple(jnp.zeros((), x.dtype) for x in jax.tree.leaves(params))
        if is_placeholder(params):
            types = 0  # One leaf stands for as many as there may be.
        zero = jnp.zeros((), jnp.int32)
        return AverageState(zero, average, types, inner_state)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AverageState]:
        params = refuse_none(params, "average_weights")
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        after = optax.apply_updates(params, updates)
        number = jnp.maximum(state.step - begin, 0) + 1
        decay = jnp.minimum(longest, 1 - 1 / number)
        average = jax.tree.map(
            lambda a, w: (decay * a + (1 - decay) * w).astype(a.dtype),
            state.average,
            jax.tree.map(widened, after),
        )
        average = zero_pruned(average, inner_state)
        step = state.step + 1
        return updates, AverageState(step, average, state.types, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def get_average(opt_state: optax.OptState, default: PyTree | None = None) -> PyTree:
    """The average in an optimiser's state, however deep it is nested.

    Args:
      opt_state: the optimiser's state.
      default: what is returned where no average is kept, such as the parameters.

    Returns:
      A tree like the parameters, in their types; it is kept in float32 at least.

    Raises:
      ValueError: there is none and no default, or more than one.

    >>> tx = optax.chain(optax.clip(1.0), average_weights(optax.sgd(0.1)))
    >>> print(get_average(tx.init({"w": jnp.ones(())}))["w"])
    1.0
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_average)
    found = [node for node in nodes if _is_average(node)]
    if not found and default is not None:
        return default
    if len(found) != 1:
        raise ValueError(
            "expected the state of one optimiser made by `average_weights`, got "
            f"{len(found)} of them; take that of each network from its own state"
        )
    leaves, structure = jax.tree.flatten(found[0].average)
    pairs = zip(leaves, found[0].types, strict=True)
    return jax.tree.unflatten(structure, [x.astype(kind.dtype) for x, kind in pairs])


def _is_average(node: Any) -> bool:
    return isinstance(node, AverageState)
