"""A part of the training examples that a training holds out to validate itself on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import data as sets
from d2sparse.train import Data, Program, Progress, TrainState, check_finite, take

_take = jax.jit(take)  # At every check, of as many examples.


def split_of(
    state: TrainState, data: Data, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Examples to train and to validate on, drawn per class by the key of the run.

    Args:
      state: of the run, at any step.
      data: all its training examples.
      fraction: of every class that is held out, see `data.holdout`.

    Returns:
      int[n] and int[m], disjoint, together all examples.

    Raises:
      ValueError: a class has a single example.
    """
    labels = np.asarray(data.labels, np.int64).tobytes()
    return _cached(labels, fraction, _seed(state))


def held_out(state: TrainState, data: Data, fraction: float) -> Data:
    """The examples to validate on."""
    return _take(data, jnp.asarray(split_of(state, data, fraction)[1]))


def batches_of(
    fraction: float, batch_size: int, progress: Progress, data: Data, steps: int
) -> np.ndarray:
    """Epochs on the examples that are not held out, in an order of the run's key.

    Args:
      fraction: of every class that is held out.
      batch_size: examples per step; fewer where there are fewer.
      progress: where the training stands.
      data: all training examples.
      steps: number of steps.

    Returns:
      int32[steps, batch], what the batches of a `Phase` are.
    """
    trained, _ = split_of(progress.state, data, fraction)
    start, seed = int(progress.state.step), (_seed(progress.state),)
    size = min(batch_size, len(trained))
    return sets.epoch_batches(trained, start, steps, size, seed)


def validation_loss(program: Program, state: TrainState, held: Data) -> float:
    """Mean negative log-likelihood of held-out examples, of the headline prediction.

    Raises:
      FloatingPointError: predictions are not finite.
    """
    outputs = program.predict(state, held)
    check_finite(outputs, "predictions", state)
    probabilities = next(iter(outputs.values()))
    chosen = probabilities[np.arange(len(probabilities)), np.asarray(held.labels)]
    likely = np.maximum(np.float64(chosen), np.finfo(np.float32).tiny)
    return float(-np.mean(np.log(likely)))


@functools.lru_cache(maxsize=16)
def _cached(labels: bytes, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    known = np.frombuffer(labels, np.int64)
    return sets.holdout(known, np.arange(len(known)), fraction, seed)


def _seed(state: TrainState) -> int:
    words = np.asarray(jax.random.key_data(state.key))
    return int.from_bytes(words.tobytes(), "little")
