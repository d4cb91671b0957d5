"""Transfer of compressed networks: their accuracies, and prompts as images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from d2sparse.checks import optional
from d2sparse.plots.style import STYLE, as_percent, looks

with optional(__name__):
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 6  # Prompts beside each other.
_FULL = 32  # Bits of a number that is not quantised.


def accuracy_against_compression(
    rows: Sequence[Mapping[str, Any]], label: str = "test accuracy"
) -> Figure:
    """Accuracy against sparsity, against bits, and where a network has both.

    >>> row = {"method": "prompt", "bits": 32, "standard_error": 0.01}
    >>> figure = accuracy_against_compression([
    ...     row | {"sparsity": 0.0, "accuracy": 0.6},
    ...     row | {"sparsity": 0.8, "accuracy": 0.65},
    ...     row | {"sparsity": 0.0, "bits": 4, "accuracy": 0.5},
    ... ])

    Args:
      rows: one per method of adaptation and compressed network, with the fields method,
        sparsity (the fraction of zeros, in [0, 1)), bits of a weight (32 if it is not
        quantised), accuracy (a fraction, the mean over seeds) and standard_error (over
        seeds; NaN draws none).
      label: what the vertical axis says.

    Returns:
      The figure: a panel each for networks that are sparse, quantised, and both, as far
      as there are such rows; every panel begins with the network that is neither.
      Compression rises to the right, in equal steps. Methods stand a little beside each
      other.

    Raises:
      ValueError: there are no rows, a number is out of its range, or two rows are of
        the same method and network.
    """
    places = [(float(row["sparsity"]), float(row["bits"])) for row in rows]
    if not all(0 <= sparsity < 1 and 0 < bits <= _FULL for sparsity, bits in places):
        raise ValueError(
            f"expected sparsities in [0, 1) and bits in (0, {_FULL}], got {places}"
        )
    names = [(row["method"], *place) for row, place in zip(rows, places, strict=True)]
    if not rows or len(set(names)) < len(names):
        raise ValueError(
            "expected one row per method and network, at least one, got "
            f"{len(rows)} rows for {len(set(names))}; take the means over seeds first"
        )
    panels = _panels(places)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    with mpl.rc_context(STYLE):
        widths = [len(places) for _, places in panels]
        figure = Figure(figsize=(3.2 + 0.75 * sum(widths), 3.6))
        every = figure.subplots(
            1, len(panels), sharey=True, squeeze=False, width_ratios=widths
        )[0]
        for axes, (title, own) in zip(every, panels, strict=True):
            _draw_panel(axes, own, rows, methods)
            axes.set_xlabel(title)
        every[0].yaxis.set_major_formatter(as_percent)
        every[0].set_ylabel(label)
        every[0].set_title("mean over seeds and its standard error", color="0.3")
        handles = every[0].get_lines()
        figure.legend(handles=handles, loc="outside right center", handlelength=2.6)
    return figure


def _panels(
    places: Sequence[tuple[float, float]],
) -> list[tuple[str, list[tuple[float, float]]]]:
    """The title of every panel, and its networks from the least compressed on."""
    networks = sorted(set(places), key=lambda place: (place[0], -place[1]))
    dense = [place for place in networks if place == (0, _FULL)]
    kinds = {
        "sparsity": [p for p in networks if p[0] > 0 and p[1] == _FULL],
        "bits of a weight": [p for p in networks if p[0] == 0 and p[1] < _FULL],
        "sparsity and bits": [p for p in networks if p[0] > 0 and p[1] < _FULL],
    }
    panels = [(title, dense + own) for title, own in kinds.items() if own]
    return panels or [("sparsity", dense)]


def _draw_panel(
    axes: Axes,
    places: Sequence[tuple[float, float]],
    rows: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
) -> None:
    step = min(0.08, 0.5 / len(methods))
    for number, (method, look) in enumerate(zip(methods, looks(), strict=False)):
        own = {
            (float(row["sparsity"]), float(row["bits"])): row
            for row in rows
            if row["method"] == method
        }
        shift = step * (number - (len(methods) - 1) / 2)
        x = np.array([i for i, place in enumerate(places) if place in own]) + shift
        shown = [own[place] for place in places if place in own]
        y = [row["accuracy"] for row in shown]
        errors = [row["standard_error"] for row in shown]
        axes.plot(x, y, label=method, marker="o", markersize=5, **look)
        axes.errorbar(x, y, errors, fmt="none", ecolor=look["color"], elinewidth=1.2)
    axes.set_xticks(range(len(places)), [_name(place) for place in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.grid(visible=False, axis="x")


def _name(place: tuple[float, float]) -> str:
    sparsity, bits = place
    parts = [as_percent(sparsity)] * (sparsity > 0) + [f"{bits:g} bit"] * (bits < _FULL)
    return "\n".join(parts) or "dense"


def prompt_grid(
    prompts: Mapping[str, ArrayLike],
    where: ArrayLike | None = None,
    *,
    signed: bool = False,
) -> Figure:
    """Prompts as images, beside each other.

    >>> figure = prompt_grid({"dense": np.full((8, 8, 3), 0.5)})

    Args:
      prompts: by name, `float[height, width, channels]` of 1 or 3 channels, in [0, 1]:
        what a network sees before the normalisation. Prompted images can be given too.
      where: `bool[height, width]`, the pixels that belong to the prompt; the others are
        left white. All if not given.
      signed: of prompts that are added to an image: grey is 0, black and white are the
        largest absolute value of each, which its title tells.

    Returns:
      The figure.

    Raises:
      ValueError: there is no prompt, or one is no such image.
    """
    images = {name: np.asarray(image, float) for name, image in prompts.items()}
    for name, image in images.items():
        if image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise ValueError(
                "expected prompts of shape [height, width, 1 or 3], got "
                f"{image.shape} of {name!r}"
            )
        if not signed and not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"expected values in [0, 1], got {image.min():.3g} to "
                f"{image.max():.3g} of {name!r}; squash the prompt, or give signed=True"
            )
    if not images:
        raise ValueError("expected at least one prompt, got none; train one first")
    columns = min(len(images), _COLUMNS)
    rows = math.ceil(len(images) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.2 + 1.7 * columns, 0.1 + 1.95 * rows))
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for axes, (name, image) in zip(panels.flat, images.items(), strict=False):
            _show_prompt(axes, name, image, where, signed)
    return figure


def _show_prompt(
    axes: Axes, name: str, image: np.ndarray, where: ArrayLike | None, signed: bool
) -> None:
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set(visible=True, color="0.7", linewidth=0.6)
    if signed:
        shown = np.ones(image.shape[:2]) if where is None else np.asarray(where)
        largest = np.abs(image[shown.astype(bool)]).max(initial=0)
        image = 0.5 + 0.5 * image / (largest or 1)
        name = f"{name}\n±{largest:.2g}"
    image = np.clip(np.broadcast_to(image, (*image.shape[:2], 3)), 0, 1)
    if where is not None:
        image = np.where(np.asarray(where, bool)[..., None], image, 1)
    axes.imshow(image, interpolation="nearest")
    axes.set_title(name, fontsize=9)
