"""From flags to trainings: methods x values of flags, each with a program."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from d2sparse import data, train
from d2sparse.constraints import METHODS, MIXES, Method, Options, StreamOptions
from d2sparse.constraints.equal_costs import Known
from d2sparse.schedules import refresh_interval, refresh_stop
from d2sparse.study.flags import Config, TrainingFlags, check_names, given, text_of
from d2sparse.study.splits import DrawSplits
from d2sparse.study.trainings import (
    MakeModel,
    make_mesh,
    make_prunable,
    make_training,
    mixed,
    named_model,
    rehearse,
)
from d2sparse.train import Data, Network, Program, Training, describe

# Flags that some methods go by and others do not.
_OF_METHODS = {
    field.name
    for options in (Options, StreamOptions)
    for field in dataclasses.fields(options)
} - {field.name for field in dataclasses.fields(TrainingFlags)}


class Row(NamedTuple):
    """What is compared: a method with values of the flags that are axes.

    Attributes:
      method: a name of METHODS.
      values: of the axes that the method goes by, by flag.
    """

    method: str
    values: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """A name for its files, such as "rigl-sparsity0.9"; nothing parses it."""
        return "-".join([self.method, *(f"{k}{text_of(v)}" for k, v in self.values)])


# (row, what is known before its training is made) -> further flags of its runs.
Values = Callable[[Row, Known], Mapping[str, Any]]


class Plan(NamedTuple):
    """How the runs of a row are trained.

    Attributes:
      row: the method and its values.
      config: all flags of these runs.
      training: what they are.
      program: it, compiled; rows that differ in settings alone share one.
      base: the network of all methods and the flags as they are given; costs are
        relative to those of its dense training.
    """

    row: Row
    config: Config
    training: Training
    program: Program
    base: Known

    @property
    def dense_training_macs(self) -> float:
        """Cost of the training of the dense network, per example of a batch."""
        return 3.0 * self.base.steps * self.base.network.dense_macs


def make_plans(
    config: Config,
    draw_splits: DrawSplits,
    classes: int,
    make_model: MakeModel | None = None,
    methods: Mapping[str, Method] = METHODS,
    values: Values = lambda row, base: {},
    starts: Collection[str] = (),
) -> list[Plan]:
    """Every method with every combination of the values of its axes.

    Args:
      config: the flags.
      draw_splits: data of a seed; those of the first one tell shapes and sizes.
      classes: number of classes.
      make_model: flags -> network; that of --model if not given.
      methods: the table of methods.
      values: flags of a row besides those given and those of its axes, such as values
        that were tuned; they are no part of its name.
      starts: flags that only say where runs start: rows that differ in them share a
        program.

    Raises:
      ValueError: a flag is out of its range or has no effect, two constraints claim
        the same thing, or the network or a pattern does not fit the data.
    """
    check_effects(config, methods)
    build = make_model or named_model(classes)
    programs: dict[Any, Program] = {}
    plans = []
    for row in list_rows(config, methods):
        like = draw_splits(with_values(config, row), 0).train
        base = describe_base(config, row, like, build)
        chosen = row._replace(
            values=tuple({**dict(row.values), **values(row, base)}.items())
        )
        flags = configure(config, chosen, base, methods)
        training = make_training(flags, like, build, methods[row.method])
        free = {*training.settings, *starts}
        key = (row.method, *(pair for pair in chosen.values if pair[0] not in free))
        skips = flags.on_nonfinite == "skip"
        if key not in programs:
            mesh = make_mesh(flags, len(like.labels))
            programs[key] = train.make_program(training, mesh, skips)
            rehearse(programs[key], like)
        program = train.starting_as(programs[key], training, skips)
        plans.append(Plan(row, flags, training, program, base))
    return plans


def list_rows(config: Config, methods: Mapping[str, Method] = METHODS) -> list[Row]:
    """Every method with every combination of the values of the axes it goes by."""
    rows = []
    for name in config.methods:
        used = flags_used(mixed(config, methods[name]), config)
        if methods[name].ticket == "keeps" and config.ticket:
            used = used - {"sparsity"}  # Its weights are as many as the ticket's.
        axes = [
            [(flag, value) for value in values]
            for flag, values in config.axes.items()
            if flag in used or flag not in _OF_METHODS
        ]
        rows += [Row(name, values) for values in itertools.product(*axes)]
    return rows


def with_values(config: Config, row: Row) -> Config:
    """The flags with the values of a row, and without axes."""
    return dataclasses.replace(
        config, methods=(row.method,), axes={}, **dict(row.values)
    )


def configure(
    config: Config, row: Row, base: Known, methods: Mapping[str, Method] = METHODS
) -> Config:
    """All flags of a row: those given, those its method sets, those of the axes.

    What a method makes of these, such as the steps at which a dense training costs what
    a sparse one does, comes last.
    """
    sets: dict[str, Any] = {}
    for method in mixed(config, methods[row.method]):
        sets |= method.sets
    made = {flag: value(base) for flag, value in sets.items() if callable(value)}
    return dataclasses.replace(base.flags, **(sets | dict(row.values) | made))


def describe_base(config: Config, row: Row, like: Data, build: MakeModel) -> Known:
    """What is known before the training of a row is made."""
    flags = with_values(config, row)
    size, steps = len(like.labels), flags.count_steps(like.labels)
    if not isinstance(flags, StreamOptions):  # On which they follow from its stages.
        epoch = data.steps_per_epoch(size, flags.batch_size)
        interval = refresh_interval(size, flags.batch_size, refresh_stop(steps))
        flags = dataclasses.replace(
            flags,
            steps=steps,
            epochs=0.0,
            refresh_interval=flags.refresh_interval or interval,
            threshold_interval=flags.threshold_interval or epoch,
            horizon=flags.horizon or max(steps / 6, epoch),
        )

    def resize(width: float) -> Network:
        return describe(build(dataclasses.replace(flags, width=width)), like)

    network = describe(build(flags), like)
    prunable = make_prunable(flags.prunable, network, like.images.shape[1:])
    return Known(flags, network._replace(prunable=prunable), size, resize, steps)


def flags_used(rows: Iterable[Method], options: Options) -> set[str]:
    """The options that methods go by: those that are read to build them, or set."""
    used: set[str] = set()
    for row in rows:
        sets = {k: v for k, v in row.sets.items() if not callable(v)}
        known = {k: v for k, v in sets.items() if hasattr(options, k)}
        recorder = _Recorder(dataclasses.replace(options, **known))
        row.constraints(recorder)
        made = row.sets.keys() - sets.keys()  # From what a sparse network costs.
        used |= (recorder.read - made) | sets.keys()
        if made:
            used.add("sparsity")
    return used


def unread_options(names: Iterable[str]) -> tuple[str, ...]:
    """The options that none of some methods of METHODS goes by, nor what they mix."""
    rows = [*(METHODS[name] for name in names), *MIXES.values()]
    read: set[str] = set()
    for options in (Options(), Options(pattern="n_of_m")):
        read |= flags_used(rows, options)
    fields = dataclasses.fields(Options)
    return tuple(field.name for field in fields if field.name not in read)


class _Recorder:
    """Options that remember which of them are read."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        derived = getattr(type(self._options), name, None)
        if isinstance(derived, property):
            assert derived.fget is not None
            return derived.fget(self)
        if callable(derived):
            return functools.partial(derived, self)
        self.read.add(name)
        return getattr(self._options, name)


