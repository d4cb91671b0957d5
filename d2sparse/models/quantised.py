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
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse import tree
from d2sparse.models.taps import read, replace
from d2sparse.quantisation import (
    Bits,
    Statistics,
    calibration,
    dynamic,
    fake_quantise,
    merge,
    observe,
    share_bits,
)
from d2sparse.quantisation.calibration import CalibratedScale
from d2sparse.tree import PyTree

_KERNEL = "/kernel"


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
        own = share_bits(bits, [layer + _KERNEL for layer in scales])
        inputs = {
            path.removesuffix(_KERNEL): functools.partial(
                fake_quantise,
                scale=scales[path.removesuffix(_KERNEL)],
                bits=number,
                signed=path.removesuffix(_KERNEL) not in unsigned,
            )
            for path, number in own.items()
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
    >>> coarse(params, state, x, train=False)[0].shape
    (2, 3)
    """
    replace(apply)

    def rounded(x: jax.Array, bits: int) -> jax.Array:
        signed = jnp.any(x < 0)
        return fake_quantise(x, dynamic(x, bits, signed), bits, signed)

    def applied(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        inputs = {
            path.removesuffix(_KERNEL): functools.partial(rounded, bits=number)
            for path, number in share_bits(bits, kernels(params)).items()
        }
        return replace(apply, inputs=inputs)(params, *args, **kwargs)

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

    @jax.jit
    def look(params: PyTree, model_state: PyTree, x: jax.Array) -> Any:
        _, taps = read(apply)(params, model_state, x, train=False)
        return {layer: observe(tap.input) for layer, tap in taps.items()}

    @jax.jit
    def together(one: Any, other: Any) -> Any:
        return {layer: merge(one[layer], other[layer]) for layer in one}

    seen = [look(params, model_state, x) for x in batches]
    if not seen:
        raise ValueError("expected at least one batch to calibrate on, got none")
    found: dict[str, Statistics] = functools.reduce(together, seen)
    return found


def unsigned(statistics: Mapping[str, Statistics]) -> frozenset[str]:
    """The layers of whose inputs none was negative: those behind a ReLU.

    Args:
      statistics: from `calibrate`, on the host.

    >>> unsigned({"a": observe(jnp.array([0.0, 1.0])), "b": observe(-jnp.ones(1))})
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

    >>> found = {"head": observe(jnp.array([0.0, 1.5]))}
    >>> float(scales_of(found, bits=4, scale=calibration.absmax)["head"]).__round__(6)
    0.1
    """
    positive = unsigned(statistics)
    own = share_bits(bits, [layer + _KERNEL for layer in statistics])
    layers = {path.removesuffix(_KERNEL): number for path, number in own.items()}
    return {n: scale(statistics[n], b, n not in positive) for n, b in layers.items()}


def kernels(params: PyTree) -> list[str]:
    """Paths of the kernels of layers, which are called `kernel`.

    >>> kernels({"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}})
    ['head/kernel']
    """
    return [path for path in tree.flatten(params) if path.endswith(_KERNEL)]


def in_order(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """Paths of the kernels in the order in which a network applies them.

    Args:
      apply: any function that applies Linen modules, not compiled.
      *args: its arguments; shapes of them are enough.
      **kwargs: its arguments that are not traced, such as `train=False`.

    >>> from d2sparse import models
    >>> model, x = models.resnet8(), jnp.ones((1, 8, 8, 1))
    >>> params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> found = in_order(model.apply, params, state, x, train=False)
    >>> found[0], found[-1]
    ('stem_conv/kernel', 'head/kernel')
    """
    found: list[str] = []

    def note(*args: Any) -> None:
        found.extend(layer + _KERNEL for layer in read(apply)(*args, **kwargs)[1])

    jax.eval_shape(note, *args)
    return found
