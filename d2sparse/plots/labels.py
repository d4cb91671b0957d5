"""Names of lines and points, placed where they hide nothing."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.transforms import Bbox

# The line from a name to what it names.
LEADER = {"arrowstyle": "-", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
# Where the name of a point may stand, best first, and how far from it in points.
DISTANCES = (8, 16, 28, 40, 56)
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def label_ends(axes: Axes, **leader: Any) -> None:
    """Names every line right of its end, moving names apart where ends meet.

    Args:
      axes: of the lines; its limits are final.
      **leader: how the line from a name to an end looks, if not like the line named.
    """
    lines = [line for line in axes.get_lines() if np.isfinite(line.get_ydata()).any()]
    low, high = axes.get_ylim()
    paths = [np.asarray(line.get_xydata()) for line in lines]
    ends = [path[np.isfinite(path).all(axis=1)][-1] for path in paths]
    heights = [(float(y) - low) / (high - low) for _, y in ends]
    for line, (x, y), height in zip(lines, ends, spread(heights, 0.07), strict=True):
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
            }
            | leader,
        )


def spread(positions: Sequence[float], gap: float) -> np.ndarray:
    """The nearest positions in [0, 1], in the mean square, that are `gap` apart.

    >>> spread([0.5, 0.5, 0.9], gap=0.25).tolist()
    [0.375, 0.625, 0.9]
    """
    n = len(positions)
    order = np.argsort(positions, kind="stable")
    # With the gaps taken out, what remains is isotonic regression, by its minimax form.
    slack = np.asarray(positions)[order] - gap * np.arange(n)
    isotonic = [
        max(min(slack[j:k].mean() for k in range(i + 1, n + 1)) for j in range(i + 1))
        for i in range(n)
    ]
    moved = np.empty(n)
    moved[order] = np.clip(isotonic, 0, 1 - gap * (n - 1)) + gap * np.arange(n)
    return moved


def label_points(axes: Axes, points: Sequence[ErrorbarContainer]) -> None:
    """Names every point of a drawn figure at the nearest free place around it.

    Where points are close, nearness does not tell whose a name is: there, as for names
    that stand far away, a line leads from the name to the point.
    """
    inside = axes.get_window_extent().padded(-4)
    taken = [_extent(axes, point) for point in points]
    crowded = np.sum(separations(axes, points) < DISTANCES[1], axis=1) > 1
    for point, has_company in zip(points, crowded, strict=True):
        marker = point.lines[0]
        where: dict[str, Any] = {"xy": _place(point), "textcoords": "offset points"}
        name = str(point.get_label())
        label = axes.annotate(name, xytext=(0, 0), color="0.15", **where)
        distances = DISTANCES[1:] if has_company else DISTANCES
        for distance, (dx, dy) in itertools.product(distances, DIRECTIONS):
            label.set_position((distance * dx, distance * dy))
            label.set_horizontalalignment(("right", "center", "left")[dx + 1])
            label.set_verticalalignment(("top", "center_baseline", "bottom")[dy + 1])
            box = label.get_window_extent()
            free = not any(box.overlaps(other) for other in taken)
            if free and inside.containsx(box.x0) and inside.containsx(box.x1):
                break
        taken.append(box.padded(6))
        if distance > DISTANCES[0]:
            edge = marker.get_markersize() / 2 - 0.5
            line = LEADER | {"color": marker.get_color(), "shrinkA": 2, "shrinkB": edge}
            axes.annotate("", xytext=label.get_position(), arrowprops=line, **where)


def separations(axes: Axes, points: Sequence[ErrorbarContainer]) -> np.ndarray:
    """How far points of a drawn figure are apart, float[points, points].

    The unit is the point of typography, 1/72 of an inch.
    """
    places = np.reshape([_place(point) for point in points], (-1, 2))
    pixels = axes.transData.transform(places)
    apart = np.linalg.norm(pixels[:, None] - pixels[None], axis=-1)
    return apart * 72 / axes.figure.dpi


def _place(point: ErrorbarContainer) -> np.ndarray:
    return np.asarray(point.lines[0].get_xydata())[0]


def _extent(axes: Axes, point: ErrorbarContainer) -> Bbox:
    """The box of a point and its error bar, in pixels."""
    marker, _, (bars,) = point.lines
    radius = marker.get_markersize() / 2 * axes.figure.dpi / 72
    # An error that is NaN leaves a segment without ends.
    ends = [_place(point), *(end for bar in bars.get_segments() for end in bar)]
    pixels = axes.transData.transform(ends)
    return Bbox([pixels.min(axis=0), pixels.max(axis=0)]).padded(radius)
