"""What is asked of the predictions on a set of examples, and means over the set."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def number(labels: jax.Array, where: jax.Array | None) -> int | jax.Array:
    """How many examples count.

    >>> print(number(jnp.array([1, 0, 2]), jnp.array([True, True, False])))
    2
    """
    return labels.size if where is None else jnp.sum(where, dtype=jnp.int32)


def mean(values: jax.Array, where: jax.Array | None) -> jax.Array:
    """Mean over the examples that count, NaN if none does.

    >>> print(mean(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False])))
    1.5
    """
    return jnp.sum(values, where=where) / number(values, where)


def check_labels(scores: Any, labels: Any, where: Any = None) -> None:
    """Raises where scores, labels and what counts are not of the same examples.

    Raises:
      ValueError: the shapes do not match, the set is empty, or `where` is not bool.

    >>> check_labels(jnp.zeros((3, 10)), jnp.array([1, 0, 2]))
    """
    if scores.shape[:-1] != labels.shape or not labels.size:
        raise ValueError(
            "expected scores of shape [..., classes] and class indices of shape [...] "
            f"for at least one example, got {scores.shape} and {labels.shape}"
        )
    if where is not None and (where.shape != labels.shape or where.dtype != bool):
        raise ValueError(
            f"expected bool[{', '.join(map(str, labels.shape))}] as `where`, True for "
            f"the examples that count, got {where.dtype} of shape {where.shape}"
        )


def check_probabilities(
    probabilities: jax.Array, labels: jax.Array, where: jax.Array | None = None
) -> None:
    """Raises as `check_labels`, and where rows that count are no probabilities.

    Rows are not checked while tracing.

    Raises:
      ValueError: what was given looks like logits.

    >>> check_probabilities(jnp.full((3, 10), 0.1), jnp.array([1, 0, 2]))
    """
    check_labels(probabilities, labels, where)
    if isinstance(probabilities, jax.core.Tracer):
        return
    values = np.asarray(probabilities, np.float32)
    if where is not None and not isinstance(where, jax.core.Tracer):
        values = values[np.asarray(where)]
    # The tolerance admits rows rounded to bfloat16; rows of logits miss it by far.
    off = np.abs(values.sum(axis=-1) - 1)
    if not (values.min(initial=1) >= 0 and off.max(initial=0) <= 1e-2):
        raise ValueError(
            "expected probabilities, got rows that are negative or do not sum to 1 "
            f"(smallest entry {values.min():.3g}, sums off by up to {off.max():.3g}); "
            "apply jax.nn.softmax to logits first"
        )
