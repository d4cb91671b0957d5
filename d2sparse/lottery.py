"""Lottery tickets: iterative magnitude pruning with rewinding.

Train, prune the smallest of the live weights, take the weights of an early step again,
and repeat (Frankle and Carbin, arXiv 1803.03635; rewinding to an early step rather than
to the initial weights, arXiv 1912.05671).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from d2sparse import scores
from d2sparse.rules import one_shot
from d2sparse.scores import Score
from d2sparse.train import TrainState
from d2sparse.transforms import set_masks, zero_pruned
from d2sparse.tree import Prunable, PyTree, is_kernel

Rewinding = Literal["weights", "learning_rate"]


class Ticket(NamedTuple):
    """What a sparse network starts from.

    Attributes:
      params: weights, 0 where they are pruned.
      model_state: normalisation statistics.
      masks: tree of bool like the parameters.
    """

    params: PyTree
    model_state: PyTree
    masks: PyTree


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
    params: PyTree,
    masks: PyTree,
    sparsity: float,
    prunable: Prunable = is_kernel,
    score: Score = scores.magnitude,
    key: jax.Array | None = None,
) -> PyTree:
    """Masks of the largest live scores, all leaves competing.

    Args:
      params: trained parameters.
      masks: their masks; what is pruned stays pruned.
      sparsity: fraction of zeros among the prunable weights, in [0, 1).
      prunable: predicate on (path, leaf).
      score: which weights matter: `scores.magnitude`, or `scores.random` as control.
      key: random key for the score.

    >>> params = {"kernel": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
    >>> masks = {"kernel": jnp.array([[False, True], [True, True]])}
    >>> prune_live(params, masks, 0.5)["kernel"].tolist()
    [[False, False], [True, True]]
    """
    rule = one_shot(sparsity, score, prunable=prunable)
    key = jax.random.key(0) if key is None else key
    return rule.update(masks, params, None, 0, key)


def rewind(
    early: TrainState, masks: PyTree, trained: TrainState | None = None
) -> TrainState:
    """The state of an early step under other masks, as a copy of its own.

    Weights, normalisation statistics, moments and step are those of the early state;
    its parameters are masked, but for those whose optimiser is made by `freeze`: there
    the losers keep their early weights (RISE, Tartaglione, ICIP 2022).

    With the trained state only the learning rate is rewound: weights and statistics are
    the trained ones, step and moments those of the early state (Renda, Frankle and
    Carbin, arXiv 2003.02389).

    Args:
      early: the state to go back to; its optimiser is made by `sparsify` or `freeze`.
      masks: tree of bool like the parameters.
      trained: the state whose weights are kept; None rewinds them too.
    """
    source = early if trained is None else trained
    opt_state = set_masks(early.opt_state, masks)
    state = early._replace(
        params=zero_pruned(source.params, opt_state),
        model_state=source.model_state,
        opt_state=opt_state,
    )
    return jax.tree.map(jnp.copy, state)  # Masks too: training uses the state up.
