"""The arguments that all rules have: who shares, what is pruned, in which pattern."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse import distributions, masks, rules, tree
from d2sparse.distributions import Distribution
from d2sparse.masks import Selection
from experiments.recipes.options import MaskOptions, read_table
from experiments.task import Task, make_prunable

Shared = dict[str, Any]


def make_shared(task: Task, options: MaskOptions, suited: Distribution) -> Shared:
    """The arguments of a rule that the flags ask for.

    Args:
      task: whose weights are pruned.
      options: the flags.
      suited: the distribution where the flags name none and weights live alone; whole
        groups have the same sparsity in every leaf.

    Raises:
      ValueError: the distribution cannot stand beside a table of sparsities.
    """
    patterns: dict[str, Callable[[], Selection]] = {
        "unstructured": lambda: masks.select,
        "n_of_m": lambda: masks.n_of_m(options.group),
        "blocks": lambda: masks.blocks((options.group, options.group)),
        "channels": masks.channels,
    }
    return {
        "distribution": _make_distribution(options, suited),
        "prunable": task.prunable,
        "selection": patterns[options.pattern](),
    }


def rehearse(task: Task, options: MaskOptions, arguments: Shared) -> None:
    """Draws a pattern, so that one that does not fit is refused before training.

    Raises:
      ValueError: a pattern or a table of sparsities does not fit the network.
    """
    if options.layer_sparsities:
        _rehearse_table(task, arguments["distribution"])
    if arguments["selection"] is masks.select:
        return
    try:
        _draw(task, arguments)
    except ValueError as error:
        if not _fits_body(task, arguments):
            raise
        hint = "or choose --prunable=body, which leaves the first layer and head dense"
        raise ValueError(f"{error}, {hint}") from error


def _make_distribution(options: MaskOptions, suited: Distribution) -> Distribution:
    named: dict[str, Distribution] = {
        "auto": suited if options.pattern == "unstructured" else distributions.uniform,
        "global": distributions.global_,
        "uniform": distributions.uniform,
        "er": distributions.er,
        "erk": distributions.erk,
    }
    chosen, table = named[options.distribution], read_table(options.layer_sparsities)
    if not table:
        return chosen
    if options.distribution == "global":
        raise ValueError(
            "expected distribution of uniform, er, erk beside layer_sparsities, got "
            "'global', which has no number for every leaf; leave it away for erk"
        )
    rest = distributions.erk if chosen is distributions.global_ else chosen
    return distributions.explicit(table, rest)


def _rehearse_table(task: Task, distribution: Distribution) -> None:
    try:
        distribution(tree.shapes(task.params, task.prunable), task.sparsity)
    except ValueError as error:
        raise ValueError(f"{error} (--layer_sparsities)") from error


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
