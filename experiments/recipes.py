"""The methods of sparse training by name, with what each needs around its rule."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from d2sparse import distributions, masks, reparam, rules, scores, train
from d2sparse.distributions import Distribution
from d2sparse.losses import cross_entropy
from d2sparse.masks import Selection, dense_masks
from d2sparse.rules import MaskRule
from d2sparse.schedules import alternating, at, cosine, cubic, every, refresh_stop
from d2sparse.scores import Score
from d2sparse.train import Data, TrainState
from d2sparse.transforms import freeze, get_masks
from d2sparse.tree import PyTree
from experiments.singles import Recipe
from experiments.task import (
    PrunableName,
    Task,
    check_choice,
    check_least,
    make_prunable,
)

RecipeName = Literal[
    "dense",
    "fixed",
    "random",
    "static",
    "one_shot",
    "gradual",
    "movement",
    "set",
    "rigl",
    "sparse_momentum",
    "granet",
    "ac_dc",
    "top_kast",
    "sr_ste",
    "snip",
    "grasp",
    "synflow",
    "fisher",
]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
DistributionName = Literal["auto", "global", "uniform", "er", "erk"]
PatternName = Literal["unstructured", "n_of_m", "blocks", "channels"]
ScoreName = Literal["magnitude", "random", "saliency", "gradient"]

_CHOICES = {
    "distribution": get_args(DistributionName),
    "pattern": get_args(PatternName),
    "score": get_args(ScoreName),
}
_SYNFLOW_ITERATIONS = 100

Shared = dict[str, Any]  # The arguments that all rules have.
Makers = dict[str, Callable[[], Recipe]]


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags that the recipes can be varied by."""

    # How layers share the live weights; auto is erk for static, set, rigl and
    # sparse_momentum, and global for all others.
    distribution: DistributionName = "auto"
    pattern: PatternName = "unstructured"  # which weights live and die together
    group: int = 4  # m of n:m, in the pattern n_of_m and in sr_ste; side of blocks
    prunable: PrunableName = "kernels"  # body leaves the first layer and the head dense
    score: ScoreName = "magnitude"  # what one_shot and gradual prune by
    # Part of the live weights that set, rigl, sparse_momentum and granet move at the
    # start; falls to 0 along a cosine.
    drop_fraction: float = 0.3
    prune_at: float = 0.5  # part of the run after which one_shot prunes
    start_sparsity: float = 0.5  # of the random pattern that granet begins with
    backward_density: float = 2.0  # weights top_kast trains for each one that it uses
    score_samples: int = 256  # examples that snip, grasp and fisher look at


def make_recipe(name: str, task: Task, options: Options) -> Recipe:
    """How a network of the task's sparsity is trained, by the name of the method.

    Masks are refreshed every `task.interval` steps until three quarters of the run.

    Raises:
      ValueError: unknown name, an option out of its range, a pattern that does not fit
        a leaf, or a run that is too short for the method.
    """
    _check(options)
    own = _without_pattern(task, options)
    if name in own:
        return own[name]()
    for make, suited in _GROUPS:
        shared = _shared(task, options, suited)
        recipes = make(task, options, shared)
        if name in recipes:
            _rehearse(task, shared)
            return recipes[name]()
    raise ValueError(f"expected a rule of {', '.join(RECIPES)}, got {name!r}")


def _without_pattern(task: Task, options: Options) -> Makers:
    """Methods that stay dense, or have a pattern of their own."""

    def sr_ste() -> Recipe:
        given = options.pattern, options.distribution
        if given[0] != "unstructured" or given[1] not in ("auto", "uniform"):
            raise ValueError(
                "expected no other pattern for sr_ste, which is n:m in every leaf, "
                f"got pattern={given[0]} and distribution={given[1]}; leave both away"
            )
        own = {
            "distribution": distributions.uniform,
            "prunable": task.prunable,
            "selection": masks.n_of_m(options.group),
        }
        _rehearse(task, own)
        n_of_m = rules.largest(task.sparsity, **own)
        return Recipe(
            rules.static(0.0),
            effective=lambda p: reparam.sr_ste(p, _chosen(n_of_m, p)),
            trained=_everything,
        )

    return {
        "dense": lambda: Recipe(rules.static(0.0)),
        "fixed": lambda: Recipe(rules.fixed(dense_masks(task.params))),
        "sr_ste": sr_ste,
    }


