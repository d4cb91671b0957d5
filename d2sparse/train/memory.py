"""What a training needs of a device's memory, before anything is compiled."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse.jaxprs import bodies
from d2sparse.train.loops import Runner
from d2sparse.train.state import Data, TrainState


def estimate_memory(run: Runner, state: TrainState, data: Data, batch_size: int) -> int:
    """Bytes that a step of one run needs, roughly: its state, its data and its values.

    The values are counted operation by operation, each from where it is computed to
    where it is used last. XLA fuses operations and needs less; on the other hand it may
    keep copies of what a branch or a loop returns.

    Args:
      run: a runner from `make_runner`, on an accelerator.
      state: of one run.
      data: its training data.
      batch_size: examples per step.
    """
    width = min(batch_size, data.labels.shape[-1])
    indices = jax.ShapeDtypeStruct((1, width), jnp.int32)
    traced = jax.make_jaxpr(lambda *given: run(*given))(state, data, indices)
    return _bytes(traced.jaxpr.invars) + _peak(traced.jaxpr)


def _peak(jaxpr: Any) -> int:
    """The most bytes of computed values that are alive at once."""
    last = {v: n for n, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    computed, alive, peak = set(), 0, 0
    for number, eqn in enumerate(jaxpr.eqns):
        inside = max((_peak(inner) for inner in bodies(eqn)), default=0)
        peak = max(peak, alive + inside, alive + _bytes(eqn.outvars))
        made = [v for v in _variables(eqn.outvars) if last.get(v, -1) > number]
        computed.update(made)
        alive += _bytes(made)
        ended = {v for v in _variables(eqn.invars) if last[v] == number} & computed
        alive -= _bytes(ended)
        peak = max(peak, alive)
    return peak


def _variables(items: Any) -> list[Any]:
    """Without literals and without results that nobody uses."""
    return [v for v in items if not hasattr(v, "val") and hasattr(v, "aval")]


def _bytes(variables: Any) -> int:
    return sum(_size(v.aval) for v in variables)


def _size(aval: Any) -> int:
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 4)
