"""Whole neurons become 0 by group lasso, without masks."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2sparse import regularizers, tree
from d2sparse.checks import check_number
from d2sparse.constraints.decayed import refuse_decided
from d2sparse.distributions import check_sparsity
from d2sparse.reparam import nonzero_masks
from d2sparse.schedules import refresh_stop
from d2sparse.train import (
    Constraint,
    Network,
    Settings,
    Training,
    TrainState,
    claim,
    same_masks,
)
from d2sparse.transforms import group_budget
from d2sparse.tree import Prunable


def group_lasso(sparsity: float, strength: float = 1e-3) -> Constraint:
    """Hidden neurons lose all incoming weights, up to a budget all layers share.

    A proximal step of the group lasso after every update, see
    `transforms.group_budget`: its strength decides how soon neurons fall, and the
    sparsity how many may. What the strength has not done in the first three quarters of
    the training is done at once then; if that is most of it, since the strength is too
    small, the network loses much of what it has learned. Every layer keeps a neuron.
    Biases stay, so that a neuron without weights is a constant. The output layer, whose
    neurons are the classes, is left out: the last dense kernel in the tree with as
    many.

    Both numbers are settings of a run, "group_sparsity" and "group_strength".

    Args:
      sparsity: fraction of the hidden neurons without weights at the end, in [0, 1).
      strength: of a step, at least 0; not multiplied by the learning rate.

    Raises:
      ValueError: a number is out of its range; when applied, the network has no hidden
        neurons, or the masks or networks are decided already.

    >>> from d2sparse import models, train
    >>> like = train.images_like((8, 8, 1))
    >>> training = train.plain(models.lenet_300_100(num_classes=3), like)
    >>> training = train.constrain(training, group_lasso(0.5))
    >>> training.settings["group_sparsity"], training.claims
    (0.5, {'the masks': 'group_lasso'})
    """
    check_sparsity(sparsity)
    check_number("strength", strength, 0, float("inf"))

    def constrained(training: Training) -> Training:
        refuse_decided(training, "group_lasso")
        hidden, stop = _hidden(training.network), refresh_stop(training.horizon)
        shapes = tree.prunable_leaves(training.network.params, hidden)
        neurons = sum(leaf.shape[-1] for leaf in shapes.values())

        def transform(
            rate: optax.Schedule, settings: Settings, key: Any
        ) -> optax.GradientTransformation:
            def kept(step: Any) -> jax.Array:
                left = jnp.round((1 - settings["group_sparsity"]) * neurons)
                return jnp.maximum(left.astype(jnp.int32), len(shapes))

            def pressure(step: Any) -> jax.Array:
                return jnp.where(step < stop, settings["group_strength"], jnp.inf)

            def groups(params: Any) -> regularizers.Groups:
                return regularizers.neurons(params, hidden)

            inner = training.transform(rate, settings, key)
            return group_budget(inner, kept, pressure, groups)

        def masks(state: TrainState) -> Any:
            return same_masks(nonzero_masks(state.params, hidden))

        return claim(training, "the masks", "group_lasso")._replace(
            transform=transform,
            settings={
                **training.settings,
                "group_sparsity": float(sparsity),
                "group_strength": float(strength),
            },
            masks=masks,
        )

    return constrained


def _hidden(network: Network) -> Prunable:
    """The prunable kernels but for that of the output layer."""
    kernels = tree.prunable_leaves(network.params, network.prunable)
    outputs = [
        path
        for path, leaf in tree.prunable_leaves(network.params).items()
        if leaf.ndim == 2 and leaf.shape[-1] == network.outputs
    ]
    paths = frozenset(path for path in kernels if path not in outputs[-1:])
    if not paths:
        raise ValueError(
            "expected a network with hidden neurons that may be pruned, got the "
            f"prunable kernels {sorted(kernels)}; choose another network"
        )
    return lambda path, leaf: path in paths
