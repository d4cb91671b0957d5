"""Lottery tickets: train, prune, take early weights again, and repeat."""

import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from d2sparse import lottery, rules, scores, tree
from d2sparse.constraints.masked import under_masks
from d2sparse.lottery import Rewinding, Ticket
from d2sparse.masks import dense_masks
from d2sparse.models import Model
from d2sparse.scores import Score
from d2sparse.train import (
    Constraint,
    Data,
    Phase,
    Program,
    Progress,
    Settings,
    Training,
    TrainState,
)
from d2sparse.transforms import freeze, get_average, get_masks, sparsify


class Rewinds(NamedTuple):
    """What goes back between two rounds of iterative pruning, and by what it prunes.

    Attributes:
      fraction: part of a training after which the weights are kept that later rounds
        start from, in [0, 1).
      what: "weights" and learning rate, or the "learning_rate" alone (Renda, Frankle
        and Carbin, arXiv 2003.02389).
      score: which weights matter; `scores.random` is the control.
      frozen: whether pruned weights hold their early values instead of being 0 (RISE,
        Tartaglione, ICIP 2022).
    """

    fraction: float = 0.1
    what: Rewinding = "weights"
    score: Score = scores.magnitude
    frozen: bool = False


def iterative_magnitude(
    sparsity: float, rounds: int = 5, rewinds: Rewinds | None = None
) -> Constraint:
    """Iterative magnitude pruning: rounds of training, pruning and rewinding.

    Every round removes the same part of the live weights, the smallest of all leaves
    together, and trains the others again from their weights of an early step. Every
    round is a titled phase; memory["ticket"] is what it is trained from. From Frankle
    and Carbin (arXiv 1803.03635, 1912.05671).

    Args:
      sparsity: fraction of zeros after the last pruning, in [0, 1).
      rounds: prunings; each is followed by a whole training.
      rewinds: what goes back between two rounds.

    Raises:
      ValueError: a number is out of its range.
    """
    chosen = rewinds or Rewinds()
    if not 0 <= chosen.fraction < 1:
        raise ValueError(
            f"expected a rewind_fraction in [0, 1), got {chosen.fraction}; 0 rewinds "
            "to the initial weights"
        )
    if chosen.what not in get_args(Rewinding):
        raise ValueError(
            f"expected rewinding of {', '.join(get_args(Rewinding))}, got "
            f"{chosen.what!r}"
        )
    sparsities = lottery.round_sparsities(sparsity, rounds)

    def constrained(training: Training) -> Training:
        def begin(progress: Progress, data: Data) -> Progress:
            return _with_ticket(remember(training.begin(progress, data), "early"))

        def prune(
            progress: Progress,
            data: Data,
            program: Program,
            sparsity: float,
            number: int,
        ) -> Progress:
            del data, program
            early, state = progress.memory["early"], progress.state
            masks = lottery.prune_live(
                get_average(state.opt_state, state.params),  # What counts of a round.
                get_masks(state.opt_state),
                sparsity,
                training.network.prunable,
                chosen.score,
                jax.random.fold_in(early.key, number),
            )
            kept = state if chosen.what == "learning_rate" else None
            return _with_ticket(
                progress._replace(state=lottery.rewind(early, masks, kept))
            )

        steps, dense = training.horizon, dense_masks(training.network.params)
        wrap = freeze if chosen.frozen else sparsify
        masked = under_masks(training, "imp", lambda s: rules.fixed(dense), None, wrap)
        prunings = [
            Phase(
                steps,
                functools.partial(prune, sparsity=left, number=number),
                title=f"round {number}",
            )
            for number, left in enumerate(sparsities, 1)
        ]
        first = Phase(int(chosen.fraction * steps))
        rest = Phase(steps, _keep_early, title="round 0")
        return masked._replace(begin=begin, phases=(first, rest, *prunings))

    return constrained


def from_ticket(ticket: Ticket) -> Constraint:
    """Starts from the weights, statistics and masks of a ticket.

    What happens to the masks is up to the constraint that decides them: `kept` keeps
    them, `rigl` moves them, `gradual` prunes on. Put it first.

    Args:
      ticket: of a network of the same shapes.
    """

    def constrained(training: Training) -> Training:
        def init_weights(key: jax.Array, x: jax.Array) -> tuple[Any, Any]:
            del key, x
            return ticket.params, ticket.model_state

        def init(
            outer: Training, key: jax.Array, data: Data, settings: Settings
        ) -> TrainState:
            state = training.init(outer, key, data, settings)
            # What has been put beside the network, such as a trained scale, is whole.
            masks = tree.replace(dense_masks(state.params), tree.flatten(ticket.masks))
            return lottery.rewind(state, masks)

        model = Model(init_weights, training.model.apply)
        return training._replace(model=model, init=init)

    return constrained


def kept() -> Constraint:
    """Keeps the masks that the training starts with, those of a ticket."""

    def constrained(training: Training) -> Training:
        dense = dense_masks(training.network.params)
        return under_masks(training, "fixed", lambda s: rules.fixed(dense))

    return constrained


def remember(progress: Progress, name: str) -> Progress:
    """The progress with a copy of its state in the memory."""
    copied = jax.tree.map(jnp.copy, progress.state)
    return progress._replace(memory={**progress.memory, name: copied})


def _keep_early(progress: Progress, data: Data, program: Program) -> Progress:
    del data, program
    return _with_ticket(remember(progress, "early"))


def _with_ticket(progress: Progress) -> Progress:
    """The progress with its weights and masks in the memory, as a ticket."""
    state = progress.state
    ticket = Ticket(state.params, state.model_state, get_masks(state.opt_state))
    copied = jax.tree.map(jnp.copy, ticket)
    return progress._replace(memory={**progress.memory, "ticket": copied})
