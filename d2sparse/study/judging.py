"""How good a trained network is, how large it is, and what it costs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import metrics, train
from d2sparse.data import CORRUPTIONS
from d2sparse.study.grid import Plan
from d2sparse.study.splits import Splits
from d2sparse.train import Data, Network, Program, Progress, TrainState
from d2sparse.tree import PyTree

_CHUNK = 1000  # Images that are corrupted at once.


def judge(
    plan: Plan, program: Program, state: TrainState, splits: Splits
) -> dict[str, Any]:
    """Quality, size and cost of a trained network.

    Args:
      plan: how it was trained.
      program: of its last phase.
      state: what counts at the end.
      splits: the data of its seed.

    Returns:
      accuracy, nll, brier and ece of the prediction that counts; "accuracy_<name>" of
      every prediction; nonzeros, the numbers stored; zeros, the fraction of zeros among
      the prunable weights; inference_macs, and as a part of the dense network's,
      relative_inference.

    Raises:
      FloatingPointError: predictions are not finite, such as after updates that were
        large, or were skipped.
    """
    outputs = program.predict(state, splits.judge)
    train.check_finite(outputs, "predictions", state)
    training = program.training
    masks = jax.device_get(training.masks(state))
    macs = float(train.forward_macs(training.network, masks.used))
    return {
        **train.evaluate(_headline(outputs), np.asarray(splits.judge.labels)),
        **{
            f"accuracy_{name}": train.accuracy(each, splits.judge)
            for name, each in outputs.items()
        },
        "nonzeros": sum(int(np.sum(m)) for m in jax.tree.leaves(masks.stored)),
        "zeros": zeros(training.network, *masks.used),
        "inference_macs": macs,
        "relative_inference": macs / plan.base.network.dense_macs,
    }


def zeros(network: Network, *masks: PyTree) -> float:
    """Fraction of zeros among the prunable weights of networks under masks."""
    live = sum(train.live_weights(network, masks).values())
    return 1 - live / (len(masks) * network.weights)


def monitor_accuracy(
    program: Program, progress: Progress, splits: Splits
) -> dict[str, float]:
    """Accuracy of a run in training on examples outside of its budget, by name."""
    if splits.monitor is None:
        return {}
    own, state = program.of(int(progress.phase)), progress.state
    if len(program.training.phases) == 1:  # Else the end depends on what phases keep.
        state = program.training.finish(progress, splits.train, program)
    return {"monitor_accuracy": train.accuracy_of(own, state, splits.monitor)}


def calibration(
    program: Program, state: TrainState, splits: Splits
) -> dict[str, list[float]]:
    """Counts, confidences and accuracies by bin, see `metrics.calibration`."""
    probabilities = _headline(program.predict(state, splits.judge))
    bins = metrics.calibration(jnp.asarray(probabilities), splits.judge.labels)
    return {name: np.asarray(values).tolist() for name, values in bins.items()}


def corrupted_accuracies(
    program: Program, state: TrainState, examples: Data, severities: tuple[int, ...]
) -> dict[str, float]:
    """Accuracies on corrupted images by name and severity, such as "blur-3".

    Every method sees the same corrupted images.
    """
    return {
        f"{name}-{severity}": train.accuracy_of(
            program, state, corrupt(examples, name, severity)
        )
        for name in CORRUPTIONS
        for severity in severities
    }


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
    return examples._replace(images=jnp.concatenate(parts))


def _headline(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return next(iter(outputs.values()))
