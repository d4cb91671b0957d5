"""One network, and how it becomes sparse."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import lottery, macs, train
from d2sparse.models import Model
from d2sparse.reparam import nonzero_masks
from d2sparse.rules import MaskRule
from d2sparse.schedules import When, at
from d2sparse.train import Data, Report, Step, TrainState
from d2sparse.transforms import get_masks, sparsify
from d2sparse.tree import PyTree
from experiments.task import Task


class Method(NamedTuple):
    """One way to learn from few labels, built once for all seeds.

    Attributes:
      init: `(key, data) -> state`.
      fit: `(state, data, report) -> (state, MACs)`: the whole training, and its cost in
        multiply-accumulates per example of a batch, summed over the steps.
      predict: `(state, data) -> probabilities by output`, the headline first.
      costs: `(state, data) -> (numbers stored, MACs of the headline at inference)`.
      live: `state -> masks` of the weights that the forward pass sees; None where a
        method has no single answer.
    """

    init: Callable[[jax.Array, Data], TrainState]
    fit: Callable[[TrainState, Data, Report], tuple[TrainState, float]]
    predict: Callable[[TrainState, Data], dict[str, np.ndarray]]
    costs: Callable[[TrainState, Data], tuple[int, float]]
    live: Callable[[TrainState], PyTree] | None = None


class Recipe(NamedTuple):
    """How one network becomes sparse.

    Attributes:
      rule: of its masks.
      when: step -> bool, when they are refreshed.
      interval: mean steps between two growth gradients; None where there are none.
      wrap: `sparsify`, or `freeze`, which leaves the other weights at their value.
      effective: `params -> params`, the weights that the forward pass sees; None where
        they are the trained ones.
      choose: `(state, data) -> masks` to begin with, of a dense state; None leaves them
        to the rule.
      trained: `state -> masks` of the weights whose gradient every step needs; None
        where they are those that the forward pass sees.
    """

    rule: MaskRule
    when: When = at([])
    interval: float | None = None
    wrap: Callable[..., optax.GradientTransformationExtraArgs] = sparsify
    effective: Callable[[PyTree], PyTree] | None = None
    choose: Callable[[TrainState, Data], PyTree] | None = None
    trained: Callable[[TrainState], PyTree] | None = None


class Network(NamedTuple):
    """One network that is trained by a recipe, compiled once.

    Attributes:
      init: `(key, data) -> state`.
      run: runner of its training steps, whose metrics hold what each of them costs:
        "macs", per example.
      predict: `(state, data) -> probabilities by output`.
      costs: `(state, data) -> (numbers stored, MACs at inference)`.
      live: `state -> masks` of the weights that the forward pass sees.
    """

    init: Callable[[jax.Array, Data], TrainState]
    run: Step
    predict: Callable[[TrainState, Data], dict[str, np.ndarray]]
    costs: Callable[[TrainState, Data], tuple[int, float]]
    live: Callable[[TrainState], PyTree]


def single(task: Task, recipe: Recipe) -> Method:
    """One network that is trained by a recipe."""
    network = make_network(task, recipe)

    def fit(state: TrainState, data: Data, report: Report) -> tuple[TrainState, float]:
        train_to, spent = metered(task, network, data, report)
        return train_to(state, task.steps), spent()

    return Method(network.init, fit, network.predict, network.costs, network.live)


def make_network(task: Task, recipe: Recipe) -> Network:
    """A network and its compiled training, for all seeds.

    A step costs what the masks that it begins with say, and growth gradients their mean
    over the run; scores that are taken before training are not counted.
    """
    rate = optax.cosine_decay_schedule(task.learning_rate, task.steps)
    model = _with_effective(task.model, recipe.effective)

    def make_tx(key: jax.Array | int) -> optax.GradientTransformationExtraArgs:
        return recipe.wrap(task.optimizer(rate), recipe.rule, recipe.when, key)

    loss = train.make_loss(model, task.augment, task.smoothing)
    # A growth gradient is for those that look at it.
    growth_samples = task.growth_samples if recipe.interval else 0
    step = train.make_train_step(loss, make_tx(0), growth_samples)
    forward = train.make_predict(model)

    def init(key: jax.Array, data: Data) -> TrainState:
        mask_key, key = jax.random.split(key)
        state = train.init_state(model, make_tx(mask_key), data, key)
        if task.ticket is not None:
            state = lottery.start_from(task.ticket, state)
        if recipe.choose is None:
            return state
        masks = recipe.choose(state, data)
        return lottery.start_from(
            lottery.Ticket(state.params, state.model_state, masks), state
        )

    def live(state: TrainState) -> PyTree:
        masks = get_masks(state.opt_state)
        if recipe.effective is None:
            return masks if recipe.wrap is sparsify else jax.tree.map(_all, masks)
        return nonzero_masks(recipe.effective(state.params), task.prunable)

    def cost(state: TrainState, data: Data) -> Any:
        return _step_macs(task, recipe, live(state), state, len(data.labels))

    def predict(state: TrainState, data: Data) -> dict[str, np.ndarray]:
        return {"network": forward(state.params, state.model_state, data)}

    def costs(state: TrainState, data: Data) -> tuple[int, float]:
        del data
        seen = jax.device_get(live(state))
        stored = sum(int(mask.sum()) for mask in jax.tree.leaves(seen))
        return stored, float(macs.masked_macs(task.macs, seen))

    run = train.make_runner(_with_cost(step, cost))
    return Network(init, run, predict, costs, live)


def metered(
    task: Task, network: Network, data: Data, report: Report
) -> tuple[lottery.Fit, Callable[[], float]]:
    """Training in one or more rounds that counts steps and costs over all of them.

    Returns:
      `(state, step) -> state`, which trains up to a step, and the multiply-accumulates
      spent so far, per example of a batch.
    """
    taken, spent = 0, 0.0

    def train_to(state: TrainState, stop: int) -> TrainState:
        last = int(state.step)

        def counted(step: int, state: TrainState, logs: dict[str, float]) -> None:
            nonlocal taken, spent, last
            taken += step - last
            spent += (step - last) * logs.pop("macs")
            last = step
            report(taken, state, logs)

        return task.fit(network.run, state, data, steps=stop, report=counted)

    return train_to, lambda: spent


def rewind_step(fraction: float, steps: int) -> int:
    """The step whose weights rounds of pruning go back to.

    Raises:
      ValueError: the fraction is outside of [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(
            f"expected a rewind_fraction in [0, 1), got {fraction}; 0 rewinds to the "
            "initial weights"
        )
    return int(fraction * steps)


def _step_macs(
    task: Task, recipe: Recipe, live: PyTree, state: TrainState, size: int
) -> Any:
    """What a step costs per example, on a data set of a size."""
    sparse = macs.masked_macs(task.macs, live)
    if recipe.trained is not None:
        return 2 * sparse + macs.masked_macs(task.macs, recipe.trained(state))
    growth = recipe.interval and min(task.growth_samples, size)
    return macs.training_macs(
        sparse,
        sum(task.macs.values()),
        interval=recipe.interval,
        growth_samples=growth or None,
        batch_size=min(task.batch_size, size),
    )


def _with_cost(step: Step, cost: Callable[[TrainState, Data], Any]) -> Step:
    """The step with its cost among its metrics, that of the state it begins with."""

    def counted(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        spent = cost(state, data)
        state, logs = step(state, data, indices)
        return state, logs | {"macs": spent}

    return counted


def _with_effective(
    model: Model, effective: Callable[[PyTree], PyTree] | None
) -> Model:
    if effective is None:
        return model

    def apply(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        return model.apply(effective(params), *args, **kwargs)

    return Model(model.init, apply)


def _all(mask: jax.Array) -> jax.Array:
    return jnp.ones(mask.shape, bool)
