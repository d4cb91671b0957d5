"""The largest threshold of magnitudes that a loss bears, by bisection on the host."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from d2sparse.checks import check_number

_CLOSE = 0.05  # Of the bound: two losses so near to each other end the search.
_STEP = 1e-10  # A threshold that moves by less ends it too.
_MOST = 100  # Evaluations; fewer are enough to halve any float to that step.


class Threshold(NamedTuple):
    """What a search has found.

    Attributes:
      value: weights whose magnitude is below it fall.
      loss: under it; NaN where it was not evaluated.
      evaluations: of the loss.
      layer: the layer that a larger threshold would empty, where the search has ended
        there; empty if the loss or the given limit has ended it.
    """

    value: float
    loss: float
    evaluations: int
    layer: str = ""


def bisect_threshold(
    loss_of: Callable[[float], float],
    magnitudes: Mapping[str, Any],
    base: float,
    tolerance: float,
    most: float = math.inf,
    released: bool = False,
) -> Threshold:
    """The largest threshold found whose loss is at most `(1 + tolerance) base`.

    The search of LOBSTER and SeReNe (arXiv 2011.09905, 2102.03773). It begins at the
    mean over layers of their mean magnitude `c`, and goes on between `c` and the
    largest threshold where the loss is within the bound there, else between the least
    magnitude, which prunes nothing, and `c`. It halves that until a threshold has been
    evaluated within the bound and the losses at both ends differ by less than 5 % of
    it, or the threshold moves by less than 1e-10. The released code looks at the losses
    alone, and ends with nothing pruned where the tolerance is small. One threshold is
    for all layers, and none may be emptied: the largest one is the least of the layers'
    largest magnitudes.

    Args:
      loss_of: threshold -> loss, evaluated on the host.
      magnitudes: of the live weights, by layer; zeros do not count.
      base: the loss without pruning.
      tolerance: by what part it may grow, at least 0.
      most: a limit of the threshold.
      released: return the middle of the last bracket, as the released code does: it was
        never evaluated, and its loss may be beyond the bound.

    Raises:
      ValueError: a layer has no weight, or a number is out of its range.

    >>> weights = {"a": [0.1, 0.2, 0.8], "b": [0.4, 1.0]}
    >>> found = bisect_threshold(lambda t: 1 + t, weights, base=1.0, tolerance=0.5)
    >>> found.value <= 0.5, round(found.value, 2), found.layer
    (True, 0.48, '')
    >>> bisect_threshold(lambda t: 1.0, weights, base=1.0, tolerance=0.5)
    Threshold(value=0.8, loss=1.0, evaluations=2, layer='a')
    """
    check_number("base", base, 0, float(np.finfo(np.float64).max))
    check_number("tolerance", tolerance, 0, math.inf)
    live = {path: _nonzero(path, values) for path, values in magnitudes.items()}
    bound = (1 + tolerance) * base
    tightest = min(live, key=lambda path: live[path].max())
    limit = min(float(live[tightest].max()), most)
    least = min(float(values.min()) for values in live.values())
    middle = min(float(np.mean([values.mean() for values in live.values()])), limit)

    inside, outside = (least, base), (limit, math.inf)
    count, moved = 1, math.inf
    loss = loss_of(middle)
    if loss <= bound:
        inside = middle, loss
        if middle < limit:
            outside, count = (limit, loss_of(limit)), 2
        if middle == limit or outside[1] <= bound:
            value, loss = inside if middle == limit else outside
            return Threshold(value, loss, count, tightest if limit < most else "")
    else:
        outside = middle, loss
    while moved >= _STEP and count < _MOST:
        is_close = abs(inside[1] - outside[1]) < _CLOSE * bound
        if is_close and (released or inside[0] > least):
            break
        before, middle = middle, (inside[0] + outside[0]) / 2
        loss, count, moved = loss_of(middle), count + 1, abs(middle - before)
        if loss <= bound:
            inside = middle, loss
        else:
            outside = middle, loss
    if released:
        return Threshold((inside[0] + outside[0]) / 2, math.nan, count)
    return Threshold(*inside, count)


def _nonzero(path: str, values: Any) -> np.ndarray:
    magnitudes = np.abs(np.asarray(values, np.float64))
    kept: np.ndarray = magnitudes[magnitudes > 0]
    if not kept.size:
        raise ValueError(
            f"expected a weight other than 0 in every layer, got none in {path!r}; "
            "lower the strength of what shrinks them"
        )
    return kept
