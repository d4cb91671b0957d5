"""Methods that prune by scores on the data of the seed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from d2sparse import distributions, lottery, masks, rules, scores, train
from d2sparse.distributions import hand_out
from d2sparse.losses import cross_entropy
from d2sparse.masks import dense_masks
from d2sparse.models import Model
from d2sparse.scores import Score
from d2sparse.train import Data, TrainState
from d2sparse.transforms import get_masks
from d2sparse.tree import Counts, PyTree
from experiments.finite import check_finite
from experiments.recipes.arguments import Shared
from experiments.recipes.groups import Makers, by_recipe
from experiments.recipes.options import Options
from experiments.session import Session
from experiments.singles import Method, Recipe, make_network, train_through
from experiments.task import Task

SYNFLOW_ITERATIONS = 100


def before_training(task: Task, options: Options, shared: Shared) -> Makers:
    """Methods that prune the initial network, by name."""

    def recipe(
        make_score: Callable[[TrainState, Data], Score], iterations: int = 1
    ) -> Recipe:
        def choose(state: TrainState, data: Data) -> PyTree:
            score = make_score(state, _sample(state, data, options.score_samples))
            if iterations > 1:  # They are compiled: look at the first scores apart.
                _prune_once(state, rules.one_shot(task.sparsity, score, **shared))
            rule = rules.one_shot(task.sparsity, score, iterations=iterations, **shared)
            return _prune_once(state, rule)

        return Recipe(rules.fixed(dense_masks(task.params)), choose=choose)

    predict = functools.partial(make_logits, task)

    def snip(state: TrainState, data: Data) -> Score:
        def loss(params: PyTree, batch: Any) -> jax.Array:
            logits = predict(state, train=True)(params, batch[0])
            return jnp.mean(cross_entropy(logits, batch[1]))

        return scores.snip(loss, [_pair(data)])

    def synflow(state: TrainState, data: Data) -> Score:
        shape = train.inputs(data).shape[1:]
        return scores.synflow(predict(state, train=False), shape)

    return by_recipe(
        task,
        {
            "snip": lambda: recipe(snip),
            "grasp": lambda: recipe(
                lambda state, data: scores.grasp(predict(state, True), [_pair(data)])
            ),
            "fisher": lambda: recipe(
                lambda state, data: scores.fisher(predict(state, False), [_pair(data)])
            ),
            "synflow": lambda: recipe(synflow, SYNFLOW_ITERATIONS),
        },
    )


def after_training(task: Task, options: Options, shared: Shared) -> Makers:
    """Methods that prune a network that is trained, by name."""

    def wanda() -> Method:
        own = shared
        is_global = shared["distribution"] is distributions.global_
        if shared["selection"] is masks.select and not is_global:
            own = {**shared, "selection": per_output}
        network = make_network(task, Recipe(rules.fixed(dense_masks(task.params))))
        prune_step = int(options.prune_at * task.steps)

        def pruned(state: TrainState, data: Data) -> TrainState:
            x = train.inputs(_sample(state, data, options.score_samples))
            inputs = kernel_inputs(task.model, state.params, state.model_state, x)
            check_finite(inputs, "activations", state)
            rule = rules.one_shot(task.sparsity, scores.wanda(inputs), **own)
            return lottery.rewind(state, _prune_once(state, rule))

        def fit(
            sessions: Sequence[Session],
            states: Sequence[TrainState],
            data: Sequence[Data],
        ) -> Sequence[TrainState]:
            # What was interrupted later has been pruned.
            if int(states[0].step) <= prune_step:
                trained = train_through(network.run, prune_step)(sessions, states, data)
                states = [pruned(*own) for own in zip(trained, data, strict=True)]
            rest = train_through(network.run, task.steps, network.settle)
            return rest(sessions, states, data)

        return Method(
            network.init,
            fit,
            network.predict,
            network.costs,
            network.live,
            settle=network.settle,
        )

    return {"wanda": wanda}


def make_logits(
    task: Task, state: TrainState, train: bool
) -> Callable[[PyTree, jax.Array], jax.Array]:
    """`(params, x) -> logits` of the task's network, with the statistics of a state."""

    def logits(params: PyTree, x: jax.Array) -> jax.Array:
        return task.model.apply(params, state.model_state, x, train=train)[0]

    return logits


def kernel_inputs(
    model: Model, params: PyTree, model_state: PyTree, x: jax.Array
) -> dict[str, jax.Array]:
    """What enters the dense layers and convolutions of a Flax network.

    Args:
      model: the network, as `from_linen` wraps it.
      params: its weights.
      model_state: its normalisation statistics.
      x: float[batch, height, width, channels].

    Returns:
      float[batch, ..., features] by the path of the kernel.
    """
    found = {}

    def note(
        layer: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> jax.Array:
        module = context.module
        if isinstance(module, nn.Dense | nn.Conv) and context.method_name == "__call__":
            found["/".join((*module.path, "kernel"))] = args[0]
        return layer(*args, **kwargs)

    with nn.intercept_methods(note):
        model.apply(params, model_state, x, train=False)
    return found


def per_output(
    scores: dict[str, jax.Array], counts: Counts, tie_key: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The largest scores of every output; all outputs of a leaf keep as many weights.

    A `d2sparse.masks.Selection`, for distributions with a number for every leaf. The
    last axis of a leaf is that of its outputs; the first ones keep the weights that are
    left over, and others what an output has not enough eligible weights for.
    """
    del tie_key
    return {
        path: _largest_of_each(score, counts[path]) for path, score in scores.items()
    }


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
    masks = get_masks(state.opt_state)
    return rule.update(masks, state.params, None, 0, jax.random.key(0))


def _sample(state: TrainState, data: Data, samples: int) -> Data:
    """Examples that scores are taken on, drawn by the key of the run."""
    return train.growth_batch(data, samples, jax.random.fold_in(state.key, 0))


def _pair(data: Data) -> tuple[jax.Array, jax.Array]:
    return train.inputs(data), data.labels
