"""What a learner on a stream is like after every megabatch."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from d2sparse.plots.curves import mean_curves
from d2sparse.plots.labels import label_ends
from d2sparse.plots.style import STYLE, as_percent, looks


def along_stream(
    lines: Sequence[Mapping[str, Any]], key: str, label: str, *, log: bool = False
) -> Figure:
    """One line per learner: the mean over seeds, in a band of its standard error.

    >>> figure = along_stream([
    ...     {"method": "app", "seed": 0, "step": 1, "density": 0.8},
    ...     {"method": "app", "seed": 0, "step": 2, "density": 0.4},
    ... ], "density", "density", log=True)

    Args:
      lines: measurements with the fields method, seed and step, the number of
        megabatches that have arrived. Those without `key` are left out.
      key: the measured quantity, a fraction.
      label: what the vertical axis says.
      log: a logarithmic axis, for densities.

    Returns:
      The figure; lines are named at their right ends.

    Raises:
      ValueError: no measurement has the key.
    """
    curves = mean_curves(lines, key)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        for (method, curve), look in zip(curves.items(), looks(), strict=False):
            steps, mean, error = curve
            # A megabatch is a point in time: nothing is known between two.
            axes.plot(steps, mean, label=method, marker="o", markersize=3, **look)
            band = (mean - error, mean + error)
            axes.fill_between(steps, *band, color=look["color"], alpha=0.15, lw=0)
        axes.set(xlabel="megabatches that have arrived", ylabel=label)
        axes.set_title("mean over seeds, in a band of its standard error", color="0.3")
        if log:
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter(as_percent)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label(axes, log)
    return figure


def _label(axes: Any, log: bool) -> None:
    """Names at the ends; they are laid out on a linear axis."""
    if not log:
        label_ends(axes)
        return
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
