"""The search for a ticket that `constraints.iterative_magnitude` replaces."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from d2sparse import scores
from d2sparse.lottery import Rewinding, Ticket, prune_live, rewind
from d2sparse.scores import Score
from d2sparse.train import TrainState
from d2sparse.transforms import get_average, get_masks
from d2sparse.tree import Prunable, is_kernel

Fit = Callable[[TrainState, int], TrainState]


class Hunt(NamedTuple):
    """Where a search for a ticket stands; a copy of it is the search.

    Attributes:
      number: int32[], prunings so far.
      state: what is being trained.
      early: the state that rounds go back to; where it has not been reached yet, any.
      ticket: what the present round started from.
    """

    number: jax.Array
    state: TrainState
    early: TrainState
    ticket: Ticket


OnRound = Callable[[int, TrainState, Ticket], None]
OnStretch = Callable[[Hunt], None]


def start_from(ticket: Ticket, state: TrainState) -> TrainState:
    """A new state that starts from a ticket: with its weights, statistics and masks.

    What becomes of the masks is up to the rule of the state's optimiser: `fixed` keeps
    them, `rigl` moves them, `gradual` prunes on.

    Args:
      ticket: where to start; it fits the network of the state.
      state: at step 0; its optimiser is made by `sparsify` or `freeze`.
    """
    state = state._replace(params=ticket.params, model_state=ticket.model_state)
    return rewind(state, ticket.masks)


def begin_hunt(state: TrainState) -> Hunt:
    """A search that starts from a dense state."""
    early = jax.tree.map(jnp.copy, state)
    return Hunt(jnp.zeros((), jnp.int32), state, early, _ticket(early))


def find_ticket(
    fit: Fit,
    state: TrainState | Hunt,
    steps: int,
    rewind_step: int,
    sparsities: Sequence[float],
    on_round: OnRound | None = None,
    prunable: Prunable = is_kernel,
    score: Score = scores.magnitude,
    rewinding: Rewinding = "weights",
    on_stretch: OnStretch | None = None,
) -> TrainState:
    """Iterative magnitude pruning: the trained winning ticket.

    Args:
      fit: `(state, step) -> state`, trains up to the given step and may use up the
        state it is given.
      state: the state to start from, dense, with an optimiser made by
        `sparsify(inner, fixed(masks))`: rounds differ in the masks alone, so one
        compiled step serves them all. With `freeze` in its place the losers hold their
        early weights instead of being 0. A search that was interrupted goes on from
        the `Hunt` in which its state stood.
      steps: the step at which every round ends.
      rewind_step: the step whose weights every round after the first starts from.
      sparsities: sparsity after each pruning, rising, as of `round_sparsities`.
      on_round: called with the round's number, its trained state, and the ticket that
        was trained in it.
      prunable: predicate on (path, leaf).
      score: which weights matter; random scores are the control. Where the optimiser
        keeps an average of the weights, that is what is scored.
      rewinding: what goes back after a pruning, `"weights"` and learning rate, or the
        `"learning_rate"` alone.
      on_stretch: called before each training with where the search stands: what has to
        be kept, besides the state in training, to go on after an interruption.

    Returns:
      The state after the last round, trained up to `steps` under the final masks.

    Raises:
      ValueError: `rewind_step` is before the state's step or not before `steps`, or
        the rewinding is unknown.
    """
    begin = int((state.early if isinstance(state, Hunt) else state).step)
    if not begin <= rewind_step < steps:
        raise ValueError(
            f"expected a rewind step from {begin}, where the state stands, "
            f"to {steps - 1}, got {rewind_step}"
        )
    if rewinding not in ("weights", "learning_rate"):
        raise ValueError(
            f"expected rewinding 'weights' or 'learning_rate', got {rewinding!r}"
        )

    hunt = state if isinstance(state, Hunt) else begin_hunt(state)
    number = int(hunt.number)

    def trained(hunt: Hunt, stop: int) -> Hunt:
        if on_stretch is not None:
            on_stretch(hunt)
        return hunt._replace(state=fit(hunt.state, stop))

    def finish_round(hunt: Hunt) -> Hunt:
        hunt = trained(hunt, steps)
        if on_round is not None:
            on_round(int(hunt.number), hunt.state, hunt.ticket)
        return hunt

    if not number and int(hunt.state.step) <= rewind_step:
        hunt = begin_hunt(trained(hunt, rewind_step).state)
    hunt = finish_round(hunt)
    for sparsity in sparsities[number:]:
        hunt = _next_round(hunt, sparsity, prunable, score, rewinding)
        hunt = finish_round(hunt)
    return hunt.state


def _next_round(
    hunt: Hunt, sparsity: float, prunable: Prunable, score: Score, rewinding: str
) -> Hunt:
    number, state, early = hunt.number + 1, hunt.state, hunt.early
    key, old = jax.random.fold_in(early.key, number), get_masks(state.opt_state)
    counts = get_average(state.opt_state, state.params)
    masks = prune_live(counts, old, sparsity, prunable, score, key)
    trained = state if rewinding == "learning_rate" else None
    state = rewind(early, masks, trained)
    return Hunt(number, state, early, _ticket(state))


def _ticket(state: TrainState) -> Ticket:
    masks = get_masks(state.opt_state)
    copied = Ticket(state.params, state.model_state, masks)
    return jax.tree.map(jnp.copy, copied)
