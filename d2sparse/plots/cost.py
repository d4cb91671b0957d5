"""Accuracy against the cost of training."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from d2sparse.plots.labels import label_points, separations
from d2sparse.plots.style import STYLE, as_percent, looks

# The diameter of a point and the width of its error bar, in points.
MARKER, BAR = 7, 1.4


def accuracy_against_cost(
    rows: Sequence[Mapping[str, Any]], label: str = "test accuracy"
) -> Figure:
    """Accuracy of every method against what its training costs.

    >>> figure = accuracy_against_cost([
    ...     {"method": "dense", "accuracy": 0.9, "standard_error": 0.01,
    ...      "relative_macs": 1.0},
    ...     {"method": "rigl", "accuracy": 0.91, "standard_error": 0.01,
    ...      "relative_macs": 0.3},
    ... ])

    Args:
      rows: one per method, with the fields method, accuracy (a fraction), its
        standard_error and relative_macs (multiply-accumulates of the whole training,
        in units of the dense network's; above 0).
      label: what the vertical axis says.

    Returns:
      The figure; up and to the left is better. A point that others would cover is drawn
      larger, as a ring around them.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        points = [
            axes.errorbar(
                row["relative_macs"],
                row["accuracy"],
                yerr=row["standard_error"],
                label=row["method"],
                color=look["color"],
                marker="o",
                markersize=MARKER,
                markeredgecolor="white",
                elinewidth=BAR,
            )
            for row, look in zip(rows, looks(), strict=False)
        ]
        axes.set_xscale("log")
        axes.margins(x=0.2, y=0.15)
        axes.set(
            xlabel="multiply-accumulates of training (dense = 1)",
            ylabel=label,
        )
        axes.set_title("mean over seeds and its standard error", color="0.3")
        axes.yaxis.set_major_formatter(as_percent)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        figure.draw_without_rendering()
        _enlarge_covered(axes, points)
        label_points(axes, points)
    return figure


def _enlarge_covered(axes: Axes, points: Sequence[ErrorbarContainer]) -> None:
    """Draws a point that others cover larger than these, so that it shows around them.

    Larger and not aside: where a point stands is what it says.
    """
    apart = separations(axes, points)
    for i, point in enumerate(points):
        marker, _, (bars,) = point.lines
        above = int(np.sum(apart[i, i + 1 :] < MARKER / 2))
        marker.set_markersize(MARKER + 5 * above)
        bars.set_linewidth(BAR + 2.5 * above)
