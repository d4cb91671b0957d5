"""Scores from the activations that enter a layer."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from d2sparse import tree
from d2sparse.checks import check_by_path
from d2sparse.scores.local import Score, widen
from d2sparse.tree import PyTree


def wanda(inputs: Mapping[str, jax.Array]) -> Score:
    """Weight times the norm of its input, `|w_ij| * |x_i|_2`.

    Pruning by weights and activations (Sun et al., arXiv 2306.11695). The norm of a
    feature is over all examples and positions, in float32 or wider. The paper ranks the
    weights of every output among themselves; how scores compete is up to the rule here.

    Args:
      inputs: by the path of every kernel, what enters it: float[..., features]. The
        last axis is axis -2 of the kernel: `(in, out)` of a dense layer,
        `(h, w, in, out)` of a convolution. What is no kernel (biases, scales) gets its
        magnitude for a score.

    Raises:
      ValueError: when scoring, where a kernel has no entry, an entry has no kernel, or
        the numbers of features differ.

    >>> score = wanda({"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]])})
    >>> score({"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]])}, None, None)["kernel"]
    Array([[ 5., 10.],
           [ 3.,  4.]], dtype=float32)
    """
    check_by_path("inputs", inputs, of="what enters the kernels")
    for path, entering in inputs.items():
        if not getattr(entering, "ndim", 0):
            raise ValueError(
                f"expected float[..., features] as what enters {path!r}, got "
                f"{entering!r}; pass arrays"
            )
    # Reduced once: the score holds a number per feature and not the data.
    norms = {path: _norms(activations) for path, activations in inputs.items()}

    def score(
        params: PyTree, grads: PyTree = None, key: jax.Array | None = None
    ) -> PyTree:
        del grads, key
        _check_paths(norms, params)

        def leaf(path: str, weight: jax.Array) -> jax.Array:
            if path not in norms:
                return jnp.abs(weight)
            return jnp.abs(weight) * _along_inputs(path, norms[path], weight)

        return tree.map_with_path(leaf, params)

    return score


def _norms(activations: jax.Array) -> jax.Array:
    features = widen(activations).reshape(-1, activations.shape[-1])
    # Scaled, since squares leave float32 where activations of bfloat16 do not.
    largest = jnp.max(jnp.abs(features), axis=0, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1)
    return scale[0] * jnp.linalg.norm(features / scale, axis=0)


def _check_paths(norms: Mapping[str, jax.Array], params: PyTree) -> None:
    leaves = tree.flatten(params)
    kernels = {path for path, leaf in leaves.items() if tree.is_kernel(path, leaf)}
    missing, unknown = sorted(kernels - set(norms)), sorted(set(norms) - kernels)
    if missing or unknown:
        raise ValueError(
            f"expected the inputs of every kernel, got none for {missing} and some for "
            f"{unknown}, which are no kernels; the kernels are {sorted(kernels)}"
        )


def _along_inputs(path: str, norms: jax.Array, kernel: jax.Array) -> jax.Array:
    if norms.size != kernel.shape[-2]:
        raise ValueError(
            f"expected inputs of {kernel.shape[-2]} features for the kernel {path!r} "
            f"of shape {kernel.shape}, got {norms.size}; the last axis of the inputs "
            "is axis -2 of the kernel"
        )
    return norms.reshape(*[1] * (kernel.ndim - 2), -1, 1)
