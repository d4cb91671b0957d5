"""What a seed trains on and is measured on."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from d2sparse import data, train
from d2sparse.train import Data
from experiments.task import TaskConfig, check_least

OUTSIDE_SIZE = 5000
MONITOR_SIZE = 1000


@dataclasses.dataclass(frozen=True)
class Splits:
    """What one seed trains on and is measured on.

    Attributes:
      train: the labels that training may use.
      judge: where the table's numbers come from: the official test set, or the
        validation part of the labels.
      outside: training images outside of the budget, which learning curves and choices
        of design look at; None where there are none.
    """

    train: Data
    judge: Data
    outside: Data | None

    @functools.cached_property
    def monitor(self) -> Data | None:
        """The part of `outside` that is looked at in training."""
        if self.outside is None:
            return None
        images, labels = self.outside.images, self.outside.labels
        return self.outside._replace(
            images=images[:MONITOR_SIZE], labels=labels[:MONITOR_SIZE]
        )


def draw_splits(config: TaskConfig, source: data.Source, seed: int) -> Splits:
    """The budget of a seed, which does not depend on the method.

    Labels are made wrong in training alone: what is judged keeps its own.
    """
    labels = source.train.labels
    check_least(config, {"imbalance": 1})
    size = config.samples_per_class
    if config.imbalance > 1:
        chosen = data.long_tailed(labels, size, config.imbalance, seed)
    else:
        chosen = data.budget(labels, size, seed)
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    rest = np.random.default_rng(seed).permutation(rest)[:OUTSIDE_SIZE]

    def pick(indices: np.ndarray, like: Data | None = None) -> Data:
        images = source.train.images[indices]
        return train.to_device(data.Split(images, labels[indices]), like)

    if config.validation_fraction:
        chosen, held_out = data.holdout(
            labels, chosen, config.validation_fraction, seed
        )
        training = pick(chosen)
        judge = pick(held_out, training)
    else:
        training = pick(chosen)
        judge = train.to_device(source.test, training)
    outside = pick(rest, training) if len(rest) else None
    noisy = data.noisy_labels(
        labels[chosen], config.label_noise, source.num_classes, seed
    )
    return Splits(training._replace(labels=jnp.asarray(noisy)), judge, outside)
