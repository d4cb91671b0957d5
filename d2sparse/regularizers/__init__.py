"""Penalties on weights, units and features, added to the loss of a task."""

from d2sparse.regularizers.transport import (
    directions,
    layer_collapse,
    sliced_wasserstein,
)

__all__ = [
    "directions",
    "layer_collapse",
    "sliced_wasserstein",
]
