"""Pictures of a run: records in, matplotlib figures out.

Figures are made with matplotlib's object interface, so that nothing global changes:
`figure.savefig("curves.png")` writes one, and a notebook shows one by naming it. The
colours are those of Okabe and Ito, told apart by colour-blind readers.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, GREY, VERMILLION, BLACK = "#56B4E9", "#7F7F7F", "#D55E00", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, GREY, VERMILLION, BLACK)
STYLE: dict[Any, Any] = {
    "figure.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.5",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "xtick.color": "0.3",
    "ytick.color": "0.3",
    "legend.frameon": False,
}
# The line from a name to what it names.
LEADER = {"arrowstyle": "-", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
# Where the name of a point may stand, best first, and how far from it in points.
DISTANCES = (8, 16, 28, 40, 56)
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
# Whose mask keeps a weight: bit 0 the fast network's, bit 1 the slow network's.
PARTS = {"neither": "#F4F4F4", "fast only": ORANGE, "slow only": BLUE, "both": BLACK}
# The part of a large layer in which single weights can still be seen.
WINDOW = (64, 128)

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
    curves = _mean_curves(metrics, key)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        for (method, curve), look in zip(curves.items(), _looks(), strict=False):
            steps, mean, error = curve
            part = steps / max(steps[-1], 1)
            axes.plot(part, mean, label=method, linewidth=1.6, **look)
            band = (mean - error, mean + error)
            axes.fill_between(part, *band, color=look["color"], alpha=0.15, lw=0)
        axes.set(xlabel="part of the method's training steps", ylabel=label)
        axes.xaxis.set_major_formatter(_percent)
        axes.set_title("mean over seeds, in a band of its standard error", color="0.3")
        axes.margins(x=0)
        if percent:
            axes.yaxis.set_major_formatter(_percent)
        _zoom_on_late_training(axes, curves.values())
        _label_ends(axes)
    return figure


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
      The figure; up and to the left is better.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        for row, look in zip(rows, _looks(), strict=False):
            axes.errorbar(
                row["relative_macs"],
                row["accuracy"],
                yerr=row["standard_error"],
                label=row["method"],
                color=look["color"],
                marker="o",
                markersize=7,
                markeredgecolor="white",
                elinewidth=1.4,
            )
        axes.set_xscale("log")
        axes.margins(x=0.2, y=0.15)
        axes.set(
            xlabel="multiply-accumulates of training (dense = 1)",
            ylabel=label,
        )
        axes.set_title("mean over seeds and its standard error", color="0.3")
        axes.yaxis.set_major_formatter(_percent)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        _label_points(figure, rows)
    return figure


def mask_pair(
    fast: ArrayLike,
    slow: ArrayLike,
    overlap_steps: ArrayLike,
    overlap: ArrayLike,
    chance: float,
) -> Figure:
    """The masks of one layer of a pair of networks, laid over each other.

    Args:
      fast: bool[rows, columns], the mask of the fast network. Of a large layer only
        the first rows and columns are shown.
      slow: bool[rows, columns], the mask of the slow network.
      overlap_steps: int[times], the training steps of `overlap`.
      overlap: float[times], the overlap of the two masks, in [0, 1].
      chance: the overlap of random masks of these densities, in [0, 1].

    Returns:
      The figure: the masks on the left, their overlap over time on the right.

    Raises:
      ValueError: if the masks are not matrices of one shape.
    """
    fast, slow = np.asarray(fast, bool), np.asarray(slow, bool)
    if fast.ndim != 2 or fast.shape != slow.shape:
        raise ValueError(
            "masks must be two matrices of one shape, got shapes"
            f" {fast.shape} and {slow.shape}; reshape a convolution to"
            " (height * width * inputs, outputs)"
        )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.3))
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        _show_masks(left, fast, slow)
        _show_overlap(right, np.asarray(overlap_steps), np.asarray(overlap), chance)
    return figure


def _mean_curves(metrics: Sequence[Mapping[str, Any]], key: str) -> dict[str, Curve]:
    """The curve of every method, in the order of first measurement."""
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


def _percent(fraction: float, _: float | None = None) -> str:
    return f"{100 * fraction:.4g}%"


def _looks() -> Iterator[dict[str, Any]]:
    """Colours, and line styles once the colours are used up."""
    styles = ("-", "--", ":")
    return itertools.cycle(
        {"color": colour, "linestyle": style} for style in styles for colour in COLOURS
    )


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


def _label_ends(axes: Axes) -> None:
    """Names every line right of its end, moving names apart where ends meet."""
    lines = [line for line in axes.get_lines() if np.isfinite(line.get_ydata()).any()]
    low, high = axes.get_ylim()
    paths = [np.asarray(line.get_xydata()) for line in lines]
    ends = [path[np.isfinite(path).all(axis=1)][-1] for path in paths]
    heights = [(float(y) - low) / (high - low) for _, y in ends]
    for line, (x, y), height in zip(lines, ends, _spread(heights, 0.07), strict=True):
        axes.annotate(
            str(line.get_label()),
            xy=(float(x), float(y)),
            xytext=(1.06, height),
            textcoords="axes fraction",
            color="0.15",
            va="center",
            annotation_clip=False,
            arrowprops=LEADER
            | {
                "color": line.get_color(),
                "linestyle": line.get_linestyle(),
                "relpos": (0, 0.5),
            },
        )


def _spread(positions: Sequence[float], gap: float) -> np.ndarray:
    """The nearest positions in [0, 1], in the mean square, that are `gap` apart."""
    n = len(positions)
    order = np.argsort(positions, kind="stable")
    # With the gaps taken out, what remains is isotonic regression, by its minimax form.
    slack = np.asarray(positions)[order] - gap * np.arange(n)
    isotonic = [
        max(min(slack[j:k].mean() for k in range(i + 1, n + 1)) for j in range(i + 1))
        for i in range(n)
    ]
    spread = np.empty(n)
    spread[order] = np.clip(isotonic, 0, 1 - gap * (n - 1)) + gap * np.arange(n)
    return spread


def _label_points(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    """Names every point at the nearest place around it where nothing else is."""
    (axes,) = figure.axes
    figure.draw_without_rendering()
    inside = axes.get_window_extent().padded(-4)
    taken = [_extent(axes, row) for row in rows]
    for row, look in zip(rows, _looks(), strict=False):
        where: dict[str, Any] = {
            "xy": (row["relative_macs"], row["accuracy"]),
            "textcoords": "offset points",
        }
        label = axes.annotate(row["method"], xytext=(0, 0), color="0.15", **where)
        for distance, (dx, dy) in itertools.product(DISTANCES, DIRECTIONS):
            label.set_position((distance * dx, distance * dy))
            label.set_horizontalalignment(("right", "center", "left")[dx + 1])
            label.set_verticalalignment(("top", "center_baseline", "bottom")[dy + 1])
            box = label.get_window_extent()
            free = not any(box.overlaps(other) for other in taken)
            if free and inside.containsx(box.x0) and inside.containsx(box.x1):
                break
        taken.append(box.padded(6))
        if distance > DISTANCES[0]:
            line = LEADER | {"color": look["color"], "shrinkA": 2, "shrinkB": 3}
            axes.annotate("", xytext=label.get_position(), arrowprops=line, **where)


def _extent(axes: Axes, row: Mapping[str, Any]) -> Bbox:
    """The box of a point and its error bar, in pixels."""
    x, y, error = (row[key] for key in ("relative_macs", "accuracy", "standard_error"))
    error = np.nan_to_num(error)
    ends = axes.transData.transform([(x, y - error), (x, y + error)])
    return Bbox(ends).padded(6)


def _show_masks(axes: Axes, fast: np.ndarray, slow: np.ndarray) -> None:
    """Every weight of the window in the colour of the networks that keep it."""
    parts = fast + 2 * slow
    names = [f"{name} {np.mean(parts == i):.1%}" for i, name in enumerate(PARTS)]
    patches = [
        Patch(facecolor=colour, edgecolor="0.7", label=name)
        for colour, name in zip(PARTS.values(), names, strict=True)
    ]
    axes.imshow(
        parts[: WINDOW[0], : WINDOW[1]],
        cmap=ListedColormap(list(PARTS.values())),
        vmin=0,
        vmax=len(PARTS) - 1,
        interpolation="nearest",
        aspect="auto",
    )
    axes.grid(visible=False)
    axes.set_ylabel(_axis_name("input unit", WINDOW[0], fast.shape[0]))
    axes.set_xlabel(_axis_name("output unit", WINDOW[1], fast.shape[1]))
    axes.legend(
        handles=[patches[i] for i in (3, 1, 2, 0)],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(patches),
        fontsize=9,
        borderpad=0,
        columnspacing=1.2,
        handletextpad=0.5,
        handlelength=1,
        handleheight=1,
    )


def _axis_name(name: str, shown: int, size: int) -> str:
    return f"{name} (first {shown} of {size})" if shown < size else name


def _show_overlap(
    axes: Axes, steps: np.ndarray, overlap: np.ndarray, chance: float
) -> None:
    """The overlap over time, next to its chance level."""
    side = 1 if overlap[-1] < chance else -1
    axes.plot(steps, overlap, color="black", linewidth=1.6)
    axes.axhline(chance, color="0.5", linestyle="--", linewidth=1.2)
    axes.annotate(
        "chance",
        xy=(1, chance),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3 * side),
        textcoords="offset points",
        horizontalalignment="right",
        verticalalignment="bottom" if side > 0 else "top",
        color="0.3",
    )
    axes.margins(x=0)
    axes.set_ylim(0, 1.15 * max(chance, *overlap))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(_percent)
    axes.set(xlabel="training step", ylabel="overlap of the masks")
