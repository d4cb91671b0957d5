"""Several sparse networks out of one training, for the price of one.

After FreeTickets (Liu et al., arXiv 2106.14568): the mask is explored at a large
learning rate first; then the learning rate falls to 0 again and again, each time
leaving a member of an ensemble, with a large move of the mask in between.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import macs, rules, train
from d2sparse.reparam import nonzero_masks
from d2sparse.schedules import Step, at, every
from d2sparse.train import Data, Teacher, TrainState
from experiments.recipes.arguments import Shared
from experiments.session import Session
from experiments.singles import NO_SETTINGS, Method, Recipe, Settings, make_network
from experiments.task import Task

_ESCAPE = 0.8  # Part of the mask that moves between two members.


class Members(NamedTuple):
    """Where the training stands; a copy of it is the whole.

    Attributes:
      number: int32[], members that are trained.
      state: what is being trained.
      kept: the members; those that are not trained yet, any.
    """

    number: jax.Array
    state: TrainState
    kept: tuple[Teacher, ...]


def free_tickets(
    task: Task, members: int, explore: float, drop_fraction: float, shared: Shared
) -> Method:
    """An ensemble out of one training; its members share the weights of one network.

    Args:
      task: what every method is given.
      members: how many there are.
      explore: part of the run, in (0, 1), before the first one is annealed.
      drop_fraction: part of the live weights that moves at a refresh until then.
      shared: the arguments that all rules have.

    Raises:
      ValueError: a number is out of its range, or an average of the weights is asked
        for, where predictions are averaged.
    """
    if task.averaging:
        raise ValueError(
            "expected no averaging of free_tickets, which averages predictions, got "
            "--averaging; leave it away"
        )
    ends = _ends(task.steps, members, explore)
    first = int(explore * task.steps)
    starts = [first, *ends[:-1]]
    escapes = starts[1:]
    explores = every(task.interval, stop=first)

    def drop(step: Step) -> jax.Array:
        return jnp.where(jnp.asarray(step) < first, drop_fraction, _ESCAPE)

    def schedule(rate: Any) -> optax.Schedule:
        falls = [
            optax.cosine_decay_schedule(rate, end - start)
            for start, end in zip(starts, ends, strict=True)
        ]
        return optax.join_schedules([optax.constant_schedule(rate), *falls], starts)

    refreshes = max(first - 1, 0) // task.interval + len(escapes)
    own_sparsity = 1 - (1 - task.sparsity) / members
    recipe = Recipe(
        lambda sparsity: rules.rigl(sparsity, drop, **shared),
        lambda step: explores(step) | at(escapes)(step),
        task.steps / refreshes if refreshes else None,
        schedule=schedule,
    )
    network = make_network(task._replace(sparsity=own_sparsity), recipe)
    forward = train.make_predict(task.model)

    def init(key: jax.Array, data: Data, settings: Settings = NO_SETTINGS) -> Members:
        state = network.init(key, data, settings)
        nobody = tuple(_copy(state) for _ in range(members))
        return Members(jnp.zeros((), jnp.int32), state, nobody)

    def run(session: Session, stands: Members, data: Data) -> TrainState:
        for number in range(int(stands.number), members):
            begun = stands

            def around(state: TrainState, begun: Members = begun) -> Members:
                return begun._replace(state=state)

            state = session.train(network.run, begun.state, data, ends[number], around)
            kept = list(begun.kept)
            kept[number] = _copy(state)
            stands = Members(begun.number + 1, state, tuple(kept))
        params, model_state = zip(*stands.kept, strict=True)
        return stands.state._replace(params=params, model_state=model_state)

    def fit(
        sessions: Sequence[Session], begun: Sequence[Members], data: Sequence[Data]
    ) -> list[TrainState]:
        return list(map(run, sessions, begun, data))

    def predict(state: TrainState, data: Data) -> dict[str, np.ndarray]:
        if not isinstance(state.params, tuple):
            return network.predict(state, data)
        pairs = zip(state.params, state.model_state, strict=True)
        each = [forward(*member, data) for member in pairs]
        named = {f"member{n}": own for n, own in enumerate(each, start=1)}
        return {"ensemble": np.mean(each, axis=0), **named}

    def costs(state: TrainState, data: Data) -> tuple[int, float]:
        del data
        live = [nonzero_masks(params, task.prunable) for params in state.params]
        stored = sum(int(mask.sum()) for mask in jax.tree.leaves(live))
        return stored, sum(float(macs.masked_macs(task.macs, own)) for own in live)

    return Method(init, fit, predict, costs, state=_in_training)


def _ends(steps: int, members: int, explore: float) -> list[int]:
    """The steps at which members are complete."""
    if members < 1 or not 0 < explore < 1:
        raise ValueError(
            "expected at least 1 member and an explored part in (0, 1), got "
            f"members={members} and explore={explore}"
        )
    first = int(explore * steps)
    ends = [first + (steps - first) * n // members for n in range(1, members + 1)]
    if steps - first < members:
        raise ValueError(
            f"expected a step for each of {members} members, got {steps - first} of "
            f"{steps} steps after exploration; raise --steps"
        )
    return ends


def _copy(state: TrainState) -> Teacher:
    return jax.tree.map(jnp.copy, Teacher(state.params, state.model_state))


def _in_training(stands: Members) -> TrainState:
    return stands.state
