"""Predictions on a whole set: how often they are right, and how likely the labels."""

import math

import jax
import jax.numpy as jnp

from d2sparse.metrics.examples import check_labels, check_probabilities, mean, number


def accuracy(
    scores: jax.Array, labels: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Fraction of examples whose largest score is at the label, in [0, 1].

    Args:
      scores: logits or probabilities of the whole set, `float[..., classes]`.
      labels: `int[...]`.
      where: `bool[...]`, the examples that count; all if not given. NaN if none does.

    Raises:
      ValueError: the shapes do not match or the set is empty.

    >>> print(accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1])))
    0.5
    """
    check_labels(scores, labels, where)
    correct = jnp.argmax(scores, axis=-1) == labels
    hits = jnp.sum(correct, where=where, dtype=jnp.int32)
    return hits / number(labels, where)


def nll(
    probabilities: jax.Array, labels: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Mean negative log likelihood of the labels, in nats.

    `-mean_i log p_i(y_i)`. It takes probabilities, not logits, so that the average of
    an ensemble can be given. A probability of 0 counts as the smallest normal float32:
    one certain error costs about 87 nats instead of making the mean infinite.

    Args:
      probabilities: of the whole set, `float[..., classes]`, rows summing to 1.
      labels: `int[...]`.
      where: as in `accuracy`.

    Raises:
      ValueError: the rows are no probabilities (not checked while tracing), the shapes
        do not match, or the set is empty.

    >>> probabilities = jnp.array([[0.25, 0.75], [1.0, 0.0]])
    >>> print(f"{nll(probabilities, jnp.array([0, 0])):.4f}")  # log(4) / 2
    0.6931
    """
    check_probabilities(probabilities, labels, where)
    smallest = jnp.finfo(jnp.float32).tiny
    return -mean(
        jnp.log(jnp.maximum(_of_label(probabilities, labels), smallest)), where
    )


def brier(
    probabilities: jax.Array, labels: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Brier score: mean squared distance from the one-hot label, in [0, 2].

    `mean_i sum_c (p_ic - [c = y_i])^2`, summed over classes.

    Args:
      probabilities: of the whole set, `float[..., classes]`, rows summing to 1.
      labels: `int[...]`.
      where: as in `accuracy`.

    Raises:
      ValueError: as in `nll`.

    >>> print(brier(jnp.array([[0.5, 0.5]]), jnp.array([0])))
    0.5
    """
    check_probabilities(probabilities, labels, where)
    onehot = jax.nn.one_hot(labels, probabilities.shape[-1], dtype=jnp.float32)
    errors = probabilities.astype(jnp.float32) - onehot
    return mean(jnp.sum(errors**2, axis=-1), where)


def confidence_split(
    probabilities: jax.Array, labels: jax.Array, *, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean probability of the true class, over right and over wrong predictions.

    A network that is right with confidence and wrong with doubt has a first number
    near 1 and a second near 0.5 or below; a second near 0 is confidence in errors.

    Args:
      probabilities: of the whole set, `float[..., classes]`, rows summing to 1.
      labels: `int[...]`.
      where: as in `accuracy`; `where=labels == c` measures one class.

    Returns:
      The two means; the mean over no prediction is NaN.

    Raises:
      ValueError: as in `nll`.

    >>> probabilities = jnp.array([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    >>> right, wrong = confidence_split(probabilities, jnp.array([0, 0, 0]))
    >>> print(right, wrong)
    0.75 0.25
    """
    check_probabilities(probabilities, labels, where)
    right = jnp.argmax(probabilities, axis=-1) == labels
    counts = True if where is None else where
    of_label = _of_label(probabilities, labels)
    return mean(of_label, right & counts), mean(of_label, ~right & counts)


def kl_to_uniform(
    probabilities: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Mean divergence of the predictions from the uniform one, in nats.

    `mean_i KL(p_i || u) = log K - mean_i H(p_i)` for K classes, in [0, log K]: 0 where
    nothing is predicted, log K where every prediction is certain. The other way round,
    `KL(u || p)` is infinite as soon as one probability underflows.

    Args:
      probabilities: of the whole set, `float[..., classes]`, rows summing to 1.
      where: as in `accuracy`; give the right or the wrong predictions to compare them.

    Raises:
      ValueError: as in `nll`.

    >>> print(kl_to_uniform(jnp.array([[0.5, 0.5], [0.5, 0.5]])))
    0.0
    """
    check_probabilities(probabilities, jnp.argmax(probabilities, axis=-1), where)
    entropy = jnp.sum(jax.scipy.special.entr(probabilities.astype(jnp.float32)), -1)
    return mean(math.log(probabilities.shape[-1]) - entropy, where)


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


def _of_label(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """Probabilities of the true classes, float32[...]."""
    of_label = jnp.take_along_axis(probabilities, labels[..., None], axis=-1)
    return of_label[..., 0].astype(jnp.float32)
