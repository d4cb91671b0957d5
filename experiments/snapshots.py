"""Several sparse networks out of one training, for the price of one."""

from d2sparse import constraints
from d2sparse.constraints import Moves, Structure
from experiments.recipes.arguments import Shared
from experiments.rows import make_method
from experiments.singles import Method
from experiments.task import Task


def free_tickets(
    task: Task, members: int, explore: float, drop_fraction: float, shared: Shared
) -> Method:
    """FreeTickets, see `d2sparse.constraints.free_tickets`.

    Args:
      task: what every method is given.
      members: how many networks there are.
      explore: part of the run, in (0, 1), before the first one is annealed.
      drop_fraction: part of the live weights that moves at a refresh until then.
      shared: the arguments that all rules have.

    Raises:
      ValueError: a number is out of its range, or an average of the weights is asked
        for, where predictions are averaged.
    """
    if task.averaging:
        raise ValueError(
            "expected no averaging of free_tickets, which averages predictions, got "
            "--averaging; leave it away"
        )
    moves = Moves(task.interval, drop_fraction, task.growth_samples)
    structure = Structure(shared["distribution"], shared["selection"])
    ensemble = constraints.free_tickets(
        task.sparsity, members, explore, moves, structure
    )
    return make_method(task, (ensemble,))
