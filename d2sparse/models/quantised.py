"""Networks whose layers see quantised inputs, by the functions of `taps`.

Every layer with a kernel has its input rounded, so that with `quantise_weights` both
sides of its products take few values. Gradients pass the rounding: those with respect
to the input of the network stay useful, down to about 3 bits.

    statistics = calibrate(model.apply, params, state, batches)
    scales = scales_of(statistics, bits=8)
    apply = with_scales(model.apply, bits=8, unsigned=unsigned(statistics))
    logits, _ = apply(scales, quantise_weights(params, 8), state, x, train=False)

Bits are one number for all layers, or a table of patterns as for `quantise_weights`: a
layer has the bits of the path of its kernel. These functions come before `jax.jit`, as
taps do.

`post_training` does all of it to a trained network, and gives back a `Model`.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from d2sparse.models.base import Model
from d2sparse.models.kernel_order import in_order as in_order
from d2sparse.models.kernel_order import (
    input_bits,
    layer_of,
    layers_of,
    with_edges,
)
from d2sparse.models.kernel_order import kernels as kernels
from d2sparse.models.taps import read, replace
from d2sparse.quantisation import (
    Bits,
    Per,
    ScaleName,
    Statistics,
    calibration,
    check_bits,
    dynamic,
    fake_quantise,
    merge,
    observe,
    quantise_weights,
    share_bits,
)
from d2sparse.quantisation.calibration import CalibratedScale
from d2sparse.tree import PyTree

_KERNEL = "/kernel"


class Calibrated(NamedTuple):
    """The model state of a network whose layers see rounded inputs.

    Attributes:
      own: that of the network, such as statistics of normalisations.
      scales: float32[] by layer, the path of its kernel without that: what a code of
        its inputs stands for.
      signed: bool[] by layer: whether inputs may be negative.
      kernels: float32[1, ..., 1, channels] or float32[] by path: scales of kernels,
        where those are in the state as well.
    """

    own: PyTree
    scales: Mapping[str, jax.Array]
    signed: Mapping[str, jax.Array]
    kernels: Mapping[str, jax.Array] = {}


def unit_scales(
    params: PyTree,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Scales of inputs before they are found, of 1, and signs: that all are signed.

    Args:
      params: whose kernels have inputs.

    Returns:
      `(scales, signed)`, as `Calibrated` has them.

    >>> unit_scales({"head": {"kernel": jnp.ones((3, 2))}})[0]["head"].shape
    ()
    """
    layers = [layer_of(path) for path in kernels(params)]
    scales = {layer: jnp.ones(()) for layer in layers}
    return scales, {layer: jnp.array(True) for layer in layers}


def with_inputs(
    apply: Callable[..., Any],
    rounded: Callable[..., jax.Array],
    layers: Mapping[str, str],
    bits: Mapping[str, int],
) -> Callable[..., Any]:
    """A function in which some layers have their inputs rounded.

    Args:
      apply: any function that applies Linen modules, not compiled.
      rounded: `(x, layer, bits) -> x`, with the layer as scales are kept under.
      layers: paths of kernels by layer as taps name it, from `kernel_order.layers_of`.
      bits: of the layers whose inputs are rounded, as taps name them.
    """
    inputs = {
        layer: functools.partial(rounded, layer=layer_of(layers[layer]), bits=number)
        for layer, number in bits.items()
    }
    return replace(apply, inputs=inputs)


def with_scales(
    apply: Callable[..., Any], bits: Bits, unsigned: Collection[str] = ()
) -> Callable[..., Any]:
    """A function with one more argument, the scales of the inputs of layers.

    The scales may be constants, from `scales_of`, or be trained with the parameters: in
    their gradient they are those of `fake_quantise`.

    Args:
      apply: any function that applies Linen modules, such as `Model.apply`.
      bits: 2 to 8, of all layers or by a pattern of the paths of their kernels.
      unsigned: layers whose inputs are never negative, see `unsigned`.

    Returns:
      `(scales, *args, **kwargs) -> result`, with float[] by layer. It raises a
      `ValueError` where a layer is not met, or a pattern matches none.

    Raises:
      ValueError: the function is compiled.

    >>> from d2sparse import models
    >>> model = models.lenet_300_100(num_classes=3)
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> coarse = with_scales(model.apply, bits=8)
    >>> scales = {"dense1": jnp.array(0.01), "head": jnp.array(0.1)}
    >>> coarse(scales, params, state, x, train=False)[0].shape
    (2, 3)
    """
    replace(apply)  # Refuses a function that is compiled.

    def applied(scales: Mapping[str, jax.Array], *args: Any, **kwargs: Any) -> Any:
        table = share_bits(bits, [layer + _KERNEL for layer in scales])
        inputs = {
            layer_of(path): functools.partial(
                fake_quantise,
                scale=scales[layer_of(path)],
                bits=number,
                signed=layer_of(path) not in unsigned,
            )
            for path, number in table.items()
        }
        return replace(apply, inputs=inputs)(*args, **kwargs)

    return applied


