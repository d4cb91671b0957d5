"""One step of training: its loss, its gradient, its examples."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2sparse import losses, metrics
from d2sparse.data import Augment, batch_indices
from d2sparse.models import Model
from d2sparse.schedules import When
from d2sparse.train.state import Data, Metrics, TrainState, inputs, take
from d2sparse.tree import PyTree

Loss = Callable[[PyTree, PyTree, Data, jax.Array], tuple[jax.Array, Any]]
Step = Callable[[TrainState, Data, jax.Array], tuple[TrainState, Metrics]]
MakeOptimizer = Callable[[Mapping[str, jax.Array]], optax.GradientTransformation]


def make_loss(
    model: Model, augment: Augment | None = None, smoothing: float = 0.0
) -> Loss:
    """Mean cross-entropy of a classifier on a batch.

    Args:
      model: maps images to logits.
      augment: `(key, images) -> images`, applied to standardised images.
      smoothing: label smoothing in [0, 1).

    Returns:
      `(params, model_state, batch, key) -> (loss, (model_state, metrics))`.
    """

    def loss(
        params: PyTree, model_state: PyTree, batch: Data, key: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        x = inputs(batch) if augment is None else augment(key, inputs(batch))
        logits, model_state = model.apply(params, model_state, x, train=True)
        value = jnp.mean(losses.cross_entropy(logits, batch.labels, smoothing))
        correct = metrics.accuracy(logits, batch.labels)
        return value, (model_state, {"loss": value, "train_accuracy": correct})

    return loss


def make_train_step(
    loss: Loss,
    tx: optax.GradientTransformation | MakeOptimizer,
    growth_samples: int = 0,
    when: When | None = None,
) -> Step:
    """One step of gradient descent, pure: `(state, data, indices) -> (state, metrics)`.

    To the metrics of the loss it adds "finite", bool[], for `guard`. Optimisers that
    ask for it are given `grad_fn(params, number)`, the gradient on the step's batch at
    other parameters, see `make_optimizer`.

    Args:
      loss: `(params, model_state, batch, key) -> (loss, (model_state, metrics))`.
      tx: any Optax optimiser, or a function that makes it of the run's settings.
      growth_samples: where `tx` is sparse, the gradient its rule sees at a refresh is
        that of this many examples (at most all), drawn anew each time; 0 means the
        gradient of the step's own batch.
      when: step -> bool, when a sparse `tx` refreshes its masks. Runs that are vmapped
        need it: what each of them finds in its own state is no branch any more.
    """
    gradient = jax.grad(loss, has_aux=True)

    def step(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        loss_key, order_key, growth_key = step_keys(state)

        def growth_fn() -> PyTree:
            batch = growth_batch(data, growth_samples, order_key)
            return gradient(state.params, state.model_state, batch, growth_key)[0]

        batch = take(data, indices)

        def grad_fn(params: PyTree, number: int) -> PyTree:
            del number
            return gradient(params, state.model_state, batch, loss_key)[0]

        extra: dict[str, Any] = {"grad_fn": grad_fn}
        if growth_samples:
            extra["growth_fn"] = growth_fn
        if when is not None:
            extra["refresh"] = when(state.step)
        own = tx(state.settings) if callable(tx) else tx
        grads, (model_state, logs) = gradient(
            state.params, state.model_state, batch, loss_key
        )
        updates, opt_state = optax.with_extra_args_support(own).update(
            grads, state.opt_state, state.params, **extra
        )
        after = state._replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            model_state=model_state,
            opt_state=opt_state,
        )
        return after, logs | {"finite": is_finite(grads)}

    return step


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
