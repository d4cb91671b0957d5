"""Calibration: is a network right as often as it says it is?"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.checks import check_choice, check_whole
from d2sparse.metrics.examples import (
    check_labels,
    check_probabilities,
    mean,
    number,
)

_BLOCK = 128  # Examples that are added one by one.


class _Examples(NamedTuple):
    """Of every example, float or int[examples]; all 0 where it does not count."""

    confidence: jax.Array
    correct: jax.Array
    counted: jax.Array
    bin_of: jax.Array


def ece(
    probabilities: jax.Array,
    labels: jax.Array,
    bins: int = 15,
    *,
    scheme: str = "width",
    where: jax.Array | None = None,
) -> jax.Array:
    """Expected calibration error of the whole set, in [0, 1].

    `sum_b |B_b| / n |accuracy(B_b) - confidence(B_b)|`; empty bins add nothing. The
    estimate depends on the number of bins and is biased upwards on small sets.

    Bins of equal width hold the examples whose largest probability lies in `((b - 1) /
    bins, b / bins]` (Guo et al., arXiv 1706.04599). Most predictions of an accurate
    network fall into the last of them; bins of equal mass hold as many examples each,
    in the order of their confidence (Nixon et al., arXiv 1904.01685). Examples of the
    same confidence are never divided, so the order of the examples does not matter: a
    bin starts with all examples as confident as the one of its first rank.

    Args:
      probabilities: of the whole set, `float[..., classes]`, rows summing to 1. The
        "confidence" of logits means nothing: apply a softmax first.
      labels: `int[...]`.
      bins: number of bins; static.
      scheme: "width" or "mass"; static.
      where: `bool[...]`, the examples that count; all if not given. NaN if none does.

    Raises:
      ValueError: as in `nll`, or there is no such scheme.

    >>> probabilities = jnp.array([[0.75, 0.25], [0.75, 0.25]])
    >>> print(ece(probabilities, jnp.array([0, 1])))
    0.25
    >>> print(ece(probabilities, jnp.array([0, 1]), scheme="mass"))
    0.25
    """
    examples = _binned(probabilities, labels, bins, scheme, where)
    surplus = examples.correct - examples.confidence
    gaps = jnp.abs(_sums(surplus, examples.bin_of, bins))
    return jnp.sum(gaps) / number(labels, where)


def calibration(
    probabilities: jax.Array,
    labels: jax.Array,
    bins: int = 15,
    *,
    scheme: str = "width",
    where: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """What a reliability diagram shows: the bins of `ece`, as sums.

    Sums of several sets in bins of equal width may be added up, on the host in float64
    or integers. Bins of equal mass are those of one set.

    Args:
      probabilities: of the whole set, `float[..., classes]`, rows summing to 1.
      labels: `int[...]`.
      bins: number of bins; static.
      scheme: "width" or "mass", see `ece`; static.
      where: as in `ece`.

    Returns:
      By name: int32[bins] "count" of examples in each bin, float32[bins] "confidence",
      the sum of their largest probabilities, and int32[bins] "correct", how many are
      right. Their calibration error is `sum |correct - confidence| / sum count`.

    Raises:
      ValueError: as in `ece`.

    >>> probabilities = jnp.array([[0.75, 0.25], [0.75, 0.25]])
    >>> sums = calibration(probabilities, jnp.array([0, 1]), bins=2)
    >>> {name: values.tolist() for name, values in sums.items()}
    {'count': [0, 2], 'confidence': [0.0, 1.5], 'correct': [0, 1]}
    """
    confidence, correct, counted, bin_of = _binned(
        probabilities, labels, bins, scheme, where
    )
    return {
        "count": jnp.bincount(bin_of, weights=counted, length=bins),
        "confidence": _sums(confidence, bin_of, bins),
        "correct": jnp.bincount(bin_of, weights=correct, length=bins),
    }


def signed_gap(
    probabilities: jax.Array, labels: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Mean confidence minus accuracy, in [-1, 1].

    Positive for a network that is too confident, negative for one that is not confident
    enough. Its size is at most the calibration error, which does not tell the two
    apart: the `ece` of an under-confident network rises with its accuracy.

    Args:
      probabilities: of the whole set, `float[..., classes]`, rows summing to 1.
      labels: `int[...]`.
      where: as in `ece`.

    Raises:
      ValueError: as in `nll`.

    >>> print(signed_gap(jnp.array([[0.75, 0.25], [0.75, 0.25]]), jnp.array([0, 1])))
    0.25
    """
    check_probabilities(probabilities, labels, where)
    confidence = jnp.max(probabilities, axis=-1).astype(jnp.float32)
    correct = jnp.argmax(probabilities, axis=-1) == labels
    return mean(confidence - correct, where)


