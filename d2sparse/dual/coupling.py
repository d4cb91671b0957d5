"""How two learners influence each other: what they teach, and where masks may grow."""

import dataclasses

import jax
import jax.numpy as jnp

from d2sparse import losses, scores, tree
from d2sparse.masks import Selection, count
from d2sparse.tree import Prunable, PyTree


@dataclasses.dataclass(frozen=True)
class Coupling:
    """How the two learners influence each other; all zeros: not at all.

    Attributes:
      fast: lambda_fast, weight of the slow learner's teaching in the fast one's loss.
      slow: lambda_slow, weight of the fast learner's teaching in the slow one's loss.
      temperature: tau of the distillation, above 0.
      ramp: steps over which both weights rise from 0; 0 means at once.
      masks: kappa in [-1, 1]. Growth scores are multiplied by `1 - kappa` where the
        peer is live: 1 makes the masks complementary, -1 attracts them.
      independent_views: whether each learner sees an augmentation of its own; the
        teaching then asks for consistency between views as well.
      weighted: whether the teaching on an example counts as much as the peer's
        confidence in it, its largest probability.
      threshold: in [0, 1); what the peer is less confident of is not taught.
    """

    fast: float = 1.0
    slow: float = 1.0
    temperature: float = 1.0
    ramp: int = 0
    masks: float = 1.0
    independent_views: bool = False
    weighted: bool = False
    threshold: float = 0.0

    def __post_init__(self) -> None:
        """Refuses values outside of their ranges."""
        if self.fast < 0 or self.slow < 0 or self.ramp < 0:
            raise ValueError(
                "expected coupling weights and a ramp of at least 0, got "
                f"fast={self.fast}, slow={self.slow}, ramp={self.ramp}"
            )
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {self.temperature}")
        if not -1 <= self.masks <= 1:
            raise ValueError(
                f"expected a mask coupling in [-1, 1], got {self.masks}; 1 makes the "
                "masks complementary, 0 leaves them independent"
            )
        if not 0 <= self.threshold < 1:
            raise ValueError(
                "expected a threshold of confidence in [0, 1), got "
                f"{self.threshold}; 0 teaches on every example"
            )


def trust(peer: jax.Array, coupling: Coupling) -> jax.Array:
    """How much the teaching of a peer counts on each example, float[batch].

    Args:
      peer: float[batch, classes], its logits.
      coupling: "weighted" by the peer's confidence, and from which "threshold" on.
    """
    confidence = losses.confidence(peer)
    weight = confidence if coupling.weighted else jnp.ones_like(confidence)
    return jnp.where(confidence >= coupling.threshold, weight, 0.0)


def discourage(grads: PyTree, peer_masks: PyTree, kappa: float) -> PyTree:
    """Gradients scaled so that growth avoids, or seeks, what is live in the peer.

    `g * max(1 - kappa * peer, 1e-6)`; it is meant for growth scores alone.

    Args:
      grads: tree of gradients.
      peer_masks: the peer's masks, of the same structure.
      kappa: in [-1, 1]; at 0 the gradients are returned as they are.

    >>> discourage({"w": jnp.ones(2)}, {"w": jnp.array([True, False])}, 0.5)
    {'w': Array([0.5, 1. ], dtype=float32)}
    """
    if not kappa:
        return grads
    return jax.tree.map(
        lambda g, peer: g * jnp.maximum(1 - kappa * peer, 1e-6), grads, peer_masks
    )


def apart(
    masks: PyTree,
    peer: PyTree,
    kappa: float,
    key: jax.Array,
    prunable: Prunable,
    selection: Selection,
) -> PyTree:
    """Random masks with the counts of the given ones, where the peer's are not.

    Args:
      masks: of one network.
      peer: masks of another one of the same shapes.
      kappa: in [-1, 1]; 1 for masks that are complementary as far as they can be, -1
        for masks that overlap.
      key: random key.
      prunable: predicate on (path, leaf).
      selection: which patterns may be live.
    """
    ranks = scores.random(masks, None, key)
    ranks = jax.tree.map(lambda rank, live: rank - kappa * live, ranks, peer)
    ranks = tree.prunable_leaves(ranks, prunable)
    return tree.replace(masks, selection(ranks, count(masks, prunable), None))