def _prune(task: Task, options: Options, shared: Shared) -> Makers:
    """Methods that lose weights in training; all but GraNet begin dense."""
    sparsity, stop = task.sparsity, refresh_stop(task.steps)
    when = every(task.interval, stop=stop)
    score: Score = getattr(scores, options.score)

    def one_shot() -> Recipe:
        rule = rules.one_shot(sparsity, score, **shared)
        return Recipe(rule, at([int(options.prune_at * task.steps)]))

    def gradual(score: Score) -> Recipe:
        ramp = cubic(sparsity, _last_refresh(task))
        return Recipe(rules.gradual(ramp, score, **shared), when)

    def movement() -> Recipe:
        ramp = cubic(sparsity, _last_refresh(task))
        return Recipe(rules.movement(ramp, **shared), when)

    def granet() -> Recipe:
        begin = min(options.start_sparsity, sparsity)
        ramp = cubic(sparsity, _last_refresh(task), start=begin)
        rule = rules.granet(ramp, cosine(options.drop_fraction, stop), **shared)
        return Recipe(rule, when, task.mean_interval(task.interval))

    def ac_dc() -> Recipe:
        phase = max(stop // 6, 1)
        last = 5 * phase
        if last >= task.steps:
            raise ValueError(
                f"expected more than {last} steps, for the dense and sparse phases of "
                f"ac_dc, got {task.steps}; raise --steps"
            )
        rule = rules.ac_dc(sparsity, alternating(phase, stop=last), **shared)
        return Recipe(rule, every(phase, stop=last + 1))

    def top_kast() -> Recipe:
        """Top-KAST without the exploration penalty of its paper."""
        forward = rules.largest(sparsity, **shared)
        density = min(options.backward_density * (1 - sparsity), 1.0)
        # Both sets are chosen in every step, so that the forward one is a part.
        return Recipe(
            rules.largest(1 - density, **shared),
            every(1),
            wrap=freeze,
            effective=lambda p: reparam.straight_through(p, _chosen(forward, p)),
            trained=lambda state: get_masks(state.opt_state),
        )

    return {
        "random": lambda: gradual(scores.random),
        "one_shot": one_shot,
        "gradual": lambda: gradual(score),
        "movement": movement,
        "granet": granet,
        "ac_dc": ac_dc,
        "top_kast": top_kast,
    }


def _move(task: Task, options: Options, shared: Shared) -> Makers:
    """Methods that are as sparse from the start; most of them move their weights."""
    sparsity, stop = task.sparsity, refresh_stop(task.steps)
    when, drop = every(task.interval, stop=stop), cosine(options.drop_fraction, stop)

    def set_() -> Recipe:
        _last_refresh(task)  # Complains where there is none.
        return Recipe(rules.set_(sparsity, drop, **shared), when)

    def rigl() -> Recipe:
        _last_refresh(task)
        interval = task.mean_interval(task.interval)
        return Recipe(rules.rigl(sparsity, drop, **shared), when, interval)

    def sparse_momentum() -> Recipe:
        _last_refresh(task)
        rule = rules.sparse_momentum(sparsity, drop, **shared)
        return Recipe(rule, when, trained=_everything)

    return {
        "static": lambda: Recipe(rules.static(sparsity, **shared)),
        "set": set_,
        "rigl": rigl,
        "sparse_momentum": sparse_momentum,
    }


def _before_training(task: Task, options: Options, shared: Shared) -> Makers:
    """Methods that prune the initial network, by scores on the data of the seed."""

    def recipe(
        make_score: Callable[[TrainState, Data], Score], iterations: int = 1
    ) -> Recipe:
        # Not compiled as a whole: a rule refuses NaN among scores that it can see.
        def choose(state: TrainState, data: Data) -> PyTree:
            score = make_score(state, _sample(state, data, options.score_samples))
            rule = rules.one_shot(task.sparsity, score, iterations=iterations, **shared)
            given = get_masks(state.opt_state), state.params, None, 0, jax.random.key(0)
            if iterations > 1:  # They are compiled: look at the first scores apart.
                rules.one_shot(task.sparsity, score, **shared).update(*given)
            return rule.update(*given)

        return Recipe(rules.fixed(dense_masks(task.params)), choose=choose)

    def predict(state: TrainState, train: bool) -> Callable[..., jax.Array]:
        def logits(params: PyTree, x: jax.Array) -> jax.Array:
            return task.model.apply(params, state.model_state, x, train=train)[0]

        return logits

    def snip(state: TrainState, data: Data) -> Score:
        def loss(params: PyTree, batch: Any) -> jax.Array:
            logits = predict(state, train=True)(params, batch[0])
            return jnp.mean(cross_entropy(logits, batch[1]))

        return scores.snip(loss, [_pair(data)])

    def synflow(state: TrainState, data: Data) -> Score:
        shape = train.inputs(data).shape[1:]
        return scores.synflow(predict(state, train=False), shape)

    return {
        "snip": lambda: recipe(snip),
        "grasp": lambda: recipe(
            lambda state, data: scores.grasp(predict(state, True), [_pair(data)])
        ),
        "fisher": lambda: recipe(
            lambda state, data: scores.fisher(predict(state, False), [_pair(data)])
        ),
        "synflow": lambda: recipe(synflow, _SYNFLOW_ITERATIONS),
    }


_GROUPS: tuple[tuple[Callable[[Task, Options, Shared], Makers], Distribution], ...] = (
    (_prune, distributions.global_),
    (_move, distributions.erk),
    (_before_training, distributions.global_),
)


def _shared(task: Task, options: Options, suited: Distribution) -> Shared:
    named: dict[str, Distribution] = {
        "auto": suited,
        "global": distributions.global_,
        "uniform": distributions.uniform,
        "er": distributions.er,
        "erk": distributions.erk,
    }
    patterns: dict[str, Callable[[], Selection]] = {
        "unstructured": lambda: masks.select,
        "n_of_m": lambda: masks.n_of_m(options.group),
        "blocks": lambda: masks.blocks((options.group, options.group)),
        "channels": masks.channels,
    }
    return {
        "distribution": named[options.distribution],
        "prunable": task.prunable,
        "selection": patterns[options.pattern](),
    }


def _rehearse(task: Task, arguments: Shared) -> None:
    """Draws a pattern, so that one that does not fit is refused before training."""
    if arguments["selection"] is masks.select:
        return
    try:
        _draw(task, arguments)
    except ValueError as error:
        if not _fits_body(task, arguments):
            raise
        hint = "or choose --prunable=body, which leaves the first layer and head dense"
        raise ValueError(f"{error}, {hint}") from error


def _draw(task: Task, arguments: Shared) -> None:
    rule = rules.static(task.sparsity, **arguments)
    rule.init(jax.tree.map(_ones, task.params), jax.random.key(0))


def _fits_body(task: Task, arguments: Shared) -> bool:
    try:
        _draw(task, {**arguments, "prunable": make_prunable("body", task)})
    except ValueError:
        return False
    return True


def _ones(leaf: Any) -> jax.Array:
    return jnp.ones(leaf.shape, leaf.dtype)


def _last_refresh(task: Task) -> int:
    """The last step at which masks are refreshed."""
    last = (refresh_stop(task.steps) - 1) // task.interval * task.interval
    if last < 1:
        raise ValueError(
            f"expected a refresh within the first {refresh_stop(task.steps)} steps, "
            f"got one every {task.interval}; lower --refresh_interval or raise --steps"
        )
    return last


def _chosen(rule: MaskRule, params: PyTree) -> PyTree:
    return rule.update(None, params, None, 0, jax.random.key(0))


def _everything(state: TrainState) -> PyTree:
    return dense_masks(state.params)


def _sample(state: TrainState, data: Data, samples: int) -> Data:
    """Examples that scores are taken on, drawn by the key of the run."""
    return train.growth_batch(data, samples, jax.random.fold_in(state.key, 0))


def _pair(data: Data) -> tuple[jax.Array, jax.Array]:
    return train.inputs(data), data.labels


def _check(options: Options) -> None:
    for name, choices in _CHOICES.items():
        check_choice(name, getattr(options, name), choices)
    for name in ("drop_fraction", "prune_at", "start_sparsity"):
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"expected {name} in [0, 1), got {getattr(options, name)}")
    check_least(options, {"group": 1, "backward_density": 1, "score_samples": 1})
