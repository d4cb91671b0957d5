"""The masks of a pair of networks, laid over each other."""

import matplotlib as mpl
import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from d2sparse.plots.style import BLACK, BLUE, ORANGE, STYLE, as_percent

# Whose mask keeps a weight: bit 0 the fast network's, bit 1 the slow network's.
PARTS = {"neither": "#F4F4F4", "fast only": ORANGE, "slow only": BLUE, "both": BLACK}
# The part of a large layer in which single weights can still be seen.
WINDOW = (64, 128)


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
    axes.yaxis.set_major_formatter(as_percent)
    axes.set(xlabel="training step", ylabel="overlap of the masks")