def with_dynamic_scales(apply: Callable[..., Any], bits: Bits) -> Callable[..., Any]:
    """A function of the same arguments, in which layers have their inputs rounded.

    The scale of an input is that of its example, which clips nothing, and an input
    without negative numbers takes all codes for the others. It needs no calibration,
    and what becomes of an example does not depend on the rest of its batch.

    Args:
      apply: `(params, *args, **kwargs) -> result`, such as `Model.apply`.
      bits: 2 to 8, of all layers with a kernel or by a pattern of their paths.

    Raises:
      ValueError: the function is compiled.

    >>> from d2sparse import models
    >>> model = models.lenet_300_100(num_classes=3)
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> coarse = with_dynamic_scales(model.apply, {"head/*": 8, "*": 4})
    >>> compiled = jax.jit(coarse, static_argnames="train")
    >>> compiled(params, state, x, train=False)[0].shape
    (2, 3)
    """
    replace(apply)

    def rounded(x: jax.Array, layer: str, bits: int) -> jax.Array:
        del layer
        signed = jnp.any(x < 0)
        return fake_quantise(x, dynamic(x, bits, signed), bits, signed)

    def applied(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        layers = layers_of(apply, params, *args, **kwargs)
        table = share_bits(bits, kernels(params))
        own = {n: table[path] for n, path in layers.items() if path in table}
        return with_inputs(apply, rounded, layers, own)(params, *args, **kwargs)

    return applied


def calibrate(
    apply: Callable[..., Any],
    params: PyTree,
    model_state: PyTree,
    batches: Iterable[jax.Array],
) -> dict[str, Statistics]:
    """Statistics of the inputs of all layers with a kernel, over batches.

    Args:
      apply: as `Model.apply`, not compiled.
      params: the weights, quantised if the inputs shall be those of a network that is.
      model_state: statistics of normalisations.
      batches: of what the network is shown, float[batch, ...] of one shape.

    Raises:
      ValueError: no batch.

    >>> from d2sparse import models
    >>> model = models.lenet_300_100(num_classes=3)
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> found = calibrate(model.apply, params, state, [x, 2 * x])
    >>> list(found), float(found["dense1"].largest)
    (['dense1', 'dense2', 'head'], 2.0)
    """
    seen = [_look(apply, params, model_state, x) for x in batches]
    if not seen:
        raise ValueError("expected at least one batch to calibrate on, got none")
    found: dict[str, Statistics] = functools.reduce(_together, seen)
    return found


def unsigned(statistics: Mapping[str, Statistics]) -> frozenset[str]:
    """The layers of whose inputs none was negative: those behind a ReLU.

    Args:
      statistics: from `calibrate`, on the host.

    >>> unsigned({"a": observe(jnp.arange(4.0)), "b": observe(-jnp.ones(4))})
    frozenset({'a'})
    """
    return frozenset(n for n, own in statistics.items() if float(own.smallest) >= 0)


def scales_of(
    statistics: Mapping[str, Statistics],
    bits: Bits,
    scale: CalibratedScale = calibration.mse,
) -> dict[str, jax.Array]:
    """Scales of the inputs of layers, by what was seen of them.

    Args:
      statistics: from `calibrate`.
      bits: 2 to 8, of all layers or by a pattern of the paths of their kernels.
      scale: a function of `d2sparse.quantisation.calibration`.

    Returns:
      float32[] by layer.

    Raises:
      ValueError: fewer or more bits, or a pattern that matches none.

    >>> found = {"head": observe(jnp.array([0.0, 1.5, 1.0, 0.5]))}
    >>> float(scales_of(found, bits=4, scale=calibration.absmax)["head"]).__round__(6)
    0.1
    """
    positive = unsigned(statistics)
    own = share_bits(bits, [layer + _KERNEL for layer in statistics])
    layers = {layer_of(path): number for path, number in own.items()}
    return {
        layer: _scale(scale, number, layer not in positive, statistics[layer])
        for layer, number in layers.items()
    }


def calibrated(model: Model, bits: Bits, edges: int = 8) -> Model:
    """A network that rounds the inputs of its layers under scales in its model state.

    The model state is `Calibrated`: networks that differ in weights, scales and signs
    share one compiled program. Scales come from `post_training`, or from `calibrate`
    and `scales_of`; `init` leaves them at 1. In training the state of the network is
    updated and the scales stay.

    Args:
      model: the network, not compiled, of layers of Linen.
      bits: 2 to 8 of all layers but the first and the last, or by a pattern of the
        paths of their kernels, which then is the whole table.
      edges: bits of the first and the last layer, 2 to 8, beside one number for others.

    Raises:
      ValueError: fewer or more bits, or the function is compiled.

    >>> from d2sparse import models
    >>> coarse = calibrated(models.from_linen(models.mlp.MLP((), 3)), bits=4)
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> params, state = coarse.init(jax.random.key(0), x)
    >>> state.scales["head"].shape, bool(state.signed["head"])
    ((), True)
    >>> coarse.apply(params, state, x, train=False)[0].shape
    (2, 3)
    """
    _check_all(bits, edges)
    replace(model.apply)

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, Calibrated]:
        params, own = model.init(key, x)
        return params, Calibrated(own, *unit_scales(params))

    def apply(
        params: PyTree, model_state: Calibrated, x: Any, *, train: bool
    ) -> tuple[Any, Calibrated]:
        own, scales, signed, _ = model_state

        def rounded(x: jax.Array, layer: str, bits: int) -> jax.Array:
            return fake_quantise(x, scales[layer], bits, signed[layer])

        layers = layers_of(model.apply, params, own, x, train=train)
        table = input_bits(layers, bits, edges)
        coarse = with_inputs(model.apply, rounded, layers, table)
        outputs, after = coarse(params, own, x, train=train)
        return outputs, model_state._replace(own=after)

    return Model(init, apply)


