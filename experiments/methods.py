"""What is compared: each method as one value with the same four functions.

A method is built once and serves every seed, so its step is compiled once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax

from d2sparse import distributions, lottery, rules
from d2sparse.masks import dense_masks
from d2sparse.train import Data, Runner, TrainState
from experiments import hunts
from experiments.hunts import Hunt
from experiments.pairs import (
    Choices,
    dense_pair,
    make_plans,
    sparse_pair,
    uncoupled_pair,
)
from experiments.recipes.arguments import make_shared, rehearse
from experiments.recipes.options import MaskOptions
from experiments.session import Session
from experiments.singles import (
    NO_SETTINGS,
    Method,
    Recipe,
    Settings,
    make_network,
    rewind_step,
    single,
)
from experiments.task import Task

MethodName = Literal[
    "dense", "static", "rigl", "imp", "uncoupled_pair", "dense_mutual", "d2_sparse"
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
SINGLES: tuple[MethodName, ...] = ("dense", "static", "rigl", "imp")


def imp(task: Task, rounds: int, rewind_fraction: float, masks: MaskOptions) -> Method:
    """Iterative magnitude pruning with rewinding; every round is a whole training.

    Raises:
      ValueError: a number is out of its range, or a pattern is asked for.
    """
    for flag in ("distribution", "pattern", "layer_sparsities"):
        value = getattr(masks, flag)
        if value not in (getattr(MaskOptions, flag), "global"):
            raise ValueError(
                f"expected no {flag} of imp, in which all weights compete one by one, "
                f"got {value}; leave imp or the flag away"
            )
    step = rewind_step(rewind_fraction, task.steps)
    network = make_network(task, Recipe(rules.fixed(dense_masks(task.params))))
    sparsities = lottery.round_sparsities(task.sparsity, rounds)

    def init(key: jax.Array, data: Data, settings: Settings = NO_SETTINGS) -> Hunt:
        return hunts.begin_hunt(network.init(key, data, settings))

    def fit(
        sessions: Sequence[Session], hunts: Sequence[Hunt], data: Sequence[Data]
    ) -> list[TrainState]:
        return [
            network.settle(
                hunt_tickets(
                    session,
                    network.run,
                    hunt,
                    own,
                    task.steps,
                    step,
                    sparsities,
                    prunable=task.prunable,
                ),
                own,
            )
            for session, hunt, own in zip(sessions, hunts, data, strict=True)
        ]

    return Method(
        init,
        fit,
        network.predict,
        network.costs,
        state=_in_training,
        settle=network.settle,
    )


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
    """`hunts.find_ticket` of one unit, from wherever it stands; returns its end."""
    stands = hunt

    def on_stretch(hunt: Hunt) -> None:
        nonlocal stands
        stands = hunt

    def fit(state: TrainState, stop: int) -> TrainState:
        rest = stands
        return session.train(run, state, data, stop, lambda s: rest._replace(state=s))

    return hunts.find_ticket(
        fit, hunt, steps, rewind_step, sparsities, on_stretch=on_stretch, **options
    )


def make_method(
    name: str, task: Task, choices: Choices, rounds: int, rewind_fraction: float
) -> Method:
    """A method by its name, one of `METHODS`.

    Args:
      name: of the method.
      task: what every method is given.
      choices: what D2-Sparse is asked to be.
      rounds: prunings of iterative magnitude pruning.
      rewind_fraction: part of a round after which its weights are kept to rewind to.

    Raises:
      ValueError: unknown name, or choices that do not fit.
    """
    plan = make_plans(task, "symmetric").fast
    shared = make_shared(task, choices.masks, distributions.erk)
    static = functools.partial(rules.static, **shared)
    rigl = functools.partial(rules.rigl, drop_fraction=plan.drop_fraction, **shared)
    interval = task.mean_interval(plan.interval)

    def alone(recipe: Recipe) -> Method:
        rehearse(task, choices.masks, shared)
        return single(task, recipe)

    builders: dict[str, Callable[[], Method]] = {
        "dense": lambda: single(task, Recipe(rules.static(0.0))),
        "static": lambda: alone(Recipe(static)),
        "rigl": lambda: alone(Recipe(rigl, plan.when, interval)),
        "imp": lambda: imp(task, rounds, rewind_fraction, choices.masks),
        "uncoupled_pair": lambda: uncoupled_pair(task, choices),
        "dense_mutual": lambda: dense_pair(task, choices.coupling),
        "d2_sparse": lambda: sparse_pair(task, choices),
    }
    if name not in builders:
        raise ValueError(f"expected a method of {', '.join(METHODS)}, got {name!r}")
    return builders[name]()


def _in_training(hunt: Hunt) -> TrainState:
    return hunt.state
