"""What is asked of a trained network besides its accuracy on clean images."""

from typing import Any

import jax
import numpy as np

from d2sparse import metrics
from d2sparse.data import CORRUPTIONS
from d2sparse.train import Data, TrainState
from experiments.few_labels.options import LowDataOptions
from experiments.singles import Method
from experiments.splits import Splits
from experiments.units import accuracy

_CHUNK = 1000  # Images that are corrupted at once.


def look_closer(
    method: Method, state: TrainState, splits: Splits, config: LowDataOptions
) -> dict[str, Any]:
    """How it is calibrated, and how accurate it is on other images.

    Args:
      method: what was trained.
      state: its end.
      splits: the data of its seed, to be judged by the test set.
      config: the flags.

    Returns:
      "calibration", as `metrics.calibration` has it; "corrupted", accuracies by name
      and severity, such as "blur-3", every method seeing the same corrupted images; and
      "outside", the accuracy on training images outside of the budget, where there are
      any.
    """
    judge = splits.judge
    probabilities = _headline(method, state, judge)
    corrupted = {
        f"{name}-{severity}": accuracy(
            _headline(method, state, corrupt(judge, name, severity)), judge
        )
        for name in CORRUPTIONS
        for severity in config.severities
    }
    bins = metrics.calibration(probabilities, judge.labels)
    lists = {name: np.asarray(values).tolist() for name, values in bins.items()}
    found = {"calibration": lists, "corrupted": corrupted}
    if (outside := splits.outside) is not None:
        found["outside"] = accuracy(_headline(method, state, outside), outside)
    return found


def corrupt(examples: Data, name: str, severity: int) -> Data:
    """Examples with corrupted images, the same in every call."""
    key = jax.random.fold_in(jax.random.key(severity), list(CORRUPTIONS).index(name))
    parts = [
        CORRUPTIONS[name](
            jax.random.fold_in(key, start),
            examples.images[start : start + _CHUNK],
            severity,
        )
        for start in range(0, len(examples.images), _CHUNK)
    ]
    return examples._replace(images=jax.numpy.concatenate(parts))


def _headline(method: Method, state: TrainState, examples: Data) -> np.ndarray:
    return next(iter(method.predict(state, examples).values()))
