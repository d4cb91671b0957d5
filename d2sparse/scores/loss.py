"""Scores from the derivatives of a loss on data: SNIP, GraSP, Fisher information.

They look at the batches they were made with and not at the gradients of the step. The
loop over batches is one of Python: XLA runs convolutions inside a `scan` without its
threaded kernels on CPU. Under `jit` the program grows with the number of batches.
Parameters of half precision are taken, and scored, in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2sparse.checks import check_function
from d2sparse.scores.local import Score, widen
from d2sparse.tree import PyTree

Batch = tuple[jax.Array, jax.Array]  # Inputs and labels.
Predict = Callable[[PyTree, jax.Array], jax.Array]


def snip(loss: Callable[[PyTree, Any], jax.Array], batches: Sequence[Any]) -> Score:
    """Sensitivity of the loss to removing the weight, `|w * mean_b g_b|`.

    Connection sensitivity at initialisation (Lee et al., arXiv 1810.02340): `saliency`
    on the gradient over all batches. The absolute value comes last, so signs that
    differ between batches cancel.

    Args:
      loss: `loss(params, batch)`, a scalar: the mean over the batch.
      batches: one batch or more, of any form. Every batch weighs the same, so the
        gradient is that of the mean over examples where all are of one size.

    Raises:
      ValueError: there is no batch.

    >>> def loss(params, x):
    ...     return jnp.mean(x @ params["w"])
    >>> score = snip(loss, [jnp.array([[1.0, -4.0]]), jnp.array([[3.0, 2.0]])])
    >>> score({"w": jnp.array([-1.0, 2.0])}, None, None)["w"].tolist()
    [2.0, 2.0]
    """
    check_function("loss", loss, "params, batch", "lambda params, batch: ...")
    batches = _at_least_one(batches)
    gradient = jax.jit(jax.grad(loss))

    def score(
        params: PyTree, grads: PyTree = None, key: jax.Array | None = None
    ) -> PyTree:
        del grads, key
        params = widen(params)
        total = _sum(lambda batch: gradient(params, batch), batches)
        return jax.tree.map(lambda w, g: jnp.abs(w * g / len(batches)), params, total)

    return score


def grasp(
    predict: Predict,
    batches: Sequence[Batch],
    temperature: float | jax.Array = 200.0,
    gradient_batches: Sequence[Batch] | None = None,
) -> Score:
    """Gradient flow that would be lost with the weight, `w * (H g)`.

    Setting a weight to 0 changes `|g|^2 / 2` by `-w * (H g)` to first order, where `g`
    and `H` are the gradient and the Hessian of the cross entropy of
    `logits / temperature`. What raises it most goes first: gradient signal preservation
    at initialisation (Wang et al., arXiv 2002.07376). The score has a sign.

    The Hessian is never formed: `H g` is one forward derivative of the gradient, along
    `g` as a constant.

    Args:
      predict: `predict(params, x)`, logits float[batch, classes].
      batches: one or more pairs of inputs [batch, ...] and labels int[batch]; every
        example weighs the same.
      temperature: positive; larger flattens the predictions. May be traced.
      gradient_batches: batches of `g`, if it shall come from other data than `H`.

    Raises:
      ValueError: there is no batch, or one is no pair.

    >>> def predict(params, x):
    ...     return x @ params["kernel"]
    >>> score = grasp(predict, [(jnp.eye(2), jnp.array([0, 1]))], temperature=1.0)
    >>> ranks = score({"kernel": jnp.array([[1.0, -1.0], [0.0, 0.0]])}, None, None)
    >>> [round(float(x), 4) for x in ranks["kernel"][0]]
    [-0.0063, -0.0063]
    """
    check_function("predict", predict, "params, x", "model.apply")
    batches = _pairs(batches)
    first = batches if gradient_batches is None else _pairs(gradient_batches)

    def loss(params: PyTree, batch: Batch) -> jax.Array:
        x, labels = batch
        logits = predict(params, x) / temperature
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses)

    gradient = jax.jit(jax.grad(loss))

    @jax.jit
    def hessian_product(params: PyTree, along: PyTree, batch: Batch) -> PyTree:
        return jax.jvp(lambda p: jax.grad(loss)(p, batch), (params,), (along,))[1]

    def score(
        params: PyTree, grads: PyTree = None, key: jax.Array | None = None
    ) -> PyTree:
        del grads, key
        params = widen(params)
        g = _mean(lambda batch: gradient(params, batch), first)
        product = _mean(lambda batch: hessian_product(params, g, batch), batches)
        return jax.tree.map(jnp.multiply, params, product)

    return score


def fisher(predict: Predict, batches: Sequence[Batch], empirical: bool = True) -> Score:
    """Second-order rise of the loss when the weight is set to 0, `w^2 * F / 2`.

    `F = mean_i (d log p(y_i | x_i) / dw)^2`, the diagonal of the Fisher information,
    stands in for the diagonal of the Hessian of the negative log likelihood, whose
    first order is taken for 0, as at a minimum: Fisher pruning (Theis et al.,
    arXiv 1801.05787).

    The gradient of every example is squared by itself: the square of a batch's gradient
    is another quantity. A batch is held in memory with one gradient, of the size of the
    parameters, per example; choose small batches.

    Args:
      predict: `predict(params, x)`, logits float[batch, classes]; an example's logits
        may not depend on the rest of the batch.
      batches: one or more pairs of inputs [batch, ...] and labels int[batch]; every
        example weighs the same.
      empirical: labels are those given; if not, the mean is over the labels as the
        model itself predicts them, exactly, at the cost of one gradient per class (a
        loop, in which convolutions are slow on CPU).

    Raises:
      ValueError: there is no batch, or one is no pair.

    >>> def predict(params, x):
    ...     return x @ params["kernel"]
    >>> score = fisher(predict, [(jnp.eye(2), jnp.array([0, 1]))])
    >>> score({"kernel": jnp.array([[4.0, 4.0], [0.0, 0.0]])}, None, None)["kernel"]
    Array([[1., 1.],
           [0., 0.]], dtype=float32)
    """
    check_function("predict", predict, "params, x", "model.apply")
    batches = _pairs(batches)

    def log_likelihood(params: PyTree, x: jax.Array, label: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(predict(params, x[None])[0])[label]

    def of_label(params: PyTree, x: jax.Array, label: jax.Array) -> PyTree:
        return jax.tree.map(jnp.square, jax.grad(log_likelihood)(params, x, label))

    def of_model(params: PyTree, x: jax.Array, label: jax.Array) -> PyTree:
        del label
        p = jax.nn.softmax(predict(params, x[None])[0])

        def add(c: jax.Array, total: PyTree) -> PyTree:
            return jax.tree.map(
                lambda t, f: t + p[c] * f, total, of_label(params, x, c)
            )

        return jax.lax.fori_loop(0, p.size, add, jax.tree.map(jnp.zeros_like, params))

    @jax.jit
    def information(params: PyTree, batch: Batch) -> PyTree:
        of_example = of_label if empirical else of_model
        each = jax.vmap(of_example, in_axes=(None, 0, 0))(params, *batch)
        return jax.tree.map(lambda f: jnp.sum(f, axis=0), each)

    def score(
        params: PyTree, grads: PyTree = None, key: jax.Array | None = None
    ) -> PyTree:
        del grads, key
        params = widen(params)
        diagonal = _mean(lambda batch: information(params, batch), batches)
        return jax.tree.map(lambda w, f: w**2 * f / 2, params, diagonal)

    return score


def _sum(f: Callable[[Any], PyTree], batches: Sequence[Any]) -> PyTree:
    first, *others = batches
    total = f(first)
    for batch in others:
        total = jax.tree.map(jnp.add, total, f(batch))
    return total


def _mean(f: Callable[[Batch], PyTree], batches: Sequence[Batch]) -> PyTree:
    """Mean over examples, where `f` is a sum over those of a batch."""
    examples = sum(len(labels) for _, labels in batches)
    return jax.tree.map(lambda total: total / examples, _sum(f, batches))


def _at_least_one(batches: Sequence[Any]) -> tuple[Any, ...]:
    batches = tuple(batches)  # A rule may score many times: an iterator would run dry.
    if not batches:
        raise ValueError("expected at least one batch to score with, got none")
    return batches


def _pairs(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    batches = _at_least_one(batches)
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                "expected a sequence of batches, each a pair (inputs, labels), got a "
                f"batch of type {type(batch).__name__}; pass one batch as [(x, labels)]"
            )
    return tuple((x, labels) for x, labels in batches)
