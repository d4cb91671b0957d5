"""Pairs of sparse networks that share the budget of one, by the names of presets."""

from collections.abc import Callable
from typing import Any, NamedTuple

from d2sparse import distributions, rules
from d2sparse.constraints.averaging import averaged
from d2sparse.constraints.coupled import coupled
from d2sparse.constraints.growing import Moves, moving
from d2sparse.constraints.masked import Structure
from d2sparse.constraints.pacing import paced
from d2sparse.dual import Consolidation, Coupling, Dual, split_sparsity
from d2sparse.rules import MaskRule
from d2sparse.rules.base import suited
from d2sparse.schedules import every, refresh_stop
from d2sparse.train import Constraint, Training, claim


class Learners(NamedTuple):
    """How the learners of a pair of sparse networks are trained.

    Attributes:
      preset: "averaged", both keep the learning rate and average their weights over the
        tail; "symmetric", both anneal it; "constant", as averaged without the average;
        "fast_slow", the fast one keeps half of the rate and moves half of its mask, the
        slow one anneals and moves a tenth at every fourth refresh.
      interval: steps between two refreshes of the fast learner's mask.
      growth_samples: examples of a growth gradient; 0 for those of the step.
      tail: part of the training that preset "averaged" averages, in (0, 1].
      horizon: steps that a slow learner reaches back which consolidates the fast one;
        None where both are trained by gradient.
      rule: how the masks move, "rigl", "set" or "static".
    """

    preset: str = "averaged"
    interval: int = 100
    growth_samples: int = 1024
    tail: float = 0.25
    horizon: float | None = None
    rule: str = "rigl"


class _Pace(NamedTuple):
    """How one learner of a preset is trained.

    Attributes:
      schedule: of its learning rate.
      scale: its learning rate at first, as a part of the pair's.
      drop_fraction: part of its live weights that moves at first.
      intervals: intervals of the pair between two refreshes of its mask.
    """

    schedule: str = "constant"
    scale: float = 1.0
    drop_fraction: float = 0.3
    intervals: int = 1


_PRESETS = {
    "averaged": Dual(_Pace(), _Pace()),
    "symmetric": Dual(_Pace("cosine"), _Pace("cosine")),
    "fast_slow": Dual(_Pace("constant", 0.5, 0.5), _Pace("cosine", 1.0, 0.1, 4)),
    "constant": Dual(_Pace(), _Pace()),
}


def paired(
    sparsity: float,
    learners: Learners | None = None,
    coupling: Coupling | None = None,
    structure: Structure | None = None,
) -> Constraint:
    """D2-Sparse of two sparse networks that share the weights of one between them.

    Args:
      sparsity: fraction of zeros of one network that has the weights of both.
      learners: how they are trained.
      coupling: how they influence each other.
      structure: which masks are possible; shared by ERK if it names no distribution.

    Raises:
      ValueError: an unknown preset, or an average of a pair that consolidates.
    """
    how = learners or Learners()
    if how.rule not in _RULES:
        raise ValueError(f"expected rule of {', '.join(_RULES)}, got {how.rule!r}")
    if how.preset not in _PRESETS:
        raise ValueError(
            f"expected preset of {', '.join(_PRESETS)}, got {how.preset!r}"
        )
    if how.horizon is not None and how.preset == "averaged":
        raise ValueError(
            "expected no average of a pair that consolidates, whose slow learner is "
            "one, got preset averaged; choose --preset=fast_slow"
        )

    def constrained(training: Training) -> Training:
        halves = split_sparsity(training.network.weights, sparsity)
        paces = _PRESETS[how.preset]
        fast = _learner(how, paces.fast, halves.fast, structure)
        slow = _learner(how, paces.slow, halves.slow, structure)
        if how.horizon is not None:
            interval = paces.slow.intervals * how.interval
            slow = (consolidated(halves.slow, how.horizon, interval, structure),)
        selection = (structure or Structure()).selection
        return coupled(fast, slow, coupling, selection)(training)

    return constrained


def consolidated(
    sparsity: float,
    horizon: float,
    interval: int = 100,
    structure: Structure | None = None,
) -> Constraint:
    """A slow learner that is a masked running average of the fast one.

    It has no loss of its own; its mask is drawn anew from the largest weights of the
    average. For the slow side of `coupled`.

    Args:
      sparsity: fraction of zeros of the slow learner, in [0, 1).
      horizon: steps the average reaches back, at least 1.
      interval: steps between two draws of the mask, in the first three quarters.
      structure: which masks are possible; shared by ERK if it names no distribution.

    Raises:
      ValueError: the horizon is below 1.
    """
    if not horizon >= 1:
        raise ValueError(f"expected a horizon of at least 1 step, got {horizon}")

    def constrained(training: Training) -> Training:
        when = every(interval, refresh_stop(training.horizon))
        own = structure or Structure()
        share = suited(own.distribution, own.selection, distributions.erk)
        how = Consolidation(sparsity, 1 - 1 / horizon, when, share, own.selection)
        claimed = claim(training, "the masks", "consolidated")
        return claimed._replace(transform=lambda rate, settings, key: how, when=when)

    return constrained


def _learner(
    how: Learners, pace: _Pace, sparsity: float, structure: Structure | None
) -> tuple[Constraint, ...]:
    """The constraints of one learner."""
    # The other rules do not look at gradients.
    samples = how.growth_samples if how.rule == "rigl" else 0
    moves = Moves(pace.intervals * how.interval, pace.drop_fraction, samples)
    grow = moving(how.rule, _RULES[how.rule], sparsity, moves, structure)

    def grown(training: Training) -> Training:
        return grow(training)._replace(growth_samples=samples)

    tail = (averaged(how.tail),) if how.preset == "averaged" else ()
    return (paced(pace.schedule, pace.scale), grown, *tail)


def _static(sparsity: Any, drop_fraction: Any, **shared: Any) -> MaskRule:
    del drop_fraction
    return rules.static(sparsity, **shared)


_RULES: dict[str, Callable[..., MaskRule]] = {
    "rigl": rules.rigl,
    "set": rules.set_,
    "static": _static,
}
