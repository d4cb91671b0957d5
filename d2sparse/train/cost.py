"""What a step costs: theoretical multiply-accumulates, counted where they happen."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from d2sparse import macs, tree
from d2sparse.masks import dense_masks
from d2sparse.train.state import TrainState
from d2sparse.train.training import Masks, Network, Training
from d2sparse.transforms import get_masks, sparse_states
from d2sparse.tree import PyTree


def live_masks(params: PyTree, opt_state: PyTree) -> PyTree:
    """Masks of the weights that are not 0 by constraint, all where there is none."""
    sparse = sparse_states(opt_state)
    return get_masks(opt_state) if sparse else dense_masks(params)


def live_weights(network: Network, masks: Sequence[PyTree]) -> dict[str, int]:
    """Live weights of every prunable leaf, over all networks.

    Args:
      network: whose leaves they are.
      masks: of each network, such as `training.masks(state).trained`.
    """
    leaves = tree.prunable_leaves(network.params, network.prunable)
    each = [tree.pick(live, leaves) for live in masks]
    return {path: sum(int(live[path].sum()) for live in each) for path in leaves}


def same_masks(*live: PyTree) -> Masks:
    """Of networks whose forward pass sees what is trained and stored."""
    return Masks(live, live, live)


def forward_macs(network: Network, masks: Sequence[PyTree]) -> Any:
    """Multiply-accumulates of the forward passes of networks under masks."""
    return sum(macs.masked_macs(network.macs, own) for own in masks)


def step_macs(training: Training, state: TrainState, size: int = 0) -> Any:
    """Multiply-accumulates of a step, per example of its batch.

    A forward pass, the gradient with respect to activations, and that with respect to
    the weights that are trained; where masks are refreshed and growth looks at a
    gradient of its own, a forward and a dense backward pass on its examples.

    Args:
      training: whose step it is.
      state: at the beginning of the step.
      size: number of training examples; 0 leaves growth out.
    """
    masks = training.masks(state)
    sparse = forward_macs(training.network, masks.used)
    spent = 2 * sparse + forward_macs(training.network, masks.trained)
    if not (size and training.growth_samples and training.when):
        return spent
    grown = growth_share(training, size) * (2 * sparse + training.network.dense_macs)
    return spent + jnp.where(training.when(state.step), grown, 0.0)


def growth_share(training: Training, size: int) -> float:
    """Examples of a growth gradient per example of a batch."""
    return min(training.growth_samples, size) / min(training.batch_size, size)
