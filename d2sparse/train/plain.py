"""The training that constraints begin with: a classifier, cross-entropy, one phase."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from d2sparse import losses, macs, metrics, tree
from d2sparse.data import Augment
from d2sparse.models import Model
from d2sparse.train.cost import live_masks, same_masks, step_macs
from d2sparse.train.optimizers import make_optimizer
from d2sparse.train.state import Data, Metrics, TrainState, init_state, inputs, take
from d2sparse.train.training import Context, Key, Network, Phase, Settings, Training
from d2sparse.tree import Prunable, PyTree, is_kernel

SCHEDULES: dict[str, Callable[[Any, int], optax.Schedule]] = {
    "cosine": optax.cosine_decay_schedule,
    "step": lambda first, horizon: optax.piecewise_constant_schedule(
        first, {round(0.4 * horizon): 0.1, round(0.8 * horizon): 0.1}
    ),
    "constant": lambda first, horizon: optax.constant_schedule(first),
}


class Recipe(NamedTuple):
    """How a plain classifier is trained.

    Attributes:
      steps: optimiser steps.
      batch_size: examples per step.
      optimizer: "sgd", "sgdw" or "adamw", see `make_optimizer`.
      learning_rate: at the first step.
      schedule: "cosine", falling to 0 at the last step; "step", to a tenth after 40 %
        and a hundredth after 80 % of them; or "constant".
      momentum: decay of the first moment.
      weight_decay: on live kernels.
      sharpness: radius of sharpness-aware minimisation; 0 for the plain gradient.
      label_smoothing: in [0, 1].
      augment: `(key, images) -> images`, on standardised images; None for none.
      prunable: which leaves constraints may prune.
    """

    steps: int = 1000
    batch_size: int = 32
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    sharpness: float = 0.0
    label_smoothing: float = 0.0
    augment: Augment | None = None
    prunable: Prunable = is_kernel


def plain(model: Model, like: Data, recipe: Recipe | None = None) -> Training:
    """The unconstrained training of a classifier: cross-entropy, one phase.

    Args:
      model: the network.
      like: data whose shapes the network is made for.
      recipe: how it is trained; `Recipe()` if not given.

    Raises:
      ValueError: a number or a name is out of its range.

    >>> import numpy as np
    >>> from d2sparse import data, models, train
    >>> images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4, dtype="int32")
    >>> split = data.Split(images, labels)
    >>> model = models.lenet_300_100(num_classes=4)
    >>> training = plain(model, train.to_device(split), Recipe(steps=10))
    >>> training.network.weights, training.phases[0].stop
    (49600, 10)
    """
    own = recipe or Recipe()
    _check_recipe(own)

    def shown(batch: Data, key: jax.Array | None) -> jax.Array:
        x = inputs(batch)
        return x if key is None or own.augment is None else own.augment(key, x)

    def loss(
        logits: jax.Array, batch: Data, context: Context
    ) -> tuple[jax.Array, Metrics]:
        del context
        each = losses.cross_entropy(logits, batch.labels, own.label_smoothing)
        value, correct = jnp.mean(each), metrics.accuracy(logits, batch.labels)
        return value, {"loss": value, "train_accuracy": correct}

    def transform(
        rate: optax.Schedule, settings: Settings, key: Key
    ) -> optax.GradientTransformation:
        del key
        decay = settings["weight_decay"]
        return make_optimizer(own.optimizer, rate, decay, own.momentum, own.sharpness)

    def cost(training: Training, state: TrainState, size: int) -> Any:
        uphill = step_macs(training, state) if own.sharpness else 0.0
        return step_macs(training, state, size) + uphill

    return Training(
        model=model,
        network=describe(model, like, own.prunable),
        inputs=shown,
        loss=loss,
        rate=SCHEDULES[own.schedule],
        transform=transform,
        settings={
            "learning_rate": own.learning_rate,
            "weight_decay": own.weight_decay,
        },
        when=None,
        growth_samples=0,
        batch_size=own.batch_size,
        horizon=own.steps,
        phases=(Phase(own.steps),),
        init=init_training,
        begin=lambda progress, data: progress,
        finish=lambda progress, data, program: progress.state,
        probabilities=lambda logits: {"network": jax.nn.softmax(logits)},
        masks=lambda state: same_masks(live_masks(state.params, state.opt_state)),
        cost=cost,
        measure=lambda state: {},
        claims={},
    )


def init_training(
    training: Training, key: jax.Array, data: Data, settings: Settings
) -> TrainState:
    """The state at step 0, pruned weights at 0."""
    mask_key, key = jax.random.split(key)
    rate = training.rate(settings["learning_rate"], training.horizon)
    tx = training.transform(rate, settings, mask_key)
    return init_state(training.model, tx, data, key, settings)


def describe(model: Model, like: Data, prunable: Prunable = is_kernel) -> Network:
    """Shapes and costs of a network for data of a form, which may be abstract."""
    x = jax.eval_shape(lambda data: inputs(take(data, jnp.arange(1))), like)
    params, costs, outputs = _shapes_and_macs(model, x.shape, x.dtype)
    return Network(params, costs, prunable, outputs)


@functools.lru_cache(maxsize=16)
def _shapes_and_macs(
    model: Model, shape: tuple[int, ...], dtype: Any
) -> tuple[PyTree, dict[str, int], int]:
    x = jax.ShapeDtypeStruct(shape, dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        return model.apply(*variables, x, train=False)[0]

    costs = macs.forward_macs(apply, variables, x)
    params, logits = variables[0], jax.eval_shape(apply, variables, x)
    found = {path: costs[f"0/{path}"] for path in tree.flatten(params)}
    return params, found, math.prod(getattr(logits, "shape", (1, 0))[1:])


def _check_recipe(recipe: Recipe) -> None:
    if recipe.steps < 1 or recipe.batch_size < 1:
        raise ValueError(
            "expected at least 1 step and 1 example per step, got "
            f"steps={recipe.steps}, batch_size={recipe.batch_size}"
        )
    if recipe.schedule not in SCHEDULES:
        raise ValueError(
            f"expected schedule of {', '.join(SCHEDULES)}, got {recipe.schedule!r}"
        )
    if not 0 <= recipe.label_smoothing <= 1:
        raise ValueError(
            f"expected label_smoothing in [0, 1], got {recipe.label_smoothing}"
        )
    make_optimizer(recipe.optimizer, recipe.learning_rate)
