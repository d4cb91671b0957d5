"""Measures of a learner that was tested after every megabatch.

With e_t the test error after megabatch t of T, and a_t = 1 - e_t. None of it can be
compared between streams of different lengths but the means.
"""

from collections.abc import Sequence

import numpy as np


def anytime_measures(
    errors: Sequence[float], test_size: int, seen: Sequence[float] | None = None
) -> dict[str, float]:
    """Measures of the whole stream.

    * `cumulative_error`: `sum_t e_t`, the cumulative error rate (CER) of ALMA.
    * `mean_error`: the same over T.
    * `error_count`: `sum_t n e_t`, misclassified test examples over the stream, the CER
      as the code of APP counts it.
    * `anytime_accuracy`: `1 / T sum_t a_t`, the average anytime accuracy.
    * `final_accuracy`: `a_T`.
    * `error_area`: see `area_under_errors`.

    Args:
      errors: float[T] in [0, 1].
      test_size: number n of test examples.
      seen: float[T] part of the data that had arrived; if not given, t / T.

    Raises:
      ValueError: there are no errors, or one is outside of [0, 1].

    >>> measures = anytime_measures([0.5, 0.25], test_size=100)
    >>> measures["cumulative_error"], measures["error_count"]
    (0.75, 75.0)
    >>> measures["anytime_accuracy"], measures["final_accuracy"]
    (0.625, 0.75)
    """
    values = _checked(errors)
    return {
        "cumulative_error": float(values.sum()),
        "mean_error": float(values.mean()),
        "error_count": float(np.rint(test_size * values).sum()),
        "anytime_accuracy": float(1 - values.mean()),
        "final_accuracy": float(1 - values[-1]),
        "error_area": area_under_errors(errors, seen),
    }


def error_changes(errors: Sequence[float]) -> list[float]:
    """`e_t - e_{t-1}` from the second megabatch on; negative is progress.

    The code of APP divides counts by 10 000 whatever the test set's size; these are
    fractions of the test set.

    >>> error_changes([0.5, 0.25, 0.5])
    [-0.25, 0.25]
    """
    changes: list[float] = np.diff(_checked(errors)).tolist()
    return changes


def area_under_errors(
    errors: Sequence[float], seen: Sequence[float] | None = None
) -> float:
    """Mean error along the data, by the trapezoid rule over the part that was seen.

    Args:
      errors: float[T] in [0, 1].
      seen: float[T] part of the data that had arrived, rising; if not given, t / T.

    Raises:
      ValueError: there are no errors, one is outside of [0, 1], or `seen` does not rise
        with them.

    >>> area_under_errors([0.5, 0.3, 0.2])
    0.325
    """
    values = _checked(errors)
    where = np.arange(1, len(values) + 1) if seen is None else np.asarray(seen, float)
    if where.shape != values.shape or (np.diff(where) <= 0).any():
        raise ValueError(
            f"expected rising parts of the data for {len(values)} errors, got {seen}"
        )
    if len(values) == 1:
        return float(values[0])
    widths = np.diff(where)
    area = np.sum(widths * (values[1:] + values[:-1]) / 2) / widths.sum()
    return round(float(area), 12)


def relative_gap_change(gap: float, dense_gap: float) -> float:
    """By which part a generalisation gap is smaller than the dense network's.

    `(g_dense - g) / g_dense`; NaN where the dense network has none.

    >>> relative_gap_change(0.075, 0.1)
    0.25
    """
    return round((dense_gap - gap) / dense_gap, 12) if dense_gap else float("nan")


def _checked(errors: Sequence[float]) -> np.ndarray:
    values = np.asarray(errors, float)
    if values.ndim != 1 or not values.size or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"expected the errors after at least one megabatch, in [0, 1], got {errors}"
        )
    return values
