"""Synaptic flow: a score without data."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.checks import check_function, is_whole
from d2sparse.scores.local import Score, magnitude, widen
from d2sparse.tree import PyTree

Predict = Callable[[PyTree, jax.Array], jax.Array]

# The normal float32 numbers from end to end, in steps coarse enough to try all at once.
_SCALES = np.exp2(np.arange(-120, 121, 16)).astype(np.float32)
# Convolutions between even weights let the flow grow: leave room above it.
_EVEN_INPUT = 2.0**-64
# Room above the sum of a layer's scores for a derivative, which is a score over |w|.
_LARGEST_TOTAL = 2.0**64


def synflow(predict: Predict, input_shape: Sequence[int]) -> Score:
    """Synaptic flow, the share of the paths from input to output through a weight.

    `|w * dR / d|w||` with `R = sum(predict(|params|, ones))`, no data (Tanaka et al.,
    arXiv 2006.05467). In a chain of dense layers or convolutions between rectifiers the
    scores of every layer have one sum, so the weights of small layers score high. One
    evaluation; the paper alternates scoring and pruning along an exponential schedule.

    Shifts would break the linearity of `R` in the input. A leaf that the derivative of
    the output in the input does not depend on is one, whatever its name or shape:
    biases score 0 and are taken as 0. Scales of a normalisation do not drop out and are
    taken as `|scale|`, like kernels.

    `R` grows as the product of all layers and leaves float32 in a network of some
    dozens of wide ones. Input and output gradient are therefore scaled by powers of
    two, found from one forward and one backward pass of 16 trial scales: the scores of
    all leaves are off by one and the same power of two. It reaches networks in which
    the flow grows about 2**230 times from input to output; scores are NaN beyond.

    Args:
      predict: `predict(params, x)`, float[batch, ...]; but for shifts in `params`
        positively homogeneous, as rectifiers and pooling are, and normalisation in
        evaluation mode with running means of 0. An example may not depend on the rest
        of the batch.
      input_shape: shape of one example, without the batch axis.

    Raises:
      ValueError: `predict` is no such function, or the shape none.

    >>> def predict(params, x):
    ...     return x @ params["a"] @ params["b"]
    >>> params = {"a": jnp.array([[1.0, -3.0]]), "b": jnp.array([[2.0], [2.0]])}
    >>> ranks = synflow(predict, (1,))(params, None, None)
    >>> [(ranks[leaf] / ranks[leaf].sum()).ravel().tolist() for leaf in params]
    [[0.25, 0.75], [0.25, 0.75]]
    """
    check_function("predict", predict, "params, x", "model.apply")
    if not np.iterable(input_shape) or not all(map(is_whole, input_shape)):
        raise ValueError(
            "expected the shape of one example as `input_shape`, such as (28, 28, 1), "
            f"got {input_shape!r}"
        )
    ones = jnp.ones((1, *input_shape))

    @jax.jit
    def evaluate(params: PyTree) -> PyTree:
        weights = _without_shifts(predict, magnitude(widen(params)), ones)
        x = _input_scale(predict, weights, ones) * ones
        output, pullback = jax.vjp(lambda w: predict(w, x), weights)
        scale = _output_scale(predict, weights, x, jnp.sum(output))
        (slopes,) = pullback(jnp.full_like(output, scale))
        # A pruned weight has score 0 even where its slope overflows.
        return jax.tree.map(
            lambda w, slope: jnp.where(w > 0, w * slope, 0), weights, slopes
        )

    def score(
        params: PyTree, grads: PyTree = None, key: jax.Array | None = None
    ) -> PyTree:
        del grads, key
        return evaluate(params)

    return score


def _without_shifts(predict: Predict, weights: PyTree, ones: jax.Array) -> PyTree:
    """The weights with 0 for every leaf that only adds to the flow."""
    x = ones * _EVEN_INPUT

    def linear_part(weights: PyTree) -> jax.Array:
        return jnp.sum(jax.jvp(lambda x: predict(weights, x), (x,), (x,))[1])

    # At even weights in place of the real ones, which may overflow or be pruned. The
    # barrier keeps the compiler from computing with these constants itself.
    even = jax.lax.optimization_barrier(jax.tree.map(_even, weights))
    total, slopes = jax.value_and_grad(linear_part)(even)

    def without(weight: jax.Array, slope: jax.Array) -> jax.Array:
        # Where even this flow dies, the slopes say nothing.
        is_shift = jnp.all(slope == 0) & (total > 0)
        return jnp.where(is_shift, 0, weight)

    return jax.tree.map(without, weights, slopes)


def _even(weight: jax.Array) -> jax.Array:
    """Equal weights; dense layers of any layout, or a stack of them, keep the flow."""
    sides = sorted(weight.shape)[-2:] if weight.ndim >= 2 else []
    return jnp.full_like(weight, 1 / math.sqrt(max(math.prod(sides), 1)))


def _input_scale(predict: Predict, weights: PyTree, ones: jax.Array) -> jax.Array:
    """The largest scale of the input at which no flow overflows."""
    # Nothing is negative, so what overflows on the way shows in the output.
    return _largest_scale(_is_finite(predict(weights, _at_every_scale(ones))))


def _output_scale(
    predict: Predict, weights: PyTree, x: jax.Array, total: jax.Array
) -> jax.Array:
    """The largest scale of the output gradient at which no flow back overflows.

    Args:
      predict: the network.
      weights: absolute values.
      x: the scaled input, float[1, ...].
      total: the sum of its output, float[].
    """
    rows = jnp.broadcast_to(x, (_SCALES.size, *x.shape[1:]))
    output, pullback = jax.vjp(lambda x: predict(weights, x), rows)
    (back,) = pullback(_at_every_scale(jnp.ones_like(output[:1])))
    fits = _SCALES.astype(total.dtype) * total <= _LARGEST_TOTAL
    return _largest_scale(_is_finite(back) & fits)


def _at_every_scale(row: jax.Array) -> jax.Array:
    scales = jnp.asarray(_SCALES, row.dtype)
    return scales.reshape(-1, *[1] * (row.ndim - 1)) * row


def _is_finite(rows: jax.Array) -> jax.Array:
    # The sum is part of what is computed, and must be finite too.
    return jnp.isfinite(jnp.sum(rows, axis=tuple(range(1, rows.ndim))))


def _largest_scale(possible: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.where(possible, _SCALES, 0))
    return jnp.where(largest > 0, largest, jnp.nan)
