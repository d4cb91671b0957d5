"""Rules: what happens to the masks at a refresh.

A rule is a few pure functions, free of an optimiser: usable in any loop, and lifted
into Optax by `sparsify` or `freeze`. Each function here is one row of the product
scores x distribution x selection x schedule x what happens at a refresh, with the name
its paper gave it.

    keep      fixed, nonzero, static
    prune     one_shot, gradual, movement; a pruned weight never comes back
    choose    largest, ac_dc: of all weights anew, live or not
    move      prune_and_grow, set_, rigl, sparse_momentum, granet

`per_layer` makes of any of them one for parameters that are stacked over layers.

A score that is NaN is a `ValueError` outside of compiled functions; inside of them it
counts as the lowest, so that the density holds, and `sparsify` notes the leaf in its
state: that of every rule here, and of your own where their `update` is a `Noting`. Of a
plain function it notes NaN in the weights and gradients alone.
"""

from d2sparse.rules.base import MaskRule, Noting, begin, refresh
from d2sparse.rules.growing import granet, prune_and_grow, rigl, set_, sparse_momentum
from d2sparse.rules.keeping import fixed, nonzero, static
from d2sparse.rules.pruning import ac_dc, gradual, largest, movement, one_shot
from d2sparse.rules.stacks import per_layer

__all__ = [
    "MaskRule",
    "Noting",
    "ac_dc",
    "begin",
    "fixed",
    "gradual",
    "granet",
    "largest",
    "movement",
    "nonzero",
    "one_shot",
    "per_layer",
    "prune_and_grow",
    "refresh",
    "rigl",
    "set_",
    "sparse_momentum",
    "static",
]
