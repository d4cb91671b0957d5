"""Post-training quantisation: a trained network becomes one of few bits, as data.

Kernels are rounded once. Inputs of layers are rounded in every forward pass, under
scales from calibration images, which are arrays of the model state: networks that
differ in weights and scales alone share a compiled program.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from d2sparse.models.base import Model
from d2sparse.models.quantised import calibrate, in_order, scales_of, unsigned
from d2sparse.models.taps import replace
from d2sparse.quantisation import (
    Per,
    ScaleName,
    check_bits,
    edge_bits,
    fake_quantise,
    quantise_weights,
    share_bits,
)
from d2sparse.tree import PyTree

_KERNEL = "/kernel"


class Calibrated(NamedTuple):
    """Model state of a network whose layers see rounded inputs.

    Attributes:
      own: the model state of the network.
      scales: float32[] by layer, what a code of its input stands for.
      signed: bool[] by layer, whether its inputs may be negative.
    """

    own: PyTree
    scales: Mapping[str, jax.Array]
    signed: Mapping[str, jax.Array]


def post_training(
    model: Model,
    params: PyTree,
    model_state: PyTree,
    batches: Iterable[jax.Array],
    *,
    bits: int,
    activation_bits: int = 0,
    per: Per = "channel",
    scale: ScaleName = "mse",
    edges: int = 8,
) -> tuple[Model, PyTree, PyTree]:
    """A network of few bits out of a trained one, without training.

    Scales of weights are those of the weights that are not 0, which stay 0. Scales of
    inputs have the least squared error on what the network of rounded weights is shown.
    Gradients with respect to images pass the rounding.

    Args:
      model: the network, of Linen layers.
      params: its trained parameters.
      model_state: its statistics of normalisations.
      batches: calibration images as the network sees them, float[batch, ...], all of
        one shape; a few hundred in all.
      bits: of the kernels, 2 to 8.
      activation_bits: of the inputs of layers with a kernel, 2 to 8; 0 for floats.
      per: one scale of weights an output "channel" or one a "tensor".
      scale: of weights, "absmax" clips nothing, "mse" has the least squared error.
      edges: bits of the first and the last layer, 2 to 8.

    Returns:
      `(model, params, model_state)`. With bits of activations the model state is
      `Calibrated`; without, model and state are those that were given.

    Raises:
      ValueError: fewer or more bits, or no calibration images.

    >>> from d2sparse import models
    >>> model, x = models.lenet_300_100(num_classes=3), jnp.ones((2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> coarse = post_training(
    ...     model, params, state, [x], bits=4, activation_bits=8)
    >>> coarse[0].apply(*coarse[1:], x, train=False)[0].shape
    (2, 3)
    """
    for number in (bits, edges, activation_bits or bits):
        check_bits(number)
    shown = list(batches)
    if not shown:
        raise ValueError(
            "expected at least one batch of calibration images for a network of few "
            "bits, got none; give some hundred training images, as the network sees "
            "them"
        )
    order = in_order(model.apply, params, model_state, shown[0], train=False)
    rounded = quantise_weights(params, edge_bits(order, bits, edges), per, scale)
    if not activation_bits:
        return model, rounded, model_state
    table = share_bits(edge_bits(order, activation_bits, edges), order)
    seen = calibrate(model.apply, rounded, model_state, shown)
    positive = unsigned(seen)
    signed = {layer: jnp.asarray(layer not in positive) for layer in seen}
    state = Calibrated(model_state, scales_of(seen, table), signed)
    return with_calibrated_inputs(model, table), rounded, state


def with_calibrated_inputs(model: Model, bits: Mapping[str, int]) -> Model:
    """A network whose layers see rounded inputs; its model state is `Calibrated`.

    Args:
      model: of Linen layers.
      bits: of every input, by path of the kernel.
    """

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, Calibrated]:
        params, own = model.init(key, x)
        layers = [path.removesuffix(_KERNEL) for path in bits]
        scales = {layer: jnp.ones(()) for layer in layers}
        return params, Calibrated(own, scales, {n: jnp.asarray(True) for n in layers})

    def apply(
        params: PyTree, model_state: Calibrated, x: Any, *, train: bool
    ) -> tuple[Any, Calibrated]:
        own, scales, signed = model_state
        inputs: dict[str, Callable[[Any], Any]] = {
            path.removesuffix(_KERNEL): functools.partial(
                fake_quantise,
                scale=scales[path.removesuffix(_KERNEL)],
                bits=number,
                signed=signed[path.removesuffix(_KERNEL)],
            )
            for path, number in bits.items()
        }
        outputs, after = replace(model.apply, inputs=inputs)(
            params, own, x, train=train
        )
        return outputs, Calibrated(after, scales, signed)

    return Model(init, apply)
