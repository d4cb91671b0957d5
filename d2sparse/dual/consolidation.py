"""The slow learner as a masked running average of the fast one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from d2sparse import distributions, scores, tree
from d2sparse.distributions import Distribution
from d2sparse.masks import Selection, apply_masks, count, dense_masks, select
from d2sparse.schedules import When
from d2sparse.scores.local import widen
from d2sparse.tree import Prunable, PyTree, is_kernel


class Consolidation(NamedTuple):
    """How the slow learner follows the fast one, in place of an optimiser.

    Attributes:
      sparsity: fraction of zeros of the slow learner.
      decay: alpha in [0, 1) of the running average; its horizon is `1 / (1 - alpha)`.
      when: step -> bool, when the slow learner's mask is drawn anew.
      distribution: how its leaves share the live weights.
      selection: which patterns may be live.
    """

    sparsity: float
    decay: float
    when: When
    distribution: Distribution = distributions.erk
    selection: Selection = select


class Trace(NamedTuple):
    """State of a consolidating slow learner.

    Attributes:
      average: running average of the fast learner's parameters.
      masks: which of them the slow learner uses.
    """

    average: PyTree
    masks: PyTree


def begin_trace(
    params: PyTree, consolidation: Consolidation, prunable: Prunable
) -> tuple[Trace, PyTree]:
    """Where a consolidating slow learner starts: at the fast one's largest weights.

    The average of weights of half precision is kept in float32, in which it can move by
    less than they can.
    """
    shapes = tree.shapes(params, prunable)
    counts = consolidation.distribution(shapes, consolidation.sparsity)
    ranks = scores.magnitude(tree.prunable_leaves(params, prunable))
    masks = tree.replace(
        dense_masks(params), consolidation.selection(ranks, counts, None)
    )
    return Trace(widen(params), masks), apply_masks(params, masks)


def consolidate(
    trace: Trace,
    fast: PyTree,
    fast_masks: PyTree,
    step: jax.Array,
    consolidation: Consolidation,
    prunable: Prunable = is_kernel,
) -> tuple[PyTree, Trace]:
    """Moves the slow learner one step after the fast one.

    `average <- a average + (1 - a) fast` with `a = min(decay, 1 - 1 / (step + 1))`.
    When it is time, the slow mask becomes the largest magnitudes of the average in each
    leaf, and the average forgets what is live in neither network, so that it holds at
    most as many numbers as both networks together. Leaves that are never pruned are
    averaged whole.

    Args:
      trace: state of the slow learner.
      fast: the fast learner's parameters after its update.
      fast_masks: its masks.
      step: int32[], the number of steps before this one.
      consolidation: how to follow.
      prunable: predicate on (path, leaf).

    Returns:
      The slow learner's parameters, zero outside of its masks and of the types of the
      fast one's, and its state, whose average keeps its own types.
    """
    decay = jnp.minimum(consolidation.decay, 1 - 1 / (step + 1.0))

    def follow(average: jax.Array, weight: jax.Array) -> jax.Array:
        kept = decay.astype(average.dtype)
        return kept * average + (1 - kept) * weight.astype(average.dtype)

    average = jax.tree.map(follow, trace.average, fast)

    def redrawn() -> PyTree:
        weights = tree.prunable_leaves(average, prunable)
        ranks = scores.magnitude(weights)
        live = consolidation.selection(ranks, count(trace.masks, prunable), None)
        return tree.replace(trace.masks, live)

    due = consolidation.when(step)
    masks = jax.lax.cond(due, redrawn, lambda: trace.masks)
    known = jax.tree.map(lambda a, b: a | b | ~due, fast_masks, masks)
    average = apply_masks(average, known)
    slow = jax.tree.map(
        lambda a, w: a.astype(w.dtype), apply_masks(average, masks), fast
    )
    return slow, Trace(average, masks)
