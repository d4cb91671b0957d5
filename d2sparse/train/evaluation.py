"""What a trained network predicts, and how good that is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import metrics
from d2sparse.models import Model
from d2sparse.train.state import Data, inputs, take
from d2sparse.tree import PyTree


def make_predict(model: Model, batch_size: int = 512) -> Callable[..., np.ndarray]:
    """Class probabilities of a data set in evaluation mode.

    Args:
      model: the network.
      batch_size: examples per forward pass; the last pass is filled up.

    Returns:
      `(params, model_state, data) -> float[n, classes]`, on the host.
    """

    @jax.jit
    def forward(params: PyTree, model_state: PyTree, batch: Data) -> jax.Array:
        logits, _ = model.apply(params, model_state, inputs(batch), train=False)
        return jax.nn.softmax(logits)

    def predict(params: PyTree, model_state: PyTree, data: Data) -> np.ndarray:
        size = len(data.labels)
        width = min(batch_size, size)
        passes = -(-size // width)
        rows = np.arange(passes * width).reshape(passes, width) % size
        outputs = [
            forward(params, model_state, take(data, jnp.asarray(row))) for row in rows
        ]
        return np.concatenate(jax.device_get(outputs))[:size]

    return predict


def evaluate(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, negative log likelihood and calibration error over a whole set.

    Args:
      probabilities: float[n, classes].
      labels: int[n].

    >>> scores = evaluate(np.array([[0.75, 0.25]]), np.array([0]))
    >>> {name: round(value, 3) for name, value in scores.items()}
    {'accuracy': 1.0, 'nll': 0.288, 'ece': 0.25}
    """
    measures = {"accuracy": metrics.accuracy, "nll": metrics.nll, "ece": metrics.ece}
    return {
        name: float(f(jnp.asarray(probabilities), jnp.asarray(labels)))
        for name, f in measures.items()
    }
