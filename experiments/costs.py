"""What networks of a sparsity cost before there are any, for what is sized by it."""

from typing import Any

from d2sparse import distributions, macs, tree
from d2sparse.distributions import Distribution
from experiments.task import Task


def shared_macs(
    task: Task, sparsity: float, distribution: Distribution = distributions.erk
) -> float:
    """Forward cost per example of a network whose layers share its weights."""
    if distribution is distributions.global_:
        distribution = distributions.uniform  # As random weights of all layers have it.
    leaves = tree.shapes(task.params, task.prunable)
    sizes = {p: x.size for p, x in tree.prunable_leaves(task.params).items()}
    live: Any = distribution(leaves, sparsity)
    return sum(
        cost * (int(live[path]) / sizes[path] if path in live else 1.0)
        for path, cost in task.macs.items()
    )


def rigl_part(
    task: Task, samples: int, distribution: Distribution = distributions.erk
) -> float:
    """What RigL's training costs, as a part of the dense network's.

    Args:
      task: whose sparsity RigL has.
      samples: number of training examples.
      distribution: how its layers share the weights.
    """
    dense = sum(task.macs.values())
    interval = task.mean_interval(task.interval)
    growth = interval and min(task.growth_samples, samples)
    spent = macs.training_macs(
        shared_macs(task, task.sparsity, distribution),
        dense,
        interval=interval,
        growth_samples=growth or None,
        batch_size=min(task.batch_size, samples),
    )
    return float(spent) / (3 * dense)
