"""What compression costs: accuracy against size, and what units of layers still do."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from d2sparse.plots.labels import label_ends
from d2sparse.plots.style import STYLE, as_percent, looks

_COLUMNS = 3  # Panels beside each other.
_LINE = 0.2  # Inches that the name of a layer takes.


def accuracy_against(
    rows: Sequence[Mapping[str, Any]],
    key: str,
    label: str,
    accuracy: str = "test accuracy",
    *,
    log: bool = False,
) -> Figure:
    """One line per method through its networks, in the order of their rows.

    >>> figure = accuracy_against([
    ...     {"method": "l2", "accuracy": 0.98, "deviation": 0.01, "compression": 5.0},
    ...     {"method": "l2", "accuracy": 0.97, "deviation": 0.01, "compression": 12.0},
    ... ], "compression", "compression ratio", log=True)

    Args:
      rows: with the fields method, accuracy (a fraction, the mean over seeds), its
        deviation over seeds and `key`. Rows without a finite `key` are left out.
      key: what the horizontal axis shows; fractions are shown in per cent.
      label: what it says.
      accuracy: what the vertical axis says.
      log: a logarithmic horizontal axis, for ratios.

    Raises:
      ValueError: no row has the key.
    """
    shown = [row for row in rows if np.isfinite(row.get(key, np.nan))]
    if not shown:
        raise ValueError(f"expected rows with {key!r}, got none")
    methods = dict.fromkeys(row["method"] for row in shown)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        for method, look in zip(methods, looks(), strict=False):
            own = [row for row in shown if row["method"] == method]
            x, y = ([row[name] for row in own] for name in (key, "accuracy"))
            errors = [row["deviation"] for row in own]
            # One network alone is a ring, which others do not cover.
            alone = {"markersize": 9, "fillstyle": "none"} if len(own) == 1 else {}
            axes.plot(
                x, y, label=method, marker="o", **{"markersize": 4, **alone, **look}
            )
            axes.errorbar(x, y, errors, fmt="none", ecolor=look["color"], elinewidth=1)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        elif max(row[key] for row in shown) <= 1:
            axes.xaxis.set_major_formatter(as_percent)
        axes.yaxis.set_major_formatter(as_percent)
        axes.set(xlabel=label, ylabel=accuracy)
        axes.set_title("mean over seeds and its standard deviation", color="0.3")
        label_ends(axes, linewidth=0.8, linestyle=":", shrinkB=4)
    return figure


def entropies_of_layers(rows: Sequence[Mapping[str, Any]], key: str = "part") -> Figure:
    """ON/OFF entropy of every layer as a training goes on, a panel per method.

    >>> figure = entropies_of_layers([
    ...     {"method": "easier", "part": 0, "entropies": {"relu1": 0.9, "relu2": 0.6}},
    ...     {"method": "easier", "part": 1, "entropies": {"relu1": 0.9, "relu2": 0.0}},
    ... ])

    Args:
      rows: one per method and part of its training, with the fields method, `key` and
        entropies, bits by layer (the mean over seeds).
      key: number of the part, the horizontal axis.

    Raises:
      ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("expected rows with the entropies of layers, got none")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    layers = list(dict.fromkeys(name for row in rows for name in row["entropies"]))
    columns = min(_COLUMNS, len(methods))
    lines = -(-len(methods) // columns)
    with mpl.rc_context(STYLE):
        # As high as the panels or as the names of many layers.
        height = max(2.4 * lines, _LINE * len(layers)) + 0.4
        figure = Figure(figsize=(2.9 * columns + 1.2, height))
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axes, method in zip(panels.flat, methods, strict=False):
            own = [row for row in rows if row["method"] == method]
            for layer, look in zip(layers, looks(), strict=False):
                x = [row[key] for row in own]
                y = [row["entropies"].get(layer, np.nan) for row in own]
                axes.plot(x, y, marker="o", markersize=3, label=layer, **look)
            axes.set_title(method, color="0.3")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in panels.flat[len(methods) :]:
            axes.set_visible(False)
        figure.supxlabel(key, fontsize=10)
        figure.supylabel("ON/OFF entropy, bits", fontsize=10)
        handles, names = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", fontsize=8)
    return figure
