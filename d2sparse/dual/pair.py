"""What belongs to two learners: containers, budgets, masks, storage and cost."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import distributions
from d2sparse import macs as costs
from d2sparse.distributions import Distribution
from d2sparse.masks import Selection, select
from d2sparse.schedules import When
from d2sparse.train import Data, TrainState
from d2sparse.transforms import get_average, get_masks
from d2sparse.tree import PyTree


class Dual(NamedTuple):
    """Something of the fast learner and the same of the slow learner."""

    fast: Any
    slow: Any


@dataclasses.dataclass(frozen=True)
class Coupling:
    """How the two learners influence each other; all zeros: not at all.

    Attributes:
      fast: lambda_fast, weight of the slow learner's teaching in the fast one's loss.
      slow: lambda_slow, weight of the fast learner's teaching in the slow one's loss.
      temperature: tau of the distillation, above 0.
      ramp: steps over which both weights rise from 0; 0 means at once.
      masks: kappa in [-1, 1]. Growth scores are multiplied by `1 - kappa` where the
        peer is live: 1 makes the masks complementary, -1 attracts them.
      independent_views: whether each learner sees an augmentation of its own; the
        teaching then asks for consistency between views as well.
      weighted: whether the teaching on an example counts as much as the peer's
        confidence in it, its largest probability.
      threshold: in [0, 1); what the peer is less confident of is not taught.
    """

    fast: float = 1.0
    slow: float = 1.0
    temperature: float = 1.0
    ramp: int = 0
    masks: float = 1.0
    independent_views: bool = False
    weighted: bool = False
    threshold: float = 0.0

    def __post_init__(self) -> None:
        """Refuses values outside of their ranges."""
        if self.fast < 0 or self.slow < 0 or self.ramp < 0:
            raise ValueError(
                "expected coupling weights and a ramp of at least 0, got "
                f"fast={self.fast}, slow={self.slow}, ramp={self.ramp}"
            )
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {self.temperature}")
        if not -1 <= self.masks <= 1:
            raise ValueError(
                f"expected a mask coupling in [-1, 1], got {self.masks}; 1 makes the "
                "masks complementary, 0 leaves them independent"
            )
        if not 0 <= self.threshold < 1:
            raise ValueError(
                "expected a threshold of confidence in [0, 1), got "
                f"{self.threshold}; 0 teaches on every example"
            )


class Trace(NamedTuple):
    """State of a consolidating slow learner.

    Attributes:
      average: running average of the fast learner's parameters.
      masks: which of them the slow learner uses.
    """

    average: PyTree
    masks: PyTree


class Consolidation(NamedTuple):
    """How the slow learner follows the fast one, in place of an optimiser.

    Attributes:
      sparsity: fraction of zeros of the slow learner.
      decay: alpha in [0, 1) of the running average; its horizon is `1 / (1 - alpha)`.
      when: step -> bool, when the slow learner's mask is drawn anew.
      distribution: how its leaves share the live weights.
      selection: which patterns may be live.
    """

    sparsity: float
    decay: float
    when: When
    distribution: Distribution = distributions.erk
    selection: Selection = select


def split_sparsity(size: int, sparsity: float, share: float = 0.5) -> Dual:
    """Sparsities of the two learners that together keep one network's budget.

    `k = round((1 - sparsity) * size)` weights are kept in all, `round(share * k)` of
    them by the fast learner.

    Args:
      size: number of prunable weights of one network.
      sparsity: fraction of zeros of one network of the same budget, in [0, 1).
      share: the fast learner's part of the budget, in (0, 1).

    Raises:
      ValueError: the sparsity or the share is outside of its range, or one learner
        would have no weights.

    >>> split_sparsity(1000, 0.8)
    Dual(fast=0.9, slow=0.9)
    """
    if not 0 <= sparsity < 1 or not 0 < share < 1:
        raise ValueError(
            "expected a sparsity in [0, 1) and a share in (0, 1), got "
            f"sparsity={sparsity}, share={share}"
        )
    total = round((1 - sparsity) * size)
    fast = round(share * total)
    if not 0 < fast < total:
        raise ValueError(
            f"expected a budget that leaves both learners weights, got {total} for "
            f"both and {fast} for the fast one; lower the sparsity {sparsity} or take "
            "a wider network"
        )
    return Dual(1 - fast / size, 1 - (total - fast) / size)


def get_pair_masks(state: TrainState) -> Dual:
    """The masks of both learners."""
    slow = state.opt_state.slow
    slow_masks = slow.masks if isinstance(slow, Trace) else get_masks(slow)
    return Dual(get_masks(state.opt_state.fast), slow_masks)


def headline(state: TrainState) -> str:
    """Which output of a pair counts, fixed before any run.

    "ensemble" where both learners are trained; "slow" where the slow learner
    consolidates the fast one, since then it alone is needed at inference.
    """
    return "slow" if isinstance(state.opt_state.slow, Trace) else "ensemble"


def settle_pair(
    state: TrainState,
    data: Data | None = None,
    statistics: Dual | None = None,
) -> TrainState:
    """The pair with the averages of its weights, where they are kept, as parameters.

    Args:
      state: the pair.
      data: training examples, for the statistics of normalisations.
      statistics: of each network, from `train.make_statistics`; None where the networks
        have no normalisations.

    Returns:
      The state; one that keeps no averages comes back as it is.
    """
    params = _weights_that_count(state)
    if params is state.params:
        return state
    model_state = state.model_state
    if statistics is not None:
        both = zip(statistics, params, model_state, strict=True)
        model_state = Dual(*(f(p, s, data, state.key) for f, p, s in both))
    return state._replace(params=params, model_state=model_state)


def pair_predictions(
    predict: Dual, state: TrainState, data: Data
) -> dict[str, np.ndarray]:
    """Class probabilities of the pair's three outputs, the headline first.

    "ensemble" is the mean of both learners' probabilities; see `headline`. Where
    averages of the weights are kept, as by preset "averaged", they are what predicts.

    Args:
      predict: of each network, from `train.make_predict`.
      state: the pair.
      data: what to predict.

    Returns:
      float[n, classes] by "ensemble", "fast" and "slow".

    Raises:
      ValueError: averages are kept, and the statistics of normalisations are those of
        the last weights.
    """
    own = _weights_that_count(state)
    if jax.tree.leaves(state.model_state) and not _all_close(own, state.params):
        raise ValueError(
            "expected statistics of the averages that count, got a pair whose "
            "normalisations know its last weights; take `dual.settle_pair(state, data, "
            "statistics)` first"
        )
    fast, slow = (
        f(params, model_state, data)
        for f, params, model_state in zip(predict, own, state.model_state, strict=True)
    )
    outputs = {"ensemble": (fast + slow) / 2, "fast": fast, "slow": slow}
    first = headline(state)
    return {first: outputs[first], **outputs}


def stored_numbers(state: TrainState) -> int:
    """Trained numbers that the pair must keep to go on training.

    Live weights of both networks and everything that is never pruned; for a
    consolidating slow learner, the support of its average in place of its weights.
    Averages of the weights, which no step looks at, are not counted.
    """
    masks = get_pair_masks(state)
    slow = state.opt_state.slow
    if isinstance(slow, Trace):
        masks = masks._replace(slow=_support(slow.average, slow.masks))
    return sum(int(np.sum(mask)) for mask in jax.tree.leaves(jax.device_get(masks)))


def pair_macs(
    state: TrainState,
    macs: Dual,
    interval: Dual,
    growth_samples: int,
    batch_size: int,
) -> dict[str, float | jax.Array]:
    """Theoretical multiply-accumulates of a pair: in training and at inference.

    A trained pair costs the sum of both networks' rows of `macs.training_macs`; a
    consolidating one costs the fast network's row and the slow one's forward pass. The
    forward pass of the peer on the growth batch is counted too.

    Args:
      state: the pair, for its masks.
      macs: dense forward cost of each network by path, from `macs.forward_macs`.
      interval: mean steps between the refreshes of each learner's mask, over the whole
        run; None where there are none.
      growth_samples: examples of a growth gradient; 0 means the step's batch.
      batch_size: examples of a training step.

    Returns:
      MACs per example: "training" (of one step), "fast", "slow" and "ensemble"; arrays,
      which may be traced.
    """
    sparse = [
        costs.masked_macs(c, m)
        for c, m in zip(macs, get_pair_masks(state), strict=True)
    ]
    followed = isinstance(state.opt_state.slow, Trace)
    training: float | jax.Array = sparse[1] if followed else 0.0
    for learner in (0,) if followed else (0, 1):
        training += costs.training_macs(
            sparse[learner],
            sum(macs[learner].values()),
            interval=interval[learner],
            growth_samples=(interval[learner] and growth_samples) or None,
            batch_size=batch_size,
        )
        if interval[learner] and growth_samples:
            peer = sparse[1 - learner]
            training += peer * growth_samples / (batch_size * interval[learner])
    names = ("training", "fast", "slow", "ensemble")
    return dict(zip(names, (training, *sparse, sum(sparse)), strict=True))


def _weights_that_count(state: TrainState) -> Dual:
    """The averages of the weights of a learner that keeps them, else its weights."""
    if isinstance(state.opt_state.slow, Trace):
        return state.params
    both = zip(state.opt_state, state.params, strict=True)
    found = Dual(*(get_average(own, params) for own, params in both))
    kept = found.fast is not state.params.fast or found.slow is not state.params.slow
    return found if kept else state.params


def _all_close(one: PyTree, other: PyTree) -> bool:
    """Whether two trees differ by no more than rounding."""
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return one is other or all(bool(jnp.allclose(a, b)) for a, b in pairs)


def _support(average: PyTree, masks: PyTree) -> PyTree:
    """What is kept of the average; a leaf that is never pruned is kept whole."""
    return jax.tree.map(lambda a, m: (a != 0) | jnp.all(m), average, masks)
