"""The flags of a comparison, one dataclass a group; their names are distinct."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, get_args

from d2sparse import data
from d2sparse.checks import check_choice, check_least
from d2sparse.constraints import METHODS, MIXES, Options

# Type checkers ask for literals that are written out; the names stand in the tables.
MethodName = Literal[*METHODS]  # type: ignore[valid-type]
MixName = Literal[*MIXES]  # type: ignore[valid-type]
PrunableName = Literal["kernels", "convolutions", "body"]
OptimizerName = Literal["sgd", "sgdw", "adamw"]
ScheduleName = Literal["cosine", "step", "constant"]


def aside(default: Any) -> Any:
    """A flag that does not tell one comparison from another."""
    return dataclasses.field(default=default, compare=False)


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """Data."""

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
    """Network."""

    model: str = "lenet_300_100"  # network, by its name in d2sparse.models
    width: float | None = None  # width, in the model's own unit; None: its default
    # What may be pruned; body is all kernels but those of the first layer and the head.
    prunable: PrunableName = "kernels"
    # Directory of a ticket that `experiments.lottery` has saved: single networks start
    # from its weights and masks.
    ticket: str = ""


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
    """Training."""

    steps: int = 1000  # optimiser steps of one training
    # Passes over the labels in one training, in place of --steps; 0: by --steps.
    epochs: float = 0.0
    batch_size: int = 32  # examples per step
    # sgd adds the weight decay to the gradient, sgdw and adamw to the step.
    optimizer: OptimizerName = "sgd"
    learning_rate: float = 0.1  # at the first step
    # Learning-rate schedule; cosine falls to 0 at the last step, step to a tenth after
    # 40 % and a hundredth after 80 % of them.
    schedule: ScheduleName = "cosine"
    momentum: float = 0.9  # of sgd; the first moment's decay in adamw
    weight_decay: float = 5e-4  # on live kernels
    sharpness: float = 0.0  # radius of sharpness-aware minimisation; 0: none
    label_smoothing: float = 0.0  # in the loss of every method
    # On a non-finite update: stop the run or skip the update.
    on_nonfinite: Literal["stop", "skip"] = "stop"


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """Runs."""

    seeds: int = 5  # runs of every method: labels, weights and order differ
    report_every: int = 100  # steps between two measurements
    # Steps between two checkpoints; 0: once a minute. A signal saves one as well.
    checkpoint_every: int = aside(0)
    # How many of the latest checkpoints of a run are kept, besides its best.
    keep_checkpoints: int = aside(2)
    # Runs of one method that are trained as one program; 0: as many as fit into the
    # memory of an accelerator, and programs of one on CPU, where that is faster.
    runs_at_once: int = aside(0)
    # Runs, or programs of several, that are trained side by side on CPU; 0: one for
    # every core, at most 4. It does not change results, but for their seconds.
    workers: int = aside(0)
    # Devices that share every batch; 0: all of them.
    data_parallel: int = aside(1)
    # Several processes of one run: "auto" on a cluster that jax knows, or
    # HOST:PORT,COUNT,INDEX, with the host of process 0. They share the workdir.
    distributed: str = aside("")
    workdir: str = aside("")  # run directory; empty: one of its own for every command
    progress: bool = aside(True)  # live display
    dry_run: bool = aside(False)  # print the runs and what they cost, and stop


@dataclasses.dataclass(frozen=True)
class Config(RunFlags, Options, TrainingFlags, NetworkFlags, DataFlags):
    """Comparison.

    Methods, values of flags, and seeds.

    Attributes:
      HIDDEN: flags that an experiment does not list, since it would always refuse them.
    """

    HIDDEN: ClassVar[tuple[str, ...]] = ()

    # What to compare: rows of `d2sparse.constraints.METHODS`.
    methods: tuple[MethodName, ...] = ("dense", "static", "rigl")
    # Constraints that every method is put under as well.
    with_: tuple[MixName, ...] = ()
    # Values to compare by flag; several flags make a grid. On the command line a flag
    # with several values, such as --sparsity=0.8,0.9, is such an axis.
    axes: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses values out of their ranges.

        Raises:
          ValueError: naming the flag.
        """
        super().__post_init__()
        # Steps have no effect beside epochs.
        check_least(self, _LEAST | ({"steps": 0} if self.epochs else {}))
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in _PARTS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"expected {name} in [0, 1], got {getattr(self, name)}"
                )
        check_names("with", self.with_, MIXES)
        self._check_axes()

    def count_steps(self, labels: Any) -> int:
        """Optimiser steps of one training on these labels.

        >>> Config(epochs=1.5, batch_size=4).count_steps([0] * 8)
        3
        """
        if not self.epochs:
            return self.steps
        epoch = data.steps_per_epoch(len(labels), self.batch_size)
        return max(round(self.epochs * epoch), 1)

    def _check_axes(self) -> None:
        known = {field.name for field in dataclasses.fields(self)}
        for name, values in self.axes.items():
            check_choice("axes", name, sorted(known - {"axes"}))
            if len(values) != len(dict.fromkeys(values)) or not values:
                raise ValueError(
                    f"expected different values of {name}, got {list(values)}"
                )
            for value in values:
                dataclasses.replace(self, axes={}, **{name: value})


