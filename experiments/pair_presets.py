"""The plans of a pair that `constraints.paired` replaces."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from d2sparse import distributions
from d2sparse.distributions import Distribution
from d2sparse.dual.consolidation import Consolidation
from d2sparse.dual.pair import Dual
from d2sparse.masks import Selection, select
from d2sparse.rules import MaskRule, rigl
from d2sparse.schedules import Schedule, When, cosine, every, refresh_stop
from d2sparse.transforms import average_weights, sparsify
from d2sparse.tree import Prunable, is_kernel

PRESETS = ("averaged", "symmetric", "fast_slow", "constant")
MODES = ("trained", "consolidated")

MakeOptimizer = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
MakeRule = Callable[..., MaskRule]


class Plan(NamedTuple):
    """How one learner moves.

    Attributes:
      learning_rate: step -> learning rate.
      drop_fraction: step -> fraction of the live weights that falls at a refresh.
      when: step -> bool, when the mask is refreshed.
      interval: steps between two refreshes while there are any.
      average_from: step from which the weights are averaged; None for no average.
    """

    learning_rate: optax.Schedule
    drop_fraction: Schedule
    when: When
    interval: int
    average_from: int | None = None


def make_plans(
    preset: str, learning_rate: float, steps: int, interval: int, tail: float = 0.25
) -> Dual:
    """Plans of the two learners.

    * `"averaged"`: both keep the learning rate, move 0.3 of the mask at every interval,
      and average their weights over the tail of the run, where the masks rest. What
      counts are the averages, `transforms.get_average` of each learner's state.
    * `"symmetric"`: as averaged, but both anneal the learning rate along a cosine in
      place of an average.
    * `"fast_slow"`: the fast learner keeps a constant half of the learning rate and
      moves 0.5 of its mask; the slow one anneals and moves 0.1 at every fourth
      interval. The asymmetry lies in the masks and schedules, not in a smaller step.
    * `"constant"`: as averaged, without the average.

    Masks move in the first three quarters of the run; drop fractions fall along a
    cosine.

    Args:
      preset: one of `PRESETS`.
      learning_rate: the largest learning rate.
      steps: steps of the run.
      interval: steps between two refreshes of the fast learner's mask.
      tail: part of the run, in (0, 1], that preset "averaged" averages.

    Raises:
      ValueError: unknown preset, or a tail outside of its range.

    >>> plans = make_plans("fast_slow", 0.1, steps=1000, interval=25)
    >>> plans.fast.interval, plans.slow.interval
    (25, 100)
    """
    if preset not in PRESETS:
        raise ValueError(f"expected a preset of {PRESETS}, got {preset!r}")
    if not 0 < tail <= 1:
        raise ValueError(f"expected a tail in (0, 1], got {tail}")
    stop = refresh_stop(steps)
    annealed = optax.cosine_decay_schedule(learning_rate, steps)

    def plan(rate: optax.Schedule, fraction: float, interval: int) -> Plan:
        return Plan(rate, cosine(fraction, stop), every(interval, stop), interval)

    if preset == "fast_slow":
        half = optax.constant_schedule(learning_rate / 2)
        return Dual(plan(half, 0.5, interval), plan(annealed, 0.1, 4 * interval))
    constant = optax.constant_schedule(learning_rate)
    own = plan(annealed if preset == "symmetric" else constant, 0.3, interval)
    if preset == "averaged":
        own = own._replace(average_from=steps - max(round(tail * steps), 1))
    return Dual(own, own)


def make_transforms(
    plans: Dual,
    sparsities: Dual,
    optimizer: MakeOptimizer,
    mode: str = "trained",
    horizon: float | None = None,
    key: jax.Array | int = 0,
    rule: MakeRule = rigl,
    distribution: Distribution = distributions.erk,
    selection: Selection = select,
    prunable: Prunable = is_kernel,
) -> Dual:
    """Transformations of the two learners, each with masks of its own.

    Where a plan has one, an average of the weights is kept beside them. `init_pair` and
    `make_dual_step` are given the same selection and predicate.

    Args:
      plans: how they move.
      sparsities: fraction of zeros of each.
      optimizer: learning rate -> inner optimiser.
      mode: "trained", both by gradient; or "consolidated", the slow learner being the
        masked running average of the fast one.
      horizon: steps the running average reaches back; needed in mode "consolidated".
      key: random key or seed of both rules.
      rule: how masks move, a function of a sparsity, a drop fraction and the arguments
        below: `rules.rigl`, `set_`, `sparse_momentum` or one like them. Masks avoid
        each other at the start, and where a rule grows by `growth_fn` as RigL does.
      distribution: how the leaves of a learner share its live weights.
      selection: which patterns may be live: `masks.select`, `masks.n_of_m(4)`, ...
      prunable: predicate on (path, leaf).

    Raises:
      ValueError: unknown mode, a horizon that is missing or below 1, or an average of
        learners of which one is an average already.
    """
    if mode not in MODES:
        raise ValueError(f"expected a mode of {MODES}, got {mode!r}")
    key = jax.random.key(key) if isinstance(key, int) else key
    if mode == "consolidated" and any(p.average_from is not None for p in plans):
        raise ValueError(
            'expected no averages in mode "consolidated", whose slow learner is one, '
            'got plans with average_from; choose preset "fast_slow"'
        )
    own = {
        "distribution": distribution,
        "selection": selection,
        "prunable": prunable,
    }
    fast, slow = (
        _make_transform(
            plan, rule(sparsity, plan.drop_fraction, **own), optimizer, learner_key
        )
        for plan, sparsity, learner_key in zip(
            plans, sparsities, jax.random.split(key), strict=True
        )
    )
    if mode == "trained":
        return Dual(fast, slow)
    if horizon is None or horizon < 1:
        raise ValueError(f"expected a horizon of at least 1 step, got {horizon}")
    decay = 1 - 1 / horizon
    follow = Consolidation(
        sparsities.slow, decay, plans.slow.when, distribution, selection
    )
    return Dual(fast, follow)


def _make_transform(
    plan: Plan, rule: MaskRule, optimizer: MakeOptimizer, key: jax.Array
) -> optax.GradientTransformation:
    tx = sparsify(optimizer(plan.learning_rate), rule, plan.when, key)
    if plan.average_from is None:
        return tx
    return average_weights(tx, plan.average_from)
