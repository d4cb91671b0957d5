"""A network that learns from labels and from trained networks that stay as they are.

Its teachers travel in the model state, so a checkpoint holds them, several runs stack,
and one compiled step serves teachers of all seeds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from d2sparse import losses, metrics
from d2sparse.data import Augment
from d2sparse.models import Model
from d2sparse.scores.local import widen
from d2sparse.train.state import Data, Metrics, inputs
from d2sparse.train.steps import Loss
from d2sparse.tree import PyTree


class Teacher(NamedTuple):
    """A trained network.

    Attributes:
      params: its parameters.
      model_state: what its forward pass carries.
    """

    params: PyTree
    model_state: PyTree


class Taught(NamedTuple):
    """Model state of a student.

    Attributes:
      own: what the student's forward pass changes.
      teachers: what it learns from, never changed.
    """

    own: PyTree
    teachers: tuple[Teacher, ...]


def with_teachers(model: Model, number: int = 1) -> Model:
    """A network whose model state is `Taught`; it predicts as it does without.

    Args:
      model: the student; its teachers are networks of the same kind.
      number: of teachers, at least 1; they are zeros until they are replaced.

    Raises:
      ValueError: there is no teacher.
    """
    if number < 1:
        raise ValueError(f"expected at least 1 teacher, got {number}")

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, Taught]:
        params, own = model.init(key, x)

        def nobody() -> Teacher:
            return Teacher(*jax.tree.map(jnp.zeros_like, (params, own)))

        return params, Taught(own, tuple(nobody() for _ in range(number)))

    def apply(
        params: PyTree, model_state: Taught, x: jax.Array, *, train: bool
    ) -> tuple[jax.Array, Taught]:
        logits, own = model.apply(params, model_state.own, x, train=train)
        return logits, model_state._replace(own=own)

    return Model(init, apply)


def make_taught_loss(
    model: Model,
    augment: Augment | None = None,
    smoothing: float = 0.0,
    weight: float = 1.0,
    temperature: float = 1.0,
) -> Loss:
    """Mean cross-entropy of a student, and its divergence from what its teachers say.

    `CE(z, y) + weight tau^2 KL(q || softmax(z / tau))` with q the mean of the teachers'
    probabilities, softened: `softmax(log(mean_t p_t) / tau)`. Teachers see the
    images that the student sees, in evaluation mode. With one teacher of the student's
    own kind and size it is a born-again network (Furlanello et al., arXiv 1805.04770).

    Args:
      model: the student, without `with_teachers`.
      augment: `(key, images) -> images`, applied to standardised images.
      smoothing: label smoothing in [0, 1).
      weight: of the teaching, at least 0.
      temperature: tau, above 0.

    Returns:
      A loss for the states of `with_teachers(model)`.

    Raises:
      ValueError: the weight or the temperature is out of its range.
    """
    if not weight >= 0 or not temperature > 0:
        raise ValueError(
            "expected a weight of at least 0 and a temperature above 0, got "
            f"weight={weight}, temperature={temperature}"
        )

    def loss(
        params: PyTree, model_state: Taught, batch: Data, key: jax.Array
    ) -> tuple[jax.Array, tuple[Taught, Metrics]]:
        x = inputs(batch) if augment is None else augment(key, inputs(batch))
        logits, own = model.apply(params, model_state.own, x, train=True)
        said = log_mean(
            [model.apply(*t, x, train=False)[0] for t in model_state.teachers]
        )
        value = jnp.mean(losses.cross_entropy(logits, batch.labels, smoothing))
        taught = jnp.mean(losses.distillation(logits, said, temperature))
        correct = metrics.accuracy(logits, batch.labels)
        logs = {"loss": value, "taught": taught, "train_accuracy": correct}
        return value + weight * taught, (model_state._replace(own=own), logs)

    return loss


def log_mean(logits: Sequence[jax.Array]) -> jax.Array:
    """The logarithm of the mean of the probabilities."""
    each = jnp.stack([jax.nn.log_softmax(widen(z)) for z in logits])
    return jax.nn.logsumexp(each, axis=0) - jnp.log(len(logits))
