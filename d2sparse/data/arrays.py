"""Data sets in memory: splits, their parts, and data sets of a user's own arrays."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Split(NamedTuple):
    """Examples in a fixed order.

    Attributes:
      images: uint8[n, h, w, c], or floats of any shape float[n, ...].
      labels: int32[n], the class of every example.
      further: further labels by name, such as a bias, a group or a domain: arrays of n
        rows.
    """

    images: np.ndarray
    labels: np.ndarray
    further: Mapping[str, np.ndarray] = {}


class Source(NamedTuple):
    """A data set: its name, the official splits and the number of classes."""

    name: str
    train: Split
    test: Split
    num_classes: int


def select(split: Split, indices: np.ndarray) -> Split:
    """The examples at the given indices, with all that belongs to them.

    >>> split = Split(np.zeros((3, 2)), np.array([0, 1, 2]), {"group": np.arange(3)})
    >>> select(split, np.array([2, 0])).further["group"]
    array([2, 0])
    """
    further = {name: values[indices] for name, values in split.further.items()}
    return Split(split.images[indices], split.labels[indices], further)


def from_arrays(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    name: str = "arrays",
    further: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> Source:
    """A data set made of arrays.

    Args:
      x_train: training examples: uint8[n, h, w, c], which are standardised per channel
        when they are trained on, or float[n, ...] of any shape, which are taken as they
        are.
      y_train: int[n], classes from 0, each at least once.
      x_test: test examples, of the shape and type of the training examples.
      y_test: int[m], their classes.
      name: of the data set.
      further: further labels by name, for training and test: arrays of n and m rows of
        numbers or bools.

    Raises:
      ValueError: naming the array that does not fit, and why.

    >>> x, y = np.random.rand(6, 7).astype(np.float32), np.arange(6) % 3
    >>> source = from_arrays(x, y, x, y, further={"group": (y > 0, y > 0)})
    >>> source.num_classes, source.train.further["group"].sum().item()
    (3, 4)
    """
    pairs = {label: _pair(label, given) for label, given in (further or {}).items()}
    firsts, seconds = ({k: pair[i] for k, pair in pairs.items()} for i in (0, 1))
    train = _split("train", x_train, y_train, firsts)
    test = _split("test", x_test, y_test, seconds)
    form, other = (_form(split.images) for split in (train, test))
    if form != other:
        raise ValueError(f"expected x_test like x_train, {form}, got {other}")
    return Source(name, train, test, _count_classes(train.labels, test.labels))


def _split(part: str, x: Any, y: Any, further: Mapping[str, Any]) -> Split:
    """A split of arrays that are checked one by one; errors name them."""
    x, y = np.asarray(x), np.asarray(y)
    _check_examples(f"x_{part}", x)
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise ValueError(
            f"expected integers of shape (n,) as y_{part}, got {y.dtype} of shape "
            f"{y.shape}; number the classes with `np.unique(y, return_inverse=True)[1]`"
        )
    arrays = {name: np.asarray(values) for name, values in further.items()}
    for name, values in {f"y_{part}": y, **arrays}.items():
        which = name if values is y else f"further[{name!r}] of {part}"
        if values.dtype.kind not in "biuf" or values.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"expected a number for each of the {len(x)} examples of x_{part} as "
                f"{which}, got {values.dtype} of shape {values.shape}"
            )
    return Split(x, y.astype(np.int32), arrays)


def _check_examples(which: str, x: np.ndarray) -> None:
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if not x.size or not x.ndim or not (is_float or x.dtype == np.uint8):
        raise ValueError(
            f"expected uint8 images or floats as {which}, at least one, got {x.dtype} "
            f"of shape {x.shape}; convert other numbers with `.astype(np.float32)`"
        )
    if not is_float and x.ndim != 4:
        raise ValueError(
            f"expected uint8 images of shape (n, h, w, c) as {which}, got shape "
            f"{x.shape}; add a channel with `x[..., None]`, or give floats"
        )
    if is_float and not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
        raise ValueError(
            f"expected finite numbers in {which}, got NaN or infinity in {len(rows)} "
            f"of {len(x)} examples, the first at index {rows[0]}"
        )


def _form(x: np.ndarray) -> str:
    return f"{x.dtype}[{', '.join(('n', *map(str, x.shape[1:])))}]"


def _count_classes(train: np.ndarray, test: np.ndarray) -> int:
    """The number of classes, all of which are there to be learned."""
    present = np.unique(train)
    classes = int(present[-1]) + 1
    if present[0] < 0 or len(present) < classes:
        raise ValueError(
            f"expected classes numbered from 0 in y_train, got {len(present)} of them "
            f"from {present[0]} to {present[-1]}; number them with "
            "`np.unique(y, return_inverse=True)[1]`"
        )
    if test.min() < 0 or test.max() >= classes:
        raise ValueError(
            f"expected classes from 0 to {classes - 1} in y_test, as in y_train, got "
            f"some from {test.min()} to {test.max()}"
        )
    return classes


def _pair(label: str, given: Any) -> tuple[Any, Any]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(
            f"expected a pair of arrays as further[{label!r}], for training and test, "
            f"got {type(given).__name__}"
        )
    return given[0], given[1]
