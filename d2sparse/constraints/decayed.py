"""Decay of the weights that outputs or loss are insensitive to, while they train."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from d2sparse import scores as sensitivities
from d2sparse import tree
from d2sparse.checks import check_choice, check_function, check_number
from d2sparse.models import taps
from d2sparse.train import (
    Constraint,
    Context,
    Data,
    Settings,
    Training,
    TrainState,
    claim,
    forward_macs,
)
from d2sparse.transforms import sensitivity_decay
from d2sparse.tree import Prunable, PyTree

Sensitivity = Literal[
    "gradient",
    "constant",
    "output",
    "neurons",
    "neurons_lower",
    "neurons_local",
    "neuron_gradients",
]
Normalise = Literal["tensor", "global", "none"]
_MOMENTUM = 0.9  # Of the gradients at neurons, as released.


def decayed(
    strength: float,
    score: Sensitivity = "gradient",
    normalise: Normalise = "tensor",
    where: Prunable | None = None,
    specific: bool = True,
) -> Constraint:
    """Every step decays weights by how insensitive the loss or the outputs are to them.

    After the update of the optimiser, `w <- w - strength w max(0, 1 - S / norm)`, see
    `transforms.sensitivity_decay`. Put it before what decides the masks, such as
    `threshold_search` or `gradual`: the decay alone makes weights small, not 0. The
    strength is the setting "decay_strength" of a run, so that a sweep over strengths
    is one program. The scores, and what they cost beside a step of 3 forward passes:

    * `"gradient"`: LOBSTER (arXiv 2011.09905), of the step's own gradient; nothing.
    * `"constant"`: L2, the control of all others; nothing.
    * `"output"`: of the outputs to every weight (arXiv 1810.11764), a forward and a
      backward pass, or a backward pass for every class.
    * `"neurons"`, `"neurons_lower"`, `"neurons_local"`: SeReNe (arXiv 2102.03773), of
      the outputs to every neuron: a forward pass in evaluation mode, and a backward
      pass to the neurons for every class, one, or none. The local score is made for
      networks whose activations follow the kernels, without a normalisation between.
    * `"neuron_gradients"`: Neuron-LOBSTER, of the loss to every neuron, with a momentum
      of 0.9; a forward pass and a backward pass to the neurons.

    Neurons are those of Linen layers with a kernel, but for the layer that is applied
    last: the outputs are always as sensitive to their own neurons, which do not decay.

    Args:
      strength: of the decay in a step, in [0, 1]; not multiplied by the learning rate.
      score: what the weights are sensitive for.
      normalise: by what scores are divided, the largest of their "tensor", the largest
        of all, "global", or "none", as published.
      where: predicate on (path, leaf), which leaves decay; those that may be pruned if
        not given.
      specific: whether an output score looks at the class of each example alone.

    Raises:
      ValueError: an option is out of its range; when applied, the masks or the networks
        are decided already, or there is another decay; when a step is traced, the
        network has no layers whose neurons can be scored.

    >>> from d2sparse import models, train
    >>> like = train.images_like((8, 8, 1))
    >>> training = train.plain(models.lenet_300_100(num_classes=3), like)
    >>> training = train.constrain(training, decayed(1e-4, "neurons"))
    >>> training.settings["decay_strength"]
    0.0001
    """
    check_number("strength", strength, 0, 1)
    check_choice("score", score, get_args(Sensitivity))
    check_choice("normalise", normalise, get_args(Normalise))
    if where is not None:
        check_function("where", where, "path, leaf", "tree.is_kernel")

    def constrained(training: Training) -> Training:
        refuse_decided(training, "decayed")
        chosen = training.network.prunable if where is None else where
        kind = score if score in ("gradient", "constant") else "given"

        def transform(
            rate: optax.Schedule, settings: Settings, key: Any
        ) -> optax.GradientTransformation:
            inner = training.transform(rate, settings, key)
            now = settings["decay_strength"]
            tx = sensitivity_decay(inner, now, kind, normalise, chosen)
            return _summed(tx) if score == "neuron_gradients" else tx

        def cost(outer: Training, state: TrainState, size: int) -> Any:
            own = _cost(outer, state, score, specific)
            return training.cost(outer, state, size) + own

        return claim(training, "the decay", score)._replace(
            transform=transform,
            settings={**training.settings, "decay_strength": float(strength)},
            scores=_scores(score, specific) if kind == "given" else training.scores,
            cost=cost,
        )

    return constrained


def refuse_decided(training: Training, who: str) -> None:
    """Refuses a training under masks, or of several networks, for what goes inside.

    Raises:
      ValueError: naming both.
    """
    for what in ("the masks", "the networks"):
        if what in training.claims:
            raise ValueError(
                f"expected {who} before what decides {what}, got it after "
                f"{training.claims[what]}; put it first, so that it is inside"
            )


def _scores(
    score: Sensitivity, specific: bool
) -> Callable[[Training, TrainState, Data, Any], PyTree]:
    """What the optimiser is given at every step."""

    def of_outputs(
        training: Training, state: TrainState, batch: Data, key: Any
    ) -> PyTree:
        x = training.inputs(batch, key)

        def outputs(params: PyTree) -> Any:
            return training.model.apply(params, state.model_state, x, train=True)[0]

        labels = batch.labels if specific else None
        return sensitivities.output_sensitivity(outputs, state.params, labels)

    def of_neurons(
        training: Training, state: TrainState, batch: Data, key: Any
    ) -> PyTree:
        x = training.inputs(batch, key)
        on_loss = score == "neuron_gradients"
        hidden = _hidden(training, state, x, score, train=on_loss)
        if score == "neurons_local":
            return sensitivities.local_sensitivity(hidden)
        zeros = jax.tree.map(jnp.zeros_like, hidden)

        def outputs(offsets: PyTree) -> Any:
            return _outputs(training, state, x, offsets, train=on_loss)

        def loss(offsets: PyTree) -> jax.Array:
            context = Context(
                state.params, state.model_state, state.step, state.settings, x
            )
            return training.loss(outputs(offsets), batch, context)[0]

        if on_loss:
            return sensitivities.neuron_gradients(loss, zeros)
        mode = "lower" if score == "neurons_lower" else "exact"
        return sensitivities.neuron_sensitivity(outputs, zeros, mode)

    return of_outputs if score == "output" else of_neurons


def _outputs(
    training: Training, state: TrainState, x: Any, offsets: PyTree, train: bool
) -> Any:
    """Outputs with offsets added to the pre-activations of layers."""
    each = {layer: taps.Tap(None, z) for layer, z in offsets.items()}
    apply = taps.offset(training.model.apply)
    return apply(each, state.params, state.model_state, x, train=train)[0]


def _hidden(
    training: Training, state: TrainState, x: Any, score: str, train: bool
) -> dict[str, jax.Array]:
    """float[batch, ..., neurons] of every layer with a kernel but the last applied."""
    read = taps.read(training.model.apply)
    _, met = read(state.params, state.model_state, x, train=train)
    layers = list(met)
    if len(layers) < 2:
        raise ValueError(
            "expected a network of Linen layers with hidden neurons for a decay by "
            f"score={score!r}, got the layers {layers}, of which the last are the "
            "outputs; take score='gradient' or 'output'"
        )
    return {layer: met[layer].output for layer in layers[:-1]}


def _cost(
    training: Training, state: TrainState, score: Sensitivity, specific: bool
) -> Any:
    """Multiply-accumulates of the scores of a step, per example."""
    masks = training.masks(state)
    forward = forward_macs(training.network, masks.used)
    weights = forward_macs(training.network, masks.trained)
    classes = training.network.outputs
    passes = {"neurons": classes, "neurons_lower": 1, "neuron_gradients": 1}
    if score in passes:
        return (1 + passes[score]) * forward
    if score == "output":
        return forward + (1 if specific else classes) * (forward + weights)
    return forward if score == "neurons_local" else 0.0


class SummedState(NamedTuple):
    """State of a decay by neurons' gradients.

    Attributes:
      trace: their sums by leaf, each shaped like the leaf.
      inner: state of the decay.
    """

    trace: PyTree
    inner: optax.OptState


def _summed(
    decay: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """A decay given `b <- 0.9 b + m` in place of `m`, the scores of a step by layer.

    The sums are shaped like the weights, since masks renew what is shaped like them.
    """

    def init(params: optax.Params) -> SummedState:
        return SummedState(optax.tree.zeros_like(params), decay.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        scores: PyTree,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SummedState]:
        given = {f"{layer}/kernel": m for layer, m in scores.items()}
        trace = {
            path: (_MOMENTUM * old + _along_last(given[path], old)).astype(old.dtype)
            for path, old in tree.pick(state.trace, given).items()
        }
        changes, inner = decay.update(
            updates, state.inner, params, scores=trace, **extra_args
        )
        return changes, SummedState(tree.replace(state.trace, trace), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _along_last(neurons: jax.Array, weights: jax.Array) -> jax.Array:
    return neurons.reshape((1,) * (weights.ndim - 1) + neurons.shape)
