"""The slow learner as a masked running average of the fast one."""

import jax
import jax.numpy as jnp

from d2sparse import scores, tree
from d2sparse.dual.pair import Consolidation, Trace
from d2sparse.masks import apply_masks, count, dense_masks
from d2sparse.tree import Prunable, PyTree, is_kernel


def begin_trace(
    params: PyTree, consolidation: Consolidation, prunable: Prunable
) -> tuple[Trace, PyTree]:
    """Where a consolidating slow learner starts: at the fast one's largest weights."""
    shapes = tree.shapes(params, prunable)
    counts = consolidation.distribution(shapes, consolidation.sparsity)
    ranks = scores.magnitude(tree.prunable_leaves(params, prunable))
    masks = tree.replace(
        dense_masks(params), consolidation.selection(ranks, counts, None)
    )
    return Trace(params, masks), apply_masks(params, masks)


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
      The slow learner's parameters, zero outside of its masks, and its state.
    """
    decay = jnp.minimum(consolidation.decay, 1 - 1 / (step + 1.0))
    average = jax.tree.map(
        lambda a, w: decay * a + (1 - decay) * w, trace.average, fast
    )

    def redrawn() -> PyTree:
        weights = tree.prunable_leaves(average, prunable)
        ranks = scores.magnitude(weights)
        live = consolidation.selection(ranks, count(trace.masks, prunable), None)
        return tree.replace(trace.masks, live)

    due = consolidation.when(step)
    masks = jax.lax.cond(due, redrawn, lambda: trace.masks)
    known = jax.tree.map(lambda a, b: a | b | ~due, fast_masks, masks)
    average = apply_masks(average, known)
    return apply_masks(average, masks), Trace(average, masks)
