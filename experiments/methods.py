"""What is compared: each method as one value with the same four functions.

A method is built once and serves every seed, so its step is compiled once.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import dual, lottery, macs, rules, train, tree
from d2sparse.data import Augment
from d2sparse.dual import Coupling, Dual
from d2sparse.masks import dense_masks
from d2sparse.models import Model
from d2sparse.rules import MaskRule
from d2sparse.schedules import When, at, refresh_stop
from d2sparse.train import Data, Report, Step, TrainState
from d2sparse.transforms import get_masks, sparsify
from d2sparse.tree import PyTree

MethodName = Literal[
    "dense", "static", "rigl", "imp", "uncoupled_pair", "dense_mutual", "d2_sparse"
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
_UNCOUPLED = Coupling(fast=0.0, slow=0.0, masks=0.0)


class Task(NamedTuple):
    """What every method is given: the network, the budget, the length of training.

    Attributes:
      model: the network.
      params: shapes of its parameters.
      macs: its dense forward cost by path.
      augment: `(key, images) -> images`.
      optimizer: learning rate -> inner optimiser.
      learning_rate: the largest one.
      smoothing: label smoothing.
      sparsity: fraction of zeros of a single network; a pair shares its budget.
      steps: steps of one training.
      batch_size: examples per step.
      growth_samples: examples of a growth gradient.
      interval: steps between two refreshes of a mask.
      every: steps between two reports.
    """

    model: Model
    params: PyTree
    macs: dict[str, int]
    augment: Augment
    optimizer: dual.MakeOptimizer
    learning_rate: float
    smoothing: float
    sparsity: float
    steps: int
    batch_size: int
    growth_samples: int
    interval: int
    every: int

    def mean_interval(self, interval: int) -> float | None:
        """Steps per refresh over the whole run, None if there is no refresh."""
        refreshes = (refresh_stop(self.steps) - 1) // interval
        return self.steps / refreshes if refreshes else None

    def fit(self, run: Step, state: TrainState, data: Data, **kwargs: Any) -> Any:
        """`train.fit` for the steps and the batch size of the task."""
        given = {"steps": self.steps, "every": self.every, **kwargs}
        return train.fit(run, state, data, batch_size=self.batch_size, **given)


class Choices(NamedTuple):
    """What only some methods ask for.

    Attributes:
      coupling: of D2-Sparse.
      preset: of D2-Sparse.
      mode: of D2-Sparse.
      horizon: steps the slow learner's average reaches back, in mode "consolidated".
      imp_rounds: prunings of iterative magnitude pruning.
      rewind_fraction: part of a round after which its weights are kept to rewind to.
    """

    coupling: Coupling
    preset: str
    mode: str
    horizon: float
    imp_rounds: int
    rewind_fraction: float


class Method(NamedTuple):
    """One way to learn from few labels.

    Attributes:
      init: `(key, data) -> state`.
      fit: `(state, data, report) -> (state, MACs)`: the whole training, and its cost in
        multiply-accumulates per example of a batch, summed over the steps.
      predict: `(state, data) -> probabilities by output`, the headline first.
      costs: `(state, data) -> (numbers stored, MACs of the headline at inference)`.
    """

    init: Callable[[jax.Array, Data], TrainState]
    fit: Callable[[TrainState, Data, Report], tuple[TrainState, float]]
    predict: Callable[[TrainState, Data], dict[str, np.ndarray]]
    costs: Callable[[TrainState, Data], tuple[int, float]]


class Network(NamedTuple):
    """One network that is trained under one mask rule, compiled once.

    Attributes:
      init: `(key, data) -> state`.
      run: runner of its training steps.
    """

    init: Callable[[jax.Array, Data], TrainState]
    run: Step


def shapes_and_macs(
    model: Model, image_shape: tuple[int, ...]
) -> tuple[PyTree, dict[str, int]]:
    """Shapes of a network's parameters, and its dense forward cost by path."""
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        return model.apply(*variables, x, train=False)[0]

    costs = macs.forward_macs(apply, variables, x)
    params = variables[0]
    return params, {path: costs[f"0/{path}"] for path in tree.flatten(params)}


def single(
    task: Task, rule: MaskRule, when: When, interval: float | None = None
) -> Method:
    """One network under a mask rule, refreshed every `interval` steps or never."""
    network = _network(task, rule, when)

    def fit(state: TrainState, data: Data, report: Report) -> tuple[TrainState, float]:
        state = task.fit(network.run, state, data, report=report)
        size = len(data.labels)
        per_step = macs.training_macs(
            _sparse_macs(state, task.macs),
            sum(task.macs.values()),
            interval=interval,
            growth_samples=(interval and min(task.growth_samples, size)) or None,
            batch_size=min(task.batch_size, size),
        )
        return state, task.steps * float(per_step)

    return _single_method(task, network, fit)


def imp(task: Task, rounds: int, rewind_fraction: float) -> Method:
    """Iterative magnitude pruning with rewinding; every round is a whole training."""
    if not 0 <= rewind_fraction < 1:
        raise ValueError(
            f"expected a rewind_fraction in [0, 1), got {rewind_fraction}; 0 rewinds "
            "to the initial weights"
        )
    network = _network(task, rules.fixed(dense_masks(task.params)), at([]))
    sparsities = lottery.round_sparsities(task.sparsity, rounds)

    def fit(state: TrainState, data: Data, report: Report) -> tuple[TrainState, float]:
        taken, spent = 0, 0.0

        def train_to(state: TrainState, stop: int) -> TrainState:
            nonlocal taken, spent
            begin, before = int(state.step), taken
            taken += stop - begin
            spent += 3 * _sparse_macs(state, task.macs) * (stop - begin)

            def in_all(step: int, *rest: Any) -> None:
                report(before + step - begin, *rest)

            return task.fit(network.run, state, data, steps=stop, report=in_all)

        rewind_step = int(rewind_fraction * task.steps)
        state = lottery.find_ticket(
            train_to, state, task.steps, rewind_step, sparsities
        )
        return state, spent

    return _single_method(task, network, fit)


