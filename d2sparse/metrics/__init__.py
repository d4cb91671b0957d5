"""What is measured: predictions on a whole set, masks over time, states of units.

Everything about predictions takes the whole set at once. Means of batches averaged
again weigh a ragged last batch wrongly, and the calibration error of batches averaged
is another, larger number: gather the predictions, then call these functions once. What
was gathered with padding is measured with `where`, True for the examples that count.

Examples and live weights are counted in int32, exactly up to 2^31 - 1, and divided in
float32. Other sums are of float32, whatever the type of the predictions, and added up
in blocks: over tens of millions of examples they are right to about 1e-6 of themselves.
"""

from d2sparse.metrics.budgets import layer_budget
from d2sparse.metrics.curvature import TopEigenvalue, top_hessian_eigenvalue
from d2sparse.metrics.entropies import (
    gaussian_layer_entropy,
    gaussian_off_probability,
    layer_entropy,
    psp_entropy,
    unit_entropies,
)
from d2sparse.metrics.masks import (
    chance_overlap,
    density_table,
    exploration_rate,
    mask_overlap,
    union,
)
from d2sparse.metrics.predictions import (
    accuracy,
    brier,
    confidence_split,
    disagreement,
    generalisation_gap,
    kl_to_uniform,
    nll,
)
from d2sparse.metrics.reliability import calibration, ece, released_ece, signed_gap
from d2sparse.metrics.resampling import bootstrap
from d2sparse.metrics.states import (
    StateCounts,
    count_states,
    count_states_by_class,
)
from d2sparse.metrics.temperature import fit_temperature, soften

__all__ = [
    "StateCounts",
    "TopEigenvalue",
    "accuracy",
    "bootstrap",
    "brier",
    "calibration",
    "chance_overlap",
    "confidence_split",
    "count_states",
    "count_states_by_class",
    "density_table",
    "disagreement",
    "ece",
    "exploration_rate",
    "fit_temperature",
    "gaussian_layer_entropy",
    "gaussian_off_probability",
    "generalisation_gap",
    "kl_to_uniform",
    "layer_budget",
    "layer_entropy",
    "mask_overlap",
    "nll",
    "psp_entropy",
    "released_ece",
    "signed_gap",
    "soften",
    "top_hessian_eigenvalue",
    "union",
    "unit_entropies",
]
