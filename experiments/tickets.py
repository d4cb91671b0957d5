"""Lottery tickets on disk, for other experiments to start from."""

import os

from d2sparse import checkpoint
from d2sparse.lottery import Ticket
from d2sparse.masks import dense_masks
from d2sparse.tree import PyTree


def save_ticket(directory: str | os.PathLike[str], ticket: Ticket) -> int:
    """Writes a ticket: its live weights, its masks in bits, its statistics.

    Returns:
      Bytes of what is stored.

    Raises:
      ValueError: the directory exists.
    """
    tree = {"params": ticket.params, "model_state": ticket.model_state}
    masks = {"params": ticket.masks, "model_state": dense_masks(ticket.model_state)}
    return checkpoint.save_sparse(directory, tree, masks)


def load_ticket(
    directory: str | os.PathLike[str], params: PyTree, model_state: PyTree
) -> Ticket:
    """Reads a ticket for a network.

    Args:
      directory: what `save_ticket` wrote.
      params: shapes of the network's parameters.
      model_state: shapes of what a forward pass changes.

    Raises:
      ValueError: there is no ticket, or it is one of another network; it names the
        leaf.
    """
    like = {"params": params, "model_state": model_state}
    tree, masks = checkpoint.load_sparse(directory, like)
    return Ticket(tree["params"], tree["model_state"], masks["params"])
