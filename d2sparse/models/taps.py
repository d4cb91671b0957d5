"""Activations by layer: read them, take gradients with respect to them, replace them.

A tap is at the output of a layer that has a kernel, named by the path of the layer in
the parameters: `"stage1_block1/conv1"`. It works on any function that applies Flax
Linen modules, whatever is wrapped around them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn


class Tap(NamedTuple):
    """What goes through a layer.

    Attributes:
      input: float[batch, ..., features], what the layer was applied to.
      output: float[batch, ..., features], what it returned.
    """

    input: jax.Array
    output: jax.Array


Visit = Callable[[str, Tap], jax.Array]


def read(apply: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Tap]]]:
    """A function that returns, beside its result, what went through every layer.

    Args:
      apply: any function that applies Linen modules, such as `Model.apply`.

    Returns:
      `(*args, **kwargs) -> (result, taps by layer)`. A layer that is applied several
      times in one call is refused: its activations would be those of the last.

    >>> import jax.numpy as jnp
    >>> from d2sparse import models
    >>> model = models.lenet_300_100(num_classes=3)
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> _, taps = read(model.apply)(params, state, x, train=False)
    >>> {path: tap.output.shape for path, tap in taps.items()}
    {'dense1': (2, 300), 'dense2': (2, 100), 'head': (2, 3)}
    """

    def reading(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tap]]:
        taps: dict[str, Tap] = {}

        def note(path: str, tap: Tap) -> jax.Array:
            if path in taps:
                raise ValueError(
                    f"expected layers that are applied once, got {path!r} twice; read "
                    "the activations of a part of the network that applies it once"
                )
            taps[path] = tap
            return tap.output

        with _visited(note):
            result = apply(*args, **kwargs)
        return result, taps

    return reading


def offset(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A function with one more argument, added to the outputs of layers.

    Its gradient with respect to offsets of 0 is that with respect to the activations.

    Args:
      apply: any function that applies Linen modules.

    Returns:
      `(offsets, *args, **kwargs) -> result`, offsets by layer; a layer that has none is
      left as it is.

    >>> import jax.numpy as jnp
    >>> from d2sparse import models
    >>> model = models.lenet_300_100(num_classes=3)
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> def loss(offsets):
    ...     logits, _ = offset(model.apply)(offsets, params, state, x, train=False)
    ...     return jnp.sum(logits)
    >>> jax.grad(loss)({"head": jnp.zeros((2, 3))})["head"].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    def offsetting(offsets: Mapping[str, jax.Array], *args: Any, **kwargs: Any) -> Any:
        changes = {path: _plus(change) for path, change in offsets.items()}
        return replace(apply, changes)(*args, **kwargs)

    return offsetting


def replace(
    apply: Callable[..., Any], changes: Mapping[str, Callable[[Tap], jax.Array]]
) -> Callable[..., Any]:
    """A function in which the outputs of some layers are replaced.

    Args:
      apply: any function that applies Linen modules.
      changes: by layer, what its output becomes: `lambda tap: tap.input` takes the
        layer out, `lambda tap: tap.output.at[..., 0].set(0)` silences a channel.

    Returns:
      `(*args, **kwargs) -> result`. It raises a `ValueError` where a layer to be
      changed is not met.

    >>> import jax.numpy as jnp
    >>> from d2sparse import models
    >>> model = models.lenet_300_100(num_classes=3)
    >>> x = jnp.ones((2, 8, 8, 1))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> silent = replace(model.apply, {"head": lambda tap: 0 * tap.output})
    >>> silent(params, state, x, train=False)[0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    def replacing(*args: Any, **kwargs: Any) -> Any:
        met = set()

        def change(path: str, tap: Tap) -> jax.Array:
            met.add(path)
            return changes[path](tap) if path in changes else tap.output

        with _visited(change):
            result = apply(*args, **kwargs)
        if unknown := sorted(changes.keys() - met):
            raise ValueError(
                f"expected layers of the network, got {unknown}; it has {sorted(met)}"
            )
        return result

    return replacing


def _plus(change: jax.Array) -> Callable[[Tap], jax.Array]:
    return lambda tap: tap.output + change


def _visited(visit: Visit) -> Any:
    """A context in which every layer with a kernel returns what `visit` makes of it."""

    def intercept(
        layer: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        output, module = layer(*args, **kwargs), context.module
        if context.method_name != "__call__" or not _has_kernel(module):
            return output
        return visit("/".join(module.path), Tap(args[0], output))

    return nn.intercept_methods(intercept)


def _has_kernel(module: nn.Module) -> bool:
    return module.has_variable("params", "kernel")
