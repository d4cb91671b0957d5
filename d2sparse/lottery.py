"""Lottery tickets: iterative magnitude pruning with rewinding.

Train, prune the smallest of the live weights, take the weights of an early step again,
and repeat (Frankle and Carbin, arXiv 1803.03635; rewinding to an early step rather than
to the initial weights, arXiv 1912.05671).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from d2sparse.masks import apply_masks
from d2sparse.rules import one_shot
from d2sparse.train import TrainState
from d2sparse.transforms import get_masks, set_masks
from d2sparse.tree import Prunable, PyTree, is_kernel

Fit = Callable[[TrainState, int], TrainState]
OnRound = Callable[[int, TrainState], None]


def round_sparsities(sparsity: float, rounds: int) -> list[float]:
    """Sparsities after each pruning, every round removing the same share of the rest.

    The density after round r of R is `(1 - sparsity)^(r / R)`.

    Args:
      sparsity: final fraction of zeros, in [0, 1).
      rounds: number of prunings, at least 1.

    Raises:
      ValueError: the sparsity or the number of rounds is outside of its range.

    >>> round_sparsities(0.75, 2)
    [0.5, 0.75]
    """
    if not 0 <= sparsity < 1 or rounds < 1:
        raise ValueError(
            "expected a sparsity in [0, 1) and at least 1 round, got "
            f"sparsity={sparsity}, rounds={rounds}"
        )
    densities = [(1 - sparsity) ** (r / rounds) for r in range(1, rounds)]
    return [1 - density for density in densities] + [sparsity]


def prune_live(
    params: PyTree, masks: PyTree, sparsity: float, prunable: Prunable = is_kernel
) -> PyTree:
    """Masks of the largest live magnitudes, all leaves competing.

    Args:
      params: trained parameters.
      masks: their masks; what is pruned stays pruned.
      sparsity: fraction of zeros among the prunable weights, in [0, 1).
      prunable: predicate on (path, leaf).

    >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
    >>> masks = {"kernel": jnp.array([[False, True], [True, True]])}
    >>> prune_live(params, masks, 0.5)["kernel"].tolist()
    [[False, False], [True, True]]
    """
    rule = one_shot(sparsity, prunable=prunable)
    return rule.update(masks, params, None, 0, jax.random.key(0))


def rewind(state: TrainState, masks: PyTree) -> TrainState:
    """The state of an early step under other masks, as a copy of its own.

    Weights, normalisation statistics, moments and step are those of the early state;
    its parameters are masked.

    Args:
      state: the state to go back to; its optimiser is made by `sparsify`.
      masks: tree of bool like the parameters.
    """
    state = state._replace(
        params=apply_masks(state.params, masks),
        opt_state=set_masks(state.opt_state, masks),
    )
    return jax.tree.map(jnp.copy, state)  # Masks too: training uses the state up.


def find_ticket(
    fit: Fit,
    state: TrainState,
    steps: int,
    rewind_step: int,
    sparsities: Sequence[float],
    on_round: OnRound | None = None,
    prunable: Prunable = is_kernel,
) -> TrainState:
    """Iterative magnitude pruning: the trained winning ticket.

    Args:
      fit: `(state, step) -> state`, trains up to the given step and may use up the
        state it is given.
      state: the state to start from, dense, with an optimiser made by
        `sparsify(inner, fixed(masks))`: rounds differ in the masks alone, so one
        compiled step serves them all.
      steps: the step at which every round ends.
      rewind_step: the step whose weights every round after the first starts from.
      sparsities: sparsity after each pruning, rising, as of `round_sparsities`.
      on_round: called with the round's number and its trained state.
      prunable: predicate on (path, leaf).

    Returns:
      The state after the last round, trained for `steps` under the final masks.

    Raises:
      ValueError: `rewind_step` is before the state's step or not before `steps`.
    """
    if not int(state.step) <= rewind_step < steps:
        raise ValueError(
            f"expected a rewind step from {int(state.step)}, where the state stands, "
            f"to {steps - 1}, got {rewind_step}"
        )
    state = fit(state, rewind_step)
    early = jax.tree.map(jnp.copy, state)
    state = fit(state, steps)
    for number, sparsity in enumerate(sparsities, start=1):
        if on_round is not None:
            on_round(number - 1, state)
        masks = get_masks(state.opt_state)
        masks = prune_live(state.params, masks, sparsity, prunable)
        state = fit(rewind(early, masks), steps)
    if on_round is not None:
        on_round(len(sparsities), state)
    return state
