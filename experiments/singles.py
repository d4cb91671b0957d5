"""One network, and how it becomes sparse."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import lottery, macs, train
from d2sparse.distributions import Sparsity
from d2sparse.models import Model
from d2sparse.reparam import nonzero_masks
from d2sparse.rules import MaskRule
from d2sparse.schedules import When, at
from d2sparse.train import Data, Loss, Runner, Step, TrainState
from d2sparse.transforms import (
    SparsifyState,
    get_average,
    get_masks,
    mask_states,
    sparsify,
)
from d2sparse.tree import PyTree
from experiments.session import Session, train_together
from experiments.task import Task

Settings = Mapping[str, float]
NO_SETTINGS: Settings = types.MappingProxyType({})


class Method(NamedTuple):
    """One way to learn from few labels, built once for all seeds.

    Attributes:
      init: `(key, data, settings) -> begun`, where training starts: a state, or what
        holds one. Settings are numbers by name, such as a learning rate, in which the
        units of one program differ; those that are not given are the task's.
      fit: `(sessions, begun, data) -> states`: the whole training of one or more units,
        from wherever each of them stands.
      predict: `(state, data) -> probabilities by output`, the headline first.
      costs: `(state, data) -> (numbers stored, MACs of the headline at inference)`.
      live: `state -> masks` of the weights that the forward pass sees; None where a
        method has no single answer.
      state: `begun -> state`, what is being trained.
      free: names of the settings that a unit may have of its own.
      run: runner of its steps, where all of them are those of one program and several
        units can be trained at once. The metrics of every step hold what it costs:
        "macs", per example.
      settle: `(state, data) -> state`, what counts of a state in or after training.
    """

    init: Callable[[jax.Array, Data, Settings], Any]
    fit: Callable[
        [Sequence[Session], Sequence[Any], Sequence[Data]], Sequence[TrainState]
    ]
    predict: Callable[[TrainState, Data], dict[str, np.ndarray]]
    costs: Callable[[TrainState, Data], tuple[int, float]]
    live: Callable[[TrainState], PyTree] | None = None
    state: Callable[[Any], TrainState] = lambda begun: begun
    free: frozenset[str] = frozenset({"learning_rate", "weight_decay"})
    run: Runner | None = None
    settle: Callable[[TrainState, Data], TrainState] = lambda state, data: state


class Recipe(NamedTuple):
    """How one network becomes sparse.

    Attributes:
      rule: of its masks; as a function of the sparsity one program serves them all.
      when: step -> bool, when they are refreshed.
      interval: mean steps between two growth gradients; None where there are none.
      wrap: `sparsify`, or `freeze`, which leaves the other weights at their value.
      effective: `params -> params`, the weights that the forward pass sees; None where
        they are the trained ones.
      choose: `(state, data) -> masks` to begin with, of a dense state; None leaves them
        to the rule.
      trained: `state -> masks` of the weights whose gradient every step needs; None
        where they are those that the forward pass sees.
      schedule: learning rate -> what becomes of it; None for that of the task.
      loss: of a batch; None for the cross-entropy of its labels.
      beside: MACs per example of a step of other networks, such as teachers.
    """

    rule: MaskRule | Callable[[Sparsity], MaskRule]
    when: When = at([])
    interval: float | None = None
    wrap: Callable[..., optax.GradientTransformationExtraArgs] = sparsify
    effective: Callable[[PyTree], PyTree] | None = None
    choose: Callable[[TrainState, Data], PyTree] | None = None
    trained: Callable[[TrainState], PyTree] | None = None
    schedule: Callable[[Any], optax.Schedule] | None = None
    loss: Loss | None = None
    beside: float = 0.0


class Network(NamedTuple):
    """One network that is trained by a recipe, compiled once.

    Attributes:
      init: `(key, data, settings) -> state`.
      run: runner of its training steps, whose metrics hold what each of them costs:
        "macs", per example.
      predict: `(state, data) -> probabilities by output`.
      costs: `(state, data) -> (numbers stored, MACs at inference)`.
      live: `state -> masks` of the weights that the forward pass sees.
      settle: `(state, data) -> state`, what counts of a state: that with the average of
        the weights, where the task asks for one and it has begun.
    """

    init: Callable[[jax.Array, Data, Settings], TrainState]
    run: Runner
    predict: Callable[[TrainState, Data], dict[str, np.ndarray]]
    costs: Callable[[TrainState, Data], tuple[int, float]]
    live: Callable[[TrainState], PyTree]
    settle: Callable[[TrainState, Data], TrainState]


def single(task: Task, recipe: Recipe) -> Method:
    """One network that is trained by a recipe."""
    network = make_network(task, recipe)
    return Method(
        network.init,
        train_through(network.run, task.steps, network.settle),
        network.predict,
        network.costs,
        network.live,
        free=frozenset(_defaults(task, recipe)),
        run=network.run,
        settle=network.settle,
    )


def train_through(
    run: Runner,
    steps: int,
    settle: Callable[[TrainState, Data], TrainState] = lambda state, data: state,
) -> Callable[..., Sequence[TrainState]]:
    """`Method.fit` of a single training to its last step."""

    def fit(
        sessions: Sequence[Session], states: Sequence[TrainState], data: Sequence[Data]
    ) -> Sequence[TrainState]:
        arounds = [_itself] * len(states)
        ends = train_together(sessions, run, states, data, steps, arounds)
        return [settle(end, own) for end, own in zip(ends, data, strict=True)]

    return fit


def make_network(task: Task, recipe: Recipe) -> Network:
    """A network and its compiled training, for all seeds.

    A step costs what the masks that it begins with say, and growth gradients their mean
    over the run; scores that are taken before training are not counted.
    """
    model, own = _with_effective(task.model, recipe.effective), _defaults(task, recipe)

    def make_tx(
        settings: Mapping[str, Any], key: jax.Array | int = 0
    ) -> optax.GradientTransformationExtraArgs:
        rate = (recipe.schedule or task.schedule)(settings["learning_rate"])
        inner = task.optimizer(rate, settings["weight_decay"])
        rule = recipe.rule
        rule = rule(settings["sparsity"]) if callable(rule) else rule
        return task.averaged(recipe.wrap(inner, rule, recipe.when, key))

    loss = recipe.loss or train.make_loss(model, task.augment, task.smoothing)
    # A growth gradient is for those that look at it.
    growth_samples = task.growth_samples if recipe.interval else 0
    step = train.make_train_step(loss, make_tx, growth_samples, recipe.when)
    forward = train.make_predict(model)

    def init(key: jax.Array, data: Data, settings: Settings = NO_SETTINGS) -> Any:
        mask_key, key = jax.random.split(key)
        chosen = own | dict(settings)
        state = train.init_state(
            model, make_tx(chosen, mask_key), data, key, chosen, task.skip_faults
        )
        if task.ticket is not None:
            state = _start_from(task.ticket, state)
        if recipe.choose is None:
            return state
        masks = recipe.choose(state, data)
        return _start_from(
            lottery.Ticket(state.params, state.model_state, masks), state
        )

    def live(state: TrainState) -> PyTree:
        if recipe.effective is None:
            return get_masks([_stored(own) for own in mask_states(state.opt_state)])
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

    run = train.make_runner(with_cost(step, cost), task.mesh)
    settle = make_settle(task, model)
    return Network(init, run, predict, costs, live, settle)


def make_settle(task: Task, model: Model) -> Callable[[TrainState, Data], TrainState]:
    """`Network.settle`; statistics of normalisations are those of the average."""
    statistics = train.make_statistics(model, task.augment, task.batch_size)

    def settle(state: TrainState, data: Data) -> TrainState:
        if task.average_from is None or int(state.step) <= task.average_from:
            return state  # The average begins with the weights after that step.
        params = get_average(state.opt_state)
        own = statistics(params, state.model_state, data, state.key)
        return state._replace(params=params, model_state=own)

    return settle


def with_cost(step: Step, cost: Callable[[TrainState, Data], Any]) -> Step:
    """The step with its cost among its metrics, that of the state it begins with."""

    def counted(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        spent = cost(state, data)
        state, logs = step(state, data, indices)
        return state, logs | {"macs": spent}

    return counted


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


def _defaults(task: Task, recipe: Recipe) -> dict[str, float]:
    """The settings of a recipe, as the task has them."""
    own = {"learning_rate": task.learning_rate, "weight_decay": task.weight_decay}
    return own | ({"sparsity": task.sparsity} if callable(recipe.rule) else {})


def _step_macs(
    task: Task, recipe: Recipe, live: PyTree, state: TrainState, size: int
) -> Any:
    """What a step costs per example, on a data set of a size."""
    sparse = macs.masked_macs(task.macs, live)
    trained = recipe.trained and macs.masked_macs(task.macs, recipe.trained(state))
    plain = 3 * sparse if trained is None else 2 * sparse + trained
    more = recipe.beside + (plain if task.sharpness else 0.0)
    if trained is not None:
        return plain + more
    growth = recipe.interval and min(task.growth_samples, size)
    return more + macs.training_macs(
        sparse,
        sum(task.macs.values()),
        interval=recipe.interval,
        growth_samples=growth or None,
        batch_size=min(task.batch_size, size),
    )


def _with_effective(
    model: Model, effective: Callable[[PyTree], PyTree] | None
) -> Model:
    if effective is None:
        return model

    def apply(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        return model.apply(effective(params), *args, **kwargs)

    return Model(model.init, apply)


def _start_from(ticket: lottery.Ticket, state: TrainState) -> TrainState:
    """A new state that starts from a ticket: with its weights, statistics and masks.

    What becomes of the masks is up to the rule of the state's optimiser: `fixed` keeps
    them, `rigl` moves them, `gradual` prunes on.

    Args:
      ticket: where to start; it fits the network of the state.
      state: at step 0; its optimiser is made by `sparsify` or `freeze`.
    """
    state = state._replace(params=ticket.params, model_state=ticket.model_state)
    return lottery.rewind(state, ticket.masks)


def _itself(state: TrainState) -> TrainState:
    return state


def _stored(state: Any) -> Any:
    """What `freeze` holds counts as live: it is not 0."""
    if isinstance(state, SparsifyState):
        return state
    return state._replace(masks=jax.tree.map(jnp.ones_like, state.masks))
