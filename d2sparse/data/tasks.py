"""Classification tasks made of a data set: some of its classes, turned, enlarged."""

from collections.abc import Callable

import jax
import numpy as np

from d2sparse.checks import check_whole
from d2sparse.data.arrays import Source, Split


def only_classes(source: Source, classes: str) -> Source:
    """The examples of some classes, which are numbered from 0.

    Args:
      source: a data set.
      classes: the first and the last, "0-4".

    Raises:
      ValueError: no such classes.

    >>> from d2sparse import data
    >>> task = only_classes(data.load("digits"), "5-9")
    >>> task.name, task.num_classes, task.train.labels.max().item()
    ('digits-5-9', 5, 4)
    """
    first, last = _range_of(classes, source.num_classes)

    def chosen(split: Split) -> Split:
        rows = np.flatnonzero((split.labels >= first) & (split.labels <= last))
        own = {name: values[rows] for name, values in split.further.items()}
        return Split(split.images[rows], split.labels[rows] - np.int32(first), own)

    return _changed(source, classes, chosen, last - first + 1)


def with_rotations(source: Source) -> Source:
    """Every class in each of four rotations is a class of its own.

    Class c turned r times, anticlockwise, has the number 4 c + r: a task of many
    classes out of one of few, of which some are hard to tell apart.

    Args:
      source: of square images.

    Raises:
      ValueError: images are not square.

    >>> from d2sparse import data
    >>> task = with_rotations(data.load("digits"))
    >>> task.num_classes, len(task.test.labels)
    (40, 2000)
    """
    shape = source.train.images.shape
    if len(shape) != 4 or shape[1] != shape[2]:
        raise ValueError(f"expected square images to turn, got shape {shape[1:]}")

    def turned(split: Split) -> Split:
        images = [np.rot90(split.images, r, axes=(1, 2)) for r in range(4)]
        labels = [4 * split.labels + np.int32(r) for r in range(4)]
        further = {
            k: np.tile(v, (4,) + (1,) * (v.ndim - 1)) for k, v in split.further.items()
        }
        return Split(np.concatenate(images), np.concatenate(labels), further)

    return _changed(source, "turned", turned, 4 * source.num_classes)


def enlarged(source: Source, side: int) -> Source:
    """Images of another size, by bilinear interpolation.

    Args:
      source: of uint8 images.
      side: height and width.

    Raises:
      ValueError: no size, or examples that are no uint8 images.

    >>> from d2sparse import data
    >>> enlarged(data.load("digits"), 16).test.images.shape
    (500, 16, 16, 1)
    """
    check_whole("side", side, least=1)
    if source.train.images.dtype != np.uint8 or source.train.images.ndim != 4:
        raise ValueError(
            "expected uint8 images to enlarge, got "
            f"{source.train.images.dtype}{list(source.train.images.shape[1:])}"
        )

    def resized(split: Split) -> Split:
        count, *_, channels = split.images.shape
        size = (count, side, side, channels)
        floats = jax.image.resize(split.images.astype(np.float32), size, "bilinear")
        return split._replace(images=np.asarray(floats).round().astype(np.uint8))

    return _changed(source, str(side), resized, source.num_classes)


def _changed(
    source: Source, what: str, change: Callable[[Split], Split], classes: int
) -> Source:
    name = f"{source.name}-{what}"
    return Source(name, change(source.train), change(source.test), classes)


def _range_of(classes: str, count: int) -> tuple[int, int]:
    first, _, last = classes.partition("-")
    known = first.isdecimal() and last.isdecimal()
    if not known or not int(first) <= int(last) < count:
        raise ValueError(
            f"expected classes FIRST-LAST of 0 to {count - 1}, such as 0-4, got "
            f"{classes!r}"
        )
    return int(first), int(last)
