"""Learning under constraints in JAX: masks as pure functions, carried by Optax.

The public names by floor; a room imports only from lower ones.

Floor 1, pure functions over trees: `masks`, `scores`, `distributions`, `schedules`.
Floor 2, rules and terms: `rules`, `reparam`, `packing`, `losses`, `metrics`, `macs`.
Floor 3, `transforms` (Optax), and the packages `models` and `data`.
Floors 4 to 6, training and experiments: `train`, `dual`, `lottery`, `checkpoint`,
`records`, `plots`.

What needs more than jax, optax and numpy is imported by name:
`from d2sparse import models`.
"""

from d2sparse import losses, macs, masks, metrics, packing, reparam, scores
from d2sparse.distributions import er, erk, explicit, global_, uniform
from d2sparse.masks import apply_masks, density, sparsity
from d2sparse.rules import (
    MaskRule,
    ac_dc,
    fixed,
    gradual,
    granet,
    largest,
    movement,
    one_shot,
    prune_and_grow,
    rigl,
    set_,
    sparse_momentum,
    static,
)
from d2sparse.schedules import (
    alternating,
    at,
    constant,
    cosine,
    cubic,
    every,
    linear,
)
from d2sparse.transforms import (
    AverageState,
    FreezeState,
    SparsifyState,
    average_weights,
    check_refreshes,
    check_sparse,
    freeze,
    get_average,
    get_masks,
    set_masks,
    sparsify,
)

__version__ = "0.1.0"

__all__ = [
    "AverageState",
    "FreezeState",
    "MaskRule",
    "SparsifyState",
    "ac_dc",
    "alternating",
    "apply_masks",
    "at",
    "average_weights",
    "check_refreshes",
    "check_sparse",
    "constant",
    "cosine",
    "cubic",
    "density",
    "er",
    "erk",
    "every",
    "explicit",
    "fixed",
    "freeze",
    "get_average",
    "get_masks",
    "global_",
    "gradual",
    "granet",
    "largest",
    "linear",
    "losses",
    "macs",
    "masks",
    "metrics",
    "movement",
    "one_shot",
    "packing",
    "prune_and_grow",
    "reparam",
    "rigl",
    "scores",
    "set_",
    "set_masks",
    "sparse_momentum",
    "sparsify",
    "sparsity",
    "static",
    "uniform",
]
