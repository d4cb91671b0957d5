"""Learning under constraints in JAX: masks as pure functions, carried by Optax.

The public names by floor; a room imports only from lower ones.

Floor 1, pure functions over trees: `masks`, `scores`, `distributions`, `schedules`; of
a network's inputs and outputs, `prompts` and `label_maps`.
Floor 2, rules and terms: `rules`, `reparam`, `quantisation`, `packing`, `losses`,
`regularizers`, `metrics`, `macs`.
Floor 3, `transforms` (Optax), and the packages `models` and `data`.
Floors 4 to 6, training and experiments: `train`, `surgery`, `dual`, `lottery`,
`checkpoint`, `records`, `plots`.

The rooms of floors 3 to 6 that need more than jax, optax and numpy are imported when
they are first asked for, `d2sparse.dual` or `from d2sparse import dual`; without their
packages they say how these are installed.
"""

import importlib
import types

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
    per_layer,
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
    "per_layer",
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

_LATER = frozenset(
    {
        *("anytime", "checkpoint", "checks", "data", "distributions", "dual"),
        *("label_maps", "lottery", "models", "plots", "prompts", "quantisation"),
        *("records", "regularizers", "rules"),
        *("schedules", "surgery", "train", "transforms", "tree"),
    }
)


def __getattr__(name: str) -> types.ModuleType:
    """Imports a room when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module 'd2sparse' has no attribute {name!r}")
    return importlib.import_module(f"d2sparse.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
