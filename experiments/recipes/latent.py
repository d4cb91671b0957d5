"""Methods whose forward pass sees other weights than those that are trained."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from d2sparse import distributions, masks, reparam, rules, tree
from d2sparse.masks import dense_masks
from d2sparse.models import Model
from d2sparse.rules import MaskRule
from d2sparse.schedules import at, every
from d2sparse.transforms import freeze, get_masks, sparsify
from d2sparse.tree import PyTree
from experiments.recipes.arguments import Shared, rehearse
from experiments.recipes.groups import Makers, by_recipe
from experiments.recipes.options import Options
from experiments.singles import Method, Recipe, single
from experiments.task import Task

Wrap = Callable[..., optax.GradientTransformationExtraArgs]

_THRESHOLD_START = -10.0  # Its sigmoid is 0.000045, which prunes next to nothing.


def methods(task: Task, options: Options, shared: Shared) -> Makers:
    """Methods by name."""

    def top_kast() -> Recipe:
        """Top-KAST without the exploration penalty of its paper."""
        forward = rules.largest(task.sparsity, **shared)
        density = min(options.backward_density * (1 - task.sparsity), 1.0)
        # Both sets are chosen in every step, so that the forward one is a part.
        return Recipe(
            rules.largest(1 - density, **shared),
            every(1),
            wrap=freeze,
            effective=lambda p: reparam.straight_through(p, _chosen(forward, p)),
            trained=lambda state: get_masks(state.opt_state),
        )

    def powerprop() -> Method:
        """Pruned by the magnitude of theta, which orders weights as their own does."""
        when = at([int(options.prune_at * task.steps)])
        recipe = Recipe(lambda s: rules.one_shot(s, **shared), when)
        return single(_in_powers(task, options.power), recipe)

    return by_recipe(task, {"top_kast": top_kast}) | {"powerprop": powerprop}


def without_pattern(task: Task, options: Options) -> Makers:
    """Methods that have a pattern of their own, by name."""

    def sr_ste() -> Recipe:
        _refuse_pattern(
            "sr_ste, which is n:m in every leaf", options, ("auto", "uniform")
        )
        own = {
            "distribution": distributions.uniform,
            "prunable": task.prunable,
            "selection": masks.n_of_m(options.group),
        }
        rehearse(task, options, own)
        n_of_m = rules.largest(task.sparsity, **own)
        return Recipe(
            rules.static(0.0),
            effective=lambda p: reparam.sr_ste(p, _chosen(n_of_m, p)),
            trained=lambda state: dense_masks(state.params),
        )

    def str_() -> Method:
        _refuse_pattern("str, which learns where its zeros are", options, ("auto",))
        return single(
            _with_thresholds(task),
            Recipe(
                rules.static(0.0),
                wrap=_decay_thresholds(options.threshold_decay),
                effective=lambda p: reparam.soft_threshold(**p),
            ),
        )

    return by_recipe(task, {"sr_ste": sr_ste}) | {"str": str_}


def _refuse_pattern(who: str, options: Options, distributions: tuple[str, ...]) -> None:
    if (
        options.pattern != "unstructured"
        or options.distribution not in distributions
        or options.layer_sparsities
    ):
        table = ",".join(options.layer_sparsities)
        layers = f" and layer_sparsities={table}" if table else ""
        raise ValueError(
            f"expected no other pattern for {who}, got pattern={options.pattern} and "
            f"distribution={options.distribution}{layers}; leave them away"
        )


def _in_powers(task: Task, alpha: float) -> Task:
    """The task with `theta` for weights: the same network at the start."""

    def thetas(params: PyTree) -> PyTree:
        return reparam.powerprop_inverse(params, alpha, task.prunable)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        params, model_state = task.model.init(key, x)
        return thetas(params), model_state

    def apply(params: PyTree, *args: Any, **kwargs: Any) -> tuple[jax.Array, PyTree]:
        weights = reparam.powerprop(params, alpha, task.prunable)
        return task.model.apply(weights, *args, **kwargs)

    ticket = task.ticket and task.ticket._replace(params=thetas(task.ticket.params))
    return task._replace(model=Model(init, apply), ticket=ticket)


def _with_thresholds(task: Task) -> Task:
    """The task with the arguments of `soft_threshold` for parameters."""

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        params, model_state = task.model.init(key, x)
        thresholds = reparam.init_thresholds(params, _THRESHOLD_START, task.prunable)
        return {"params": params, "thresholds": thresholds}, model_state

    return task._replace(model=task.model._replace(init=init))


def _decay_thresholds(strength: float) -> Wrap:
    """`sparsify`, with weight decay on the thresholds too."""
    decay = optax.add_decayed_weights(strength, mask=_thresholds)

    def wrap(
        inner: optax.GradientTransformation, *rest: Any
    ) -> optax.GradientTransformationExtraArgs:
        return sparsify(optax.chain(decay, inner), *rest)

    return wrap


def _thresholds(params: PyTree) -> PyTree:
    return tree.map_with_path(lambda path, leaf: path.startswith("thresholds/"), params)


def _chosen(rule: MaskRule, params: PyTree) -> PyTree:
    return rule.update(None, params, None, 0, jax.random.key(0))
