"""A training as a record of pure functions, and constraints as functions on it.

    training = constrain(plain(model, data, recipe), rigl(0.9), averaged(tail=0.25))

A constraint replaces one to three fields of a training, mostly by wrapping them. What
it does not name it leaves alone, so constraints compose as functions do.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from d2sparse import tree
from d2sparse.models import Model
from d2sparse.train.state import Data, Metrics, TrainState
from d2sparse.tree import Prunable, PyTree, is_kernel

Settings = Mapping[str, Any]  # Numbers by name; inside of a step they are traced.
Key = Any  # A random key, or a seed; of a pair, those of its parts.


class Context(NamedTuple):
    """What a loss may look at besides outputs and labels.

    Attributes:
      params: the trained parameters.
      model_state: what the forward pass carries, as it was before the step.
      step: int32[], the number of steps taken.
      settings: numbers of this run.
      x: what the network was shown.
    """

    params: PyTree
    model_state: PyTree
    step: jax.Array
    settings: Settings
    x: PyTree


class Progress(NamedTuple):
    """Where a training stands: all that must survive an interruption.

    Attributes:
      phase: int32[], the phase it is in; -1 before the first.
      state: what is being trained.
      memory: what phases keep: early weights, members, teachers, the best epoch.
    """

    phase: jax.Array
    state: TrainState
    memory: Mapping[str, Any]


Enter = Callable[[Progress, Data, Any], Progress]


def stay(progress: Progress, data: Data, program: Any) -> Progress:
    """A phase is entered without any change."""
    del data, program
    return progress


class Phase(NamedTuple):
    """A stretch of steps, and what happens before the first of them.

    Attributes:
      stop: step of the state before which the phase ends; it may have no steps.
      enter: `(progress, data, program) -> progress`: prune, rewind, keep, validate,
        hand over. It runs on the host between two steps, for one run. It keeps the
        structure of the progress, unless the phase is of another training than the one
        before it: then it may change it, and `jax.eval_shape` has to be able to trace
        it. It ends the whole training where it returns `end(progress)`.
      batches: `(progress, data, steps) -> int32[steps, batch]`, the examples of the
        next steps; None for all data in epochs. It runs on the host, for one run, whose
        state it must not keep.
      training: whose steps these are; None for the training the phase belongs to.
      title: where it is set, such as "round 3", the network is judged at the end of the
        phase and has a row of its own in the results.
    """

    stop: int
    enter: Enter = stay
    batches: Callable[[Progress, Data, int], Any] | None = None
    training: "Training | None" = None
    title: str = ""


class Network(NamedTuple):
    """What is known of a network before it is trained.

    Attributes:
      params: shapes of its parameters.
      macs: multiply-accumulates of its dense forward pass by leaf, per example.
      prunable: which leaves may be pruned.
      outputs: numbers that it returns for an example; 0 where they are no array.
    """

    params: PyTree
    macs: Mapping[str, int]
    prunable: Prunable = is_kernel
    outputs: int = 0

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return tree.size(tree.prunable_leaves(self.params, self.prunable))

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of a dense forward pass, per example."""
        return sum(self.macs.values())


class Masks(NamedTuple):
    """Which weights of a training count, as masks of one or more networks.

    Attributes:
      used: of the networks that predictions need: what their forward passes see.
      trained: of those whose gradient every step needs, likewise.
      stored: of the numbers that have to be kept to train on.
    """

    used: tuple[PyTree, ...]
    trained: tuple[PyTree, ...]
    stored: tuple[PyTree, ...]


class Training(NamedTuple):
    """What a training is made of. A constraint replaces one to three of these.

    Attributes:
      model: `init(key, x)` and `apply(params, model_state, x, train=...)`, whose
        outputs the loss and `probabilities` are given.
      network: shapes and costs of the plain network.
      inputs: `(batch, key) -> x`, what the network sees in training; without a key, in
        evaluation.
      loss: `(outputs, batch, context) -> (scalar, metrics)`.
      rate: (learning rate at the first step, horizon) -> schedule.
      transform: `(schedule, settings, key) -> Optax transformation`.
      settings: numbers that runs of one program may differ in.
      when: step -> bool, when masks are refreshed; of a pair, step -> Dual of bools.
      growth_samples: examples of the gradient that growth looks at, at most all; 0 for
        the gradient of the step.
      batch_size: examples per step.
      horizon: steps of one learning-rate schedule.
      phases: what happens when.
      init: `(training, key, data, settings) -> state` at step 0.
      begin: `(progress, data) -> progress` at step 0: what phases keep in the memory.
      finish: `(progress, data, program) -> state`, what counts at the end.
      probabilities: outputs -> class probabilities by name, the headline first.
      masks: state -> which weights count.
      cost: `(training, state, examples) -> float32[]`, multiply-accumulates of the step
        to come, per example of its batch.
      measure: state -> measurements by name, at every report.
      claims: what only one constraint can decide: which of them does.
      scores: `(training, state, batch, key) -> scores` of weights or neurons at every
        step, which its optimiser is given as `update(..., scores=...)`; None where it
        asks for none. Their cost is part of `cost`.
    """

    model: Model
    network: Network
    inputs: Callable[[Data, jax.Array | None], PyTree]
    loss: Callable[[Any, Data, Context], tuple[jax.Array, Metrics]]
    rate: Callable[[Any, int], optax.Schedule]
    transform: Callable[[optax.Schedule, Settings, Key], optax.GradientTransformation]
    settings: Mapping[str, float]
    when: Callable[[jax.Array], Any] | None
    growth_samples: int
    batch_size: int
    horizon: int
    phases: tuple[Phase, ...]
    init: "Callable[[Training, jax.Array, Data, Settings], TrainState]"
    begin: Callable[[Progress, Data], Progress]
    finish: Callable[[Progress, Data, Any], TrainState]
    probabilities: Callable[[Any], dict[str, jax.Array]]
    masks: Callable[[TrainState], Masks]
    cost: "Callable[[Training, TrainState, int], Any]"
    measure: Callable[[TrainState], Mapping[str, Any]]
    claims: Mapping[str, str]
    scores: "Callable[[Training, TrainState, Data, Key], PyTree] | None" = None


Constraint = Callable[[Training], Training]


def constrain(training: Training, *constraints: Constraint) -> Training:
    """The training under constraints, applied from left to right.

    Args:
      training: what to constrain, such as `plain(...)`.
      *constraints: each a function from a training to a training.

    Raises:
      ValueError: two of them claim the same thing, such as the masks.
    """
    return functools.reduce(lambda t, constraint: constraint(t), constraints, training)


def claim(training: Training, what: str, who: str) -> Training:
    """Notes that a constraint has taken something that only one can have.

    Args:
      training: what is constrained.
      what: is claimed, in words, such as "the masks".
      who: claims it, such as "rigl".

    Raises:
      ValueError: naming both, where another constraint has claimed it.
    """
    if what in training.claims:
        raise ValueError(
            f"expected one constraint that decides {what}, got {training.claims[what]} "
            f"and {who}; leave one of them away"
        )
    return training._replace(claims={**training.claims, what: who})


def lasting(steps: int) -> Constraint:
    """A training of another length, in one phase; put it first.

    Args:
      steps: optimiser steps, at least 1.
    """
    if steps < 1:
        raise ValueError(f"expected a training of at least 1 step, got {steps}")
    return lambda training: training._replace(horizon=steps, phases=(Phase(steps),))


def end(progress: Progress) -> Progress:
    """Ends the training where a phase is entered: no further step is taken."""
    return progress._replace(phase=jnp.full_like(progress.phase, _OVER))


_OVER = 2**31 - 1
