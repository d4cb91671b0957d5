"""Dense at first, and pruned while the weights train."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from d2sparse import rules, scores
from d2sparse.constraints.growing import Moves
from d2sparse.constraints.masked import (
    Structure,
    last_refresh,
    refreshes,
    shared,
    under_masks,
    with_sparsity,
)
from d2sparse.rules import MaskRule
from d2sparse.schedules import alternating, at, cosine, cubic, every, refresh_stop
from d2sparse.scores import Score
from d2sparse.train import Constraint, Settings, Training


def one_shot(
    sparsity: float,
    prune_at: float = 0.5,
    score: Score = scores.magnitude,
    structure: Structure | None = None,
) -> Constraint:
    """Pruned once, in the middle of a training that continues under the masks.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1).
      prune_at: part of the training before the pruning, in [0, 1).
      score: which weights matter.
      structure: which masks are possible; all leaves compete if it names no
        distribution.
    """

    def constrained(training: Training) -> Training:
        own = shared(training, structure)
        when = at([int(prune_at * training.horizon)])
        return under_masks(
            with_sparsity(training, sparsity),
            "one_shot",
            lambda s: rules.one_shot(s["sparsity"], score, **own),
            when,
        )

    return constrained


def gradual(
    sparsity: float,
    interval: int = 100,
    score: Score = scores.magnitude,
    structure: Structure | None = None,
) -> Constraint:
    """Gradual pruning: the sparsity rises along a cubic in the first three quarters.

    From Zhu and Gupta (arXiv 1710.01878). With `scores.random` it is the control.

    Args:
      sparsity: fraction of zeros at the end, in [0, 1).
      interval: steps between two prunings.
      score: which weights matter.
      structure: which masks are possible; all leaves compete if it names no
        distribution.
    """
    rule = functools.partial(rules.gradual, score=score)
    return _rising("gradual", rule, sparsity, interval, structure)


def movement(
    sparsity: float, interval: int = 100, structure: Structure | None = None
) -> Constraint:
    """Gradual pruning of the weights that training moved most towards zero.

    From Sanh et al. (arXiv 2005.07683), see `d2sparse.rules.movement`. Arguments as in
    `gradual`.
    """
    return _rising("movement", rules.movement, sparsity, interval, structure)


def granet(
    sparsity: float,
    start_sparsity: float = 0.5,
    moves: Moves | None = None,
    structure: Structure | None = None,
) -> Constraint:
    """GraNet: gradual pruning of a sparse network whose masks move as in RigL.

    From Liu et al. (arXiv 2106.10404), see `d2sparse.rules.granet`.

    Args:
      sparsity: fraction of zeros at the end, in [0, 1).
      start_sparsity: of the random pattern that training begins with; at most
        `sparsity` counts.
      moves: how the masks move.
      structure: which masks are possible; all leaves compete if it names no
        distribution.
    """
    chosen = moves or Moves()

    def constrained(training: Training) -> Training:
        drop = cosine(chosen.drop_fraction, refresh_stop(training.horizon))
        rule = functools.partial(rules.granet, drop_fraction=drop)
        grow = _rising(
            "granet", rule, sparsity, chosen.interval, structure, start_sparsity
        )
        return grow(training)._replace(growth_samples=chosen.growth_samples)

    return constrained


def ac_dc(sparsity: float, structure: Structure | None = None) -> Constraint:
    """AC/DC: dense and sparse phases by turns, sparse at the end.

    Five phases in the first three quarters of the training. From Peste et al.
    (arXiv 2106.12379), see `d2sparse.rules.ac_dc`.

    Args:
      sparsity: fraction of zeros in sparse phases, in [0, 1).
      structure: which masks are possible; all leaves compete if it names no
        distribution.
    """

    def constrained(training: Training) -> Training:
        own = shared(training, structure)
        length = max(refresh_stop(training.horizon) // 6, 1)
        last = 5 * length
        if last >= training.horizon:
            raise ValueError(
                f"expected more than {last} steps, for the dense and sparse phases of "
                f"ac_dc, got {training.horizon}; raise --steps"
            )
        phases = alternating(length, stop=last)
        return under_masks(
            with_sparsity(training, sparsity),
            "ac_dc",
            lambda s: rules.ac_dc(s["sparsity"], phases, **own),
            every(length, stop=last + 1),
        )

    return constrained


def _rising(
    who: str,
    rule: Callable[..., MaskRule],
    sparsity: float,
    interval: int,
    structure: Structure | None,
    start: float = 0.0,
) -> Constraint:
    """A rule under a sparsity that rises along a cubic up to the last refresh."""

    def constrained(training: Training) -> Training:
        own = shared(training, structure)
        last = last_refresh(training.horizon, interval)

        def rising(settings: Settings) -> MaskRule:
            goal = settings["sparsity"]
            begin: Any = jnp.minimum(start, goal) if start else 0.0
            return rule(cubic(goal, last, start=begin), **own)

        sparse = with_sparsity(training, sparsity)
        return under_masks(sparse, who, rising, refreshes(training, interval))

    return constrained
