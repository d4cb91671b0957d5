"""Masks, storage, predictions and cost of a pair, as constraints.coupled has them."""

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import macs as costs
from d2sparse.dual.consolidation import Trace
from d2sparse.dual.pair import Dual
from d2sparse.train import Data, TrainState
from d2sparse.transforms import get_average, get_masks
from d2sparse.tree import PyTree


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
