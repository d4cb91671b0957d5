"""Temperature scaling: one number that calibrates a trained network."""

import math

import jax
import jax.numpy as jnp

from d2sparse.metrics.examples import check_labels, mean

# Temperatures lie in [1 / _LARGEST, _LARGEST]; halving that range so often, in its
# logarithm, reaches the precision of float32.
_LARGEST, _HALVINGS = 100.0, 24


def soften(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Probabilities at a temperature, `softmax(logits / T)`.

    Above 1 it makes a network less confident, below 1 more; what it predicts, and so
    its accuracy, stays.

    Args:
      logits: `float[..., classes]`.
      temperature: positive; may be traced.

    Returns:
      `float32[..., classes]`, rows summing to 1.

    >>> print(soften(jnp.array([2.0, 0.0]), temperature=1e6).round(3))
    [0.5 0.5]
    """
    return jax.nn.softmax(logits.astype(jnp.float32) / temperature)


def fit_temperature(
    logits: jax.Array, labels: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Temperature at which held-out labels are the most likely (arXiv 1706.04599).

    `argmin_T -mean_i log softmax(z_i / T)_{y_i}`, found by bisection in log T: the loss
    is convex in 1 / T, with the derivative `mean_i (sum_c p_ic z_ic - z_i y_i)`, whose
    sign tells on which side the minimum lies. Fit it on examples that were not trained
    on and are not tested on.

    Temperatures are looked for in [1/100, 100]. Labels that are no more likely than at
    random have no best temperature and get 100; where all predictions are right,
    colder is always better, and it is 1/100, or the first of 1, 1/10, ... at which they
    are certain in float32. Logits that are all equal leave it at 1, and NaN gives NaN.

    Args:
      logits: of a held-out set, `float[..., classes]`, finite.
      labels: `int[...]`.
      where: `bool[...]`, the examples that count; all if not given.

    Returns:
      float32[], the temperature.

    Raises:
      ValueError: the shapes do not match or the set is empty.

    >>> logits = jnp.log(jnp.array([[0.75, 0.25]] * 4))
    >>> labels = jnp.array([0, 0, 0, 1])  # Right in three of four cases, as it says.
    >>> print(f"{fit_temperature(logits, labels):.3f}")
    1.000
    >>> print(f"{fit_temperature(3 * logits, labels):.3f}")
    3.000
    """
    check_labels(logits, labels, where)
    logits = logits.astype(jnp.float32)
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]

    def halve(i: jax.Array, log_t: jax.Array) -> jax.Array:
        expected = jnp.sum(soften(logits, jnp.exp(log_t)) * logits, axis=-1)
        # Positive where a higher temperature makes the labels more likely.
        slope = mean(expected - of_label, where)
        return log_t + jnp.sign(slope) * math.log(_LARGEST) / 2.0 ** (i + 1)

    return jnp.exp(jax.lax.fori_loop(0, _HALVINGS, halve, jnp.float32(0)))
