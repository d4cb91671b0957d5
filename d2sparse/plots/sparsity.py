"""Accuracy against sparsity: how much of a network is needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from d2sparse.distributions import check_sparsity
from d2sparse.plots.labels import label_ends
from d2sparse.plots.style import STYLE, as_percent, looks


def accuracy_against_sparsity(
    rows: Sequence[Mapping[str, Any]],
    label: str = "test accuracy",
    reference: Mapping[str, Any] | None = None,
) -> Figure:
    """One line per method through its sparsities, with the deviation over seeds.

    >>> figure = accuracy_against_sparsity([
    ...     {"method": "rigl", "sparsity": 0.8, "accuracy": 0.93, "deviation": 0.01},
    ...     {"method": "rigl", "sparsity": 0.95, "accuracy": 0.9, "deviation": 0.02},
    ... ])

    Args:
      rows: one per method and sparsity, with the fields method, sparsity (the fraction
        of zeros, in [0, 1)), accuracy (a fraction, the mean over seeds) and deviation
        (its standard deviation over seeds; NaN draws none).
      label: what the vertical axis says.
      reference: what the methods are compared to, such as the dense network: a row
        without a sparsity, drawn as a horizontal line in a band of its deviation.

    Returns:
      The figure. The horizontal axis is logarithmic in the density, so that halving the
      weights is the same step everywhere; its ticks are the sparsities of the rows.
      Methods stand a little beside each other, by the same step at every sparsity, so
      that their error bars can be told apart. Lines are named at their right ends.

    Raises:
      ValueError: there are no rows, or a sparsity is outside [0, 1).
    """
    if not rows:
        raise ValueError(
            "expected at least one row, a method at a sparsity, got none; wait until"
            " a run has finished"
        )
    methods = dict.fromkeys(row["method"] for row in rows)
    # Sparsities that differ by rounding have one name and are one tick.
    ticks = {as_percent(s): s for s in sorted(_sparsity(row) for row in rows)}
    densities = 1 - np.array(list(ticks.values()))
    shifts, limits = _layout(np.log10(densities), len(methods))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_xlim(*10**limits)
        for method, shift, look in zip(methods, shifts, looks(), strict=False):
            own = [row for row in rows if row["method"] == method]
            _draw_method(axes, sorted(own, key=_sparsity), 10**shift, look)
        if reference is not None:
            _draw_reference(axes, reference, 10**limits)
        axes.set_xticks(densities, list(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(as_percent)
        axes.set(xlabel="sparsity (log scale of density)", ylabel=label)
        axes.set_title("mean over seeds and its standard deviation", color="0.3")
        # Thin and dotted, where a solid line would seem to be measured.
        label_ends(axes, linewidth=0.8, linestyle=":", shrinkB=4)
        figure.draw_without_rendering()
        _hide_crowded_ticks(axes)
    return figure


def _sparsity(row: Mapping[str, Any]) -> float:
    return float(check_sparsity(row["sparsity"]))


def _layout(places: np.ndarray, methods: int) -> tuple[np.ndarray, np.ndarray]:
    """Where methods stand beside the sparsities, and where the axis begins and ends.

    Args:
      places: float[sparsities], their densities in powers of ten, falling.
      methods: how many there are.

    Returns:
      In powers of ten, the shift of every method and the two limits.
    """
    if len(places) == 1:  # In the middle of a power of ten.
        places = places + np.array([0.5, -0.5])
    gaps = -np.diff(places)
    # The methods of one sparsity stay clear of those of the next.
    step = min(0.012 * gaps.sum(), 0.5 * np.median(gaps) / methods)
    shifts = step * ((methods - 1) / 2 - np.arange(methods))
    margin = shifts[0] + 0.06 * gaps.sum()
    return shifts, np.array([places[0] + margin, places[-1] - margin])


def _draw_method(
    axes: Axes, rows: Sequence[Mapping[str, Any]], shift: float, look: dict[str, Any]
) -> None:
    """The line through the rows, its densities multiplied by `shift`."""
    x = [shift * (1 - _sparsity(row)) for row in rows]
    y = [row["accuracy"] for row in rows]
    axes.plot(x, y, label=rows[0]["method"], marker="o", markersize=5, **look)
    deviations = [row["deviation"] for row in rows]
    axes.errorbar(x, y, deviations, fmt="none", ecolor=look["color"], elinewidth=1.2)


def _draw_reference(axes: Axes, row: Mapping[str, Any], ends: np.ndarray) -> None:
    """A horizontal line in a band of its deviation, below everything else."""
    mean, deviation = row["accuracy"], row["deviation"]
    look: dict[str, Any] = {"color": "0.4", "zorder": 1}
    axes.plot(ends, [mean, mean], label=row["method"], linestyle="--", **look)
    band = (mean - deviation, mean + deviation)
    axes.fill_between(ends, *band, alpha=0.15, linewidth=0, **look)


def _hide_crowded_ticks(axes: Axes) -> None:
    """Leaves out, once drawn, the names of ticks that would crowd the one before."""
    end = -np.inf
    for text in axes.get_xticklabels():
        box = text.get_window_extent()
        if box.x0 > end:
            end = box.x1 + box.height / 2
        else:
            text.set_visible(False)