def check_effects(config: Config, methods: Mapping[str, Method] = METHODS) -> None:
    """Refuses unknown methods, and flags without effect or that a method sets.

    Where methods do not tell one comparison from another, any of the table may join the
    run directory later, and flags of all of them have an effect.

    Raises:
      ValueError: naming the flag.
    """
    check_names("methods", config.methods, methods)
    fields = {field.name: field for field in dataclasses.fields(config)}
    names = config.methods if fields["methods"].compare else tuple(methods)
    used = flags_used(
        [row for name in names for row in mixed(config, methods[name])],
        config,
    )
    values = given(config)
    for flag in (*values, *config.axes):
        if flag in _OF_METHODS and flag not in used:
            raise ValueError(
                f"expected no {flag}, which none of {', '.join(names)} goes "
                f"by, got {values.get(flag, config.axes.get(flag))}; leave it away"
            )
    both = config.epochs and ("steps" in values or "steps" in config.axes)
    if both and not isinstance(config, StreamOptions):
        raise ValueError("expected either steps or epochs, got both; leave one away")
    for flag in config.axes.keys() & values.keys():
        raise ValueError(
            f"expected either a value of {flag} or an axis of it, got {values[flag]} "
            f"and {list(config.axes[flag])}"
        )
    for name in config.methods:
        _check_sets(name, mixed(config, methods[name]), values)
        _check_ticket(name, methods[name], config)


def _check_sets(name: str, rows: Sequence[Method], values: Mapping[str, Any]) -> None:
    for row in rows:
        for flag in row.sets.keys() & values.keys():
            if not callable(row.sets[flag]) and values[flag] != row.sets[flag]:
                raise ValueError(
                    f"expected {flag} of {row.sets[flag]} for {name}, got "
                    f"{values[flag]}; leave the method or --{flag} away"
                )


def _check_ticket(name: str, method: Method, config: Config) -> None:
    if config.ticket and not method.ticket:
        raise ValueError(
            f"expected methods that can start from a ticket, got {name}; choose "
            "--methods=fixed to keep its masks"
        )
    if name == "fixed" and not config.ticket:
        raise ValueError(
            "expected a --ticket whose masks fixed can keep, got none; `python -m "
            "experiments.lottery` saves tickets"
        )
