"""The methods of sparse training by name, with what each needs around its rule."""

from collections.abc import Callable

from d2sparse import distributions, rules
from d2sparse.distributions import Distribution
from d2sparse.masks import dense_masks
from experiments.recipes import growing, latent, pruning, scored
from experiments.recipes.arguments import Shared, make_shared, rehearse
from experiments.recipes.groups import Makers, by_recipe
from experiments.recipes.options import (
    LEARNED_SPARSITY,
    RECIPES,
    Options,
    RecipeName,
    check_options,
)
from experiments.singles import Method, Recipe
from experiments.task import Task

__all__ = ["LEARNED_SPARSITY", "RECIPES", "Options", "RecipeName", "make_method"]

_GROUPS: tuple[tuple[Callable[[Task, Options, Shared], Makers], Distribution], ...] = (
    (pruning.methods, distributions.global_),
    (latent.methods, distributions.global_),
    (growing.methods, distributions.erk),
    (scored.before_training, distributions.global_),
    (scored.after_training, distributions.uniform),
)


def make_method(name: str, task: Task, options: Options) -> Method:
    """How a network of the task's sparsity is trained, by the name of the method.

    Masks are refreshed every `task.interval` steps until three quarters of the run.

    Raises:
      ValueError: unknown name, an option out of its range, a pattern that does not fit
        a leaf, or a run that is too short for the method.
    """
    check_options(options)
    own = _dense(task) | latent.without_pattern(task, options)
    if name in own:
        return own[name]()
    for make, suited in _GROUPS:
        shared = make_shared(task, options, suited)
        methods = make(task, options, shared)
        if name in methods:
            rehearse(task, options, shared)
            return methods[name]()
    raise ValueError(f"expected a rule of {', '.join(RECIPES)}, got {name!r}")


def _dense(task: Task) -> Makers:
    """Methods that keep all weights, or those of a ticket."""
    return by_recipe(
        task,
        {
            "dense": lambda: Recipe(rules.static(0.0)),
            "fixed": lambda: Recipe(rules.fixed(dense_masks(task.params))),
        },
    )
