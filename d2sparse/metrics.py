"""What is measured: predictions on a whole set, and masks over time.

Everything about predictions takes the whole set at once. Means of batches averaged
again weigh a ragged last batch wrongly, and the calibration error of batches averaged
is another, larger number: gather the predictions, then call these functions once.

Examples and live weights are counted in int32, exactly up to 2^31 - 1, and divided in
float32. Other sums are of float32, whatever the type of the predictions, and added up
in blocks: over tens of millions of examples they are right to about 1e-6 of themselves.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import tree
from d2sparse.masks import count, count_all, density
from d2sparse.tree import Prunable, PyTree, is_kernel

_BLOCK = 128  # Examples that are added one by one.


def accuracy(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Fraction of examples whose largest score is at the label, in [0, 1].

    Args:
      scores: logits or probabilities of the whole set, `float[..., classes]`.
      labels: `int[...]`.

    Raises:
      ValueError: the shapes do not match or the set is empty.

    >>> print(accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1])))
    0.5
    """
    check_labels(scores, labels)
    correct = jnp.argmax(scores, axis=-1) == labels
    return jnp.sum(correct, dtype=jnp.int32) / correct.size


def nll(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean negative log likelihood of the labels, in nats.

    `-mean_i log p_i(y_i)`. It takes probabilities, not logits, so that the average of
    an ensemble can be given. A probability of 0 counts as the smallest normal float32:
    one certain error costs about 87 nats instead of making the mean infinite.

    Args:
      probabilities: of the whole set, `float[..., classes]`, rows summing to 1.
      labels: `int[...]`.

    Raises:
      ValueError: the rows are no probabilities (not checked while tracing), the shapes
        do not match, or the set is empty.

    >>> probabilities = jnp.array([[0.25, 0.75], [1.0, 0.0]])
    >>> print(f"{nll(probabilities, jnp.array([0, 0])):.4f}")  # log(4) / 2
    0.6931
    """
    _check_probabilities(probabilities, labels)
    of_label = jnp.take_along_axis(probabilities, labels[..., None], axis=-1)
    of_label = of_label.astype(jnp.float32)
    return -jnp.mean(jnp.log(jnp.maximum(of_label, jnp.finfo(jnp.float32).tiny)))


def brier(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """Brier score: mean squared distance from the one-hot label, in [0, 2].

    `mean_i sum_c (p_ic - [c = y_i])^2`, summed over classes.

    Args:
      probabilities: of the whole set, `float[..., classes]`, rows summing to 1.
      labels: `int[...]`.

    Raises:
      ValueError: as in `nll`.

    >>> print(brier(jnp.array([[0.5, 0.5]]), jnp.array([0])))
    0.5
    """
    _check_probabilities(probabilities, labels)
    onehot = jax.nn.one_hot(labels, probabilities.shape[-1], dtype=jnp.float32)
    errors = probabilities.astype(jnp.float32) - onehot
    return jnp.mean(jnp.sum(errors**2, axis=-1))


def ece(probabilities: jax.Array, labels: jax.Array, bins: int = 15) -> jax.Array:
    """Expected calibration error of the whole set, in [0, 1].

    `sum_b |B_b| / n |accuracy(B_b) - confidence(B_b)|` over bins of equal width,
    `B_b` holding the examples whose largest probability lies in `((b - 1) / bins,
    b / bins]`; empty bins add nothing (Guo et al., arXiv 1706.04599). The estimate
    depends on the number of bins and is biased upwards on small sets.

    Args:
      probabilities: of the whole set, `float[..., classes]`, rows summing to 1. The
        "confidence" of logits means nothing: apply a softmax first.
      labels: `int[...]`.
      bins: number of bins; static.

    Raises:
      ValueError: as in `nll`.

    >>> probabilities = jnp.array([[0.75, 0.25], [0.75, 0.25]])
    >>> print(ece(probabilities, jnp.array([0, 1])))
    0.25
    """
    confidence, correct, bin_of = _binned(probabilities, labels, bins)
    surplus = correct - confidence
    return jnp.sum(jnp.abs(_sums(surplus, bin_of, bins))) / surplus.size


def calibration(
    probabilities: jax.Array, labels: jax.Array, bins: int = 15
) -> dict[str, jax.Array]:
    """What a reliability diagram shows: the bins of `ece`, as sums.

    Sums of several sets may be added up, on the host in float64 or integers.

    Args:
      probabilities: of the whole set, `float[..., classes]`, rows summing to 1.
      labels: `int[...]`.
      bins: number of bins; static.

    Returns:
      By name: int32[bins] "count" of examples in each bin, float32[bins] "confidence",
      the sum of their largest probabilities, and int32[bins] "correct", how many are
      right. Their calibration error is `sum |correct - confidence| / sum count`.

    Raises:
      ValueError: as in `nll`.

    >>> probabilities = jnp.array([[0.75, 0.25], [0.75, 0.25]])
    >>> found = calibration(probabilities, jnp.array([0, 1]), bins=2)
    >>> {name: sums.tolist() for name, sums in found.items()}
    {'count': [0, 2], 'confidence': [0.0, 1.5], 'correct': [0, 1]}
    """
    confidence, correct, bin_of = _binned(probabilities, labels, bins)
    ones, hits = jnp.ones_like(bin_of), correct.astype(jnp.int32)
    return {
        "count": jnp.bincount(bin_of, weights=ones, length=bins),
        "confidence": _sums(confidence, bin_of, bins),
        "correct": jnp.bincount(bin_of, weights=hits, length=bins),
    }


def disagreement(scores_a: jax.Array, scores_b: jax.Array) -> jax.Array:
    """Fraction of examples for which two networks predict different classes.

    Args:
      scores_a: logits or probabilities of the whole set, `float[..., classes]`.
      scores_b: the other network's, of the same shape.

    Raises:
      ValueError: the shapes differ or the set is empty.

    >>> a, b = jnp.array([[0.0, 1.0], [2.0, 1.0]]), jnp.array([[0.0, 3.0], [1.0, 2.0]])
    >>> print(disagreement(a, b))
    0.5
    """
    if scores_a.shape != scores_b.shape:
        raise ValueError(
            "expected the scores of two networks on the same examples, got shapes "
            f"{scores_a.shape} and {scores_b.shape}"
        )
    return 1 - accuracy(scores_a, jnp.argmax(scores_b, axis=-1))


def generalisation_gap(
    train_accuracy: float | jax.Array, test_accuracy: float | jax.Array
) -> float | jax.Array:
    """Training accuracy minus test accuracy; positive where the network overfits.

    >>> generalisation_gap(1.0, 0.75)
    0.25
    """
    return train_accuracy - test_accuracy


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


def _binned(
    probabilities: jax.Array, labels: jax.Array, bins: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of every example: its confidence, whether it is right, and its bin."""
    _check_probabilities(probabilities, labels)
    return _in_bins(probabilities, labels, bins)


# Compiled as a whole: operation by operation they would be twenty programs.
@functools.partial(jax.jit, static_argnames="bins")
def _in_bins(
    probabilities: jax.Array, labels: jax.Array, bins: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    confidence = jnp.max(probabilities, axis=-1).astype(jnp.float32)
    correct = jnp.argmax(probabilities, axis=-1) == labels
    # Rounding can put a confidence slightly above 1.
    bin_of = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    return confidence.ravel(), correct.ravel(), bin_of.ravel()


@functools.partial(jax.jit, static_argnames="bins")
def _sums(values: jax.Array, bin_of: jax.Array, bins: int) -> jax.Array:
    """Sums of the values in every bin, float32[bins].

    A bin count adds one value after another, and a long such sum stops growing: short
    ones are counted first.
    """
    blocks = -(-values.size // _BLOCK)
    block = jnp.arange(values.size, dtype=jnp.int32) // _BLOCK
    short = jnp.bincount(block * bins + bin_of, values, length=blocks * bins)
    return jnp.sum(short.reshape(blocks, bins), axis=0)


def check_labels(scores: Any, labels: Any) -> None:
    """Refuses scores and labels whose shapes do not match, and none at all.

    Raises:
      ValueError: naming both shapes.
    """
    if scores.shape[:-1] != labels.shape or not labels.size:
        raise ValueError(
            "expected scores of shape [..., classes] and class indices of shape [...] "
            f"for at least one example, got {scores.shape} and {labels.shape}"
        )


def _check_probabilities(probabilities: jax.Array, labels: jax.Array) -> None:
    check_labels(probabilities, labels)
    if isinstance(probabilities, jax.core.Tracer):
        return
    values = np.asarray(probabilities, np.float32)
    # The tolerance admits rows rounded to bfloat16; rows of logits miss it by far.
    off = np.abs(values.sum(axis=-1) - 1)
    if not (values.min() >= 0 and off.max() <= 1e-2):
        raise ValueError(
            "expected probabilities, got rows that are negative or do not sum to 1 "
            f"(smallest entry {values.min():.3g}, sums off by up to {off.max():.3g}); "
            "apply jax.nn.softmax to logits first"
        )


def _live_in_sparser(masks_a: PyTree, masks_b: PyTree, prunable: Prunable) -> jax.Array:
    live = [count_all(masks, prunable) for masks in (masks_a, masks_b)]
    return jnp.maximum(jnp.minimum(*live), 1)
