"""Several retrainings of one sparse network, averaged into one network."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from d2sparse import lottery, rules
from d2sparse.constraints.lottery import remember
from d2sparse.constraints.masked import under_masks
from d2sparse.masks import dense_masks
from d2sparse.train import (
    Constraint,
    Data,
    Phase,
    Program,
    Progress,
    Training,
    TrainState,
)
from d2sparse.transforms import get_masks


class _Place(NamedTuple):
    """A training among those of all rounds.

    Attributes:
      round: its round; 0 before the first pruning.
      member: its place in the round.
      ended: its place among those of its round that precede a phase: how many trainings
        of the round that is being averaged have ended; 0 at the very first.
    """

    round: int
    member: int
    ended: int


def souped(sparsity: float, rounds: int = 3, members: int = 2) -> Constraint:
    """Sparse model soups: prune, retrain several times, average, and repeat.

    The first training is dense. Every round prunes the smallest weights of the average
    and retrains it `members` times, with the examples in other orders and the learning
    rate from its start; the next round prunes the average of these. One mask, one
    network at the end. From Zimmer, Spiegel and Pokutta (arXiv 2306.16788).

    Args:
      sparsity: fraction of zeros after the last pruning, in [0, 1).
      rounds: prunings.
      members: retrainings after each.
    """
    return _averaged_rounds("soup", sparsity, rounds, members, rewound=False)


def swamp(sparsity: float, rounds: int = 3, members: int = 2) -> Constraint:
    """SWAMP: iterative pruning whose rounds average several trainings.

    As `souped`, but every training, the first included, starts from the initial weights
    under the masks of its round. From Choi, Lee et al. (arXiv 2305.14852).
    """
    return _averaged_rounds("swamp", sparsity, rounds, members, rewound=True)


def _averaged_rounds(
    who: str, sparsity: float, rounds: int, members: int, rewound: bool
) -> Constraint:
    if members < 1:
        raise ValueError(f"expected at least 1 member of a round, got {members}")
    sparsities = lottery.round_sparsities(sparsity, rounds)

    def constrained(training: Training) -> Training:
        def begin(progress: Progress, data: Data) -> Progress:
            progress = remember(training.begin(progress, data), "start")
            return remember(progress, "mean")

        def enter(
            progress: Progress, data: Data, program: Program, place: _Place
        ) -> Progress:
            del data, program
            progress = _collect(progress, place.ended)
            start = progress.memory["start"]
            if place.member == 0 and place.round:
                start = pruned(progress, sparsities[place.round - 1])
                kept = jax.tree.map(jnp.copy, start)
                progress = progress._replace(memory={**progress.memory, "start": kept})
            number = place.round * members + place.member
            key = jax.random.fold_in(progress.memory["start"].key, number)
            again = jax.tree.map(jnp.copy, start)._replace(key=key)
            return progress._replace(state=again)

        def pruned(progress: Progress, sparsity: float) -> TrainState:
            mean, start = progress.memory["mean"], progress.memory["start"]
            masks = lottery.prune_live(
                mean.params,
                get_masks(mean.opt_state),
                sparsity,
                training.network.prunable,
                key=start.key,
            )
            return lottery.rewind(start, masks, None if rewound else mean)

        def finish(progress: Progress, data: Data, program: Program) -> TrainState:
            mean = _collect(progress, members).memory["mean"]
            statistics = program.statistics(
                mean.params, mean.model_state, data, progress.state.key
            )
            return progress.state._replace(params=mean.params, model_state=statistics)

        sizes = [members if rewound else 1, *[members] * rounds]
        order = [(r, m) for r, size in enumerate(sizes) for m in range(size)]
        ended = [0, *(m + 1 for _, m in order)]
        places = [_Place(*own, n) for own, n in zip(order, ended, strict=False)]
        dense = dense_masks(training.network.params)
        masked = under_masks(training, who, lambda s: rules.fixed(dense))
        return masked._replace(
            begin=begin,
            finish=finish,
            phases=tuple(
                Phase(training.horizon, functools.partial(enter, place=place))
                for place in places
            ),
        )

    return constrained


def _collect(progress: Progress, ended: int) -> Progress:
    """The progress with what was trained last in the mean of its round."""
    if not ended:
        return progress
    state, mean = progress.state, progress.memory["mean"].params
    if ended > 1:
        params = jax.tree.map(lambda m, w: m + (w - m) / ended, mean, state.params)
        state = state._replace(params=params)
    kept = jax.tree.map(jnp.copy, state)
    return progress._replace(memory={**progress.memory, "mean": kept})
