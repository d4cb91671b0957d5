"""Pruned by scores on the training data: before training, or in its middle."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse import distributions, lottery, masks, rules, scores
from d2sparse.constraints.masked import Structure, shared, under_masks
from d2sparse.distributions import hand_out
from d2sparse.losses import cross_entropy
from d2sparse.masks import dense_masks
from d2sparse.models import Model, taps
from d2sparse.scores import Score
from d2sparse.train import (
    Constraint,
    Data,
    Phase,
    Program,
    Progress,
    Training,
    TrainState,
    check_finite,
    growth_batch,
)
from d2sparse.transforms import get_masks
from d2sparse.tree import Counts, PyTree

SYNFLOW_ITERATIONS = 100

MakeScore = Callable[[Training, TrainState, Data], Score]


def snip(
    sparsity: float, samples: int = 256, structure: Structure | None = None
) -> Constraint:
    """SNIP: pruned at initialisation by the saliency of weights on some examples.

    From Lee et al. (arXiv 1810.02340), see `d2sparse.scores.snip`.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1).
      samples: examples that are looked at, drawn by the key of the run.
      structure: which masks are possible; all leaves compete if it names no
        distribution.
    """

    def score(training: Training, state: TrainState, data: Data) -> Score:
        predict = make_logits(training.model, state.model_state, train=True)

        def loss(params: PyTree, batch: Any) -> jax.Array:
            return jnp.mean(cross_entropy(predict(params, batch[0]), batch[1]))

        return scores.snip(loss, [_pair(training, data)])

    return _before_training("snip", score, sparsity, samples, structure)


def grasp(
    sparsity: float, samples: int = 256, structure: Structure | None = None
) -> Constraint:
    """GraSP: pruned at initialisation by what keeps the gradient flowing.

    From Wang et al. (arXiv 2002.07376), see `d2sparse.scores.grasp`. Arguments as in
    `snip`.
    """

    def score(training: Training, state: TrainState, data: Data) -> Score:
        predict = make_logits(training.model, state.model_state, train=True)
        return scores.grasp(predict, [_pair(training, data)])

    return _before_training("grasp", score, sparsity, samples, structure)


def fisher(
    sparsity: float, samples: int = 256, structure: Structure | None = None
) -> Constraint:
    """Pruned at initialisation by the empirical Fisher information of weights.

    See `d2sparse.scores.fisher`. Arguments as in `snip`.
    """

    def score(training: Training, state: TrainState, data: Data) -> Score:
        predict = make_logits(training.model, state.model_state, train=False)
        return scores.fisher(predict, [_pair(training, data)])

    return _before_training("fisher", score, sparsity, samples, structure)


def synflow(sparsity: float, structure: Structure | None = None) -> Constraint:
    """SynFlow: pruned at initialisation by synaptic flow, in a hundred iterations.

    From Tanaka et al. (arXiv 2006.05467), see `d2sparse.scores.synflow`. It looks at no
    data. Other arguments as in `snip`.
    """

    def score(training: Training, state: TrainState, data: Data) -> Score:
        shape = training.inputs(data, None).shape[1:]
        return scores.synflow(
            make_logits(training.model, state.model_state, train=False), shape
        )

    return _before_training("synflow", score, sparsity, 1, structure)


def wanda(
    sparsity: float,
    prune_at: float = 0.5,
    samples: int = 256,
    structure: Structure | None = None,
) -> Constraint:
    """Wanda: pruned once by weights times the norms of their inputs.

    Every output keeps as many weights. From Sun et al. (arXiv 2306.11695), see
    `d2sparse.scores.wanda`.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1).
      prune_at: part of the training before the pruning, in [0, 1).
      samples: examples whose activations are looked at, drawn by the key of the run.
      structure: which masks are possible; uniform if it names no distribution.
    """

    def constrained(training: Training) -> Training:
        own = shared(training, structure)
        own["distribution"] = own["distribution"] or distributions.uniform
        is_global = own["distribution"] is distributions.global_
        if own["selection"] is masks.select and not is_global:
            own["selection"] = per_output

        def prune(progress: Progress, data: Data, program: Program) -> Progress:
            state = progress.state
            t = program.training
            x = t.inputs(_sample(state, data, samples), None)
            entering = kernel_inputs(t.model, state.params, state.model_state, x)
            check_finite(entering, "activations", state)
            rule = rules.one_shot(sparsity, scores.wanda(entering), **own)
            pruned = lottery.rewind(state, _prune_once(state, rule))
            return progress._replace(state=pruned)

        step = int(prune_at * training.horizon)
        dense = dense_masks(training.network.params)
        masked = under_masks(training, "wanda", lambda s: rules.fixed(dense))
        return masked._replace(phases=(Phase(step), Phase(training.horizon, prune)))

    return constrained


def _before_training(
    who: str,
    score: MakeScore,
    sparsity: float,
    samples: int,
    structure: Structure | None,
) -> Constraint:
    iterations = SYNFLOW_ITERATIONS if who == "synflow" else 1

    def constrained(training: Training) -> Training:
        own = shared(training, structure)

        def prune(progress: Progress, data: Data, program: Program) -> Progress:
            progress = first.enter(progress, data, program)
            state = progress.state
            found = score(program.training, state, _sample(state, data, samples))
            if iterations > 1:  # They are compiled: look at the first scores apart.
                _prune_once(state, rules.one_shot(sparsity, found, **own))
            rule = rules.one_shot(sparsity, found, iterations=iterations, **own)
            pruned = lottery.rewind(state, _prune_once(state, rule))
            return progress._replace(state=pruned)

        first, *others = training.phases
        dense = dense_masks(training.network.params)
        masked = under_masks(training, who, lambda s: rules.fixed(dense))
        return masked._replace(phases=(first._replace(enter=prune), *others))

    return constrained


def per_output(
    scores: dict[str, jax.Array], counts: Counts, tie_key: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The largest scores of every output; all outputs of a leaf keep as many weights.

    A `d2sparse.masks.Selection`, for distributions with a number for every leaf. The
    last axis of a leaf is that of its outputs; the first ones keep the weights that are
    left over, and others what an output has not enough eligible weights for.
    """
    del tie_key
    assert isinstance(counts, Mapping)
    return {
        path: _largest_of_each(score, counts[path]) for path, score in scores.items()
    }


