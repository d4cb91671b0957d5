"""Masks over time: what two of them share, and which weights were ever live."""

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import tree
from d2sparse.masks import count, count_all, density
from d2sparse.tree import Prunable, PyTree, is_kernel


def mask_overlap(
    masks_a: PyTree, masks_b: PyTree, prunable: Prunable = is_kernel
) -> jax.Array:
    """Overlap of two masks: shared live weights per live weight of the sparser one.

    `O = |A and B| / min(|A|, |B|)` over the prunable leaves, in [0, 1]; 0 if a mask has
    no live weight. Compare it with `chance_overlap`.

    >>> a, b = jnp.array([[True, True, False]]), jnp.array([[False, True, False]])
    >>> print(mask_overlap({"kernel": a}, {"kernel": b}))
    1.0
    """
    shared = jax.tree.map(jnp.logical_and, masks_a, masks_b)
    live = count_all(shared, prunable)
    return live / _live_in_sparser(masks_a, masks_b, prunable)


def chance_overlap(
    masks_a: PyTree, masks_b: PyTree, prunable: Prunable = is_kernel
) -> jax.Array:
    """Overlap that two random masks of the same layer densities have in expectation.

    `sum_l k_A,l k_B,l / n_l / min(k_A, k_B)` with `k` live of `n` weights in leaf `l`.

    >>> half = {"kernel": jnp.array([[True, True, False, False]])}
    >>> print(chance_overlap(half, half))
    0.5
    """
    live_a = count(masks_a, prunable)
    density_b = density_table(masks_b, prunable)
    expected = sum(live_a[path] * density_b[path] for path in live_a)
    return expected / _live_in_sparser(masks_a, masks_b, prunable)


def union(masks_a: PyTree, masks_b: PyTree) -> PyTree:
    """Weights that are live in at least one of two masks.

    Carried along training, `ever = union(ever, masks)`, it is what `exploration_rate`
    measures.

    >>> union({"w": jnp.array([True, False])}, {"w": jnp.array([False, False])})
    {'w': Array([ True, False], dtype=bool)}
    """
    return jax.tree.map(jnp.logical_or, masks_a, masks_b)


def exploration_rate(ever_live: PyTree, prunable: Prunable = is_kernel) -> jax.Array:
    """Fraction of the prunable weights that has been live at some time.

    The in-time over-parametrisation rate of ITOP (Liu et al., arXiv 2102.02887): it
    starts at the density and, for a mask that never moves, stays there.

    Args:
      ever_live: the `union` of all masks so far.
      prunable: which leaves count.

    >>> print(exploration_rate({"kernel": jnp.array([[True, True, True, False]])}))
    0.75
    """
    return density(ever_live, prunable)


def density_table(
    masks: PyTree, prunable: Prunable = is_kernel
) -> dict[str, jax.Array]:
    """Density of every prunable leaf, by path.

    >>> {p: float(d) for p, d in density_table({"w": jnp.eye(4, dtype=bool)}).items()}
    {'w': 0.25}
    """
    leaves = tree.flatten(masks)
    live = count(masks, prunable)
    return {path: live[path] / np.float32(leaves[path].size) for path in live}


def _live_in_sparser(masks_a: PyTree, masks_b: PyTree, prunable: Prunable) -> jax.Array:
    live = [count_all(masks, prunable) for masks in (masks_a, masks_b)]
    return jnp.maximum(jnp.minimum(*live), 1)
