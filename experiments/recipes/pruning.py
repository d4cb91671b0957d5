"""Methods that lose weights in training; all but GraNet begin dense."""

import jax.numpy as jnp

from d2sparse import rules, scores
from d2sparse.distributions import Sparsity
from d2sparse.rules import MaskRule
from d2sparse.schedules import alternating, at, cosine, cubic, every, refresh_stop
from d2sparse.scores import Score
from experiments.recipes.arguments import Shared
from experiments.recipes.groups import Makers, by_recipe, last_refresh
from experiments.recipes.options import Options
from experiments.singles import Recipe
from experiments.task import Task


def methods(task: Task, options: Options, shared: Shared) -> Makers:
    """Methods by name."""
    stop = refresh_stop(task.steps)
    when = every(task.interval, stop=stop)
    score: Score = getattr(scores, options.score)

    def one_shot() -> Recipe:
        when = at([int(options.prune_at * task.steps)])
        return Recipe(lambda s: rules.one_shot(s, score, **shared), when)

    def gradual(score: Score) -> Recipe:
        last = last_refresh(task)
        return Recipe(lambda s: rules.gradual(cubic(s, last), score, **shared), when)

    def movement() -> Recipe:
        last = last_refresh(task)
        return Recipe(lambda s: rules.movement(cubic(s, last), **shared), when)

    def granet() -> Recipe:
        last, drop = last_refresh(task), cosine(options.drop_fraction, stop)

        def rule(sparsity: Sparsity) -> MaskRule:
            begin = jnp.minimum(options.start_sparsity, sparsity)
            return rules.granet(cubic(sparsity, last, start=begin), drop, **shared)

        return Recipe(rule, when, task.mean_interval(task.interval))

    def ac_dc() -> Recipe:
        phase = max(stop // 6, 1)
        last = 5 * phase
        if last >= task.steps:
            raise ValueError(
                f"expected more than {last} steps, for the dense and sparse phases of "
                f"ac_dc, got {task.steps}; raise --steps"
            )
        phases = alternating(phase, stop=last)
        return Recipe(
            lambda s: rules.ac_dc(s, phases, **shared), every(phase, stop=last + 1)
        )

    return by_recipe(
        task,
        {
            "random": lambda: gradual(scores.random),
            "one_shot": one_shot,
            "gradual": lambda: gradual(score),
            "movement": movement,
            "granet": granet,
            "ac_dc": ac_dc,
        },
    )
