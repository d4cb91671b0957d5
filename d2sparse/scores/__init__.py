"""Scores: how much does each weight matter?

A score takes `(params, grads, key)` and returns a tree of the structure of `params`;
the largest scores are kept. Every score has this signature, so that a rule can be given
any. What a score needs beside weights and gradients (data, a network, activations) is
given to the function that makes it: `one_shot(0.9, score=snip(loss, batches))`.
"""

from d2sparse.scores.activations import wanda
from d2sparse.scores.flow import synflow
from d2sparse.scores.local import (
    GRADIENT_SCORES,
    LOCAL,
    MovementState,
    Score,
    constant,
    gradient,
    magnitude,
    movement,
    observed,
    random,
    saliency,
    signed_saliency,
)
from d2sparse.scores.loss import fisher, grasp, snip

__all__ = [
    "GRADIENT_SCORES",
    "LOCAL",
    "MovementState",
    "Score",
    "constant",
    "fisher",
    "gradient",
    "grasp",
    "magnitude",
    "movement",
    "observed",
    "random",
    "saliency",
    "signed_saliency",
    "snip",
    "synflow",
    "wanda",
]
