"""What repetitions with several seeds say of a quantity."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike


class Summary(NamedTuple):
    """What repeated measurements say of a quantity.

    Attributes:
      mean: their mean.
      standard_error: of the mean; NaN for a single measurement.
      n: how many there are.
    """

    mean: float
    standard_error: float
    n: int


def summarize(values: Iterable[ArrayLike]) -> Summary:
    """Mean and standard error over repetitions, `s / sqrt(n)` with `n - 1` in `s`.

    >>> summarize([0.8, 0.9, 1.0])
    Summary(mean=0.9, standard_error=0.0577..., n=3)

    Args:
      values: one number per repetition.

    Returns:
      Their summary.

    Raises:
      ValueError: if there are no values.
    """
    numbers = np.array([float(np.asarray(value)) for value in values])
    if numbers.size == 0:
        raise ValueError("a summary needs at least one value, got none")
    spread = numbers.std(ddof=1) if numbers.size > 1 else math.nan
    error = float(spread) / math.sqrt(numbers.size)
    return Summary(float(numbers.mean()), error, numbers.size)


def paired_difference(
    a: Mapping[int, ArrayLike], b: Mapping[int, ArrayLike]
) -> Summary:
    """Mean and standard error of `a - b` over the seeds that both have.

    Runs of one seed share data and initial weights, so their difference varies less
    than either of them.

    >>> paired_difference({0: 0.75, 1: 0.5}, {0: 0.5, 1: 0.25, 2: 0.1})
    Summary(mean=0.25, standard_error=0.0, n=2)

    Args:
      a: a number per seed.
      b: what it is compared to.

    Returns:
      The summary of the differences.

    Raises:
      ValueError: if no seed is in both.
    """
    seeds = [seed for seed in a if seed in b]
    if not seeds:
        raise ValueError(
            f"no seed is in both, got seeds {sorted(a)} and {sorted(b)}; run the"
            " compared methods with the same seeds"
        )
    return summarize(np.asarray(a[seed]) - np.asarray(b[seed]) for seed in seeds)
