"""What steps of training need: their examples, their keys, whether all is finite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse.data import batch_indices
from d2sparse.train.state import Data, Metrics, TrainState, take
from d2sparse.tree import PyTree

Step = Callable[[TrainState, Data, jax.Array], tuple[TrainState, Metrics]]


def is_finite(values: PyTree) -> jax.Array:
    """Whether all numbers are: bool[]. A maximum: `all` writes its bools out first.

    >>> bool(is_finite({"w": jnp.ones(2), "b": jnp.array([0.0, jnp.inf])}))
    False
    """
    finite = jnp.ones((), bool)
    for leaf in jax.tree.leaves(values):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size:
            finite &= jnp.isfinite(jnp.max(jnp.abs(leaf)))
    return finite


def step_keys(state: TrainState) -> jax.Array:
    """Keys of the step to come: for its loss, the growth batch, and the loss on that.

    Returns:
      key[3].
    """
    _, key = jax.random.split(state.key)
    return jax.random.split(jax.random.fold_in(key, state.step), 3)


def growth_batch(data: Data, samples: int, key: jax.Array) -> Data:
    """Up to `samples` examples in random order, for a growth gradient."""
    order = jax.random.permutation(key, len(data.labels))
    return take(data, order[:samples])


def step_indices(state: TrainState, data: Data, steps: int, batch_size: int) -> Any:
    """Which examples the next steps are trained on: int32[steps, batch]."""
    key, _ = jax.random.split(state.key)
    return batch_indices(key, state.step, steps, data.labels.shape[-1], batch_size)