ConfigT = TypeVar("ConfigT", bound=Config)
OptionsT = TypeVar("OptionsT")
_LEAST = {
    "samples_per_class": 0,
    "imbalance": 1,
    "seeds": 1,
    "steps": 1,
    "epochs": 0,
    "batch_size": 1,
    "report_every": 1,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
    "data_parallel": 0,
    "runs_at_once": 0,
    "workers": 0,
    "learning_rate": 0,
    "momentum": 0,
    "weight_decay": 0,
    "sharpness": 0,
}
_PARTS = ("label_smoothing", "label_noise", "validation_fraction")
_CHOICES = {
    "prunable": get_args(PrunableName),
    "optimizer": get_args(OptimizerName),
    "schedule": get_args(ScheduleName),
    "on_nonfinite": ("stop", "skip"),
}


def check_names(flag: str, names: tuple[str, ...], known: Iterable[str]) -> None:
    """Refuses names that are unknown or stand there twice, and no methods at all.

    Raises:
      ValueError: naming the flag and the names that there are.
    """
    for name in names:
        check_choice(flag, name, known)
    if len(set(names)) < len(names) or (flag == "methods" and not names):
        raise ValueError(
            f"expected different {flag} of {', '.join(known)}, got "
            f"{', '.join(names) or 'none'}"
        )


def given(config: Any) -> dict[str, Any]:
    """The flags that differ from their defaults, with their values."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is not dataclasses.MISSING and value != field.default:
            values[field.name] = value
    return values


def options_of(kind: type[OptionsT], flags: Any) -> OptionsT:
    """The options of a kind among flags, by their names.

    >>> options_of(DataFlags, Config(shift=3)).shift
    3
    """
    fields: Any = kind
    names = [field.name for field in dataclasses.fields(fields)]
    return kind(**{name: getattr(flags, name) for name in names})


def refuse(config: Any, reasons: Mapping[str, str]) -> None:
    """Refuses flags that have no meaning in an experiment.

    Args:
      config: the flags.
      reasons: why, by flag.

    Raises:
      ValueError: naming the first that is given, or an axis, and why it has none.
    """
    values = {**given(config), **config.axes}
    for name, reason in reasons.items():
        if name in values:
            raise ValueError(
                f"expected no --{name}, since {reason}, got {values[name]}"
            )


def as_axes(config: ConfigT, names: Iterable[str]) -> ConfigT:
    """The flags with axes of one value in place of single values.

    Runs store the values of axes, so that they can join others in one directory.

    >>> config = as_axes(Config(label_noise=0.2), ["label_noise"])
    >>> dict(config.axes), config.label_noise
    ({'label_noise': (0.2,)}, 0.0)
    """
    single = [name for name in names if name not in config.axes]
    axes = {name: (getattr(config, name),) for name in single}
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    reset: dict[str, Any] = {name: defaults[name] for name in single}
    return dataclasses.replace(config, axes={**config.axes, **axes}, **reset)


def text_of(value: Any) -> str:
    """The shortest text that tells a value from all others, for names.

    >>> text_of(0.9), text_of(2.0), text_of(0.123456789), text_of(50)
    ('0.9', '2', '0.123456789', '50')
    """
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value)
