"""What a group of methods is, and when its masks are refreshed last."""

import functools
from collections.abc import Callable, Mapping

from d2sparse.schedules import refresh_stop
from experiments.singles import Method, Recipe, single
from experiments.task import Task

Makers = dict[str, Callable[[], Method]]


def by_recipe(task: Task, recipes: Mapping[str, Callable[[], Recipe]]) -> Makers:
    """Methods that are one training of the task's network, by their recipes."""
    return {
        name: functools.partial(_train, task, make) for name, make in recipes.items()
    }


def last_refresh(task: Task) -> int:
    """The last step at which masks are refreshed.

    Raises:
      ValueError: there is none.
    """
    last = (refresh_stop(task.steps) - 1) // task.interval * task.interval
    if last < 1:
        raise ValueError(
            f"expected a refresh within the first {refresh_stop(task.steps)} steps, "
            f"got one every {task.interval}; lower --refresh_interval or raise --steps"
        )
    return last


def _train(task: Task, make: Callable[[], Recipe]) -> Method:
    return single(task, make())