def post_training(
    model: Model,
    params: PyTree,
    model_state: PyTree,
    batches: Iterable[jax.Array],
    bits: Bits,
    activation_bits: Bits = 0,
    per: Per = "channel",
    scale: ScaleName = "mse",
    edges: int = 8,
) -> tuple[Model, PyTree, PyTree]:
    """A trained network in few bits, without further training.

    Kernels are rounded once: pruned weights stay exactly 0, and scales look at the
    survivors alone. Inputs are calibrated on those that layers of the network with the
    rounded weights have on the batches. Networks of one form can share a program: its
    `Model` depends on `model` and the bits alone, so that of the first serves for all.

    Args:
      model: the network, not compiled, of layers of Linen.
      params: its weights, pruned ones 0.
      model_state: statistics of normalisations.
      batches: of what the network is shown, float[batch, ...]. Without activation bits
        only the shape of the first one matters, which shows the order of layers.
      bits: of kernels, 2 to 8 of all but the first and the last layer, or by a pattern
        of their paths, which then is the whole table.
      activation_bits: of the inputs of layers, likewise; 0 for floats.
      per: one scale of weights an output "channel" or one a "tensor".
      scale: of weights and inputs, "absmax" clips nothing, "mse" has the least error.
      edges: bits of the first and the last layer, 2 to 8.

    Returns:
      The network, its parameters and its model state, which is `Calibrated`; without
      activation bits the model and the model state that were given.

    Raises:
      ValueError: no batch, fewer or more bits, a pattern that matches no kernel, or no
        layers of Linen whose inputs could be rounded.

    >>> from d2sparse import models
    >>> model = models.lenet_300_100(num_classes=3)
    >>> x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> coarse, rounded, own = post_training(model, params, state, [x], 4, 8)
    >>> len(set(rounded["dense2"]["kernel"][:, 0].tolist())) <= 15
    True
    >>> {layer: bool(signed) for layer, signed in own.signed.items()}
    {'dense1': False, 'dense2': False, 'head': False}
    >>> coarse.apply(rounded, own, x, train=False)[0].shape
    (2, 3)
    """
    _check_all(bits, edges)
    _check_all(activation_bits or edges, edges)
    shown = list(batches)
    if not shown:
        raise ValueError(
            "expected at least one batch of images, which show the order of layers and "
            "calibrate their inputs, got none; without activation bits a shape will do"
        )
    layers = layers_of(model.apply, params, model_state, shown[0], train=False)
    table = with_edges(list(layers.values()), bits, edges)
    rounded = _rounded(params, _fixed(table), per, scale)
    if not activation_bits:
        return model, rounded, model_state
    seen = calibrate(model.apply, rounded, model_state, shown)
    if not seen:
        raise ValueError(
            "expected layers of Linen, whose inputs can be rounded, got a network "
            "without; take 0 activation bits"
        )
    statistics = {layer_of(layers[n]): own for n, own in seen.items()}
    own = with_edges(list(layers.values()), activation_bits, edges)
    scales = scales_of(statistics, own, calibration.named(scale))
    positive = unsigned(statistics)
    signed = {layer: jnp.asarray(layer not in positive) for layer in scales}
    coarse = calibrated(model, activation_bits, edges)
    return coarse, rounded, Calibrated(model_state, scales, signed)


def _check_all(bits: Bits, edges: int) -> None:
    table = bits if isinstance(bits, Mapping) else {"*": bits}
    for number in (*table.values(), edges):
        check_bits(number)


def _fixed(bits: Bits) -> int | tuple[tuple[str, int], ...]:
    """Bits that a compiled function can be remembered by."""
    return tuple(bits.items()) if isinstance(bits, Mapping) else bits


# Compiled once for all networks of one form, as a comparison of them has many.


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _rounded(params: PyTree, bits: Any, per: Per, scale: Any) -> PyTree:
    table = dict(bits) if isinstance(bits, tuple) else bits
    return quantise_weights(params, table, per, scale)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scale(scale: Any, bits: int, signed: bool, statistics: Statistics) -> Any:
    return scale(statistics, bits, signed)


@functools.partial(jax.jit, static_argnums=0)
def _look(apply: Any, params: PyTree, model_state: PyTree, x: jax.Array) -> Any:
    _, taps = read(apply)(params, model_state, x, train=False)
    return {layer: observe(tap.input) for layer, tap in taps.items()}


@jax.jit
def _together(one: Any, other: Any) -> Any:
    return {layer: merge(one[layer], other[layer]) for layer in one}
