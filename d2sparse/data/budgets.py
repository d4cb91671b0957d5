"""Data budgets and validation splits: index arithmetic on the labels.

The draws sort raw 64-bit words of PCG64. NumPy promises the words of a bit generator
to stay the same, which it does not promise of permutations, so a seed names the same
examples on every machine and with every later NumPy.
"""

import numpy as np

# Part of the seed of a stream, so that one seed may serve all draws independently; 3 is
# that of noisy labels.
_BUDGET, _HOLDOUT, _TAIL = 1, 2, 4


def budget(labels: np.ndarray, samples_per_class: int | None, seed: int) -> np.ndarray:
    """A class-balanced subset: the same number of random examples of every class.

    Row r of the result, seen as `[samples_per_class, classes]`, is the r-th draw of
    every class in the order of the labels. A class is drawn without replacement and
    independently of the other classes and of the budget, so budgets of one seed are
    nested: the first `10 * classes` indices of a budget of 50 are the budget of 10.

    Args:
      labels: int[n] class of every example.
      samples_per_class: examples of each class; 0 or None for all the data, in order.
      seed: seed of the draw, at least 0; keep it apart from the seed of the model, so
        that many models can share one budget.

    Returns:
      int64[classes * samples_per_class] distinct indices into `labels`.

    Raises:
      ValueError: a class has fewer examples, or the number is negative.

    >>> labels = np.array([0, 0, 0, 1, 1, 1])
    >>> labels[budget(labels, samples_per_class=2, seed=0)]
    array([0, 1, 0, 1])
    """
    labels = check_labels(labels)
    if not samples_per_class:
        return np.arange(len(labels))
    if samples_per_class < 0:
        raise ValueError(
            f"expected samples_per_class of at least 0, got {samples_per_class}"
        )
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < samples_per_class:
        raise ValueError(
            f"expected {samples_per_class} examples of every class, got {counts.min()} "
            f"of class {classes[counts.argmin()]}; lower samples_per_class"
        )
    draws = [
        shuffled(np.flatnonzero(labels == label), (seed, _BUDGET, rank))
        for rank, label in enumerate(classes)
    ]
    return np.stack([d[:samples_per_class] for d in draws], axis=1).reshape(-1)


def long_tailed(
    labels: np.ndarray, samples_per_class: int, imbalance: float, seed: int
) -> np.ndarray:
    """A budget whose classes are of exponentially falling size.

    Of the examples that it has in the `budget` of `samples_per_class = n_max`, the
    class at place c of C, in an order drawn with the seed, keeps the first
    `n_c = max(1, round(n_max imbalance^(-c / (C - 1))))` (the profile of Cui et al.,
    arXiv 1901.05555): n_max in the largest class, `n_max / imbalance` in the smallest.
    Of one seed a larger imbalance or a smaller n_max gives a part of the same examples.

    Args:
      labels: int[n] class of every example.
      samples_per_class: examples of the largest class, at least 1.
      imbalance: size of the largest class over that of the smallest, at least 1; at 1
        the result is the `budget`.
      seed: seed of the draw, at least 0.

    Returns:
      int64[m] distinct indices into `labels`, in the order of the budget.

    Raises:
      ValueError: the imbalance or the number is out of range, or a class has fewer than
        `samples_per_class` examples.

    >>> labels = np.repeat([0, 1, 2], 100)
    >>> chosen = long_tailed(labels, samples_per_class=100, imbalance=100, seed=0)
    >>> np.sort(np.bincount(labels[chosen]))
    array([  1,  10, 100])
    """
    if not imbalance >= 1:
        raise ValueError(f"expected an imbalance of at least 1, got {imbalance}")
    if samples_per_class < 1:
        raise ValueError(
            "expected samples_per_class of at least 1 in the largest class, got "
            f"{samples_per_class}; a long tail needs a number"
        )
    chosen = budget(labels, samples_per_class, seed).reshape(samples_per_class, -1)
    classes = chosen.shape[1]
    place = shuffled(np.arange(classes), (seed, _TAIL, 0))
    sizes = samples_per_class * imbalance ** (-place / max(classes - 1, 1))
    kept = np.maximum(np.rint(sizes), 1)
    return chosen[np.arange(samples_per_class)[:, None] < kept]


def holdout(
    labels: np.ndarray, indices: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Carves a stratified validation set out of a budget.

    Of the n examples of a class among `indices`, `round(fraction * n)` are held out,
    but at least one and at most n - 1. Validation is thus paid from the budget, and the
    test split is left alone.

    Args:
      labels: int[n] class of every example of the data set.
      indices: int[m] distinct indices into `labels`, such as a `budget`.
      fraction: share of every class to hold out, between 0 and 1, both excluded.
      seed: seed of the draw, at least 0.

    Returns:
      Training and validation indices: disjoint, together `indices`, and each in the
      order of `indices`.

    Raises:
      ValueError: a class has a single example, the fraction is out of range, or
        `indices` are not distinct indices into `labels`.

    >>> labels = np.array([0, 0, 0, 1, 1, 1])
    >>> train, validation = holdout(labels, np.arange(6), fraction=1 / 3, seed=0)
    >>> labels[train], labels[validation]
    (array([0, 0, 1, 1]), array([0, 1]))
    """
    labels, indices = check_labels(labels), np.asarray(indices)
    _check_indices(indices, len(labels))
    if not 0 < fraction < 1:
        raise ValueError(f"expected a fraction between 0 and 1, got {fraction}")
    classes, counts = np.unique(labels[indices], return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            "expected two examples of every class, one to train and one to validate, "
            f"got 1 of class {classes[counts.argmin()]}; raise the budget"
        )
    held_out = np.zeros(len(indices), bool)
    for rank, (label, count) in enumerate(zip(classes, counts, strict=True)):
        number = min(max(round(fraction * int(count)), 1), int(count) - 1)
        members = np.flatnonzero(labels[indices] == label)
        held_out[shuffled(members, (seed, _HOLDOUT, rank))[:number]] = True
    return indices[~held_out], indices[held_out]


def shuffled(values: np.ndarray, stream: tuple[int, ...]) -> np.ndarray:
    """The values in a random order, the same wherever the numbers are the same."""
    words = np.random.PCG64(stream).random_raw(len(values))
    return values[np.argsort(words, kind="stable")]


def check_labels(labels: np.ndarray) -> np.ndarray:
    """The labels as integers, or a ValueError that says what they are."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iu":
        raise ValueError(
            "expected integer labels of shape (n,) with n > 0, got "
            f"{labels.dtype} of shape {labels.shape}"
        )
    return labels


def _check_indices(indices: np.ndarray, size: int) -> None:
    if indices.ndim != 1 or indices.size == 0 or indices.dtype.kind not in "iu":
        raise ValueError(
            "expected integer indices of shape (m,) with m > 0, got "
            f"{indices.dtype} of shape {indices.shape}"
        )
    inside = indices.min() >= 0 and indices.max() < size
    if not inside or len(np.unique(indices)) != len(indices):
        raise ValueError(f"expected distinct indices from 0 to {size - 1}")
