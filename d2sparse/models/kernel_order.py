"""The kernels of a network in the order in which it applies them, and their bits."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from d2sparse import tree
from d2sparse.models.taps import read
from d2sparse.quantisation import Bits, edge_bits, share_bits
from d2sparse.tree import PyTree

_KERNEL = "/kernel"


def kernels(params: PyTree) -> list[str]:
    """Paths of the kernels of layers, which are called `kernel`.

    >>> import jax.numpy as jnp
    >>> kernels({"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}})
    ['head/kernel']
    """
    return [path for path in tree.flatten(params) if path.endswith(_KERNEL)]


def layer_of(path: str) -> str:
    """The path of a kernel without that: what scales of inputs are kept under.

    >>> layer_of("block1/conv/kernel")
    'block1/conv'
    """
    return path.removesuffix(_KERNEL)


def layers_of(
    apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any
) -> dict[str, str]:
    """Layers with a kernel, as taps name them, and the paths of their kernels.

    They are in the order in which the network applies them. Paths are longer than the
    names where something else has parameters beside the network, such as a prompt.

    Args:
      apply: `(params, *args, **kwargs) -> result`, not compiled.
      params: the weights; shapes of all arguments are enough.
      *args: further arguments.
      **kwargs: arguments that are not traced, such as `train=False`.

    Returns:
      Paths by layer; of a network that is not of Linen those that its parameters have,
      sorted by name, though taps meet none of them.

    >>> import jax.numpy as jnp
    >>> from d2sparse import models
    >>> model, x = models.lenet_300_100(num_classes=3), jnp.ones((1, 8, 8, 1))
    >>> params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> layers_of(model.apply, params, state, x, train=False)["head"]
    'head/kernel'
    """
    met: list[str] = []

    def note(params: PyTree, *args: Any) -> None:
        met.extend(read(apply)(params, *args, **kwargs)[1])

    jax.eval_shape(note, params, *args)
    paths = kernels(params)
    if not met:
        return {layer_of(path): path for path in paths}
    return {layer: _place(layer, paths) for layer in met}


def in_order(
    apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any
) -> list[str]:
    """Paths of the kernels in the order in which a network applies them.

    Args:
      apply: `(params, *args, **kwargs) -> result`, not compiled.
      params: the weights; shapes of all arguments are enough.
      *args: further arguments.
      **kwargs: arguments that are not traced, such as `train=False`.

    >>> import jax.numpy as jnp
    >>> from d2sparse import models
    >>> model, x = models.resnet8(), jnp.ones((1, 8, 8, 1))
    >>> params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> found = in_order(model.apply, params, state, x, train=False)
    >>> found[0], found[-1]
    ('stem_conv/kernel', 'head/kernel')
    """
    return list(layers_of(apply, params, *args, **kwargs).values())


def with_edges(order: list[str], bits: Bits, edges: int) -> Bits:
    """Bits by pattern: of one number with other bits at both ends, or as they are.

    Args:
      order: paths of kernels, as the network applies them.
      bits: of all others, or by a pattern of their paths, which is the whole table.
      edges: bits of the first and the last one.

    >>> with_edges(["stem/kernel", "conv/kernel", "head/kernel"], 4, 8)
    {'stem/kernel': 8, 'head/kernel': 8, '*': 4}
    """
    return bits if isinstance(bits, Mapping) else edge_bits(order, bits, edges)


def input_bits(layers: Mapping[str, str], bits: Bits, edges: int = 8) -> dict[str, int]:
    """Bits of the inputs of layers, those that have any.

    Args:
      layers: from `layers_of`.
      bits: of all layers but the first and the last, or by a pattern of the paths of
        their kernels, which then is the whole table.
      edges: bits of the first and the last layer.

    >>> input_bits({"conv": "conv/kernel", "head": "head/kernel"}, {"conv/*": 4})
    {'conv': 4}
    """
    own = share_bits(with_edges(list(layers.values()), bits, edges), layers.values())
    return {layer: own[path] for layer, path in layers.items() if path in own}


def _place(layer: str, paths: Iterable[str]) -> str:
    """The path of the kernel of a layer: the shortest that ends with its name."""
    own = layer + _KERNEL
    found = [path for path in paths if path == own or path.endswith("/" + own)]
    return min(found, key=len)
