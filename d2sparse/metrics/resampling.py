"""How much a metric would differ on another set of examples."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from d2sparse.checks import check_function, check_key, check_whole


def bootstrap(
    metric: Callable[..., jax.Array],
    key: jax.Array,
    *examples: jax.Array,
    resamples: int = 200,
) -> jax.Array:
    """Values of a metric on sets drawn from the examples with replacement.

    Their standard deviation estimates the standard error of the metric, their quantiles
    an interval (Efron, 1979). A calibration error is biased upwards on every resample
    once more: take its spread, not its mean.

    Args:
      metric: (*examples) -> scalar, that can be traced, such as `metrics.ece`.
      key: of the draws; the same key draws the same examples for every network.
      *examples: arrays with a leading axis over the same examples.
      resamples: how many sets are drawn; static.

    Returns:
      float[resamples].

    Raises:
      ValueError: an argument is not what it should be.

    >>> right = jnp.arange(1000) % 4 > 0
    >>> values = bootstrap(jnp.mean, jax.random.key(0), right)
    >>> print(f"{values.std():.2f}")  # sqrt(.75 * .25 / 1000) = .014
    0.01
    """
    check_function(
        "metric", metric, ", ".join(["array"] * len(examples)), "metrics.ece"
    )
    check_key(key)
    check_whole("resamples", resamples, least=1)
    lengths = {len(each) if each.ndim else 0 for each in examples}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "expected arrays of the same examples, at least one, got shapes "
            f"{[each.shape for each in examples]}"
        )
    n = lengths.pop()

    def once(key: jax.Array) -> jax.Array:
        drawn = jax.random.randint(key, (n,), 0, n)
        return metric(*(jnp.asarray(each)[drawn] for each in examples))

    return jax.lax.map(once, jax.random.split(key, resamples))
