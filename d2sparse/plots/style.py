"""How every figure looks: its colours, line styles and settings."""

import itertools
from collections.abc import Iterator
from typing import Any

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


def as_percent(fraction: float, _: float | None = None) -> str:
    """The fraction in per cent, to four digits; also the form of a tick's name.

    >>> as_percent(0.95)
    '95%'
    """
    return f"{100 * fraction:.4g}%"


def looks() -> Iterator[dict[str, Any]]:
    """Colours, and line styles once the colours are used up.

    >>> next(looks())
    {'color': '#0072B2', 'linestyle': '-'}
    """
    styles = ("-", "--", ":")
    return itertools.cycle(
        {"color": colour, "linestyle": style} for style in styles for colour in COLOURS
    )
