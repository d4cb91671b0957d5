"""Learning curves: a measurement against training steps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2sparse.plots.labels import label_ends
from d2sparse.plots.style import STYLE, as_percent, looks

# Training steps, the mean over seeds, and its standard error.
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]


def learning_curves(
    metrics: Sequence[Mapping[str, Any]], key: str, label: str, *, percent: bool = False
) -> Figure:
    """One line per method: the mean over seeds, in a band of its standard error.

    >>> lines = [
    ...     {"method": "rigl", "seed": seed, "step": step, "accuracy": step / 200}
    ...     for seed in range(3) for step in (0, 50, 100)
    ... ]
    >>> figure = learning_curves(lines, "accuracy", "test accuracy", percent=True)

    Args:
      metrics: measurements with the fields method, seed and step, such as
        `records.read_metrics` returns. Those without `key` are left out.
      key: the measured quantity.
      label: what the vertical axis says, with the unit.
      percent: show fractions as percentages.

    Returns:
      The figure. Every line spans the whole of its method's training, which may be
      longer than another's. Lines are named at their ends; colours follow the order in
      which the methods first occur, as they do in `accuracy_against_cost`. The vertical
      axis is that of the last three quarters of training, in which methods differ.

    Raises:
      ValueError: if no measurement has the key.
    """
    curves = mean_curves(metrics, key)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        for (method, curve), look in zip(curves.items(), looks(), strict=False):
            steps, mean, error = curve
            part = steps / max(steps[-1], 1)
            axes.plot(part, mean, label=method, linewidth=1.6, **look)
            band = (mean - error, mean + error)
            axes.fill_between(part, *band, color=look["color"], alpha=0.15, lw=0)
        axes.set(xlabel="part of the method's training steps", ylabel=label)
        axes.xaxis.set_major_formatter(as_percent)
        axes.set_title("mean over seeds, in a band of its standard error", color="0.3")
        axes.margins(x=0)
        if percent:
            axes.yaxis.set_major_formatter(as_percent)
        _zoom_on_late_training(axes, curves.values())
        label_ends(axes)
    return figure


def mean_curves(metrics: Sequence[Mapping[str, Any]], key: str) -> dict[str, Curve]:
    """The curve of every method, in the order of first measurement.

    Args:
      metrics: measurements with the fields method, seed and step.
      key: the measured quantity; lines without it are left out.

    Raises:
      ValueError: no measurement has the key.

    >>> lines = [{"method": "rigl", "seed": 0, "step": 5, "accuracy": 0.5}]
    >>> steps, mean, error = mean_curves(lines, "accuracy")["rigl"]
    >>> int(steps[0]), float(mean[0]), float(error[0])
    (5, 0.5, 0.0)
    """
    values: dict[str, dict[int, list[float]]] = {}
    for line in metrics:
        if key in line:
            steps = values.setdefault(line["method"], {})
            steps.setdefault(line["step"], []).append(line[key])
    if not values:
        known = sorted({name for line in metrics for name in line})
        raise ValueError(f"no measurement has the key {key!r}, only {known}")
    return {
        method: (
            np.array(sorted(steps)),
            np.array([np.mean(steps[step]) for step in sorted(steps)]),
            np.array([_standard_error(steps[step]) for step in sorted(steps)]),
        )
        for method, steps in values.items()
    }


def _standard_error(values: Sequence[float]) -> float:
    n = len(values)
    return float(np.std(values, ddof=1)) / n**0.5 if n > 1 else 0.0


def _zoom_on_late_training(axes: Axes, curves: Iterable[Curve]) -> None:
    late = np.hstack(
        [
            (mean + side * error)[steps >= steps[-1] / 4]
            for steps, mean, error in curves
            for side in (-1, 1)
        ]
    )
    late = late[np.isfinite(late)]
    if late.size and np.ptp(late) > 0:
        margin = 0.05 * np.ptp(late)
        axes.set_ylim(late.min() - margin, late.max() + margin)