def pair(
    task: Task, tx: Callable[[jax.Array], Dual], coupling: Coupling, intervals: Dual
) -> Method:
    """Two networks, coupled or not.

    Args:
      task: what every method is given.
      tx: key -> transformations of the two networks.
      coupling: how they influence each other.
      intervals: mean steps between the refreshes of each mask, None for none.
    """
    models = Dual(task.model, task.model)
    transforms = tx(jax.random.key(0))
    step = dual.make_dual_step(
        models, transforms, coupling, task.augment, task.smoothing, task.growth_samples
    )
    run, forward = train.make_runner(step), train.make_predict(task.model)

    def init(key: jax.Array, data: Data) -> TrainState:
        mask_key, key = jax.random.split(key)
        return dual.init_pair(models, tx(mask_key), data, key, coupling)

    def costs(state: TrainState, data: Data) -> dict[str, float]:
        return dual.pair_macs(
            state,
            Dual(task.macs, task.macs),
            intervals,
            growth_samples=min(task.growth_samples, len(data.labels)),
            batch_size=min(task.batch_size, len(data.labels)),
        )

    def fit(state: TrainState, data: Data, report: Report) -> tuple[TrainState, float]:
        state = task.fit(run, state, data, report=report)
        return state, task.steps * costs(state, data)["training"]

    def predict(state: TrainState, data: Data) -> dict[str, np.ndarray]:
        return dual.pair_predictions(Dual(forward, forward), state, data)

    def stored_and_inference(state: TrainState, data: Data) -> tuple[int, float]:
        return dual.stored_numbers(state), costs(state, data)[dual.headline(state)]

    return Method(init, fit, predict, stored_and_inference)


def sparse_pair(task: Task, choices: Choices) -> Method:
    """Two sparse networks with the budget of one between them."""
    size = sum(leaf.size for leaf in tree.prunable_leaves(task.params).values())
    halves = dual.split_sparsity(size, task.sparsity)
    plans = _plans(task, choices.preset)

    def tx(key: jax.Array) -> Dual:
        return dual.make_transforms(
            plans, halves, task.optimizer, choices.mode, choices.horizon, key
        )

    intervals = Dual(*(task.mean_interval(plan.interval) for plan in plans))
    return pair(task, tx, choices.coupling, intervals)


def dense_pair(task: Task) -> Method:
    """Two dense networks that teach each other: deep mutual learning."""
    rate = optax.cosine_decay_schedule(task.learning_rate, task.steps)

    def tx(key: jax.Array) -> Dual:
        network = sparsify(task.optimizer(rate), rules.static(0.0), at([]), key)
        return Dual(network, network)

    return pair(task, tx, Coupling(masks=0.0), Dual(None, None))


def make_method(name: str, task: Task, choices: Choices) -> Method:
    """A method by its name, one of `METHODS`.

    Raises:
      ValueError: unknown name, or choices that do not fit.
    """
    plan = _plans(task, "symmetric").fast
    rigl = rules.rigl(task.sparsity, plan.drop_fraction)
    builders: dict[str, Callable[[], Method]] = {
        "dense": lambda: single(task, rules.static(0.0), at([])),
        "static": lambda: single(task, rules.static(task.sparsity), at([])),
        "rigl": lambda: single(
            task, rigl, plan.when, task.mean_interval(plan.interval)
        ),
        "imp": lambda: imp(task, choices.imp_rounds, choices.rewind_fraction),
        "uncoupled_pair": lambda: sparse_pair(
            task,
            choices._replace(coupling=_UNCOUPLED, preset="symmetric", mode="trained"),
        ),
        "dense_mutual": lambda: dense_pair(task),
        "d2_sparse": lambda: sparse_pair(task, choices),
    }
    if name not in builders:
        raise ValueError(f"expected a method of {', '.join(METHODS)}, got {name!r}")
    return builders[name]()


def _plans(task: Task, preset: str) -> Dual:
    return dual.make_plans(preset, task.learning_rate, task.steps, task.interval)


def _network(task: Task, rule: MaskRule, when: When) -> Network:
    rate = optax.cosine_decay_schedule(task.learning_rate, task.steps)

    def make_tx(key: jax.Array | int) -> optax.GradientTransformationExtraArgs:
        return sparsify(task.optimizer(rate), rule, when, key)

    loss = train.make_loss(task.model, task.augment, task.smoothing)
    step = train.make_train_step(loss, make_tx(0), task.growth_samples)

    def init(key: jax.Array, data: Data) -> TrainState:
        mask_key, key = jax.random.split(key)
        return train.init_state(task.model, make_tx(mask_key), data, key)

    return Network(init, train.make_runner(step))


def _single_method(
    task: Task,
    network: Network,
    fit: Callable[[TrainState, Data, Report], tuple[TrainState, float]],
) -> Method:
    forward = train.make_predict(task.model)

    def predict(state: TrainState, data: Data) -> dict[str, np.ndarray]:
        return {"network": forward(state.params, state.model_state, data)}

    def costs(state: TrainState, data: Data) -> tuple[int, float]:
        del data
        live = jax.device_get(get_masks(state.opt_state))
        stored = sum(int(mask.sum()) for mask in jax.tree.leaves(live))
        return stored, _sparse_macs(state, task.macs)

    return Method(network.init, fit, predict, costs)


def _sparse_macs(state: TrainState, cost: dict[str, int]) -> float:
    return float(macs.masked_macs(cost, get_masks(state.opt_state)))
