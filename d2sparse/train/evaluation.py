"""How good what a trained network predicts is."""

import jax.numpy as jnp
import numpy as np

from d2sparse import metrics


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
