"""The methods of sparse training by name, from the flags of the experiments."""

import dataclasses
from typing import Any

from d2sparse import constraints, distributions
from experiments.recipes.arguments import make_shared, rehearse
from experiments.recipes.options import (
    LEARNED_SPARSITY,
    RECIPES,
    Options,
    RecipeName,
    check_options,
)
from experiments.rows import average_of
from experiments.rows import make_method as under
from experiments.singles import Method
from experiments.task import Task

__all__ = ["LEARNED_SPARSITY", "RECIPES", "Options", "RecipeName", "make_method"]

_ALONE = {  # They have a pattern of their own: who they are, distributions that fit.
    "sr_ste": ("sr_ste, which is n:m in every leaf", ("auto", "uniform")),
    "str": ("str, which learns where its zeros are", ("auto",)),
}


def make_method(name: str, task: Task, options: Options) -> Method:
    """How a network of the task's sparsity is trained, by the name of the method.

    Masks are refreshed every `task.interval` steps until three quarters of the run.

    Raises:
      ValueError: unknown name, an option out of its range, a pattern that does not fit
        a leaf, or a run that is too short for the method.
    """
    check_options(options)
    if name not in RECIPES:
        raise ValueError(f"expected a rule of {', '.join(RECIPES)}, got {name!r}")
    if name in _ALONE:
        _refuse_pattern(*_ALONE[name], options)
    elif name not in ("dense", "fixed"):
        shared = make_shared(task, options, distributions.erk)
        rehearse(task, options, shared)
    own = make_options(task, options)
    if name == "sr_ste":
        rehearse(
            task, options, make_shared(task, _as_groups(options), distributions.uniform)
        )
    chosen = constraints.METHODS[name].constraints(own)
    return under(task, (*chosen, *average_of(task)))


def make_options(task: Task, options: Any) -> constraints.Options:
    """The options of METHODS, from a task and the flags that are among them."""
    known = {field.name for field in dataclasses.fields(constraints.Options)}
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name in known
    }
    given |= {
        "sparsity": task.sparsity,
        "refresh_interval": task.interval,
        "growth_samples": task.growth_samples,
    }
    return constraints.Options(**given)


def _as_groups(options: Options) -> Options:
    return dataclasses.replace(options, pattern="n_of_m", distribution="uniform")


def _refuse_pattern(who: str, fitting: tuple[str, ...], options: Options) -> None:
    if (
        options.pattern != "unstructured"
        or options.distribution not in fitting
        or options.layer_sparsities
    ):
        table = ",".join(options.layer_sparsities)
        layers = f" and layer_sparsities={table}" if table else ""
        raise ValueError(
            f"expected no other pattern for {who}, got pattern={options.pattern} and "
            f"distribution={options.distribution}{layers}; leave them away"
        )
