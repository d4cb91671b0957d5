"""The seam between d2sparse and any neural-network library: two pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from d2sparse.checks import optional

with optional(__name__):
    from flax import linen as nn

PyTree = Any


class Model(NamedTuple):
    """A network as two pure functions that jit, vmap and grad like any other.

    Nothing else in d2sparse knows how a network is written, so a model of another
    library takes part as soon as it is wrapped in these two functions.

    Attributes:
      init: `init(key, x) -> (params, model_state)`. Only the shape and dtype of the
        batch `x` matter. `model_state` is what the network carries apart from its
        parameters, such as BatchNorm statistics; `{}` when there is nothing.
      apply: `apply(params, model_state, x, *, train) -> (logits, model_state)` with
        `x: float[batch, ...]`, of images `float[batch, height, width, channels]`, and
        `logits: float[batch, classes]`. `train` is static under jit. With
        `train=False` the state comes back unchanged.
    """

    init: Callable[[jax.Array, jax.Array], tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[jax.Array, PyTree]]


def from_linen(module: nn.Module) -> Model:
    """Wraps a Flax Linen module as a `Model`.

    Args:
      module: a module whose `__call__` is `(x, *, train) -> logits` and which needs
        no random key when applied (no dropout).

    Returns:
      The model whose parameters are the collection `"params"` and whose state is
      the dict of all other collections.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> class Linear(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, *, train):
      ...         return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))
      >>> model = from_linen(Linear())
      >>> x = jnp.ones((5, 2, 2, 1))
      >>> params, state = model.init(jax.random.key(0), x)
      >>> params["head"]["kernel"].shape, state
      ((4, 3), {})
      >>> logits, state = model.apply(params, state, x, train=True)
      >>> logits.shape
      (5, 3)
    """

    # Under jit the forward pass inside `module.init` is dead code, so only the
    # random numbers are computed.
    @jax.jit
    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        model_state = dict(module.init(key, x, train=False))
        params = model_state.pop("params")
        return params, model_state

    def apply(
        params: PyTree, model_state: PyTree, x: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        logits, updated = module.apply(
            {"params": params, **model_state},
            x,
            train=train,
            mutable=list(model_state) if train else [],
        )
        return logits, {**model_state, **updated}

    return Model(init, apply)
