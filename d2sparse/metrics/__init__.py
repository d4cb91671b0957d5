"""What is measured: predictions on a whole set, and masks over time."""

from d2sparse.metrics.predictions import (
    accuracy,
    brier,
    calibration,
    chance_overlap,
    density_table,
    disagreement,
    ece,
    exploration_rate,
    generalisation_gap,
    mask_overlap,
    nll,
    union,
)

__all__ = [
    "accuracy",
    "brier",
    "calibration",
    "chance_overlap",
    "density_table",
    "disagreement",
    "ece",
    "exploration_rate",
    "generalisation_gap",
    "mask_overlap",
    "nll",
    "union",
]
