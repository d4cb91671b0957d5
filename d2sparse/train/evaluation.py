"""How good what a trained network predicts is."""

import jax.numpy as jnp
import numpy as np

from d2sparse import metrics
from d2sparse.metrics.examples import check_labels
from d2sparse.train.program import Program
from d2sparse.train.state import Data, TrainState


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
    arrays = jnp.asarray(probabilities), jnp.asarray(labels)
    return {name: float(f(*arrays)) for name, f in measures.items()}


def accuracy(probabilities: np.ndarray, examples: Data) -> float:
    """Fraction of examples whose label has the largest probability."""
    labels = np.asarray(examples.labels)
    check_labels(probabilities, labels)
    # As `metrics.accuracy`, to the bit; what is on the host needs no program.
    correct = np.count_nonzero(np.argmax(probabilities, axis=-1) == labels)
    return float(np.float32(correct) / np.float32(labels.size))


def accuracy_of(program: Program, state: TrainState, examples: Data) -> float:
    """Accuracy of the prediction that counts, the first of a program."""
    headline, *_ = program.predict(state, examples).values()
    return accuracy(headline, examples)
