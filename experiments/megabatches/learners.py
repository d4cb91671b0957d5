"""The learners on a stream by name: what is trained, and what an arrival does to it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax

from d2sparse import rules
from d2sparse.masks import dense_masks
from d2sparse.schedules import cosine, cubic, every, refresh_stop
from d2sparse.train import Runner, TrainState
from d2sparse.transforms import get_masks
from d2sparse.tree import PyTree
from experiments import pair_account
from experiments.megabatches.options import (
    StreamConfig,
    app_densities,
    density,
    released,
)
from experiments.pairs import PairOptions, make_choices, sparse_pair
from experiments.recipes.groups import last_refresh
from experiments.singles import Method, Network, Recipe, make_network
from experiments.task import Task


class Learner(NamedTuple):
    """What is trained on a stream.

    Attributes:
      network: makes, judges and prices states.
      run: runner of its steps.
      masks: `state -> masks` of every network in it.
      config: the flags that it goes by.
      densities: part of the weights that is left at every stage, None where nothing is
        pruned; None for a learner that is never pruned from outside.
      matches: the learner whose densities it takes, of the same seed; None for none.
      anew: whether every stage begins with a new network.
      anneals: whether the learning rate falls within a stage.
      prunes_within: whether masks lose weights within a stage. What is gone on from are
        the weights of its best epoch under its last masks: those of the epoch may be
        denser than they were asked to be by then.
    """

    network: Network | Method
    run: Runner
    masks: Callable[[TrainState], Sequence[PyTree]]
    config: StreamConfig
    densities: Sequence[float | None] | None = None
    matches: str | None = None
    anew: bool = False
    anneals: bool = True
    prunes_within: bool = False


def make_learner(
    name: str, task: Task, config: StreamConfig, stages: int, samples: int
) -> Learner:
    """A learner by its name, one of `options.LEARNERS`.

    Args:
      name: of the learner.
      task: what is learned; its steps are those of the whole stream, its sparsity is
        that of the last level, its schedule is constant.
      config: the flags.
      stages: how many there are.
      samples: training examples of the first one.

    Raises:
      ValueError: a flag is out of its range, or the run is too short.
    """
    if name in ("d2_sparse", "d2_consolidated"):
        return _pair(name, task, config, samples)
    own = released(config) if name == "app_2022" else config
    if name in ("gradual", "rigl"):
        moving = _single(task, _moving(name, task), own)
        return moving._replace(prunes_within=name == "gradual")
    alone = _single(task, Recipe(rules.fixed(dense_masks(task.params))), own)
    left = app_densities(config, stages)
    once = [density(config.tau), *[None] * (stages - 1)]
    changes: dict[str, dict[str, Any]] = {
        "dense": {},
        "scratch": {"anew": True},
        "one_shot": {"densities": once},
        "app": {"densities": left},
        "app_magnitude": {
            "densities": left,
            "config": dataclasses.replace(config, criterion="magnitude"),
        },
        "app_2022": {"densities": left},
        "random_matched": {
            "matches": "app_2022",
            "config": dataclasses.replace(
                released(config),
                criterion="random",
                dead="exclude",
                score_weights="current",
            ),
        },
    }
    return alone._replace(**changes[name])


def _single(task: Task, recipe: Recipe, config: StreamConfig) -> Learner:
    network = make_network(task, recipe._replace(schedule=optax.constant_schedule))
    return Learner(
        network, network.run, lambda state: [get_masks(state.opt_state)], config
    )


def _moving(name: str, task: Task) -> Recipe:
    """What is pruned within the stages, by the step of the whole stream."""
    stop, last = refresh_stop(task.steps), last_refresh(task)
    when = every(task.interval, stop=stop)
    options = {"prunable": task.prunable}
    if name == "gradual":
        return Recipe(lambda s: rules.gradual(cubic(s, last), **options), when)
    drop = cosine(0.3, stop)
    interval = task.mean_interval(task.interval)
    return Recipe(lambda s: rules.rigl(s, drop, **options), when, interval)


def _pair(name: str, task: Task, config: StreamConfig, samples: int) -> Learner:
    """D2-Sparse; a fast learner that anneals would leave nothing to consolidate."""
    consolidates = name == "d2_consolidated"
    options = PairOptions(mode="consolidated" if consolidates else "trained")
    whole = dataclasses.replace(config, schedule="constant", steps=task.steps)
    choices = make_choices(options, whole, samples)._replace(preset="constant")
    method = sparse_pair(task, choices)
    assert method.run is not None
    return Learner(
        method,
        method.run,
        lambda state: list(pair_account.get_pair_masks(state)),
        config,
        anneals=not consolidates,
    )
