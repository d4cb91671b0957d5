"""Data sets, data budgets, minibatch streams, augmentation and corruptions."""

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
from d2sparse.data.budgets import budget, holdout, long_tailed
from d2sparse.data.corruptions import (
    CORRUPTIONS,
    Corruption,
    blur,
    contrast,
    gaussian_noise,
    occlusion,
)
from d2sparse.data.noise import noisy_labels
from d2sparse.data.sources import Source, Split, load

__all__ = [
    "CORRUPTIONS",
    "Augment",
    "Corruption",
    "Source",
    "Split",
    "batch_indices",
    "blur",
    "budget",
    "channel_statistics",
    "color_jitter",
    "contrast",
    "cutout",
    "flip",
    "gaussian_noise",
    "holdout",
    "load",
    "long_tailed",
    "make_augment",
    "noisy_labels",
    "occlusion",
    "shift",
    "standardize",
    "steps_per_epoch",
]
