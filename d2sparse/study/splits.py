"""What a seed trains on and is judged on."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from d2sparse import data, train
from d2sparse.data import Source, Split
from d2sparse.study.flags import DataFlags, options_of
from d2sparse.train import Data

OUTSIDE_SIZE = 5000
MONITOR_SIZE = 1000


@dataclasses.dataclass(frozen=True)
class Splits:
    """What one seed trains on and is judged on.

    Attributes:
      train: the labels that training may use.
      judge: where the table's numbers come from: the official test set, or the
        validation part of the labels.
      outside: training examples outside of the budget, which learning curves and
        choices of design look at; None where there are none.
    """

    train: Data
    judge: Data
    outside: Data | None

    @functools.cached_property
    def monitor(self) -> Data | None:
        """The part of `outside` that is looked at in training."""
        if self.outside is None:
            return None
        return train.take(
            self.outside, jnp.arange(min(MONITOR_SIZE, len(self.outside.labels)))
        )


DrawSplits = Callable[[Any, int], Splits]


def make_draw_splits(source: Source) -> DrawSplits:
    """`(flags, seed) -> splits`, which remembers the last few.

    The budget of a seed does not depend on the method. Labels are made wrong in
    training alone: what is judged keeps its own.
    """

    @functools.lru_cache(maxsize=16)
    def drawn(flags: DataFlags, seed: int) -> Splits:
        return _draw(flags, source, seed)

    def draw_splits(flags: Any, seed: int) -> Splits:
        return drawn(options_of(DataFlags, flags), seed)

    return draw_splits


def _draw(flags: DataFlags, source: Source, seed: int) -> Splits:
    labels = source.train.labels
    if flags.imbalance > 1:
        chosen = data.long_tailed(
            labels, flags.samples_per_class, flags.imbalance, seed
        )
    else:
        chosen = data.budget(labels, flags.samples_per_class, seed)
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    rest = np.random.default_rng(seed).permutation(rest)[:OUTSIDE_SIZE]
    if flags.validation_fraction:
        chosen, held_out = data.holdout(labels, chosen, flags.validation_fraction, seed)
        judge: Split = data.select(source.train, held_out)
    else:
        judge = source.test
    training = data.select(source.train, chosen)
    like = train.to_device(training)
    noisy = data.noisy_labels(
        training.labels, flags.label_noise, source.num_classes, seed
    )
    outside = data.select(source.train, rest)
    return Splits(
        train.to_device(training._replace(labels=noisy), like),
        train.to_device(judge, like),
        train.to_device(outside, like) if len(rest) else None,
    )
