"""Masks: which weights are live. Selection of the largest scores, and mask algebra.

A mask tree has the structure and the shapes of the parameters and dtype bool on every
leaf; a leaf that is never pruned is all True. Sparsity is the fraction of zeros and
density = 1 - sparsity, both over the prunable leaves unless said otherwise.
"""

from d2sparse.masks.algebra import (
    apply_masks,
    copy_masks,
    count,
    count_all,
    count_live,
    dense_masks,
    density,
    is_gap,
    refuse_other_paths,
    sparsity,
)
from d2sparse.masks.patterns import Pattern, blocks, channels, n_of_m
from d2sparse.masks.selection import Selection, select, top_k

__all__ = [
    "Pattern",
    "Selection",
    "apply_masks",
    "blocks",
    "channels",
    "copy_masks",
    "count",
    "count_all",
    "count_live",
    "dense_masks",
    "density",
    "is_gap",
    "n_of_m",
    "refuse_other_paths",
    "select",
    "sparsity",
    "top_k",
]
