"""One network out of the two."""

import jax

from d2sparse import scores, tree
from d2sparse.dual.pair import Dual
from d2sparse.masks import Selection, apply_masks, count, select
from d2sparse.scores.local import widen
from d2sparse.tree import Prunable, PyTree, is_kernel


def merge(
    params: Dual,
    masks: Dual,
    share: float = 0.5,
    prunable: Prunable = is_kernel,
    selection: Selection = select,
) -> tuple[PyTree, PyTree]:
    """The average of both learners, pruned to the size of the slow one.

    `w = share fast + (1 - share) slow`; each leaf keeps the largest magnitudes of w, as
    many as the slow learner has there, and leaves that are never pruned are averaged
    whole. It halves the cost of inference, and makes sense where the two lie in one
    basin: a slow learner that consolidates the fast one does, two that are trained from
    weights of their own do not, their hidden units being in another order. Statistics
    of normalisations have to be taken anew, see `train.Program`. Half precision
    is averaged and ranked in float32, and rounded once.

    Args:
      params: of the two learners, zero outside of their masks, of one structure.
      masks: of the two learners.
      share: the fast learner's part of the average, in [0, 1].
      prunable: predicate on (path, leaf).
      selection: which patterns may be live, that of both masks.

    Returns:
      The parameters of the merged network and its masks.

    Raises:
      ValueError: the share is out of its range.

    >>> import jax.numpy as jnp
    >>> params = Dual({"w": jnp.array([[4.0, 0.0]])}, {"w": jnp.array([[0.0, 1.0]])})
    >>> masks = Dual({"w": params.fast["w"] != 0}, {"w": params.slow["w"] != 0})
    >>> merged, live = merge(params, masks)
    >>> merged["w"].tolist(), live["w"].tolist()
    ([[2.0, 0.0]], [[True, False]])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"expected a share in [0, 1], got {share}")
    average = jax.tree.map(lambda a, b: share * a + (1 - share) * b, *widen(params))
    ranks = scores.magnitude(tree.prunable_leaves(average, prunable))
    live = selection(ranks, count(masks.slow, prunable), None)
    merged = tree.replace(masks.slow, live)
    average = jax.tree.map(lambda x, like: x.astype(like.dtype), average, params.fast)
    return apply_masks(average, merged), merged
