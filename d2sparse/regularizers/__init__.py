"""Penalties on weights, groups, kernels and features, and their proximal operators.

A penalty is a function of the parameters, `penalty(params) -> float[]`, to be added to
a loss times a strength. Its gradient is finite everywhere, also at groups of zeros,
where it is 0. Gradients of penalties that have a kink rarely end at exact zeros; their
proximal operators do:

    prox(v, strength) = argmin_w  |w - v|^2 / 2 + strength * penalty(w),

which `transforms.proximal` applies after the update of any Optax optimiser.

| penalty | proximal operator | zeros |
|---|---|---|
| `l1` | `soft_threshold` | weights |
| `l2` | `shrink` | none |
| `hoyer_square`, `group_hoyer_square` | none in closed form | weights, groups |
| `group_lasso` | `group_soft_threshold` | neurons, channels |
| `nuclear_norm` | `singular_value_threshold` | singular values |

`layer_collapse` is a penalty on features: how far blocks move what enters them.
"""

from d2sparse.regularizers.groups import (
    Groups,
    group_hoyer_square,
    group_lasso,
    group_norms,
    group_sizes,
    group_soft_threshold,
    neurons,
    scale_groups,
    soft_factors,
)
from d2sparse.regularizers.spectral import nuclear_norm, singular_value_threshold
from d2sparse.regularizers.transport import (
    block_distances,
    directions,
    layer_collapse,
    sliced_wasserstein,
)
from d2sparse.regularizers.weights import (
    hoyer_square,
    l1,
    l2,
    shrink,
    soft_threshold,
)

__all__ = [
    "Groups",
    "block_distances",
    "directions",
    "group_hoyer_square",
    "group_lasso",
    "group_norms",
    "group_sizes",
    "group_soft_threshold",
    "hoyer_square",
    "l1",
    "l2",
    "layer_collapse",
    "neurons",
    "nuclear_norm",
    "scale_groups",
    "shrink",
    "singular_value_threshold",
    "sliced_wasserstein",
    "soft_factors",
    "soft_threshold",
]
