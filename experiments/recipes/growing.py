"""Methods that are as sparse from the start; most of them move their weights."""

from d2sparse import rules
from d2sparse.masks import dense_masks
from d2sparse.schedules import cosine, every, refresh_stop
from experiments.recipes.arguments import Shared
from experiments.recipes.groups import Makers, by_recipe, last_refresh
from experiments.recipes.options import Options
from experiments.singles import Recipe
from experiments.task import Task


def methods(task: Task, options: Options, shared: Shared) -> Makers:
    """Methods by name."""
    stop = refresh_stop(task.steps)
    when, drop = every(task.interval, stop=stop), cosine(options.drop_fraction, stop)

    def set_() -> Recipe:
        last_refresh(task)  # Complains where there is none.
        return Recipe(lambda s: rules.set_(s, drop, **shared), when)

    def rigl() -> Recipe:
        last_refresh(task)
        interval = task.mean_interval(task.interval)
        return Recipe(lambda s: rules.rigl(s, drop, **shared), when, interval)

    def sparse_momentum() -> Recipe:
        last_refresh(task)
        return Recipe(
            lambda s: rules.sparse_momentum(s, drop, **shared),
            when,
            trained=lambda state: dense_masks(state.params),
        )

    return by_recipe(
        task,
        {
            "static": lambda: Recipe(lambda s: rules.static(s, **shared)),
            "set": set_,
            "rigl": rigl,
            "sparse_momentum": sparse_momentum,
        },
    )
