"""Quantisation: weights and activations in 2 to 8 bits, as the network sees them.

The numbers stay floats that take few values (fake quantisation): gradients pass the
rounding, so that networks and what stands in front of them can be trained through it.

`uniform` is the quantiser, `scales` are those of arrays, `weights` are trees, and
`calibration` has the scales of activations from batches. Activations of a network are
reached by layer through `d2sparse.models.quantised`.
"""

from d2sparse.quantisation import calibration, scales
from d2sparse.quantisation.calibration import Statistics, dynamic, merge, observe
from d2sparse.quantisation.scales import Per, ScaleName, make_scale, survivors
from d2sparse.quantisation.uniform import (
    check_bits,
    code_range,
    codes,
    dequantise,
    fake_quantise,
    learned,
)
from d2sparse.quantisation.weights import (
    Bits,
    Codes,
    edge_bits,
    effective_size,
    quantise_weights,
    restore_weights,
    share_bits,
    weight_codes,
)

__all__ = [
    "Bits",
    "Codes",
    "Per",
    "ScaleName",
    "Statistics",
    "calibration",
    "check_bits",
    "code_range",
    "codes",
    "dequantise",
    "dynamic",
    "edge_bits",
    "effective_size",
    "fake_quantise",
    "learned",
    "make_scale",
    "merge",
    "observe",
    "quantise_weights",
    "restore_weights",
    "scales",
    "share_bits",
    "survivors",
    "weight_codes",
]
