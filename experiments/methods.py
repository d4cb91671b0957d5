"""What is compared: each method as one value with the same four functions.

A method is built once and serves every seed, so its step is compiled once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import optax

from d2sparse import dual, lottery, rules, train, tree
from d2sparse.dual import Coupling, Dual
from d2sparse.lottery import Hunt
from d2sparse.masks import dense_masks
from d2sparse.schedules import at
from d2sparse.train import Data, Runner, TrainState
from d2sparse.transforms import sparsify
from experiments.session import Session
from experiments.singles import (
    NO_SETTINGS,
    Method,
    Recipe,
    Settings,
    make_network,
    rewind_step,
    single,
    train_through,
)
from experiments.task import Task

MethodName = Literal[
    "dense", "static", "rigl", "imp", "uncoupled_pair", "dense_mutual", "d2_sparse"
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
SINGLES: tuple[MethodName, ...] = ("dense", "static", "rigl", "imp")
_UNCOUPLED = Coupling(fast=0.0, slow=0.0, masks=0.0)


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


def imp(task: Task, rounds: int, rewind_fraction: float) -> Method:
    """Iterative magnitude pruning with rewinding; every round is a whole training."""
    step = rewind_step(rewind_fraction, task.steps)
    network = make_network(task, Recipe(rules.fixed(dense_masks(task.params))))
    sparsities = lottery.round_sparsities(task.sparsity, rounds)

    def init(key: jax.Array, data: Data, settings: Settings = NO_SETTINGS) -> Hunt:
        return lottery.begin_hunt(network.init(key, data, settings))

    def fit(
        sessions: Sequence[Session], hunts: Sequence[Hunt], data: Sequence[Data]
    ) -> list[TrainState]:
        return [
            hunt_tickets(session, network.run, hunt, own, task.steps, step, sparsities)
            for session, hunt, own in zip(sessions, hunts, data, strict=True)
        ]

    return Method(init, fit, network.predict, network.costs, state=_in_training)


def hunt_tickets(
    session: Session,
    run: Runner,
    hunt: Hunt,
    data: Data,
    steps: int,
    rewind_step: int,
    sparsities: Sequence[float],
    **options: Any,
) -> TrainState:
    """`lottery.find_ticket` of one unit, from wherever it stands; returns its end."""
    stands = hunt

    def on_stretch(hunt: Hunt) -> None:
        nonlocal stands
        stands = hunt

    def fit(state: TrainState, stop: int) -> TrainState:
        rest = stands
        return session.train(run, state, data, stop, lambda s: rest._replace(state=s))

    return lottery.find_ticket(
        fit, hunt, steps, rewind_step, sparsities, on_stretch=on_stretch, **options
    )


def pair(
    task: Task,
    tx: Callable[[Settings, jax.Array], Dual],
    coupling: Coupling,
    intervals: Dual,
    when: Dual | None = None,
) -> Method:
    """Two networks, coupled or not.

    Args:
      task: what every method is given.
      tx: (settings, key) -> transformations of the two networks.
      coupling: how they influence each other; equal weights may differ between units.
      intervals: mean steps between the refreshes of each mask, None for none.
      when: step -> bool of each, when its mask is refreshed.
    """
    models, own = Dual(task.model, task.model), {"learning_rate": task.learning_rate}
    if coupling.fast and coupling.fast == coupling.slow:
        own["coupling"] = coupling.fast
    tx(own, jax.random.key(0))  # Complains now, not when the step is traced.
    step = dual.make_dual_step(
        models,
        lambda settings: tx(settings, jax.random.key(0)),
        coupling,
        task.augment,
        task.smoothing,
        task.growth_samples,
        when=when,
    )
    run = train.make_runner(step, task.mesh)
    forward = train.make_predict(task.model)

    def init(key: jax.Array, data: Data, settings: Settings = NO_SETTINGS) -> Any:
        mask_key, key = jax.random.split(key)
        chosen, skip = own | dict(settings), task.skip_faults
        transforms = tx(chosen, mask_key)
        return dual.init_pair(
            models, transforms, data, key, coupling, settings=chosen, skip_faults=skip
        )

    def costs(state: TrainState, data: Data) -> dict[str, float]:
        return dual.pair_macs(
            state,
            Dual(task.macs, task.macs),
            intervals,
            growth_samples=min(task.growth_samples, len(data.labels)),
            batch_size=min(task.batch_size, len(data.labels)),
        )

    def training_macs(state: TrainState, data: Data) -> float:
        return task.steps * costs(state, data)["training"]

    def predict(state: TrainState, data: Data) -> dict[str, np.ndarray]:
        return dual.pair_predictions(Dual(forward, forward), state, data)

    def stored_and_inference(state: TrainState, data: Data) -> tuple[int, float]:
        return dual.stored_numbers(state), costs(state, data)[dual.headline(state)]

    return Method(
        init,
        train_through(run, task.steps),
        predict,
        stored_and_inference,
        training_macs=training_macs,
        free=frozenset(own),
        run=run,
    )


def sparse_pair(task: Task, choices: Choices) -> Method:
    """Two sparse networks with the budget of one between them."""
    size = sum(leaf.size for leaf in tree.prunable_leaves(task.params).values())
    halves = dual.split_sparsity(size, task.sparsity)
    plans = _plans(task, choices.preset)

    def tx(settings: Settings, key: jax.Array) -> Dual:
        plans = _plans(task, choices.preset, settings["learning_rate"])
        return dual.make_transforms(
            plans, halves, task.optimizer, choices.mode, choices.horizon, key
        )

    intervals = Dual(*(task.mean_interval(plan.interval) for plan in plans))
    return pair(
        task, tx, choices.coupling, intervals, Dual(*(plan.when for plan in plans))
    )


def dense_pair(task: Task) -> Method:
    """Two dense networks that teach each other: deep mutual learning."""

    def tx(settings: Settings, key: jax.Array) -> Dual:
        rate = optax.cosine_decay_schedule(settings["learning_rate"], task.steps)
        network = sparsify(task.optimizer(rate), rules.static(0.0), at([]), key)
        return Dual(network, network)

    never = at([])
    return pair(task, tx, Coupling(masks=0.0), Dual(None, None), Dual(never, never))


def make_method(name: str, task: Task, choices: Choices) -> Method:
    """A method by its name, one of `METHODS`.

    Raises:
      ValueError: unknown name, or choices that do not fit.
    """
    plan = _plans(task, "symmetric").fast
    rigl = functools.partial(rules.rigl, drop_fraction=plan.drop_fraction)
    interval = task.mean_interval(plan.interval)
    builders: dict[str, Callable[[], Method]] = {
        "dense": lambda: single(task, Recipe(rules.static(0.0))),
        "static": lambda: single(task, Recipe(rules.static)),
        "rigl": lambda: single(task, Recipe(rigl, plan.when, interval)),
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


def _in_training(hunt: Hunt) -> TrainState:
    return hunt.state


def _plans(task: Task, preset: str, learning_rate: float | None = None) -> Dual:
    rate = task.learning_rate if learning_rate is None else learning_rate
    return dual.make_plans(preset, rate, task.steps, task.interval)