@jax.jit
def _largest_of_each(score: jax.Array, count: Any) -> jax.Array:
    columns = score.reshape(-1, score.shape[-1])
    eligible = jnp.sum(columns > -jnp.inf, axis=0)
    even = (count + jnp.arange(len(eligible))[::-1]) // len(eligible)
    possible = jnp.minimum(even, eligible)
    possible = hand_out(count - jnp.sum(possible), possible, eligible)
    top = jax.vmap(masks.top_k, in_axes=(1, 0), out_axes=1)
    return top(columns, possible).reshape(score.shape)


def _prune_once(state: TrainState, rule: rules.MaskRule) -> PyTree:
    # Not compiled as a whole: a rule refuses NaN among scores that it can see.
    live = get_masks(state.opt_state)
    return rule.update(live, state.params, None, 0, jax.random.key(0))


def kernel_inputs(
    model: Model, params: PyTree, model_state: PyTree, x: Any
) -> dict[str, jax.Array]:
    """The activations that enter every kernel, by its path."""
    read = taps.read(model.apply)
    _, tapped = read(params, model_state, x, train=False)
    return {f"{path}/kernel": tap.input for path, tap in tapped.items()}


def make_logits(
    model: Model, model_state: PyTree, train: bool
) -> Callable[[PyTree, jax.Array], jax.Array]:
    """`(params, x) -> logits` of a network, with given statistics."""

    def logits(params: PyTree, x: jax.Array) -> jax.Array:
        return model.apply(params, model_state, x, train=train)[0]

    return logits


def _sample(state: TrainState, data: Data, samples: int) -> Data:
    """Examples that scores are taken on, drawn by the key of the run."""
    return growth_batch(data, samples, jax.random.fold_in(state.key, 0))


def _pair(training: Training, data: Data) -> tuple[jax.Array, jax.Array]:
    return training.inputs(data, None), data.labels