def released_ece(
    logits: jax.Array, labels: jax.Array, batch_size: int, bins: int = 15
) -> jax.Array:
    """The "calibration error" of a published code: for comparison only.

    The code of arXiv 2308.14969 feeds logits to a calibration error that expects
    probabilities, batch by batch, and divides the sum over batches by the number of
    examples. Whatever exceeds 1 is in the last bin, so that the value is close to
    `|mean largest logit - accuracy| / batch_size`. It is no calibration error: it
    changes with a constant added to the logits and with the batch size, and is smallest
    where the largest logits, not the confidences, are near the accuracy, which favours
    networks of small logits. Use `ece(jax.nn.softmax(logits), labels)`.

    Args:
      logits: of the whole set in the order of the batches, `float[n, classes]`.
      labels: `int[n]`.
      batch_size: of the evaluation; the last batch may be smaller. Static.
      bins: number of bins of equal width; static.

    Raises:
      ValueError: the shapes do not match, the set is empty, or a size is below 1.

    >>> logits = jnp.array([[4.0, 0.0], [4.0, 0.0]])
    >>> print(released_ece(logits, jnp.array([0, 1]), batch_size=2))  # (4 - 1/2) / 2
    1.75
    """
    check_labels(logits, labels)
    check_whole("batch_size", batch_size, least=1)
    check_whole("bins", bins, least=1)
    largest = jnp.max(logits, axis=-1).astype(jnp.float32)
    surplus = (jnp.argmax(logits, axis=-1) == labels) - largest
    batch = np.arange(labels.size) // batch_size
    sizes = np.bincount(batch).astype(np.float32)
    place = batch * bins + _bins_of_width(largest, bins)
    gaps = jnp.abs(jnp.bincount(place, surplus, length=len(sizes) * bins))
    return jnp.sum(gaps.reshape(-1, bins).sum(axis=1) / sizes) / labels.size


def _binned(
    probabilities: jax.Array,
    labels: jax.Array,
    bins: int,
    scheme: str,
    where: jax.Array | None,
) -> _Examples:
    """Of every example: its confidence, whether it is right and counts, and its bin."""
    check_probabilities(probabilities, labels, where)
    check_whole("bins", bins, least=1)
    check_choice("scheme", scheme, ("width", "mass"))
    return _in_bins(probabilities, labels, bins, scheme, where)


# Compiled as a whole: operation by operation they would be twenty programs.
@functools.partial(jax.jit, static_argnames=("bins", "scheme"))
def _in_bins(
    probabilities: jax.Array,
    labels: jax.Array,
    bins: int,
    scheme: str,
    where: jax.Array | None,
) -> _Examples:
    counted = jnp.ones(labels.shape, bool) if where is None else where
    confidence = jnp.max(probabilities, axis=-1).astype(jnp.float32)
    confidence = jnp.where(counted, confidence, 0).ravel()
    correct = (jnp.argmax(probabilities, axis=-1) == labels) & counted
    if scheme == "width":
        bin_of = _bins_of_width(confidence, bins)
    else:
        bin_of = _bins_of_mass(confidence, counted.ravel(), bins)
    hits, ones = (each.ravel().astype(jnp.int32) for each in (correct, counted))
    return _Examples(confidence, hits, ones, bin_of)


def _bins_of_width(confidence: jax.Array, bins: int) -> jax.Array:
    """Bins ((b - 1) / bins, b / bins]; what is outside of (0, 1] joins first or last.

    Rounding can put a confidence slightly above 1.
    """
    return jnp.clip(jnp.ceil(confidence * bins), 1, bins).astype(jnp.int32) - 1


def _bins_of_mass(confidence: jax.Array, counted: jax.Array, bins: int) -> jax.Array:
    """Bin b starts at the confidence of rank b n / bins of the n that count."""
    n = jnp.sum(counted, dtype=jnp.int32)
    ranked = jnp.sort(jnp.where(counted, confidence, jnp.inf))
    b = np.arange(1, bins, dtype=np.int32)
    ranks = b * (n // bins) + b * (n % bins) // bins  # b n overflows.
    return jnp.searchsorted(ranked[ranks], confidence, side="right").astype(jnp.int32)


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
