"""Sensitivities of outputs and loss to weights and to neurons.

They serve `transforms.sensitivity_decay`, and unlike the other scores are evaluated
where they are called. Every one is a mean over examples: twice the same batch gives the
same. A neuron is one feature of a layer, the last axis of its pre-activations; what
they are, and offsets that are added to them, `models.taps` gives for Linen networks.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse.checks import check_choice, check_function, check_whole
from d2sparse.scores.local import widen
from d2sparse.tree import PyTree

Outputs = Callable[[PyTree], jax.Array]


def output_sensitivity(
    outputs: Outputs,
    params: PyTree,
    labels: jax.Array | None = None,
    chunk: int = 16,
) -> PyTree:
    """Sensitivity of the outputs to every weight, `sum_k alpha_k |d y_k / dw|`.

    `y_k` is the mean of output k over the batch, taken before its derivative. Without
    labels it is the unspecific sensitivity, `alpha_k = 1 / classes`; with them the
    specific one, of the mean of what each example has at its own class (Tartaglione et
    al., arXiv 1810.11764). It costs a backward pass per class, or a single one.

    Args:
      outputs: params -> float[batch, classes], logits of a batch.
      params: weights; those of half precision are taken in float32.
      labels: int[batch], the classes of the examples.
      chunk: of how many classes the backward passes are done, and held, at once.

    Returns:
      A tree like the parameters, at least 0.

    Raises:
      ValueError: the outputs are of another form, or the labels are not one of each.

    >>> x = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> output_sensitivity(lambda p: x @ p["kernel"], params)["kernel"].tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    >>> labels = jnp.array([0, 1])
    >>> found = output_sensitivity(lambda p: x @ p["kernel"], params, labels)
    >>> found["kernel"].tolist()
    [[0.5, 1.5], [0.0, 0.0]]
    """
    logits, pullback = _pullback(outputs, widen(params), chunk)
    batch, classes = logits.shape
    if labels is not None:
        if jnp.shape(labels) != (batch,):
            raise ValueError(
                f"expected labels int[{batch}], one of every example, got shape "
                f"{jnp.shape(labels)}; pass class numbers and not one-hot rows"
            )
        targets = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
        return jax.tree.map(jnp.abs, pullback(targets / batch))

    def of_class(direction: jax.Array) -> PyTree:
        rows = jnp.broadcast_to(direction[None] / batch, logits.shape)
        return jax.tree.map(jnp.abs, pullback(rows))

    return _mean_over_classes(of_class, logits, chunk)


def neuron_sensitivity(
    outputs: Outputs,
    offsets: PyTree,
    mode: str = "exact",
    chunk: int = 16,
    released: bool = False,
) -> PyTree:
    """Sensitivity of the outputs to every neuron, per example: SeReNe.

    `S_n = mean over examples and positions of 1/C sum_k |d y_k / d z_n|`, with the
    pre-activation `z_n` and C classes (Tartaglione et al., arXiv 2102.03773), exact at
    the cost of C backward passes. Its lower bound `1/C |sum_k d y_k / d z_n|` costs
    one. Examples may not depend on each other: take normalisations in evaluation mode.

    Leave the output layer out: there `S_n = 1 / C` for every neuron, whatever it does.

    Args:
      outputs: offsets -> float[batch, classes], logits of a batch with the offsets
        added to the pre-activations.
      offsets: zeros float[batch, ..., neurons], by layer.
      mode: `"exact"` or `"lower"`.
      chunk: of how many classes the backward passes are done, and held, at once.
      released: the exact mode as it was published, where outputs are averaged over the
        batch before the derivative and again after it: `S_n` is too small by the size
        of the batch, and close to 0 for every neuron.

    Returns:
      `float[neurons]` at least 0, in place of every offset: what
      `transforms.sensitivity_decay` takes as scores by layer.

    Raises:
      ValueError: the outputs or the offsets are of another form, or an option is out of
        its range.

    >>> x, head = jnp.array([[2.0, -1.0]]), jnp.array([[1.0, -1.0], [2.0, 2.0]])
    >>> def outputs(offsets):
    ...     return jax.nn.relu(x + offsets["hidden"]) @ head
    >>> offsets = {"hidden": jnp.zeros((1, 2))}
    >>> neuron_sensitivity(outputs, offsets)["hidden"].tolist()
    [1.0, 0.0]
    >>> neuron_sensitivity(outputs, offsets, "lower")["hidden"].tolist()
    [0.0, 0.0]

    Of a Linen network, by taps:

    >>> from d2sparse import models
    >>> from d2sparse.models import taps
    >>> model, x = models.lenet_300_100(num_classes=3, width=0.02), jnp.ones((2, 4))
    >>> params, state = model.init(jax.random.key(0), x)
    >>> hidden = taps.read(model.apply, ["dense1", "dense2"])
    >>> _, met = hidden(params, state, x, train=False)
    >>> def outputs(offsets):
    ...     each = {layer: taps.Tap(None, z) for layer, z in offsets.items()}
    ...     return taps.offset(model.apply)(each, params, state, x, train=False)[0]
    >>> offsets = {layer: jnp.zeros_like(tap.output) for layer, tap in met.items()}
    >>> found = jax.jit(lambda offsets: neuron_sensitivity(outputs, offsets))(offsets)
    >>> {layer: s.shape for layer, s in found.items()}
    {'dense1': (6,), 'dense2': (2,)}
    """
    check_choice("mode", mode, ("exact", "lower"))
    if released and mode != "exact":
        raise ValueError(
            f'expected mode "exact" where `released` is True, got {mode!r}; the lower '
            "bound that was published does not run"
        )
    logits, pullback = _pullback(outputs, offsets, chunk)
    _check_offsets(offsets, len(logits))
    batch, classes = logits.shape

    def along(direction: jax.Array) -> PyTree:
        # Examples are independent: the sum over them has every one's own derivative.
        slopes = pullback(jnp.broadcast_to(direction[None], logits.shape))
        return jax.tree.map(lambda slope: _mean(jnp.abs(slope)), slopes)

    if mode == "lower":
        found = along(jnp.full(classes, 1 / classes, logits.dtype))
    else:
        found = _mean_over_classes(along, logits, chunk)
    return jax.tree.map(lambda s: s / batch, found) if released else found


def local_sensitivity(preactivations: PyTree, mode: str = "indicator") -> PyTree:
    """Sensitivity of a rectified neuron's own activation, 1 or 0: SeReNe's local one.

    `"indicator"` is 1 where the mean of the pre-activation over examples and positions
    is above 0, as published; `"fraction"` is the mean of the derivative, the fraction
    of examples and positions where it is above 0. Neither needs a backward pass.

    Args:
      preactivations: float[batch, ..., neurons], by layer.
      mode: `"indicator"` or `"fraction"`.

    Returns:
      `float[neurons]` in [0, 1], in place of every array.

    Raises:
      ValueError: the mode is none of them.

    >>> z = {"dense": jnp.array([[4.0, -1.0], [-1.0, -1.0]])}
    >>> local_sensitivity(z)["dense"].tolist()
    [1.0, 0.0]
    >>> local_sensitivity(z, "fraction")["dense"].tolist()
    [0.5, 0.0]
    """
    check_choice("mode", mode, ("indicator", "fraction"))

    def of_layer(z: jax.Array) -> jax.Array:
        if mode == "fraction":
            return _mean((z > 0).astype(jnp.float32))
        mean = _mean(z)
        return (mean > 0).astype(mean.dtype)

    return jax.tree.map(of_layer, preactivations)


def neuron_gradients(
    loss: Callable[[PyTree], jax.Array], offsets: PyTree, released: bool = False
) -> PyTree:
    """Mean gradient of the loss at every neuron: Neuron-LOBSTER before its momentum.

    `m_n = mean over examples and positions of d loss_i / d z_n`, with the loss of every
    example. It is the gradient of the neuron's bias over the number of positions. The
    absolute value comes last, after a momentum of 0.9, `optax.trace(0.9)`; so signs
    that differ between examples cancel, and a neuron that half of them want up and half
    of them down looks insensitive. Released with SeReNe (arXiv 2102.03773).

    Args:
      loss: offsets -> float[], the *mean* over the batch, with the offsets added to the
        pre-activations.
      offsets: zeros float[batch, ..., neurons], by layer.
      released: divide by the size of the batch once more, as was published.

    Returns:
      `float[neurons]` with signs, in place of every offset.

    >>> x = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
    >>> def loss(offsets):
    ...     return jnp.mean(x * (x + offsets["dense"]))
    >>> neuron_gradients(loss, {"dense": jnp.zeros((2, 2))})["dense"].tolist()
    [0.0, 0.5]
    """
    check_function("loss", loss, "offsets", "lambda offsets: ...")

    def of_layer(slope: jax.Array) -> jax.Array:
        # The slope of a mean over the batch holds 1 / batch already.
        return _mean(slope) * (1 if released else len(slope))

    return jax.tree.map(of_layer, jax.grad(loss)(offsets))


def _pullback(outputs: Outputs, at: PyTree, chunk: int) -> tuple[jax.Array, Any]:
    """Logits, and what takes their cotangent to that of the one argument."""
    check_function("outputs", outputs, "params", "lambda params: ...")
    check_whole("chunk", chunk, least=1)
    logits, pullback = jax.vjp(outputs, at)
    if getattr(logits, "ndim", 0) != 2:
        raise ValueError(
            "expected outputs float[batch, classes], got "
            f"{jax.tree.map(jnp.shape, logits)}; return the logits alone"
        )
    return logits, lambda cotangent: pullback(cotangent)[0]


def _mean_over_classes(
    of_class: Callable[[jax.Array], PyTree], logits: jax.Array, chunk: int
) -> PyTree:
    """The mean of what each of the one-hot directions gives, some of them at once."""
    classes = logits.shape[-1]
    chunk = min(chunk, classes)
    # Directions of 0 fill the last chunk and add nothing.
    rows = math.ceil(classes / chunk) * chunk
    directions = jnp.eye(rows, classes, dtype=logits.dtype).reshape(-1, chunk, classes)

    def of_chunk(directions: jax.Array) -> PyTree:
        found = jax.vmap(of_class)(directions)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0) / classes, found)

    # Not in a scan where one chunk is all: there a CPU has no fast convolutions.
    total = of_chunk(directions[0])
    if len(directions) == 1:
        return total

    def add(total: PyTree, directions: jax.Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, of_chunk(directions)), None

    return jax.lax.scan(add, total, directions[1:])[0]


def _mean(activations: jax.Array) -> jax.Array:
    """float[neurons], over all other axes."""
    wide = widen(activations)
    return jnp.mean(wide, axis=tuple(range(wide.ndim - 1)))


def _check_offsets(offsets: PyTree, batch: int) -> None:
    for offset in jax.tree.leaves(offsets):
        if offset.ndim < 2 or len(offset) != batch:
            raise ValueError(
                f"expected offsets float[{batch}, ..., neurons], one of every example, "
                f"got shape {offset.shape}"
            )
