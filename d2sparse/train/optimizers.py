"""The inner optimisers of the experiments, by name."""

import jax
import jax.numpy as jnp
import optax
from optax.contrib import sam

from d2sparse import tree
from d2sparse.tree import PyTree


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | jax.Array = 0.0,
    momentum: float = 0.9,
    sharpness: float = 0.0,
) -> optax.GradientTransformation:
    """An optimiser by name. Weight decay acts on kernels only.

    * `"sgd"`: momentum, decay coupled: added to the gradient, so that it enters the
      momentum and scales with the learning rate.
    * `"sgdw"`: momentum, decay decoupled from it (arXiv 1711.05101).
    * `"adamw"`: Adam with decoupled decay; `momentum` is its first moment's decay.

    Inside `sparsify` momentum and decay act on live weights alone.

    Args:
      name: one of the above.
      learning_rate: of the updates, or a schedule.
      weight_decay: on kernels; may be traced.
      momentum: decay of the first moment.
      sharpness: above 0, the gradient is taken where the loss is larger, at
        `params + sharpness g / |g|` with g the gradient at the parameters, of live
        weights inside `sparsify` (sharpness-aware minimisation, Foret et al.,
        arXiv 2010.01412). `update` then needs `grad_fn(params, number) -> gradient`;
        `make_step` gives it. It doubles the cost of a step.

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
    if sharpness:
        plain = make_optimizer(name, learning_rate, weight_decay, momentum)
        return sam(plain, _descent(sharpness), opaque_mode=True)
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


def _descent(length: float) -> optax.GradientTransformation:
    """A step of a length against the gradient, none where there is no gradient."""

    def step(updates: PyTree, params: PyTree) -> PyTree:
        del params
        norm = jnp.maximum(optax.tree.norm(updates), jnp.finfo(jnp.float32).tiny)
        return jax.tree.map(lambda g: -length * (g / norm), updates)

    return optax.stateless(step)


def _kernels(params: PyTree) -> PyTree:
    # A prompt alone has none.
    has_any = any(tree.is_kernel(*leaf) for leaf in tree.flatten(params).items())
    kernels = set(tree.prunable_leaves(params)) if has_any else set()
    return tree.map_with_path(lambda path, leaf: path in kernels, params)
