"""One pruning on the way."""

from typing import Literal, get_args

import jax

from d2sparse import distributions, rules, scores
from d2sparse.distributions import Distribution
from d2sparse.masks import dense_masks
from d2sparse.scores import Score
from d2sparse.tree import Prunable, PyTree, is_kernel

Dead = Literal["exclude", "revive", "intersect"]
DEAD: tuple[Dead, ...] = get_args(Dead)


def prune(
    masks: PyTree,
    params: PyTree,
    sparsity: float,
    score: Score = scores.magnitude,
    grads: PyTree = None,
    dead: Dead = "exclude",
    distribution: Distribution = distributions.global_,
    prunable: Prunable = is_kernel,
    iterations: int = 1,
    key: jax.Array | None = None,
) -> PyTree:
    """Masks of the largest scores, as many as the sparsity leaves of all weights.

    What becomes of weights that are dead already:

    * `"exclude"`: they stay dead. The masks are monotone and their number is exact.
    * `"revive"`: they compete with the others, and may come back.
    * `"intersect"`: they compete, and take places, but do not come back: the number of
      live weights is below what was asked for. The released code of APP does this.

    Args:
      masks: tree of bool like the parameters.
      params: weights as the score shall see them.
      sparsity: fraction of zeros among the prunable weights, in [0, 1).
      score: which weights matter, of `d2sparse.scores`.
      grads: gradients, for the scores that look at them.
      dead: one of the above.
      distribution: how the budget is shared between the leaves.
      prunable: predicate on (path, leaf).
      iterations: prunings in geometric steps, for scores such as SynFlow.
      key: random key for the score.

    Raises:
      ValueError: no such treatment of the dead, a sparsity out of its range, or a score
        that is NaN; it names the leaf.

    >>> import jax.numpy as jnp
    >>> masks = {"kernel": jnp.array([False, True, True, True])}
    >>> params = {"kernel": jnp.array([9.0, 1.0, 2.0, 3.0])}
    >>> for dead in ("exclude", "revive", "intersect"):
    ...     kept = prune(masks, params, 0.5, dead=dead, prunable=lambda *_: True)
    ...     print(dead, kept["kernel"].tolist())
    exclude [False, False, True, True]
    revive [True, False, False, True]
    intersect [False, False, False, True]
    """
    if dead not in DEAD:
        raise ValueError(f"expected dead of {', '.join(DEAD)}, got {dead!r}")
    rule = rules.one_shot(
        sparsity, score, distribution, prunable, iterations=iterations
    )
    competing = masks if dead == "exclude" else dense_masks(params)
    key = jax.random.key(0) if key is None else key
    chosen = rule.update(competing, params, grads, 0, key)
    if dead == "intersect":
        return jax.tree.map(lambda new, old: new & old, chosen, masks)
    return chosen
