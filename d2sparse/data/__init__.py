"""Data sets, data budgets, streams of them, augmentation and corruptions."""

from d2sparse.data.arrays import Source, Split, from_arrays, select
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
from d2sparse.data.sources import load
from d2sparse.data.streams import (
    REPLAYS,
    Megabatch,
    Replay,
    Stream,
    accumulate,
    cut_stream,
    epoch_batches,
    on_finest_grid,
    visible,
)
from d2sparse.data.tasks import enlarged, only_classes, with_rotations

__all__ = [
    "CORRUPTIONS",
    "REPLAYS",
    "Augment",
    "Corruption",
    "Megabatch",
    "Replay",
    "Source",
    "Split",
    "Stream",
    "accumulate",
    "batch_indices",
    "blur",
    "budget",
    "channel_statistics",
    "color_jitter",
    "contrast",
    "cut_stream",
    "cutout",
    "enlarged",
    "epoch_batches",
    "flip",
    "from_arrays",
    "gaussian_noise",
    "holdout",
    "load",
    "long_tailed",
    "make_augment",
    "noisy_labels",
    "occlusion",
    "on_finest_grid",
    "only_classes",
    "select",
    "shift",
    "standardize",
    "steps_per_epoch",
    "visible",
    "with_rotations",
]
