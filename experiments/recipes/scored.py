"""Methods that prune by scores on the data of the seed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse import distributions, lottery, masks, rules, scores, train
from d2sparse.constraints.scored import SYNFLOW_ITERATIONS, per_output
from d2sparse.losses import cross_entropy
from d2sparse.masks import dense_masks
from d2sparse.models import taps
from d2sparse.scores import Score
from d2sparse.train import Data, TrainState
from d2sparse.transforms import get_masks
from d2sparse.tree import PyTree
from experiments.finite import check_finite
from experiments.recipes.arguments import Shared
from experiments.recipes.groups import Makers, by_recipe
from experiments.recipes.options import Options
from experiments.session import Session
from experiments.singles import Method, Recipe, make_network, train_through
from experiments.task import Task


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
            read = taps.read(task.model.apply)
            _, tapped = read(state.params, state.model_state, x, train=False)
            inputs = {f"{path}/kernel": tap.input for path, tap in tapped.items()}
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


def _prune_once(state: TrainState, rule: rules.MaskRule) -> PyTree:
    # Not compiled as a whole: a rule refuses NaN among scores that it can see.
    masks = get_masks(state.opt_state)
    return rule.update(masks, state.params, None, 0, jax.random.key(0))


def _sample(state: TrainState, data: Data, samples: int) -> Data:
    """Examples that scores are taken on, drawn by the key of the run."""
    return train.growth_batch(data, samples, jax.random.fold_in(state.key, 0))


def _pair(data: Data) -> tuple[jax.Array, jax.Array]:
    return train.inputs(data), data.labels
