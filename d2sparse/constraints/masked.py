"""What constraints with masks share: who decides them, and in which pattern."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from d2sparse import masks
from d2sparse.distributions import Distribution
from d2sparse.masks import Selection
from d2sparse.rules import MaskRule
from d2sparse.schedules import When, at, every, refresh_stop
from d2sparse.train import Settings, Training, claim
from d2sparse.transforms import sparsify

Wrap = Callable[..., optax.GradientTransformationExtraArgs]


class Structure(NamedTuple):
    """Which masks are possible, and how leaves share the live weights.

    Attributes:
      distribution: how the budget is shared between the leaves; None for the one that
        suits the method.
      selection: which weights live and fall together.
    """

    distribution: Distribution | None = None
    selection: Selection = masks.select


def shared(training: Training, structure: Structure | None) -> dict[str, Any]:
    """The arguments that all rules have.

    Args:
      training: whose weights are pruned.
      structure: which masks are possible; None for all.
    """
    own = structure or Structure()
    return {
        "distribution": own.distribution,
        "prunable": training.network.prunable,
        "selection": own.selection,
    }


def under_masks(
    training: Training,
    who: str,
    rule: Callable[[Settings], MaskRule],
    when: When | None = None,
    wrap: Wrap = sparsify,
) -> Training:
    """A training whose optimiser is under masks.

    Args:
      training: what is constrained.
      who: decides the masks, as errors name it.
      rule: settings -> rule of the masks.
      when: step -> bool, when they are refreshed; None for never.
      wrap: `sparsify`, or `freeze`, which leaves the other weights at their value.

    Raises:
      ValueError: the masks are decided by another constraint.
    """
    due = at([]) if when is None else when

    def transform(
        rate: optax.Schedule, settings: Settings, key: Any
    ) -> optax.GradientTransformation:
        return wrap(training.transform(rate, settings, key), rule(settings), due, key)

    claimed = claim(training, "the masks", who)
    return claimed._replace(transform=transform, when=due)


def with_sparsity(training: Training, sparsity: float) -> Training:
    """A training whose runs may differ in their sparsity."""
    return training._replace(settings={**training.settings, "sparsity": sparsity})


def refreshes(training: Training, interval: int) -> When:
    """Every so many steps in the first three quarters of the training.

    Raises:
      ValueError: there is no refresh.
    """
    last_refresh(training.horizon, interval)
    return every(interval, refresh_stop(training.horizon))


def last_refresh(steps: int, interval: int) -> int:
    """The last step at which masks are refreshed, in a training of some steps.

    Raises:
      ValueError: there is none.

    >>> last_refresh(steps=100, interval=20)
    60
    """
    stop = refresh_stop(steps)
    last = (stop - 1) // interval * interval
    if last < 1:
        raise ValueError(
            f"expected a refresh within the first {stop} steps, got one every "
            f"{interval}; lower --refresh_interval or raise --steps"
        )
    return last
