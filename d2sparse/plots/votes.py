"""Label maps: which source label stands for a target class, and who voted for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from d2sparse.checks import optional
from d2sparse.plots.style import BLACK, STYLE, VERMILLION, as_percent

with optional(__name__):
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

_ROWS = 40  # Source labels that can still be read.


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
        # The least share can be told from none.
        shades = mpl.colors.ListedColormap(shades(np.linspace(0.15, 1, 256)))
        shades = shades.with_extremes(bad="white")
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
        frame = Rectangle(
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
