"""Methods that lose weights in training; all but GraNet begin dense."""

from d2sparse import rules, scores
from d2sparse.schedules import alternating, at, cosine, cubic, every, refresh_stop
from d2sparse.scores import Score
from experiments.recipes.arguments import Shared
from experiments.recipes.groups import Makers, by_recipe, last_refresh
from experiments.recipes.options import Options
from experiments.singles import Recipe
from experiments.task import Task


def methods(task: Task, options: Options, shared: Shared) -> Makers:
    """Methods by name."""
    sparsity, stop = task.sparsity, refresh_stop(task.steps)
    when = every(task.interval, stop=stop)
    score: Score = getattr(scores, options.score)

    def one_shot() -> Recipe:
        rule = rules.one_shot(sparsity, score, **shared)
        return Recipe(rule, at([int(options.prune_at * task.steps)]))

    def gradual(score: Score) -> Recipe:
        ramp = cubic(sparsity, last_refresh(task))
        return Recipe(rules.gradual(ramp, score, **shared), when)

    def movement() -> Recipe:
        ramp = cubic(sparsity, last_refresh(task))
        return Recipe(rules.movement(ramp, **shared), when)

    def granet() -> Recipe:
        begin = min(options.start_sparsity, sparsity)
        ramp = cubic(sparsity, last_refresh(task), start=begin)
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
