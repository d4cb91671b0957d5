"""A network that learns from labels and from trained networks that stay as they are.

Its teachers travel in the model state, so a checkpoint holds them, several runs stack,
and one compiled step serves teachers of all seeds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from d2sparse.models import Model
from d2sparse.scores.local import widen
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


def log_mean(logits: Sequence[jax.Array]) -> jax.Array:
    """The logarithm of the mean of the probabilities."""
    each = jnp.stack([jax.nn.log_softmax(widen(z)) for z in logits])
    return jax.nn.logsumexp(each, axis=0) - jnp.log(len(logits))
