"""What happens to a network when a megabatch arrives: it is pruned, or begun anew."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import anytime, distributions, macs, rules, scores, tree
from d2sparse.constraints.scored import SYNFLOW_ITERATIONS, kernel_inputs, make_logits
from d2sparse.constraints.timetables import StreamOptions, Timetable
from d2sparse.data.budgets import shuffled
from d2sparse.losses import cross_entropy
from d2sparse.masks import apply_masks
from d2sparse.scores import Score
from d2sparse.train import Data, Training, TrainState, take
from d2sparse.transforms import get_masks, set_masks
from d2sparse.tree import Prunable, PyTree

_SAMPLE = 10  # Part of a seed, apart from those of `d2sparse.data.streams`.
_SCORE, _ANEW = 1, 2  # Uses of the key of a stage.
_GRADIENTS: dict[str, Score] = {
    "snip": scores.saliency,  # Of the sum over all batches.
    "saliency": scores.saliency,
    "gradient": scores.gradient,
}
# Forward passes that a score takes; a backward pass counts as two.
_PASSES = {
    "snip": 3,
    "saliency": 3,
    "gradient": 3,
    "fisher": 3,
    "grasp": 12,
    "wanda": 1,
    "synflow": 3,
}


class Arrival(NamedTuple):
    """What an arrival does to the network.

    Attributes:
      densities: part of the prunable weights that is left at every stage, None where
        nothing is pruned; empty for a network that no arrival prunes.
      anew: whether every stage begins with a new network.
    """

    densities: tuple[float | None, ...] = ()
    anew: bool = False


class Scoring(NamedTuple):
    """How a network is scored.

    Attributes:
      score: which weights matter.
      grads: gradients that the score looks at, or None.
      iterations: prunings in geometric steps.
      macs: multiply-accumulates of its passes, over all examples.
    """

    score: Score
    grads: PyTree
    iterations: int
    macs: float


Prune = Callable[[TrainState, Data, float, int], tuple[TrainState, float]]


def make_pruner(training: Training, options: StreamOptions) -> Prune:
    """Prunes by the criterion of the options; what it compiles serves all stages.

    Args:
      training: whose network is pruned; its optimiser is made by `sparsify`.
      options: the criterion, and what it looks at.

    Returns:
      `(state, sample, density, stage) -> (state, macs)`: the state under masks of that
      density by scores on the sample, and the multiply-accumulates of scoring.
    """
    score = _make_scorer(training, options)
    shares = {"global": distributions.global_, "leaf": distributions.uniform}

    def prune(
        state: TrainState, sample: Data, density: float, stage: int
    ) -> tuple[TrainState, float]:
        masks, weights = get_masks(state.opt_state), state.params
        weights_key, score_key = jax.random.split(_stage_key(state, _SCORE, stage))
        if options.score_weights == "fresh" and stage:
            weights = fresh_weights(weights, training.network.prunable, weights_key)
        scoring = score(weights, masks, state, sample)
        rule = rules.one_shot(
            1 - density,
            scoring.score,
            shares[options.scope],
            training.network.prunable,
            iterations=scoring.iterations,
        )
        grads, dead = scoring.grads, options.dead
        masks = anytime.prune(masks, weights, rule, grads, dead, score_key)
        pruned = state._replace(
            params=apply_masks(state.params, masks),
            opt_state=set_masks(state.opt_state, masks),
        )
        return pruned, scoring.macs

    return prune


def new_network(
    training: Training, state: TrainState, data: Data, stage: int
) -> TrainState:
    """A network that has learned nothing, in place of that of the state.

    Args:
      training: whose network it is.
      state: its steps, faults and settings are kept.
      data: training data.
      stage: number of the stage, which it is drawn for.
    """
    key = _stage_key(state, _ANEW, stage)
    begun = training.init(training, key, data, state.settings)
    return begun._replace(step=state.step, faults=state.faults)


def sample_of(
    options: StreamOptions, timetable: Timetable, state: TrainState, stage: int
) -> np.ndarray:
    """int[n]: the examples that a network is scored on when a stage begins."""
    shown = timetable.arrived if options.score_on == "new" else timetable.visible
    examples = shown[stage].train
    if options.score_sample == "random":
        seed = int(state.settings["seed"])
        examples = shuffled(examples, (seed, _SAMPLE, stage))
    return examples[: timetable.scored]


def fresh_weights(params: PyTree, prunable: Prunable, key: jax.Array) -> PyTree:
    """The parameters with new random prunable leaves, uniform in +-1 / sqrt(fan in).

    What the released code of APP (arXiv 2204.01640) scores from its second stage on:
    the weights of its checkpoints have other names than those of the network that is
    scored, which keeps what PyTorch has drawn.

    >>> params = {"kernel": jnp.ones((16, 2)), "bias": jnp.ones(2)}
    >>> drawn = fresh_weights(params, tree.is_kernel, jax.random.key(0))
    >>> bool(jnp.max(jnp.abs(drawn["kernel"])) <= 1 / 4), drawn["bias"].tolist()
    (True, [1.0, 1.0])
    """
    kernels = tree.prunable_leaves(params, prunable)
    keys = jax.random.split(key, len(kernels))
    drawn = {}
    for leaf_key, (path, leaf) in zip(keys, kernels.items(), strict=True):
        bound = 1 / math.sqrt(math.prod(leaf.shape[:-1]))
        drawn[path] = jax.random.uniform(
            leaf_key, leaf.shape, leaf.dtype, -bound, bound
        )
    return tree.replace(params, drawn)


def _stage_key(state: TrainState, use: int, stage: int) -> jax.Array:
    key = jax.random.key(int(state.settings["seed"]))
    return jax.random.fold_in(jax.random.fold_in(key, use), stage)


def _make_scorer(training: Training, options: StreamOptions) -> Callable[..., Scoring]:
    """`(weights, masks, state, sample) -> scoring` of a forward pass of live weights.

    Normalisations use the statistics of the batch and forget them.
    """
    criterion, model = options.criterion, training.model

    @jax.jit
    def gradient(params: PyTree, model_state: PyTree, batch: Data) -> PyTree:
        def loss(params: PyTree) -> jax.Array:
            logits = make_logits(model, model_state, train=True)
            each = cross_entropy(
                logits(params, training.inputs(batch, None)), batch.labels
            )
            return jnp.sum(each)

        return jax.grad(loss)(params)

    def cost(masks: PyTree, examples: int) -> float:
        forward = macs.masked_macs(training.network.macs, jax.device_get(masks))
        return _PASSES[criterion] * examples * float(forward)

    def score(
        weights: PyTree, masks: PyTree, state: TrainState, sample: Data
    ) -> Scoring:
        if criterion in ("magnitude", "random"):
            return Scoring(getattr(scores, criterion), None, 1, 0.0)
        live = apply_masks(weights, masks)
        if criterion in _GRADIENTS:
            grads = _sum_over_batches(
                lambda batch: gradient(live, state.model_state, batch),
                sample,
                options.score_batch,
            )
            spent = cost(masks, len(sample.labels))
            return Scoring(_GRADIENTS[criterion], grads, 1, spent)
        if criterion == "synflow":
            shape = training.inputs(sample, None).shape[1:]
            logits = make_logits(model, state.model_state, train=False)
            # One example of ones, in place of the sample.
            spent = cost(masks, SYNFLOW_ITERATIONS)
            flow = scores.synflow(logits, shape)
            return Scoring(flow, None, SYNFLOW_ITERATIONS, spent)
        spent = cost(masks, len(sample.labels))
        found = _score_at_once(training, criterion, live, state.model_state, sample)
        return Scoring(found, None, 1, spent)

    return score


def _score_at_once(
    training: Training, criterion: str, live: PyTree, model_state: PyTree, sample: Data
) -> Score:
    x, model = training.inputs(sample, None), training.model
    if criterion == "wanda":
        return scores.wanda(kernel_inputs(model, live, model_state, x))
    batches = [(x, sample.labels)]
    if criterion == "grasp":
        return scores.grasp(make_logits(model, model_state, train=True), batches)
    return scores.fisher(make_logits(model, model_state, train=False), batches)


def _sum_over_batches(
    f: Callable[[Data], PyTree], sample: Data, batch_size: int
) -> PyTree:
    size = len(sample.labels)
    rows = [np.arange(i, min(i + batch_size, size)) for i in range(0, size, batch_size)]
    first, *others = (f(take(sample, jnp.asarray(row))) for row in rows)
    for other in others:
        first = jax.tree.map(jnp.add, first, other)
    return first
