"""The inner optimisers of the experiments, by name."""

import optax

from d2sparse import tree
from d2sparse.tree import PyTree


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    """An optimiser by name. Weight decay acts on kernels only.

    * `"sgd"`: momentum, decay coupled: added to the gradient, so that it enters the
      momentum and scales with the learning rate.
    * `"sgdw"`: momentum, decay decoupled from it (arXiv 1711.05101).
    * `"adamw"`: Adam with decoupled decay; `momentum` is its first moment's decay.

    Inside `sparsify` momentum and decay act on live weights alone.

    Raises:
      ValueError: unknown name.

    >>> import jax, jax.numpy as jnp
    >>> tx = make_optimizer("sgd", 0.1, weight_decay=0.5, momentum=0.0)
    >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params),
    ...                        params)
    >>> updates["kernel"].tolist(), updates["bias"].tolist()
    ([[-0.05000000074505806]], [-0.0])
    """
    decay = optax.add_decayed_weights(weight_decay, mask=_kernels)
    trace = optax.trace(momentum)
    rate = optax.scale_by_learning_rate(learning_rate)
    if name == "sgd":
        return optax.chain(decay, trace, rate)
    if name == "sgdw":
        return optax.chain(trace, decay, rate)
    if name == "adamw":
        return optax.chain(optax.scale_by_adam(b1=momentum), decay, rate)
    raise ValueError(f"expected optimizer 'sgd', 'sgdw' or 'adamw', got {name!r}")


def _kernels(params: PyTree) -> PyTree:
    kernels = set(tree.prunable_leaves(params))
    return tree.map_with_path(lambda path, leaf: path in kernels, params)
