"""Activations by layer: read them, take gradients with respect to them, replace them.

A layer is a Linen module, named by its path: `"stage1_block1/conv1"`. Every module that
is called with an array can be tapped, at its input and at its output: layers with a
kernel, whose path is that in the parameters, and also normalisations, whole blocks, and
activation functions, which are layers in the networks of `d2sparse.models`: `"relu1"`.

Taps work on any function that applies Linen modules, whatever is wrapped around them.
Taps come before `jax.jit`: compile the function that is returned here, not the one that
is given. Inside of `nn.scan` and the like a layer cannot be read.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax.core.tracers import current_trace


class Tap(NamedTuple):
    """What goes through a layer.

    Attributes:
      input: float[batch, ..., features], what the layer is applied to.
      output: float[batch, ..., features], what it returns.
    """

    input: Any
    output: Any


def read(
    apply: Callable[..., Any], layers: Collection[str] | None = None
) -> Callable[..., tuple[Any, dict[str, Tap]]]:
    """A function that returns, beside its result, what goes through layers.

    Args:
      apply: any function that applies Linen modules, such as `Model.apply`.
      layers: paths of those that are read; if not given, all that have a kernel.

    Returns:
      `(*args, **kwargs) -> (result, taps by layer)`. It raises a `ValueError` where a
      layer is not met, or is applied several times in one call: its activations would
      be those of the last.

    Raises:
      ValueError: the function is compiled.

    >>> import jax.numpy as jnp
    >>> from d2sparse import models
    >>> model = models.lenet_300_100(num_classes=3)
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> _, taps = read(model.apply)(params, state, x, train=False)
    >>> {path: tap.output.shape for path, tap in taps.items()}
    {'dense1': (2, 300), 'dense2': (2, 100), 'head': (2, 3)}
    >>> _, taps = read(model.apply, ["relu1"])(params, state, x, train=False)
    >>> bool(taps["relu1"].input.min() < 0), bool(taps["relu1"].output.min() < 0)
    (True, False)
    """
    _refuse_compiled(apply)

    def reading(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tap]]:
        taps: dict[str, Tap] = {}
        met, here = set(), current_trace()

        def note(module: nn.Module, tap: Tap) -> Any:
            if current_trace() != here:  # A rehearsal inside, such as `jax.eval_shape`.
                return tap.output
            met.add(path := _path(module))
            has_kernel = module.has_variable("params", "kernel")
            if not (has_kernel if layers is None else path in layers):
                return tap.output
            if path in taps:
                raise ValueError(
                    f"expected layers that are applied once, got {path!r} twice; read "
                    "the activations of a part of the network that applies it once"
                )
            taps[path] = tap
            return tap.output

        with _intercepted(lambda module, x: x, note):
            result = apply(*args, **kwargs)
        _refuse_unknown(layers or (), met)
        return result, taps

    return reading


def offset(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A function with one more argument, added to inputs and outputs of layers.

    Its gradient with respect to offsets of 0 is that with respect to the activations.
    That of an input is the gradient through this layer alone, also where a shortcut
    takes the same activations elsewhere.

    Args:
      apply: any function that applies Linen modules.

    Returns:
      `(offsets, *args, **kwargs) -> result`, with offsets by layer as `read` returns
      activations: a `Tap` with None where nothing is added. It raises a `ValueError`
      where a layer is not met.

    Raises:
      ValueError: the function is compiled.

    >>> import jax.numpy as jnp
    >>> from d2sparse import models
    >>> model = models.lenet_300_100(num_classes=3)
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> _, taps = read(model.apply)(params, state, x, train=False)
    >>> def loss(offsets):
    ...     logits, _ = offset(model.apply)(offsets, params, state, x, train=False)
    ...     return jnp.sum(logits)
    >>> gradients = jax.jit(jax.grad(loss))(jax.tree.map(jnp.zeros_like, taps))
    >>> gradients["head"].output.tolist(), gradients["head"].input.shape
    ([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], (2, 100))
    """
    _refuse_compiled(apply)

    def offsetting(offsets: Mapping[str, Tap], *args: Any, **kwargs: Any) -> Any:
        def at_input(change: Any) -> Callable[[Any], Any]:
            return lambda x: x if change is None else x + change

        def at_output(change: Any) -> Callable[[Tap], Any]:
            return lambda tap: tap.output if change is None else tap.output + change

        outputs = {path: at_output(tap.output) for path, tap in offsets.items()}
        inputs = {path: at_input(tap.input) for path, tap in offsets.items()}
        return replace(apply, outputs, inputs)(*args, **kwargs)

    return offsetting


def replace(
    apply: Callable[..., Any],
    outputs: Mapping[str, Callable[[Tap], Any]] | None = None,
    inputs: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Callable[..., Any]:
    """A function in which outputs or inputs of some layers are replaced.

    Args:
      apply: any function that applies Linen modules.
      outputs: by layer, its new output: `lambda tap: tap.input` puts the identity in
        place of an activation function or a block, and
        `lambda tap: tap.output.at[..., 0].set(0)` a constant in place of a channel.
      inputs: by layer, its new input, a function of its input.

    Returns:
      `(*args, **kwargs) -> result`. It raises a `ValueError` where a layer to be
      changed is not met.

    Raises:
      ValueError: the function is compiled.

    >>> import jax.numpy as jnp
    >>> from d2sparse import models
    >>> model = models.lenet_300_100(num_classes=3)
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> silent = replace(model.apply, {"relu2": lambda tap: 0 * tap.output})
    >>> silent(params, state, x, train=False)[0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    _refuse_compiled(apply)
    leaving, entering = outputs or {}, inputs or {}

    def replacing(*args: Any, **kwargs: Any) -> Any:
        met = set()

        def before(module: nn.Module, x: Any) -> Any:
            met.add(path := _path(module))
            return entering[path](x) if path in entering else x

        def after(module: nn.Module, tap: Tap) -> Any:
            path = _path(module)
            return leaving[path](tap) if path in leaving else tap.output

        with _intercepted(before, after):
            result = apply(*args, **kwargs)
        _refuse_unknown((*leaving, *entering), met)
        return result

    return replacing


def _intercepted(
    before: Callable[[nn.Module, Any], Any], after: Callable[[nn.Module, Tap], Any]
) -> Any:
    """A context in which modules see and return what two functions make of it."""

    def intercept(
        layer: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        if context.method_name != "__call__" or not args:
            return layer(*args, **kwargs)
        x = before(context.module, args[0])
        return after(context.module, Tap(x, layer(x, *args[1:], **kwargs)))

    return nn.intercept_methods(intercept)


def _path(module: nn.Module) -> str:
    return "/".join(module.path)


def _refuse_compiled(apply: Callable[..., Any]) -> None:
    if isinstance(apply, jax.stages.Wrapped):
        raise ValueError(
            "expected a function that is not compiled, got one made by `jax.jit`, "
            "which remembers what it has traced; compile the function with taps instead"
        )


def _refuse_unknown(layers: Iterable[str], met: Collection[str]) -> None:
    if unknown := sorted(set(layers) - set(met)):
        known = sorted(filter(None, met))  # Without the network as a whole.
        raise ValueError(
            f"expected layers of the network, got {unknown}; it has {known}"
        )
