"""Sparse from the start: a random pattern, kept or moved while the weights train."""

from collections.abc import Callable
from typing import NamedTuple

from d2sparse import rules
from d2sparse.constraints.masked import (
    Structure,
    last_refresh,
    shared,
    under_masks,
    with_sparsity,
)
from d2sparse.masks import dense_masks
from d2sparse.rules import MaskRule
from d2sparse.schedules import cosine, every, refresh_stop
from d2sparse.train import Constraint, Masks, Training, TrainState


class Moves(NamedTuple):
    """How the masks of a sparse training move.

    They move in its first three quarters, and less and less: the part that moves falls
    to 0 along a cosine.

    Attributes:
      interval: steps between two refreshes.
      drop_fraction: part of the live weights that moves at first, in [0, 1].
      growth_samples: examples of the gradient that growth looks at; 0 for the step's.
    """

    interval: int = 100
    drop_fraction: float = 0.3
    growth_samples: int = 1024


def static(sparsity: float, structure: Structure | None = None) -> Constraint:
    """Static sparse training: a random pattern that is kept.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1).
      structure: which masks are possible; shared by ERK if it names no distribution.
    """

    def constrained(training: Training) -> Training:
        own = shared(training, structure)
        sparse = with_sparsity(training, sparsity)
        return under_masks(
            sparse, "static", lambda s: rules.static(s["sparsity"], **own)
        )

    return constrained


def set_(
    sparsity: float, moves: Moves | None = None, structure: Structure | None = None
) -> Constraint:
    """Sparse evolutionary training: small weights fall, random ones grow.

    From Mocanu et al. (arXiv 1707.04780), see `d2sparse.rules.set_`.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1).
      moves: how the masks move.
      structure: which masks are possible; shared by ERK if it names no distribution.
    """
    return _growing("set", rules.set_, sparsity, moves, structure)


def rigl(
    sparsity: float, moves: Moves | None = None, structure: Structure | None = None
) -> Constraint:
    """RigL: small weights fall, those with the largest gradients grow.

    From Evci et al. (arXiv 1911.11134), see `d2sparse.rules.rigl`. Arguments as in
    `set_`.
    """
    chosen = moves or Moves()
    grow = _growing("rigl", rules.rigl, sparsity, chosen, structure)
    return lambda training: grow(training)._replace(
        growth_samples=chosen.growth_samples
    )


def sparse_momentum(
    sparsity: float, moves: Moves | None = None, structure: Structure | None = None
) -> Constraint:
    """Small weights fall, those with the largest momentum of the gradient grow.

    From Dettmers and Zettlemoyer (arXiv 1907.04840), see
    `d2sparse.rules.sparse_momentum`. Every step needs the dense gradient. Arguments as
    in `set_`.
    """
    grow = _growing(
        "sparse_momentum", rules.sparse_momentum, sparsity, moves, structure
    )
    return lambda training: with_dense_gradient(grow(training))


def with_dense_gradient(training: Training) -> Training:
    """A training whose steps need the gradient of pruned weights too."""

    def masks(state: TrainState) -> Masks:
        found = training.masks(state)
        dense = tuple(dense_masks(own) for own in found.used)
        return found._replace(trained=dense)

    return training._replace(masks=masks)


def moving(
    who: str,
    rule: Callable[..., MaskRule],
    sparsity: float,
    moves: Moves | None = None,
    structure: Structure | None = None,
) -> Constraint:
    """A random pattern that a rule moves; a short training may have no refresh.

    Args:
      who: decides the masks, as errors name it.
      rule: (sparsity, drop fraction, ...) -> rule, such as `rules.rigl`.
      sparsity: fraction of zeros among the prunable weights, in [0, 1).
      moves: how the masks move.
      structure: which masks are possible; shared by ERK if it names no distribution.
    """
    chosen = moves or Moves()

    def constrained(training: Training) -> Training:
        own = shared(training, structure)
        stop = refresh_stop(training.horizon)
        drop, when = cosine(chosen.drop_fraction, stop), every(chosen.interval, stop)
        sparse = with_sparsity(training, sparsity)
        return under_masks(
            sparse, who, lambda s: rule(s["sparsity"], drop, **own), when
        )

    return constrained


def _growing(
    who: str,
    rule: Callable[..., MaskRule],
    sparsity: float,
    moves: Moves | None,
    structure: Structure | None,
) -> Constraint:
    constraint = moving(who, rule, sparsity, moves, structure)

    def constrained(training: Training) -> Training:
        # Raises where there is no refresh.
        last_refresh(training.horizon, (moves or Moves()).interval)
        return constraint(training)

    return constrained
