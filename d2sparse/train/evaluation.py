"""What a trained network predicts, and how good that is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import metrics
from d2sparse.data import Augment, batch_indices
from d2sparse.models import Model
from d2sparse.scores.local import widen
from d2sparse.train.state import Data, inputs, take
from d2sparse.tree import PyTree

_BATCHES = 100  # That statistics are taken from.


def make_predict(model: Model, batch_size: int = 512) -> Callable[..., np.ndarray]:
    """Class probabilities of a data set in evaluation mode.

    Args:
      model: the network.
      batch_size: examples per forward pass, at most; the last pass is filled up, and
        smaller sets to a power of two, so that sets that grow compile a few programs.

    Returns:
      `(params, model_state, data) -> float32[n, classes]`, on the host; float64 where
      the logits are. Logits of half precision are widened first. It raises a ValueError
      where there are no data.
    """

    @jax.jit
    def forward(params: PyTree, model_state: PyTree, batch: Data) -> jax.Array:
        logits, _ = model.apply(params, model_state, inputs(batch), train=False)
        return jax.nn.softmax(widen(logits))

    def predict(params: PyTree, model_state: PyTree, data: Data) -> np.ndarray:
        size = len(data.labels)
        if not size:
            raise ValueError("expected at least one example to predict, got none")
        width = min(batch_size, 1 << (size - 1).bit_length())
        passes = -(-size // width)
        rows = np.arange(passes * width).reshape(passes, width) % size
        outputs = [
            forward(params, model_state, take(data, jnp.asarray(row))) for row in rows
        ]
        return np.concatenate(jax.device_get(outputs))[:size]

    return predict


def make_statistics(
    model: Model, augment: Augment | None = None, batch_size: int = 128
) -> Callable[..., PyTree]:
    """What normalisations need to know of other weights than those they were met with.

    An average or a merger of networks has statistics of its own. They are taken as in
    training, from 100 batches drawn at random, after which 0.003 % is left of what was
    there before at the usual momentum of 0.9. They are kept in the type that the model
    keeps them in; Flax takes means of batches, and keeps statistics, in float32 also
    where a network computes in half precision.

    Args:
      model: the network.
      augment: `(key, images) -> images`, that of training.
      batch_size: examples per forward pass; at most all of them.

    Returns:
      `(params, model_state, data, key) -> model_state`. A state that is empty comes
      back as it is.
    """

    @jax.jit
    def forward(
        params: PyTree, model_state: PyTree, batch: Data, key: jax.Array
    ) -> PyTree:
        x = inputs(batch) if augment is None else augment(key, inputs(batch))
        return model.apply(params, model_state, x, train=True)[1]

    def statistics(
        params: PyTree, model_state: PyTree, data: Data, key: jax.Array
    ) -> PyTree:
        if not jax.tree.leaves(model_state):
            return model_state
        rows = batch_indices(key, 0, _BATCHES, len(data.labels), batch_size)
        for number, row in enumerate(rows):
            own = jax.random.fold_in(key, number)
            model_state = forward(params, model_state, take(data, row), own)
        return model_state

    return statistics


def evaluate(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, likelihood, Brier score and calibration error over a whole set.

    Examples are counted exactly, other sums are float32, see `d2sparse.metrics`.

    Args:
      probabilities: float[n, classes].
      labels: int[n].

    >>> scores = evaluate(np.array([[0.75, 0.25]]), np.array([0]))
    >>> {name: round(value, 3) for name, value in scores.items()}
    {'accuracy': 1.0, 'nll': 0.288, 'brier': 0.125, 'ece': 0.25}
    """
    measures = {
        "accuracy": metrics.accuracy,
        "nll": metrics.nll,
        "brier": metrics.brier,
        "ece": metrics.ece,
    }
    return {
        name: float(f(jnp.asarray(probabilities), jnp.asarray(labels)))
        for name, f in measures.items()
    }
