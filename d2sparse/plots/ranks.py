"""Average ranks of methods over many comparisons, and which of them differ."""

import itertools
import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from d2sparse.plots.style import BLUE, STYLE


def average_ranks(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """Mean rank of every method, 1 for the best of a comparison.

    Args:
      scores: float[comparisons, methods], larger is better; ties share their ranks.

    Returns:
      float[methods].

    Raises:
      ValueError: it is no matrix of finite numbers with something to compare.

    >>> average_ranks([[0.9, 0.8, 0.7], [0.9, 0.9, 0.1]]).tolist()
    [1.25, 1.75, 3.0]
    """
    values = np.asarray(scores, float)
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise ValueError(
            "expected finite scores of shape (comparisons, methods), got shape "
            f"{values.shape}; leave comparisons out that a method lacks"
        )
    from scipy import stats  # Takes a second, and only ranks need it.

    return stats.rankdata(-values, axis=1).mean(axis=0)


def critical_difference(methods: int, comparisons: int, alpha: float = 0.05) -> float:
    """How far mean ranks have to be apart for the Nemenyi test to tell them apart.

    `q sqrt(k (k + 1) / (6 N))` for k methods in N comparisons, with q the upper
    quantile of the studentised range of k means over sqrt(2) (Demsar, JMLR 2006).

    Args:
      methods: at least 2.
      comparisons: at least 1; they should be independent of each other.
      alpha: probability of a false difference anywhere, in (0, 1).

    Raises:
      ValueError: a number is out of its range.

    >>> round(critical_difference(methods=5, comparisons=30), 3)
    1.114
    """
    if methods < 2 or comparisons < 1 or not 0 < alpha < 1:
        raise ValueError(
            "expected at least 2 methods, 1 comparison and alpha in (0, 1), got "
            f"methods={methods}, comparisons={comparisons}, alpha={alpha}"
        )
    from scipy import stats

    quantile = stats.studentized_range.ppf(1 - alpha, methods, np.inf) / np.sqrt(2)
    return float(quantile * np.sqrt(methods * (methods + 1) / (6 * comparisons)))


def rank_diagram(scores: Mapping[str, Sequence[float]], alpha: float = 0.05) -> Figure:
    """Methods on a line of mean ranks; bars join those that cannot be told apart.

    >>> figure = rank_diagram({"rigl": [0.9, 0.8], "dense": [0.8, 0.7]})

    Args:
      scores: of every method, one per comparison (a seed in a setting), in the same
        order for all; larger is better.
      alpha: of the Nemenyi test, see `critical_difference`.

    Returns:
      The figure, the best method at the top left. A bar spans methods whose ranks are
      less than the critical difference apart.

    Raises:
      ValueError: there are fewer than two methods, or they differ in their comparisons.
    """
    lengths = {len(values) for values in scores.values()}
    if len(scores) < 2 or len(lengths) != 1:
        raise ValueError(
            "expected at least two methods with as many comparisons each, got "
            f"{ {name: len(values) for name, values in scores.items()} }"
        )
    ranks = average_ranks(np.transpose(list(scores.values())).tolist())
    order = np.argsort(ranks, kind="stable")
    names, ranks = [list(scores)[i] for i in order], ranks[order]
    apart = critical_difference(len(names), lengths.pop(), alpha)
    groups = _groups(ranks, apart)
    with mpl.rc_context(STYLE):
        height = 1.1 + 0.17 * len(groups) + 0.27 * ((len(names) + 1) // 2)
        figure = Figure(figsize=(8, height))
        axes = figure.subplots()
        _draw_axis(axes, ranks, apart, alpha)
        for level, (first, last) in enumerate(groups, start=1):
            axes.plot(
                [ranks[first], ranks[last]],
                [-0.55 * level] * 2,
                color="black",
                linewidth=3,
                solid_capstyle="butt",
                zorder=3,
            )
        _name_methods(axes, names, ranks, -0.55 * (len(groups) + 1))
    return figure


def _groups(ranks: np.ndarray, apart: float) -> list[tuple[int, int]]:
    """Longest runs of sorted ranks that lie within the critical difference."""
    reach = [int(np.searchsorted(ranks, rank + apart)) - 1 for rank in ranks]
    runs = [(i, last) for i, last in enumerate(reach) if last > i]
    return [
        run
        for before, run in itertools.pairwise([(-1, -1), *runs])
        if run[1] > before[1]
    ]


def _draw_axis(axes: Axes, ranks: np.ndarray, apart: float, alpha: float) -> None:
    first, last = math.floor(ranks[0]), math.ceil(ranks[-1])
    last = max(last, first + 1)
    margin = 0.03 * (last - first)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.tick_top()
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.yaxis.set_visible(False)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["top"].set_visible(True)
    axes.spines["top"].set_position(("data", 0))
    axes.set_title(
        f"mean rank, 1 is best; bars join ranks within {apart:.2f}, the critical "
        f"difference at {alpha:g}",
        color="0.3",
        pad=18,
    )


def _name_methods(
    axes: Axes, names: Sequence[str], ranks: np.ndarray, top: float
) -> None:
    """Names below the axis, the better half on the left, with lines to their ranks."""
    half, (left, right) = (len(names) + 1) // 2, axes.get_xlim()
    for place, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        is_left = place < half
        row = place if is_left else len(names) - 1 - place
        height, end = top - row, left if is_left else right
        axes.plot([rank, rank, end], [0, height, height], color="0.6", linewidth=0.8)
        axes.plot([rank], [0], marker="o", markersize=4, color=BLUE, clip_on=False)
        axes.annotate(
            f"{name}  {rank:.2f}" if is_left else f"{rank:.2f}  {name}",
            xy=(end, height),
            xytext=(-4 if is_left else 4, 0),
            textcoords="offset points",
            ha="right" if is_left else "left",
            va="center",
            color="0.15",
            annotation_clip=False,
        )
    axes.set_ylim(top - half + 0.4, 0)
