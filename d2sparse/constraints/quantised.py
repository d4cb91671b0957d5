"""Quantisation-aware training: the network sees weights and inputs of few bits."""

from typing import Any, get_args

import jax

from d2sparse.checks import check_choice
from d2sparse.constraints.found_scales import (
    InputScales,
    Precision,
    describe_factors,
    find_scales,
    with_found_scales,
)
from d2sparse.models import Model
from d2sparse.models.kernel_order import in_order
from d2sparse.models.quantised import with_dynamic_scales
from d2sparse.quantisation import (
    Per,
    ScaleName,
    check_bits,
    edge_bits,
    quantise_weights,
)
from d2sparse.train import Constraint, Data, Settings, Training, TrainState, claim
from d2sparse.tree import PyTree

# Who decides the precision, where training images decide it when the training begins.
CALIBRATED = "quantised, with calibrated inputs,"


def quantised(
    bits: int = 4,
    activation_bits: int = 0,
    per: Per = "channel",
    scale: ScaleName = "absmax",
    edges: int = 8,
    inputs: InputScales = "dynamic",
) -> Constraint:
    """Every forward pass is that of a network of few bits; floats are trained.

    Weights are rounded under scales of the moment, inputs of layers under one scale an
    example, and gradients pass the rounding (see `d2sparse.quantisation`). Apply it
    before what decides the masks or pairs networks: what comes first is innermost, so
    that weights are masked first and then rounded, with the scales of the survivors.
    Pruned weights stay 0, and growth sees their gradients. A prompt may be in front of
    it, or of it and the network.

    Scales may be learned step sizes instead (LSQ, Esser et al., arXiv 1902.08153),
    whose gradients are divided by `sqrt(n Q_P)`, with n the numbers that share one.
    Beside each kernel the parameters then have `kernel_scale` and `input_scale`:
    factors of `2 mean |x| / sqrt(Q_P)`, of the weights and of inputs when the training
    begins. That leaves weights room to grow: from the least squared error, which at 8
    bits has none, scales overshoot. No factor decays, and less than 1 / 64 counts as
    that. A stream has dynamic inputs alone, as others look at all training images.

    Args:
      bits: of the kernels, 2 to 8.
      activation_bits: of the inputs of layers with a kernel, 2 to 8; 0 for floats.
      per: one scale of weights an output "channel" or one a "tensor".
      scale: of weights, "absmax" clips nothing, "mse" has the least squared error,
        "lsq" is trained.
      edges: bits of the first and the last layer, 2 to 8.
      inputs: scales of inputs, "dynamic", of every example, which clips nothing;
        "calibrated", of least squared error on up to 512 training images when the
        training begins, after which they stay in the model state; "learned", trained.

    Raises:
      ValueError: fewer or more bits, an unknown choice, or, when applied, a second
        quantisation, or one of what is frozen already. When the training begins, no
        images to calibrate inputs on.
    """
    for number in (bits, edges, activation_bits or bits):
        check_bits(number)
    check_choice("scale", scale, get_args(ScaleName))
    check_choice("inputs", inputs, get_args(InputScales))
    how = Precision(bits, activation_bits, per, scale, edges, inputs)

    def constrained(training: Training) -> Training:
        if training.claims.get("the masks") == "frozen":
            raise ValueError(
                "expected quantised before what freezes the network, whose kernels are "
                "no parameters any more, got it after; put it first"
            )
        who = CALIBRATED if how.finds_inputs else "quantised"
        claimed = claim(training, "the precision", who)
        if not how.finds_inputs and not how.trains_kernels:
            return claimed._replace(model=_of_the_moment(training.model, how))

        def init(
            outer: Training, key: jax.Array, data: Data, settings: Settings
        ) -> TrainState:
            if not len(data.labels):
                raise ValueError(
                    "expected training images to calibrate the inputs of layers on, "
                    "got none; take inputs='dynamic', which needs none"
                )
            return find_scales(outer, training.init(outer, key, data, settings), data)

        return claimed._replace(
            model=with_found_scales(training.model, how),
            network=describe_factors(training.network, how),
            init=init,
        )

    return constrained


def _of_the_moment(model: Model, how: Precision) -> Model:
    """A network whose scales follow from its weights and inputs in every pass."""

    def apply(
        params: PyTree, model_state: PyTree, x: Any, *, train: bool
    ) -> tuple[Any, PyTree]:
        order = in_order(model.apply, params, model_state, x, train=train)
        table = edge_bits(order, how.bits, how.edges)
        coarse = quantise_weights(params, table, how.per, how.scale)
        inner = model.apply
        if how.activation_bits:
            own = edge_bits(order, how.activation_bits, how.edges)
            inner = with_dynamic_scales(model.apply, own)
        return inner(coarse, model_state, x, train=train)

    return Model(model.init, apply)
