"""Data sets, data budgets, minibatch streams and on-device augmentation."""

from d2sparse.data.augment import (
    Augment,
    channel_statistics,
    color_jitter,
    cutout,
    flip,
    make_augment,
    shift,
    standardize,
)
from d2sparse.data.batches import batch_indices, steps_per_epoch
from d2sparse.data.budgets import budget, holdout
from d2sparse.data.noise import noisy_labels
from d2sparse.data.sources import Source, Split, load

__all__ = [
    "Augment",
    "Source",
    "Split",
    "batch_indices",
    "budget",
    "channel_statistics",
    "color_jitter",
    "cutout",
    "flip",
    "holdout",
    "load",
    "make_augment",
    "noisy_labels",
    "shift",
    "standardize",
    "steps_per_epoch",
]
