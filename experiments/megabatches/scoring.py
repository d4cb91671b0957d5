"""What a network is pruned by when a megabatch arrives."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import macs, scores, train, tree
from d2sparse.losses import cross_entropy
from d2sparse.masks import apply_masks
from d2sparse.models import taps
from d2sparse.scores import Score
from d2sparse.train import Data, TrainState
from d2sparse.tree import PyTree
from experiments.recipes.scored import SYNFLOW_ITERATIONS, make_logits
from experiments.task import Task

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


class Scoring(NamedTuple):
    """How a network is scored.

    Attributes:
      score: which weights matter.
      grads: gradients that the score looks at, or None.
      iterations: prunings in geometric steps.
      macs: what it costs, forward and backward, over all examples.
    """

    score: Score
    grads: PyTree
    iterations: int
    macs: float


Scorer = Callable[[PyTree, PyTree, TrainState, Data], Scoring]


def make_scorer(task: Task, criterion: str, batch_size: int) -> Scorer:
    """Scores of a network on a sample, compiled once for all stages.

    Normalisations use the statistics of the batch and forget them.

    Args:
      task: whose network is scored.
      criterion: a name, of `options.CRITERIA`.
      batch_size: examples of one batch.

    Returns:
      `(params, masks, state, sample) -> scoring` of the weights `params`, whose forward
      pass is that of the live ones.
    """

    @jax.jit
    def gradient(params: PyTree, model_state: PyTree, batch: Data) -> PyTree:
        def loss(params: PyTree) -> jax.Array:
            x = train.inputs(batch)
            logits, _ = task.model.apply(params, model_state, x, train=True)
            return jnp.sum(cross_entropy(logits, batch.labels))

        return jax.grad(loss)(params)

    def cost(masks: PyTree, examples: int) -> float:
        forward = float(macs.masked_macs(task.macs, jax.device_get(masks)))
        return _PASSES.get(criterion, 0) * examples * forward

    def scorer(
        params: PyTree, masks: PyTree, state: TrainState, sample: Data
    ) -> Scoring:
        if criterion in ("magnitude", "random"):
            return Scoring(getattr(scores, criterion), None, 1, 0.0)
        spent, live = cost(masks, len(sample.labels)), apply_masks(params, masks)
        if criterion in _GRADIENTS:
            grads = _sum_over_batches(
                lambda batch: gradient(live, state.model_state, batch),
                sample,
                batch_size,
            )
            return Scoring(_GRADIENTS[criterion], grads, 1, spent)
        if criterion == "synflow":
            shape = sample.images.shape[1:]
            score = scores.synflow(make_logits(task, state, train=False), shape)
            # One example of ones, in place of the sample.
            spent = cost(masks, SYNFLOW_ITERATIONS)
            return Scoring(score, None, SYNFLOW_ITERATIONS, spent)
        return Scoring(_score_on(criterion, task, state, live, sample), None, 1, spent)

    return scorer


def fresh_weights(params: PyTree, task: Task, key: jax.Array) -> PyTree:
    """The parameters with new random prunable kernels, uniform in +-1 / sqrt(fan in).

    What the released code of APP scores from its second stage on: the weights of its
    checkpoints go by other names than those of the network that is scored, and stay
    what PyTorch has drawn (arXiv 2204.01640, its code).
    """
    kernels = tree.prunable_leaves(params, task.prunable)
    keys = jax.random.split(key, len(kernels))
    drawn = {}
    for own, (path, leaf) in zip(keys, kernels.items(), strict=True):
        bound = 1 / math.sqrt(math.prod(leaf.shape[:-1]))
        drawn[path] = jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)
    return tree.replace(params, drawn)


def _score_on(
    criterion: str, task: Task, state: TrainState, live: PyTree, sample: Data
) -> Score:
    x = train.inputs(sample)
    batch = (x, sample.labels)
    if criterion == "grasp":
        return scores.grasp(make_logits(task, state, train=True), [batch])
    if criterion == "fisher":
        return scores.fisher(make_logits(task, state, train=False), [batch])
    _, tapped = taps.read(task.model.apply)(live, state.model_state, x, train=False)
    return scores.wanda({f"{path}/kernel": tap.input for path, tap in tapped.items()})


def _sum_over_batches(
    f: Callable[[Data], PyTree], sample: Data, batch_size: int
) -> PyTree:
    size = len(sample.labels)
    rows = [np.arange(i, min(i + batch_size, size)) for i in range(0, size, batch_size)]
    first, *others = (f(train.take(sample, jnp.asarray(row))) for row in rows)
    for other in others:
        first = jax.tree.map(jnp.add, first, other)
    return first
