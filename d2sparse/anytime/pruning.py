"""One pruning of a network that was pruned before."""

from typing import Literal, get_args

import jax

from d2sparse.masks import dense_masks
from d2sparse.rules import MaskRule
from d2sparse.tree import PyTree

Dead = Literal["exclude", "revive", "intersect"]
DEAD: tuple[Dead, ...] = get_args(Dead)


def prune(
    masks: PyTree,
    params: PyTree,
    rule: MaskRule,
    grads: PyTree = None,
    dead: Dead = "exclude",
    key: jax.Array | None = None,
) -> PyTree:
    """Masks of the largest scores, as many as a rule leaves of all weights.

    Weights that were pruned before:

    * `"exclude"`: they stay dead. The masks are monotone and their number is exact.
    * `"revive"`: they compete with the others, and may come back.
    * `"intersect"`: they compete, and take places, but do not come back: the number of
      live weights is below what was asked for. The released code of APP does this.

    Args:
      masks: tree of bool like the parameters.
      params: weights as the score shall see them.
      rule: made by `rules.one_shot`: how many weights are left, and by which score.
      grads: gradients, for the scores that look at them.
      dead: one of the above.
      key: random key for the score.

    Raises:
      ValueError: no such treatment of the dead, a sparsity out of its range, or a score
        that is NaN; it names the leaf.

    >>> import jax.numpy as jnp
    >>> from d2sparse import rules
    >>> masks = {"kernel": jnp.array([False, True, True, True])}
    >>> params = {"kernel": jnp.array([9.0, 1.0, 2.0, 3.0])}
    >>> half = rules.one_shot(0.5, prunable=lambda *_: True)
    >>> for dead in ("exclude", "revive", "intersect"):
    ...     print(dead, prune(masks, params, half, dead=dead)["kernel"].tolist())
    exclude [False, False, True, True]
    revive [True, False, False, True]
    intersect [False, False, False, True]
    """
    if dead not in DEAD:
        raise ValueError(f"expected dead of {', '.join(DEAD)}, got {dead!r}")
    competing = masks if dead == "exclude" else dense_masks(params)
    key = jax.random.key(0) if key is None else key
    chosen = rule.update(competing, params, grads, 0, key)
    if dead == "intersect":
        return jax.tree.map(lambda new, old: new & old, chosen, masks)
    return chosen
