"""Sparse training for any Optax optimiser.

`sparsify` lifts a mask rule into an `optax.GradientTransformation`, and `freeze` does
so for weights that hold their value instead of being zero. The masks live in the
optimiser's state; nothing else in a training loop changes. `average_weights` keeps the
average of the weights beside them. `sensitivity_decay` decays the weights that the loss
or the outputs are insensitive to; `proximal` and `group_budget` make weights and groups
of them exactly 0, without masks.
"""

from d2sparse.transforms.averaging import (
    AverageState,
    average_weights,
    get_average,
)
from d2sparse.transforms.decays import DecayState, sensitivity_decay
from d2sparse.transforms.moments import reset_moments
from d2sparse.transforms.proximal import ProximalState, group_budget, proximal
from d2sparse.transforms.states import (
    FreezeState,
    SparsifyState,
    check_refreshes,
    check_sparse,
    get_masks,
    mask_states,
    refreshes_are_sound,
    set_masks,
    sparse_states,
    zero_pruned,
)
from d2sparse.transforms.wrappers import freeze, sparsify

__all__ = [
    "AverageState",
    "DecayState",
    "FreezeState",
    "ProximalState",
    "SparsifyState",
    "average_weights",
    "check_refreshes",
    "check_sparse",
    "freeze",
    "get_average",
    "get_masks",
    "group_budget",
    "mask_states",
    "proximal",
    "refreshes_are_sound",
    "reset_moments",
    "sensitivity_decay",
    "set_masks",
    "sparse_states",
    "sparsify",
    "zero_pruned",
]
