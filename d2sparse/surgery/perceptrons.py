"""Perceptrons without the activation functions that have become linear."""

import numpy as np

from d2sparse.models import Model, from_linen
from d2sparse.models.gates import Gates
from d2sparse.models.mlp import MLP
from d2sparse.surgery.merging import Dense, merge_dense
from d2sparse.tree import PyTree


def merge_perceptron(params: PyTree, gates: Gates) -> tuple[Model, PyTree]:
    """A perceptron of fewer layers that computes the same, up to rounding.

    The layers around every activation function whose gate is closed become one, see
    `merge_dense`. This runs on the host. It serves networks of `d2sparse.models.mlp`:
    convolutions of the networks here pad what the one before has computed, and cannot
    be merged exactly, see `surgery.merging`.

    Args:
      params: of layers `dense1`, `dense2`, ..., `head`.
      gates: of their activation functions `relu1`, `relu2`, ..., from `get_gates`.

    Returns:
      The network without gates, whose model state is empty, and its parameters.

    Raises:
      ValueError: the parameters are not those of such a perceptron.

    >>> import jax, jax.numpy as jnp
    >>> from d2sparse.models import gates, lenet_300_100
    >>> model, x = gates.gated(lenet_300_100(num_classes=3)), jnp.ones((2, 8))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> linear = gates.linearised(state.gates, "relu1")
    >>> smaller, merged = merge_perceptron(params, linear)
    >>> {name: layer["kernel"].shape for name, layer in merged.items()}
    {'dense1': (8, 100), 'head': (100, 3)}
    """
    names = [f"dense{n}" for n in range(1, len(params))]
    if sorted(params) != sorted([*names, "head"]):
        raise ValueError(
            "expected the parameters of a perceptron, dense1, dense2, ... and head, "
            f"got {sorted(params)}; merge its layers by `merge_dense` or "
            "`merge_convolutions`"
        )
    layer, *later = (Dense(**params[name]) for name in [*names, "head"])
    hidden: list[Dense] = []
    for number, following in enumerate(later, 1):
        relu = f"relu{number}"
        if bool(gates.active[relu]):
            hidden.append(layer)
            layer = following
        else:
            layer = merge_dense(_let_through(layer, gates.open[relu]), following)
    sizes = tuple(own.kernel.shape[1] for own in hidden)
    model = from_linen(MLP(sizes, layer.kernel.shape[1]))
    merged = {f"dense{n}": own._asdict() for n, own in enumerate(hidden, 1)}
    return model, {**merged, "head": layer._asdict()}


def _let_through(layer: Dense, channels: PyTree) -> Dense:
    """The layer whose other channels are 0."""
    own = np.asarray(channels)
    bias = None if layer.bias is None else layer.bias * own
    return Dense(layer.kernel * own[None], bias)
