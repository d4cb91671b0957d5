"""Reliability diagrams: is a network right as often as it says it is?"""

import math
from collections.abc import Mapping

import numpy as np
from jax.typing import ArrayLike

from d2sparse.checks import optional
from d2sparse.plots.style import BLUE, ORANGE, STYLE, VERMILLION, as_percent

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
    own = _checked(bins)
    with mpl.rc_context(STYLE):
        figure, panels = _panels(len(own))
        for axes, (name, sums) in zip(panels, own.items(), strict=True):
            _draw(axes, name, sums)
    return figure


def reliability_before_and_after(
    before: Mapping[str, Mapping[str, ArrayLike]],
    after: Mapping[str, Mapping[str, ArrayLike]],
    temperatures: Mapping[str, float] | None = None,
) -> Figure:
    """Reliability of networks before and after temperature scaling, a panel each.

    >>> doubts = {"count": [0, 4], "confidence": [0.0, 2.4], "correct": [0, 4]}
    >>> knows = {"count": [0, 4], "confidence": [0.0, 3.9], "correct": [0, 4]}
    >>> figure = reliability_before_and_after({"dense": doubts}, {"dense": knows})

    Args:
      before: by network, what `d2sparse.metrics.calibration` returns of the
        probabilities as they are; its bins may be of equal width or mass.
      after: the same of the probabilities at the fitted temperature.
      temperatures: by network, for the titles.

    Returns:
      The figure. A dot is a bin, at its mean confidence and its accuracy, as large as
      its share of the examples; above the diagonal a network is not confident enough.
      Titles hold the expected calibration errors before and after.

    Raises:
      ValueError: there is no network, one has no examples, or names differ.
    """
    early, late = _checked(before), _checked(after)
    lacking = set(early) ^ set(late)
    lacking |= set(early) - set(early if temperatures is None else temperatures)
    if lacking:
        raise ValueError(
            f"expected the same networks before and after, got {sorted(lacking)} once"
        )
    with mpl.rc_context(STYLE):
        figure, panels = _panels(len(early))
        for axes, name in zip(panels, early, strict=True):
            _draw_diagonal(axes)
            _draw_dots(axes, early[name], VERMILLION, "before", "s")
            _draw_dots(axes, late[name], BLUE, "after", "o")
            at = f", T = {temperatures[name]:.2g}" if temperatures else ""
            errors = [
                f"{100 * _error(sums):.1f}%" for sums in (early[name], late[name])
            ]
            axes.set_title(f"{name}{at}\nECE {' → '.join(errors)}", fontsize=9)
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=2, fontsize=9)
    return figure


def _checked(
    bins: Mapping[str, Mapping[str, ArrayLike]],
) -> dict[str, dict[str, np.ndarray]]:
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
    return own


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    """A figure with a square panel for every method, its axes named."""
    columns = min(number, _COLUMNS)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(0.6 + 2.1 * columns, 0.5 + 2.3 * rows))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(panels.flat):
        if place >= number:
            axes.set_axis_off()
        # The last of each column, which need not be in the last row.
        axes.tick_params(labelbottom=place + columns >= number, labelsize=9)
    figure.supxlabel("confidence", fontsize=10)
    figure.supylabel("accuracy", fontsize=10)
    return figure, list(panels.flat[:number])


def _draw(axes: Axes, name: str, sums: Mapping[str, np.ndarray]) -> None:
    count, full = sums["count"], sums["count"] > 0
    edges = np.linspace(0, 1, len(count) + 1)
    accuracy = sums["correct"][full] / count[full]
    confidence = sums["confidence"][full] / count[full]
    bars = axes.bar(
        edges[:-1][full], accuracy, 1 / len(count), align="edge", color=BLUE
    )
    for bar, share in zip(bars, count[full] / count.max(), strict=True):
        bar.set(alpha=0.15 + 0.85 * share, edgecolor="white")
    _draw_diagonal(axes)
    axes.plot(
        confidence, accuracy, color=ORANGE, marker="o", markersize=4, linestyle="none"
    )
    axes.set_title(f"{name}\nECE {100 * _error(sums):.1f}%", fontsize=9)


def _draw_dots(
    axes: Axes, sums: Mapping[str, np.ndarray], colour: str, label: str, marker: str
) -> None:
    """A dot for every bin, its area the share of the examples, joined by a line."""
    full = sums["count"] > 0
    count = sums["count"][full]
    confidence, accuracy = (
        sums[key][full] / count for key in ("confidence", "correct")
    )
    areas = 8 + 120 * count / count.sum()
    axes.plot(confidence, accuracy, color=colour, linewidth=1)
    axes.scatter(
        confidence,
        accuracy,
        areas,
        color=colour,
        marker=marker,
        label=label,
        alpha=0.75,
        linewidths=0,
        clip_on=False,
        zorder=3,
    )


def _draw_diagonal(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(as_percent)
    axes.yaxis.set_major_formatter(as_percent)


def _error(sums: Mapping[str, np.ndarray]) -> float:
    """Expected calibration error of the bins."""
    return float(
        np.abs(sums["correct"] - sums["confidence"]).sum() / sums["count"].sum()
    )
