"""Penalties on the singular values of kernels."""

import jax
import jax.numpy as jnp

from d2sparse import tree
from d2sparse.regularizers.weights import change_leaves
from d2sparse.scores.local import widen
from d2sparse.tree import Prunable, PyTree


def nuclear_norm(params: PyTree, prunable: Prunable = tree.is_kernel) -> jax.Array:
    """Sum of the singular values of every kernel, as a matrix of (all inputs, outputs).

    The convex hull of the rank: weights whose small singular values are 0 factorise
    into two layers. Its derivative is `U V^T` over the singular values that are not 0
    to rounding. A decomposition per kernel and call: of a convolution of
    (3, 3, 512, 512) it takes longer than a training step.

    Args:
      params: weights.
      prunable: predicate on (path, leaf), which leaves are penalised; of at least two
        dimensions.

    Returns:
      float[].

    >>> print(nuclear_norm({"kernel": jnp.array([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]])}))
    7.0
    """

    def of_leaf(path: str, w: jax.Array) -> jax.Array:
        matrix = _matrix(path, widen(w))
        values = jnp.linalg.svd(matrix, compute_uv=False)
        # The limit below which a matrix is said to lose a rank.
        precision = float(jnp.finfo(matrix.dtype).eps) * max(matrix.shape)
        limit = precision * jnp.max(values, initial=0)
        return jnp.sum(jnp.where(values > limit, values, 0))

    leaves = tree.prunable_leaves(params, prunable)
    return sum(
        (of_leaf(p, w) for p, w in leaves.items()), start=jnp.zeros((), jnp.float32)
    )


def singular_value_threshold(
    params: PyTree, strength: float | jax.Array, prunable: Prunable = tree.is_kernel
) -> PyTree:
    """Proximal operator of `nuclear_norm`: singular values less the strength, or 0.

    `U max(S - strength, 0) V^T` of every kernel (Cai et al., arXiv 0810.3286).

    Args:
      params: weights.
      strength: at least 0.
      prunable: predicate on (path, leaf), of at least two dimensions; other leaves
        stay.

    Returns:
      A tree like the parameters.

    >>> kernel = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> print(singular_value_threshold({"kernel": kernel}, 1.5)["kernel"])
    [[1.5 0. ]
     [0.  0. ]]
    """
    for path, w in tree.prunable_leaves(params, prunable).items():
        _matrix(path, w)  # Complains of vectors.

    def of_leaf(w: jax.Array) -> jax.Array:
        u, values, v = jnp.linalg.svd(w.reshape(-1, w.shape[-1]), full_matrices=False)
        left = jax.nn.relu(values - strength)
        return ((u * left[None]) @ v).reshape(w.shape)

    return change_leaves(of_leaf, params, prunable)


def _matrix(path: str, w: jax.Array) -> jax.Array:
    if w.ndim < 2:
        raise ValueError(
            f"expected kernels of at least two dimensions, got shape {w.shape} at "
            f"{path!r}; leave this leaf out with `prunable`"
        )
    return w.reshape(-1, w.shape[-1])
