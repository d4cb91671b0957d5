"""Quantisation-aware training: the network sees weights and inputs of few bits."""

from typing import Any

from d2sparse.models import Model
from d2sparse.models.quantised import in_order, with_dynamic_scales
from d2sparse.quantisation import (
    Per,
    ScaleName,
    check_bits,
    edge_bits,
    quantise_weights,
)
from d2sparse.train import Constraint, Training, claim
from d2sparse.tree import PyTree


def quantised(
    bits: int = 4,
    activation_bits: int = 0,
    per: Per = "channel",
    scale: ScaleName = "absmax",
    edges: int = 8,
) -> Constraint:
    """Every forward pass is that of a network of few bits; floats are trained.

    Weights are rounded under scales of the moment, inputs of layers under one scale an
    example, and gradients pass the rounding (see `d2sparse.quantisation`). Apply it
    before what decides the masks or pairs networks: what comes first is innermost, so
    that weights are masked first and then rounded, with the scales of the survivors.
    Pruned weights stay 0, and growth sees their gradients.

    Args:
      bits: of the kernels, 2 to 8.
      activation_bits: of the inputs of layers with a kernel, 2 to 8; 0 for floats.
      per: one scale of weights an output "channel" or one a "tensor".
      scale: of weights, "absmax" clips nothing, "mse" has the least squared error.
      edges: bits of the first and the last layer, 2 to 8.

    Raises:
      ValueError: fewer or more bits, or, when applied, a second quantisation.
    """
    for number in (bits, edges, activation_bits or bits):
        check_bits(number)

    def constrained(training: Training) -> Training:
        model = training.model

        def apply(
            params: PyTree, model_state: PyTree, x: Any, *, train: bool
        ) -> tuple[Any, PyTree]:
            order = in_order(model.apply, params, model_state, x, train=train)
            coarse = quantise_weights(params, edge_bits(order, bits, edges), per, scale)
            inner = model.apply
            if activation_bits:
                own = edge_bits(order, activation_bits, edges)
                inner = with_dynamic_scales(model.apply, own)
            return inner(coarse, model_state, x, train=train)

        claimed = claim(training, "the precision", "quantised")
        return claimed._replace(model=Model(model.init, apply))

    return constrained
