"""Transfer of compressed networks: accuracies, prompts and label maps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from d2sparse.checks import optional
from d2sparse.plots.style import BLACK, STYLE, VERMILLION, as_percent, looks

with optional(__name__):
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_COLUMNS = 6  # Prompts beside each other.
_ROWS = 40  # Source labels that can still be read.
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


def label_map(
    votes: ArrayLike,
    chosen: ArrayLike,
    targets: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
) -> Figure:
    """What a network takes target classes for, and the source label each was given.

    >>> figure = label_map(np.array([[3, 0], [1, 0], [0, 0]]), [0, 2])

    Args:
      votes: `float[sources, targets]`, how many examples of a target class, or how much
        probability of them, a network predicts as a source label.
      chosen: `int[targets]`, the source label of every target class.
      targets: names of the target classes; their numbers if not given.
      sources: names of the source labels; their numbers if not given.

    Returns:
      The figure. A cell is the share of a target class; white cells have no vote.
      Chosen cells are framed, and crossed out where no example votes for them. Rows
      begin with the chosen labels in the order of their targets; of many source labels
      only those with the most votes follow.

    Raises:
      ValueError: votes are no matrix of numbers from 0, or labels are not of it.
    """
    votes, chosen = np.asarray(votes, float), np.asarray(chosen, int)
    _check_map(votes, chosen, targets, sources)
    rest = [s for s in np.argsort(-votes.sum(1), kind="stable") if s not in chosen]
    rows = list(dict.fromkeys(chosen.tolist()))
    rows += rest[: max(0, _ROWS - len(rows))]
    totals = votes.sum(axis=0)
    shares = np.divide(votes, totals, where=totals > 0, out=np.zeros_like(votes))[rows]
    size, own = votes.shape
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.8 + 0.28 * own, 1.7 + 0.2 * len(rows)))
        axes = figure.subplots()
        shades = mpl.colormaps["Blues"].resampled(256)
        shades = mpl.colors.ListedColormap(shades(np.linspace(0.15, 1, 256)))
        shades.set_bad("white")
        image = axes.imshow(
            np.ma.masked_equal(shares, 0), cmap=shades, vmin=0, vmax=1, aspect="auto"
        )
        bar = figure.colorbar(image, ax=axes, format=as_percent, shrink=0.8, aspect=30)
        bar.set_label("share of the target class")
        bar.outline.set_visible(False)
        _mark_chosen(axes, [rows.index(s) for s in chosen], votes[chosen, range(own)])
        _name_cells(axes, rows, totals, targets, sources)
        axes.set_xlabel("target class")
        shown = f" ({len(rows)} of {size})" if len(rows) < size else ""
        axes.set_ylabel(f"source label{shown}")
    return figure


def _check_map(
    votes: np.ndarray,
    chosen: np.ndarray,
    targets: Sequence[str] | None,
    sources: Sequence[str] | None,
) -> None:
    if votes.ndim != 2 or not votes.size or not (votes >= 0).all():
        raise ValueError(
            "expected votes of shape [sources, targets], none negative, got shape "
            f"{votes.shape} and the least {votes.min(initial=0):g}"
        )
    size, own = votes.shape
    inside = ((chosen >= 0) & (chosen < size)).all()
    if chosen.shape != (own,) or not inside:
        raise ValueError(
            f"expected {own} source labels below {size}, one for each target class, "
            f"got {chosen.tolist()}"
        )
    for name, given, number in (("targets", targets, own), ("sources", sources, size)):
        if given is not None and len(given) != number:
            raise ValueError(f"expected {number} names as {name}, got {len(given)}")


def _mark_chosen(axes: Axes, rows: Sequence[int], votes: np.ndarray) -> None:
    """Frames the chosen cells, crosses out those without votes, and counts them."""
    none = int(np.sum(votes == 0))
    for column, (row, own) in enumerate(zip(rows, votes, strict=True)):
        colour = BLACK if own else VERMILLION
        frame = mpl.patches.Rectangle(
            (column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=1.3
        )
        axes.add_patch(frame).set(zorder=3, clip_on=False)
        if not own:
            axes.plot(column, row, marker="x", markersize=5, color=VERMILLION)
    box: dict[str, Any] = {
        "marker": "s",
        "markersize": 8,
        "fillstyle": "none",
        "linestyle": "none",
    }
    cross: dict[str, Any] = {"marker": "x", "markersize": 6, "linestyle": "none"}
    handles = [
        Line2D(
            [], [], color=BLACK, label=f"chosen, with votes: {len(votes) - none}", **box
        ),
        Line2D([], [], color=VERMILLION, label=f"chosen, no votes: {none}", **cross),
    ]
    axes.legend(
        handles=handles[: 1 + (none > 0)],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        fontsize=9,
        borderpad=0.2,
        handletextpad=0.3,
    )


def _name_cells(
    axes: Axes,
    rows: Sequence[int],
    totals: np.ndarray,
    targets: Sequence[str] | None,
    sources: Sequence[str] | None,
) -> None:
    """Names rows and columns; a class without examples says so."""
    columns = range(len(totals)) if targets is None else targets
    names = [
        f"{name}" if total else f"{name} (no examples)"
        for name, total in zip(columns, totals, strict=True)
    ]
    upright = max(map(len, names)) > 2
    axes.set_xticks(range(len(names)), names, rotation=90 if upright else 0)
    axes.set_yticks(range(len(rows)), [sources[s] if sources else str(s) for s in rows])
    axes.tick_params(labelsize=8, length=0)
    # Lines between the cells.
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(visible=False)
    axes.grid(visible=True, which="minor", color="0.9", linewidth=0.5)
