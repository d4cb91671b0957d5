"""Label noise: which labels are wrong, and what they are instead."""

import numpy as np

_NOISE = 3  # Part of the seed of a stream, apart from those of the budgets.


def noisy_labels(
    labels: np.ndarray, fraction: float, num_classes: int, seed: int
) -> np.ndarray:
    """Labels of which some are replaced by another class, each other one equally often.

    Symmetric label noise with exact counts: `round(fraction * n)` random examples have
    a wrong label afterwards. Of one seed the wrong ones of a smaller fraction are among
    those of a larger one.

    Args:
      labels: int[n] true class of every example, in [0, num_classes).
      fraction: share of wrong labels, in [0, 1].
      num_classes: number of classes, at least 2 unless the fraction is 0.
      seed: seed of the draw, at least 0.

    Returns:
      Labels of the same shape and type, as a copy.

    Raises:
      ValueError: the fraction is out of range, or there is no other class.

    >>> labels = np.zeros(10, np.int32)
    >>> noisy = noisy_labels(labels, 0.4, num_classes=3, seed=0)
    >>> int((noisy != labels).sum()), bool(noisy.max() < 3)
    (4, True)
    """
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"expected a fraction of wrong labels in [0, 1], got {fraction}"
        )
    if fraction and num_classes < 2:
        raise ValueError(f"expected at least 2 classes to confuse, got {num_classes}")
    words = np.random.PCG64((seed, _NOISE)).random_raw(2 * len(labels))
    order, shifts = np.split(words, 2)
    wrong = np.argsort(order, kind="stable")[: round(fraction * len(labels))]
    noisy = labels.copy()
    away = 1 + shifts[wrong] % np.uint64(max(num_classes - 1, 1))
    noisy[wrong] = (labels[wrong] + away.astype(labels.dtype)) % num_classes
    return noisy
