"""Two trainings, one after the other: what was trained first teaches the second."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import distributions, dual, rules, train
from d2sparse.dual import Dual
from d2sparse.lottery import Ticket
from d2sparse.masks import dense_masks
from d2sparse.train import Data, Taught, Teacher, TrainState
from experiments import hunts, pair_account
from experiments.costs import shared_macs
from experiments.pairs import Choices, sparse_pair, split_budget
from experiments.recipes.arguments import make_shared
from experiments.session import Session
from experiments.singles import (
    NO_SETTINGS,
    Method,
    Network,
    Recipe,
    Settings,
    make_network,
    single,
)
from experiments.task import Task


class Relay(NamedTuple):
    """Where a relay stands; a copy of it is the whole.

    Attributes:
      number: int32[], 0 in the first training and 1 in the second.
      first: state of the first training; where that is over, any.
      second: state of the second; in the first one, how it is made.
    """

    number: jax.Array
    first: TrainState
    second: TrainState


HandOver = Callable[[TrainState, TrainState, Data], TrainState]


class Finish(NamedTuple):
    """How a pair ends as one network.

    Attributes:
      part: of the run's steps, those that the one network is trained.
      rate: its learning rate at first, in units of the pair's.
      weight: of the pair's teaching in its loss.
      temperature: of what is taught.
    """

    part: float
    rate: float
    weight: float
    temperature: float


def self_distilled(task: Task, weight: float, temperature: float) -> Method:
    """A dense network taught by one that was trained before it: born again."""
    dense = Recipe(rules.static(0.0))
    cost = float(sum(task.macs.values()))
    student = _student(task, dense, 1, cost, weight, temperature)

    def hand_over(first: TrainState, second: TrainState, data: Data) -> TrainState:
        del data
        return _taught_by([Teacher(first.params, first.model_state)], second)

    return relay(single(task, dense), task.steps, student, task.steps, hand_over)


def distilled_pair(
    task: Task, choices: Choices, finish: Finish, merged: bool = False
) -> Method:
    """A pair whose ensemble teaches one network at the end: inference is that of one.

    Args:
      task: what every method is given; its steps are shared by both trainings.
      choices: what the pair is asked to be.
      finish: how it ends.
      merged: whether the network starts from the merger of both, instead of from the
        slow learner.

    Raises:
      ValueError: a training would have no steps.
    """
    last = round(finish.part * task.steps)
    if not 0 < last < task.steps:
        raise ValueError(
            f"expected finish_part to leave both trainings steps, got {finish.part} of "
            f"{task.steps}"
        )
    before, after = task._replace(steps=task.steps - last), task._replace(steps=last)
    halves = split_budget(task)
    shared = make_shared(task, choices.masks, distributions.erk)
    cost = sum(shared_macs(task, half, shared["distribution"]) for half in halves)
    recipe = Recipe(rules.fixed(dense_masks(task.params)))
    student = _student(after, recipe, 2, cost, finish.weight, finish.temperature)
    statistics = train.make_statistics(task.model, task.augment, task.batch_size)

    def hand_over(first: TrainState, second: TrainState, data: Data) -> TrainState:
        masks = pair_account.get_pair_masks(first)
        params, own = first.params.slow, first.model_state.slow
        live = masks.slow
        if merged:
            params, live = dual.merge(
                first.params,
                masks,
                prunable=task.prunable,
                selection=shared["selection"],
            )
            own = statistics(params, own, data, first.key)
        teachers = Dual(*zip(first.params, first.model_state, strict=True))
        known = Taught(own, tuple(Teacher(*teacher) for teacher in teachers))
        return hunts.start_from(Ticket(params, known, live), second)

    pair = sparse_pair(before, choices)
    return relay(pair, before.steps, student, last, hand_over, finish.rate)


def relay(
    first: Method,
    first_steps: int,
    second: Network,
    second_steps: int,
    hand_over: HandOver,
    rate: float = 1.0,
) -> Method:
    """One training after the other; the table shows the second network.

    Args:
      first: the first training.
      first_steps: its steps.
      second: what is trained then, with teachers in its model state.
      second_steps: its steps.
      hand_over: (first at its end, second as it was made, data) -> where the second
        starts, which shares no memory with the first.
      rate: learning rate of the second, in units of the first's.
    """

    def init(key: jax.Array, data: Data, settings: Settings = NO_SETTINGS) -> Relay:
        begun = first.init(key, data, settings)
        own = {
            "learning_rate": rate * float(begun.settings["learning_rate"]),
            "weight_decay": float(begun.settings["weight_decay"]),
        }
        follows = second.init(jax.random.fold_in(key, 1), data, own)
        return Relay(jnp.zeros((), jnp.int32), begun, follows)

    def train_first(session: Session, begun: Relay, data: Data) -> Relay:
        trained = session.train(
            first.run,
            begun.first,
            data,
            first_steps,
            lambda state: begun._replace(first=state),
        )
        start = hand_over(first.settle(trained, data), begun.second, data)
        return Relay(jnp.ones((), jnp.int32), trained, start)

    def run_relay(session: Session, stands: Relay, data: Data) -> TrainState:
        if not int(stands.number):
            stands = train_first(session, stands, data)
        end = session.train(
            second.run,
            stands.second,
            data,
            second_steps,
            lambda state: stands._replace(second=state),
        )
        return second.settle(end, data)

    def fit(
        sessions: Sequence[Session], relays: Sequence[Relay], data: Sequence[Data]
    ) -> list[TrainState]:
        return list(map(run_relay, sessions, relays, data))

    def predict(state: TrainState, data: Data) -> dict[str, np.ndarray]:
        is_second = isinstance(state.model_state, Taught)
        return (second if is_second else first).predict(state, data)

    def settle(state: TrainState, data: Data) -> TrainState:
        is_second = isinstance(state.model_state, Taught)
        return (second if is_second else first).settle(state, data)

    return Method(
        init,
        fit,
        predict,
        second.costs,
        second.live,
        _in_training,
        settle=settle,
    )


def _student(
    task: Task,
    recipe: Recipe,
    teachers: int,
    cost: float,
    weight: float,
    temperature: float,
) -> Network:
    """A network of the task that is taught."""
    loss = train.make_taught_loss(
        task.model, task.augment, task.smoothing, weight, temperature
    )
    student = task._replace(model=train.with_teachers(task.model, teachers))
    return make_network(student, recipe._replace(loss=loss, beside=cost))


def _taught_by(teachers: Sequence[Teacher], state: TrainState) -> TrainState:
    known = state.model_state._replace(teachers=tuple(teachers))
    return jax.tree.map(jnp.copy, state._replace(model_state=known))


def _in_training(stands: Relay) -> TrainState:
    return stands.second if int(stands.number) else stands.first
