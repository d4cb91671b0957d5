"""From flags to runs: methods x values of flags x seeds, and the training of each."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from d2sparse import data, models
from d2sparse.constraints import METHODS
from d2sparse.data import steps_per_epoch
from d2sparse.schedules import refresh_interval, refresh_stop
from d2sparse.study.config import Config, with_flags
from d2sparse.train import Data, Recipe, Training, constrain, plain
from d2sparse.tree import Prunable, is_kernel


class Row(NamedTuple):
    """A method with values of flags: what a row of a table is about.

    Attributes:
      method: a name of METHODS.
      values: of the axes, by flag.
    """

    method: str
    values: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """A name for its files, such as "rigl-sparsity0.9"; nothing parses it."""
        axes = "".join(f"-{flag}{_text(value)}" for flag, value in self.values)
        return f"{self.method}{axes}"


def list_rows(config: Config) -> list[Row]:
    """Every method with every combination of the values of the axes."""
    axes = [[(flag, value) for value in values] for flag, values in config.axes.items()]
    rows = itertools.product(config.methods, *axes)
    return [Row(method, tuple(values)) for method, *values in rows]


def configure(config: Config, row: Row) -> Config:
    """The flags of a row: those given, those its method sets, those of the axes.

    A flag of an axis wins over one that the method sets.
    """
    sets: dict[str, Any] = {}
    for name in (row.method, *config.with_):
        sets |= METHODS[name].sets
    return with_flags(config, sets | dict(row.values))


def make_training(config: Config, like: Data, classes: int) -> Training:
    """The training of a row whose flags are known.

    Args:
      config: from `configure`, with one method.
      like: training data of one seed; all seeds have data of the same shapes.
      classes: number of classes.

    Raises:
      ValueError: a flag is out of its range, or two constraints claim the same thing.
    """
    own, size = config.training, len(like.labels)
    stop = refresh_stop(own.steps)
    options = config.options
    interval = options.refresh_interval or refresh_interval(size, own.batch_size, stop)
    epoch = steps_per_epoch(size, own.batch_size)
    options = dataclasses.replace(
        options,
        refresh_interval=interval,
        horizon=options.horizon or max(round(own.steps / 6), epoch),
    )
    model = models.make_model(config.network.model, classes, config.network.width)
    recipe = Recipe(
        steps=own.steps,
        batch_size=own.batch_size,
        optimizer=own.optimizer,
        learning_rate=own.learning_rate,
        schedule=own.schedule,
        momentum=own.momentum,
        weight_decay=own.weight_decay,
        sharpness=own.sharpness,
        label_smoothing=own.label_smoothing,
        augment=data.make_augment(
            padding=config.data.shift,
            flip=config.data.flip,
            cutout=config.data.cutout,
            jitter=config.data.jitter,
        ),
        prunable=_prunable(config),
    )
    (method,) = config.methods
    constraints = [
        constraint
        for name in (method, *config.with_)
        for constraint in METHODS[name].constraints(options)
    ]
    return constrain(plain(model, like, recipe), *constraints)


def program_key(config: Config, row: Row, free: Mapping[str, Any]) -> Any:
    """What rows have to share to be trained by one program: all but free settings."""
    fixed = tuple(pair for pair in row.values if pair[0] not in free)
    return row.method, fixed


def _prunable(config: Config) -> Prunable:
    del config
    return is_kernel


def _text(value: Any) -> str:
    return (
        repr(float(value)).removesuffix(".0")
        if isinstance(value, float)
        else str(value)
    )
