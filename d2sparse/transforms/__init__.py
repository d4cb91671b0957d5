"""Sparse training for any Optax optimiser.

`sparsify` lifts a mask rule into an `optax.GradientTransformation`, and `freeze` does
so for weights that hold their value instead of being zero. The masks live in the
optimiser's state; nothing else in a training loop changes.
"""

from d2sparse.transforms.states import (
    FreezeState,
    SparsifyState,
    check_refreshes,
    get_masks,
    refreshes_are_sound,
    set_masks,
    sparse_states,
)
from d2sparse.transforms.wrappers import freeze, mask_moments, sparsify

__all__ = [
    "FreezeState",
    "SparsifyState",
    "check_refreshes",
    "freeze",
    "get_masks",
    "mask_moments",
    "refreshes_are_sound",
    "set_masks",
    "sparse_states",
    "sparsify",
]
