"""Scores: how much does each weight matter?

A score takes `(params, grads, key)` and returns a tree of the structure of `params`;
the largest scores are kept. Every score has this signature, so that a rule can be given
any. What a score needs beside weights and gradients (data, a network, activations) is
given to the function that makes it: `one_shot(0.9, score=snip(loss, batches))`.

Sensitivities of outputs and neurons are no scores of that signature: they are evaluated
where they are called, and given to `transforms.sensitivity_decay`.
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
from d2sparse.scores.sensitivity import (
    local_sensitivity,
    neuron_gradients,
    neuron_sensitivity,
    output_sensitivity,
)

__all__ = [
    "GRADIENT_SCORES",
    "LOCAL",
    "MovementState",
    "Score",
    "constant",
    "fisher",
    "gradient",
    "grasp",
    "local_sensitivity",
    "magnitude",
    "movement",
    "neuron_gradients",
    "neuron_sensitivity",
    "observed",
    "output_sensitivity",
    "random",
    "saliency",
    "signed_saliency",
    "snip",
    "synflow",
    "wanda",
]
