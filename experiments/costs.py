"""What networks of a sparsity cost before there are any, for what is sized by it."""

from d2sparse import distributions, macs, tree
from experiments.task import Task


def erk_macs(task: Task, sparsity: float) -> float:
    """Forward cost of a network whose layers share the weights by ERK, per example."""
    leaves = tree.shapes(task.params, task.prunable)
    sizes = {p: x.size for p, x in tree.prunable_leaves(task.params).items()}
    live = distributions.erk(leaves, sparsity)
    return sum(
        cost * (int(live[path]) / sizes[path] if path in live else 1.0)
        for path, cost in task.macs.items()
    )


def rigl_part(task: Task, samples: int) -> float:
    """What RigL's training costs, as a part of the dense network's.

    Args:
      task: whose sparsity RigL has.
      samples: number of training examples.
    """
    dense = sum(task.macs.values())
    interval = task.mean_interval(task.interval)
    growth = interval and min(task.growth_samples, samples)
    spent = macs.training_macs(
        erk_macs(task, task.sparsity),
        dense,
        interval=interval,
        growth_samples=growth or None,
        batch_size=min(task.batch_size, samples),
    )
    return float(spent) / (3 * dense)
