"""Reliability diagrams: is a network right as often as it says it is?"""

import math
from collections.abc import Mapping

import numpy as np
from jax.typing import ArrayLike

from d2sparse.checks import optional
from d2sparse.plots.style import BLUE, ORANGE, STYLE, as_percent

with optional(__name__):
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 4


def reliability_diagram(bins: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Accuracy against confidence, one panel per method.

    >>> own = {"count": [0, 4], "confidence": [0.0, 3.0], "correct": [0, 2]}
    >>> figure = reliability_diagram({"rigl": own})

    Args:
      bins: by method, what `d2sparse.metrics.calibration` returns: sums over the
        examples of bins of equal width, which may be those of several seeds.

    Returns:
      The figure. A bar is the accuracy of the examples of a bin, a dot their mean
      confidence; on the diagonal both are equal. Bars are as dark as their bin is
      full. Titles hold the expected calibration error.

    Raises:
      ValueError: there is no method, or one without examples.
    """
    if not bins:
        raise ValueError(
            "expected the bins of at least one method, got none; wait until a run has "
            "finished"
        )
    own = {
        name: {key: np.asarray(values, float) for key, values in sums.items()}
        for name, sums in bins.items()
    }
    empty = [name for name, sums in own.items() if not sums["count"].sum()]
    if empty:
        raise ValueError(f"expected examples in the bins, got none of {empty}")
    columns = min(len(own), _COLUMNS)
    rows = math.ceil(len(own) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2.1 * columns, 0.5 + 2.3 * rows))
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (name, sums) in zip(panels.flat, own.items(), strict=False):
            _draw(axes, name, sums)
        for number, axes in enumerate(panels.flat):
            if number >= len(own):
                axes.set_axis_off()
            # The last of each column, which need not be in the last row.
            axes.tick_params(labelbottom=number + columns >= len(own))
        figure.supxlabel("confidence", fontsize=10)
        figure.supylabel("accuracy", fontsize=10)
    return figure


def _draw(axes: Axes, name: str, sums: Mapping[str, np.ndarray]) -> None:
    count, full = sums["count"], sums["count"] > 0
    edges = np.linspace(0, 1, len(count) + 1)
    accuracy = sums["correct"][full] / count[full]
    confidence = sums["confidence"][full] / count[full]
    error = np.abs(sums["correct"] - sums["confidence"]).sum() / count.sum()
    bars = axes.bar(
        edges[:-1][full], accuracy, 1 / len(count), align="edge", color=BLUE
    )
    for bar, share in zip(bars, count[full] / count.max(), strict=True):
        bar.set(alpha=0.15 + 0.85 * share, edgecolor="white")
    axes.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1)
    axes.plot(
        confidence, accuracy, color=ORANGE, marker="o", markersize=4, linestyle="none"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(as_percent)
    axes.yaxis.set_major_formatter(as_percent)
    axes.set_title(f"{name}\nECE {100 * error:.1f}%", fontsize=9)
