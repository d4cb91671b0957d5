"""The flags that every comparison has, in groups; all names are distinct."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from d2sparse.constraints import METHODS, Options

PrunableName = Literal["kernels", "convolutions", "body"]


def _aside(default: Any) -> Any:
    """A flag that does not tell one comparison from another."""
    return dataclasses.field(default=default, compare=False)


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """Data: what is learned from."""

    dataset: str = "digits"  # "digits", or any TFDS image classification set
    data_dir: str | None = None  # directory of prepared TFDS sets
    samples_per_class: int = 10  # training labels of every class; 0 for all
    # Long tail: how many times more labels the largest class has, which has those of
    # --samples_per_class, than the smallest; 1: all have as many.
    imbalance: float = 1.0
    label_noise: float = 0.0  # part of the training labels that are wrong
    # Part of the labels to validate on. Above 0 the table shows validation accuracy
    # and the test set is not read: choose settings this way.
    validation_fraction: float = 0.0
    shift: int = 1  # augmentation: random crop after padding by so many pixels
    flip: bool = False  # augmentation: mirror left and right
    cutout: int = 0  # augmentation: side of an erased square, in pixels
    jitter: float = 0.0  # augmentation: strength of colour jitter


@dataclasses.dataclass(frozen=True)
class NetworkFlags:
    """Network: what learns."""

    model: str = "lenet_300_100"  # network, by its name in d2sparse.models
    width: float | None = None  # width, in the model's own unit; None: its default
    prunable: PrunableName = "kernels"  # body leaves the first layer and the head dense


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
    """Training: how the weights move."""

    steps: int = 1000  # optimiser steps of one training
    batch_size: int = 32  # examples per step
    # sgd adds the weight decay to the gradient, sgdw and adamw to the step.
    optimizer: Literal["sgd", "sgdw", "adamw"] = "sgd"
    learning_rate: float = 0.1  # at the first step
    # Learning-rate schedule: cosine falls to 0 at the last step.
    schedule: Literal["cosine", "constant"] = "cosine"
    momentum: float = 0.9  # of sgd; the first moment's decay in adamw
    weight_decay: float = 5e-4  # on live kernels
    sharpness: float = 0.0  # radius of sharpness-aware minimisation; 0: none
    label_smoothing: float = 0.0  # in the loss of every method
    # On a non-finite update: stop the run, or skip the update.
    on_nonfinite: Literal["stop", "skip"] = "stop"


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """Run: how often, where, and what is shown."""

    seeds: int = 5  # runs of every method: labels, weights and order differ
    report_every: int = 100  # steps between two measurements
    # Steps between two checkpoints; 0: once a minute. A signal saves one as well.
    checkpoint_every: int = _aside(0)
    keep_checkpoints: int = _aside(2)  # latest checkpoints of a run that are kept
    # Runs of one method that are trained as one program; 0: as many as fit into the
    # memory of an accelerator, and one after another on CPU, where that is faster.
    runs_at_once: int = _aside(0)
    workdir: str = _aside("")  # run directory; empty: one of its own for every command
    progress: bool = _aside(True)  # live display
    dry_run: bool = _aside(False)  # print the runs and what they cost, and stop


@dataclasses.dataclass(frozen=True)
class Config:
    """A comparison: methods x values of flags x seeds.

    Attributes:
      methods: rows of METHODS.
      with_: rows whose constraints every method is put under as well.
      axes: values by flag; several flags make a grid.
    """

    methods: tuple[str, ...] = ("dense", "static", "rigl")  # what to compare
    with_: tuple[str, ...] = ()  # methods whose constraints are added to each of them
    data: DataFlags = DataFlags()
    network: NetworkFlags = NetworkFlags()
    training: TrainingFlags = TrainingFlags()
    options: Options = Options()
    run: RunFlags = RunFlags()
    axes: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses unknown methods and flags."""
        for name in (*self.methods, *self.with_):
            if name not in METHODS:
                raise ValueError(
                    f"expected a method of {', '.join(METHODS)}, got {name!r}"
                )
        if not self.methods:
            raise ValueError(f"expected methods of {', '.join(METHODS)}, got none")
        if unknown := self.axes.keys() - flags(self).keys():
            raise ValueError(
                f"expected flags of {', '.join(flags(self))}, got {sorted(unknown)}"
            )


GROUPS = ("data", "network", "training", "options", "run")


def flags(config: Config) -> dict[str, Any]:
    """The values of all grouped flags by name."""
    return {
        field.name: getattr(getattr(config, group), field.name)
        for group in GROUPS
        for field in dataclasses.fields(getattr(config, group))
    }


def with_flags(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values of some flags.

    >>> with_flags(Config(), {"steps": 5, "sparsity": 0.9}).options.sparsity
    0.9

    Raises:
      ValueError: a flag is unknown, or its value is out of its range.
    """
    if unknown := values.keys() - flags(config).keys():
        raise ValueError(
            f"expected flags of {', '.join(flags(config))}, got {sorted(unknown)}"
        )
    changed = {}
    for name in GROUPS:
        group = getattr(config, name)
        known = {field.name for field in dataclasses.fields(group)}
        own = {key: value for key, value in values.items() if key in known}
        if own:
            changed[name] = dataclasses.replace(group, **own)
    return dataclasses.replace(config, **changed)
