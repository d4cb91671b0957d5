"""The names of the learners, the flags of a stream, and what they come to."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from d2sparse import anytime, data
from d2sparse.anytime import Dead, LevelSchedule, Stage, density
from d2sparse.anytime.journeys import STAGE_SCHEDULES, StageSchedule
from d2sparse.data import Replay, Stream
from experiments.task import (
    PrunableName,
    TaskConfig,
    check_choice,
    check_effects,
    check_least,
)

LearnerName = Literal[
    "dense",
    "scratch",
    "one_shot",
    "app",
    "app_magnitude",
    "gradual",
    "rigl",
    "d2_sparse",
    "d2_consolidated",
    "app_2022",
    "random_matched",
]
LEARNERS: tuple[LearnerName, ...] = get_args(LearnerName)
CriterionName = Literal[
    "snip",
    "magnitude",
    "random",
    "gradient",
    "saliency",
    "grasp",
    "synflow",
    "fisher",
    "wanda",
]
CRITERIA: tuple[CriterionName, ...] = get_args(CriterionName)
_LEAST = {
    "epochs": 1,
    "steps": 0,
    "batch_size": 1,
    "replay_size": 0,
    "score_batch": 1,
    "megabatches": 1,
}
# Flags of every experiment that have no meaning on a stream, and what they have to be.
_MEANINGLESS = {
    "ticket": ("", "a stream begins with a new network"),
    "averaging": (0.0, "the best epoch of every stage is kept instead"),
    "growth_samples": (0, "other examples than those of the step may be the future's"),
    "runs_at_once": (0, "the runs of a stream are trained one after another"),
}
# What the code that was released does where the flags differ from it.
_RELEASED = {
    "permuted": False,
    "dead": "intersect",
    "score_weights": "fresh",
    "score_sample": "first",
    "carry_moments": True,
}


@dataclasses.dataclass(frozen=True)
class StreamConfig(TaskConfig):
    """Flags of experiments on a stream."""

    # What to compare. app_magnitude is app with that criterion, app_2022 is APP as its
    # released code does it, and random_matched deletes random weights down to the
    # densities that app_2022 has come to.
    methods: tuple[LearnerName, ...] = ("dense", "one_shot", "app", "app_2022")

    samples_per_class: int = 0  # training labels of every class; 0 for all
    megabatches: int = 8  # pieces in which the data arrive
    stratified: bool = False  # every class evenly in every megabatch
    permuted: bool = True  # draw the order of the data; else that of the data set
    stream_validation: float = 0.1  # part of every megabatch that epochs are chosen by
    replay: Replay = "full"  # what stays visible of earlier megabatches
    replay_size: int = 200  # examples of the reservoir of --replay=buffer
    replay_fraction: float = 0.5  # what --replay=fraction keeps at every arrival
    wait: int = 1  # megabatches that a learner waits for before it trains

    tau: float = 4.5  # last level: 0.8^tau of the weights are left
    first_level: float = 1.0  # the first level of app
    levels: LevelSchedule = "linear_level"  # how levels rise from the first to tau
    criterion: CriterionName = "snip"  # what app and one_shot prune by
    # Whether weights of all layers compete, or every layer loses the same part.
    scope: Literal["global", "leaf"] = "global"
    prunable: PrunableName = "kernels"  # what may be pruned, as in experiments.prune
    dead: Dead = "exclude"  # whether dead weights compete for the places of the live
    # The weights that are scored: the network's own, or new random ones.
    score_weights: Literal["current", "fresh"] = "current"
    # Which examples are scored on: random ones, or the first in the order of arrival.
    score_sample: Literal["random", "first"] = "random"
    score_on: Literal["replayed", "new"] = "replayed"  # all that is visible, or the new
    score_fraction: float = 0.2  # examples that are scored on, over a megabatch
    score_batch: int = 100  # examples of one batch that is scored
    carry_moments: bool = False  # keep the optimiser's moments between stages
    # Which epoch of a stage is tested and gone on from: the best on validation.
    select: Literal["best", "last"] = "best"
    # app-2022 sets all flags above in which the released code differs.
    compat: Literal["none", "app-2022"] = "none"

    epochs: int = 10  # passes of a stage over what is visible
    steps: int = 0  # steps of every stage in place of --epochs; 0: by epochs
    # What becomes of the learning rate within a stage; step is a tenth after 40 %, a
    # hundredth after 80 % of the epochs.
    schedule: StageSchedule = "step"
    learning_rate: float = 0.05  # at the first step of every stage
    growth_samples: int = 0  # growth gradients are those of the step
    # Steps after which a checkpoint may be due; measured is after every epoch.
    report_every: int = 100


def check(config: StreamConfig) -> None:
    """Refuses flags that are out of their range or have no meaning on a stream.

    Raises:
      ValueError: naming the flag.
    """
    check_least(config, _LEAST)
    if not config.methods:
        raise ValueError(f"expected methods of {', '.join(LEARNERS)}, got none")
    for name in config.methods:
        check_choice("methods", name, LEARNERS)
    _check_order(list(config.methods))
    check_effects(config, list_effects(config))
    for name, choices in {
        "criterion": CRITERIA,
        "scope": ("global", "leaf"),
        "score_weights": ("current", "fresh"),
        "score_sample": ("random", "first"),
        "score_on": ("replayed", "new"),
        "select": ("best", "last"),
        "compat": ("none", "app-2022"),
        "schedule": STAGE_SCHEDULES,
    }.items():
        check_choice(name, getattr(config, name), choices)
    if not 0 < config.score_fraction <= 1:
        raise ValueError(
            f"expected score_fraction in (0, 1], got {config.score_fraction}"
        )
    for name, (value, why) in _MEANINGLESS.items():
        if getattr(config, name) != value:
            given = getattr(config, name)
            raise ValueError(f"expected no --{name}, since {why}, got {given}")


def list_effects(config: StreamConfig) -> dict[str, tuple[object, str]]:
    """Flags whose effect others take away, see `task.check_effects`."""
    found: dict[str, tuple[object, str]] = {
        "epochs": (not config.steps, f"since steps are {config.steps}"),
        "replay_size": (config.replay == "buffer", "which is for --replay=buffer"),
        "replay_fraction": (
            config.replay == "fraction",
            "which is for --replay=fraction",
        ),
    }
    if config.compat == "app-2022":
        for flag, value in _RELEASED.items():
            same = getattr(config, flag) == value
            found[flag] = (same, f"which compat=app-2022 sets to {value}")
    return found


def _check_order(names: Sequence[str]) -> None:
    """What takes the densities of another comes after it."""
    if "random_matched" not in names:
        return
    if "app_2022" not in names[: names.index("random_matched")]:
        raise ValueError(
            "expected app_2022 among the methods before random_matched, which takes "
            f"its densities, got {', '.join(names)}"
        )


def released(config: StreamConfig) -> StreamConfig:
    """The flags with those of the released code."""
    return dataclasses.replace(config, **_RELEASED)


@dataclasses.dataclass(frozen=True)
class Timetable:
    """What is visible when, and how long it is trained on.

    Attributes:
      stream: the megabatches, on the finest grid.
      arrived: those that a learner trains on together, new at each of its stages.
      visible: what it may look at, at each stage.
      stages: when it trains.
      scored: number of examples that a network is scored on.
    """

    stream: Stream
    arrived: Stream
    visible: Stream
    stages: list[Stage]
    scored: int

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.stages[-1].end


def make_timetable(config: StreamConfig, labels: np.ndarray, seed: int) -> Timetable:
    """What a seed sees; it does not depend on the learner.

    Raises:
      ValueError: the data cannot be cut, replayed or waited for like that, a class
        would never be trained on, nothing is held out to choose epochs by, or a stage
        does not fill one batch.
    """
    stream = data.cut_stream(
        labels,
        config.megabatches,
        seed,
        config.stream_validation,
        config.stratified,
        config.permuted,
    )
    arrived = data.accumulate(stream, config.wait)
    _check_classes(config, labels, arrived)
    visible = data.visible(
        arrived, config.replay, seed, config.replay_size, config.replay_fraction
    )
    sizes = [len(own.train) for own in visible]
    data.epoch_batches(np.arange(min(sizes)), 0, 1, config.batch_size, (0,))
    stages = anytime.plan_stages(sizes, config.batch_size, config.epochs, config.steps)
    smallest = min(len(own.train) for own in arrived)
    scored = max(int(config.score_fraction * smallest), 1)
    return Timetable(stream, arrived, visible, stages, scored)


def _check_classes(config: StreamConfig, labels: np.ndarray, arrived: Stream) -> None:
    """Every class is trained on at some time, and every stage can be validated."""
    trained = np.concatenate([own.train for own in arrived])
    if len(missing := np.setdiff1d(labels, labels[trained])):
        raise ValueError(
            "expected every class to be trained on at some time, got none of the "
            f"examples of {missing.tolist()}, which come after the last megabatch that "
            f"--wait={config.wait} trains on; choose a --wait that divides "
            f"--megabatches={config.megabatches}, or --stratified"
        )
    if config.select != "best" or not config.stream_validation:
        return
    if not all(len(own.validation) for own in arrived):
        raise ValueError(
            "expected something to hold out of every megabatch, got "
            f"--stream_validation={config.stream_validation} of "
            f"{min(sum(map(len, own)) for own in arrived)} examples; raise it, lower "
            "--megabatches, or choose --select=last"
        )


def app_densities(config: StreamConfig, stages: int) -> list[float]:
    """Part of the weights that APP leaves at every stage.

    Raises:
      ValueError: a level is out of its range.
    """
    levels: Sequence[float] = anytime.levels(
        config.tau, stages, config.levels, config.first_level
    )
    return [density(level) for level in levels]
