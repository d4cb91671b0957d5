"""Flags that make a method cost, or store, what another one does."""

from collections.abc import Callable
from typing import Any, NamedTuple

from d2sparse import distributions, lottery, macs, tree
from d2sparse.distributions import Distribution
from d2sparse.schedules import refresh_stop
from d2sparse.train import Network

CAPPED_ROUNDS = 3


class Known(NamedTuple):
    """What is known of a comparison before its trainings are made.

    Attributes:
      flags: the flags of the method, with a refresh interval.
      network: the network of all methods.
      samples: number of training examples.
      resize: width -> the network of another width.
      steps: optimiser steps of a training with these flags.
    """

    flags: Any
    network: Network
    samples: int
    resize: Callable[[float], Network]
    steps: int


def steps_of_rigl(known: Known) -> int:
    """Steps of a dense training that costs what RigL's does."""
    return max(round(rigl_cost(known) * known.flags.steps), 1)


def steps_of_rounds(known: Known) -> int:
    """Steps of a round, where three rounds together cost about a dense training."""
    flags = known.flags
    sparsities = lottery.round_sparsities(flags.sparsity, CAPPED_ROUNDS)
    later = sum(1 - sparsity for sparsity in sparsities[:-1]) + 1 - flags.sparsity
    return max(round(flags.steps / (1 + (1 - flags.rewind_fraction) * later)), 2)


def width_of_sparse(known: Known) -> float:
    """Width of the widest network with no more numbers than the sparse one has.

    Raises:
      ValueError: there is none.
    """
    flags, network = known.flags, known.network
    rest = tree.size(network.params) - network.weights
    most = round((1 - flags.sparsity) * network.weights) + rest
    # The width of a network of dense layers alone is a factor.
    unit = 1.0 if flags.model not in _MULTIPLIED else 0.01

    def fits(number: int) -> bool:
        return tree.size(known.resize(unit * number).params) <= most

    if not fits(1):
        raise ValueError(
            f"expected a narrow {flags.model} of at most {most} numbers, got none; "
            "lower the sparsity or leave dense_narrow away"
        )
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return unit * low


_MULTIPLIED = ("lenet_300_100", "lenet5")


def rigl_cost(known: Known) -> float:
    """Cost of RigL's training, as a part of the dense network's."""
    flags, network = known.flags, known.network
    refreshes = (refresh_stop(flags.steps) - 1) // flags.refresh_interval
    interval = flags.steps / refreshes if refreshes else None
    growth = interval and min(flags.growth_samples, known.samples)
    spent = macs.training_macs(
        sparse_macs(network, flags.sparsity, flags.masks.distribution),
        network.dense_macs,
        interval=interval,
        growth_samples=growth or None,
        batch_size=min(flags.batch_size, known.samples),
    )
    return float(spent) / (3 * network.dense_macs)


def sparse_macs(
    network: Network, sparsity: float, distribution: Distribution | None = None
) -> float:
    """Forward cost per example of a random sparse network.

    Args:
      network: that is made sparse.
      sparsity: fraction of zeros among its prunable weights.
      distribution: how its layers share the live weights, by ERK if not given.
    """
    share = distribution or distributions.erk
    if share is distributions.global_:
        share = distributions.uniform  # As random weights of all layers have it.
    live: Any = share(tree.shapes(network.params, network.prunable), sparsity)
    weights = tree.prunable_leaves(network.params, network.prunable)
    return sum(
        cost * (int(live[path]) / weights[path].size if path in live else 1.0)
        for path, cost in network.macs.items()
    )
