"""Pictures of a run: records in, matplotlib figures out.

Figures are made with matplotlib's object interface, so that nothing global changes:
`figure.savefig("curves.png")` writes one, and a notebook shows one by naming it. The
colours are those of Okabe and Ito, told apart by colour-blind readers.
"""

from d2sparse.plots.calibration import (
    reliability_before_and_after,
    reliability_diagram,
)
from d2sparse.plots.cost import accuracy_against_cost
from d2sparse.plots.curves import Curve, learning_curves
from d2sparse.plots.labels import DIRECTIONS, DISTANCES, LEADER
from d2sparse.plots.masks import PARTS, WINDOW, mask_pair
from d2sparse.plots.ranks import average_ranks, critical_difference, rank_diagram
from d2sparse.plots.sparsity import accuracy_against_sparsity
from d2sparse.plots.streams import along_stream
from d2sparse.plots.style import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    STYLE,
    VERMILLION,
)
from d2sparse.plots.tradeoff import accuracy_against, entropies_of_layers
from d2sparse.plots.transfer import (
    accuracy_against_compression,
    prompt_grid,
)
from d2sparse.plots.votes import label_map

__all__ = [
    "BLACK",
    "BLUE",
    "COLOURS",
    "DIRECTIONS",
    "DISTANCES",
    "GREEN",
    "GREY",
    "LEADER",
    "ORANGE",
    "PARTS",
    "PINK",
    "SKY",
    "STYLE",
    "VERMILLION",
    "WINDOW",
    "Curve",
    "accuracy_against",
    "accuracy_against_compression",
    "accuracy_against_cost",
    "accuracy_against_sparsity",
    "along_stream",
    "average_ranks",
    "critical_difference",
    "entropies_of_layers",
    "label_map",
    "learning_curves",
    "mask_pair",
    "prompt_grid",
    "rank_diagram",
    "reliability_before_and_after",
    "reliability_diagram",
]
