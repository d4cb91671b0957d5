"""Learning under constraints in JAX: masks as pure functions, carried by Optax.

The public names by floor; a room imports only from lower ones.

Floor 1, pure functions over trees: `masks`, `scores`, `distributions`, `schedules`.
Floor 2, rules and terms: `rules`, `losses`, `metrics`, `macs`.
Floor 3, `transforms` (Optax), and the packages `models` and `data`.
Floors 4 to 6, training and experiments: `train`, `dual`, `lottery`, `records`, `plots`.

What needs more than jax, optax and numpy is imported by name:
`from d2sparse import models`.
"""

from d2sparse import losses, macs, metrics, scores
from d2sparse.distributions import er, erk, global_, uniform
from d2sparse.masks import apply_masks, density, sparsity
from d2sparse.rules import (
    MaskRule,
    fixed,
    gradual,
    one_shot,
    prune_and_grow,
    rigl,
    set_,
    static,
)
from d2sparse.schedules import at, constant, cosine, cubic, every, linear
from d2sparse.transforms import SparsifyState, get_masks, set_masks, sparsify

__version__ = "0.1.0"

__all__ = [
    "MaskRule",
    "SparsifyState",
    "apply_masks",
    "at",
    "constant",
    "cosine",
    "cubic",
    "density",
    "er",
    "erk",
    "every",
    "fixed",
    "get_masks",
    "global_",
    "gradual",
    "linear",
    "losses",
    "macs",
    "metrics",
    "one_shot",
    "prune_and_grow",
    "rigl",
    "scores",
    "set_",
    "set_masks",
    "sparsify",
    "sparsity",
    "static",
    "uniform",
]
