"""When the data of a stream arrive, and which of them are visible at each stage."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from d2sparse import anytime, data
from d2sparse.anytime import DEAD, LEVELS, Dead, LevelSchedule, Stage
from d2sparse.anytime.stages import STAGE_SCHEDULES, StageSchedule
from d2sparse.checks import check_choice, check_least
from d2sparse.data import REPLAYS, Replay, Stream
from d2sparse.train import Data, TrainState

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

# What the released code of APP does differently, besides the order of the data.
RELEASED: dict[str, Any] = {
    "dead": "intersect",
    "score_weights": "fresh",
    "score_sample": "first",
    "carry_moments": True,
}


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """Options of a stream: how the data arrive, and what an arrival does."""

    megabatches: int = 8  # pieces in which the data arrive
    stratified: bool = False  # every class evenly in every megabatch
    permuted: bool = True  # draw the order of the data; else that of the data set
    stream_validation: float = 0.1  # part of every megabatch that epochs are chosen by
    replay: Replay = "full"  # which earlier megabatches stay visible
    replay_size: int = 200  # examples of the reservoir of replay=buffer
    replay_fraction: float = 0.5  # part of the past that replay=fraction keeps
    wait: int = 1  # megabatches that arrive before a stage of training begins

    epochs: int = 10  # passes of a stage over the visible examples
    steps: int = 0  # steps of every stage instead of epochs; 0: by epochs
    # Learning rate within a stage: constant, falling along a cosine, or by steps, to a
    # tenth after 40 % and a hundredth after 80 % of the epochs.
    schedule: StageSchedule = "step"
    # The epoch of a stage that is evaluated and resumed from: the best on validation,
    # or the last.
    select: Literal["best", "last"] = "best"
    carry_moments: bool = False  # keep the optimiser's moments between stages

    tau: float = 4.5  # last level: 0.8^tau of the weights are left
    first_level: float = 1.0  # the first level of app
    levels: LevelSchedule = "linear_level"  # how levels rise from the first to tau
    criterion: CriterionName = "snip"  # score that app and one_shot prune by
    # Whether weights of all layers compete, or every layer loses the same part.
    scope: Literal["global", "leaf"] = "global"
    dead: Dead = "exclude"  # whether pruned weights compete with the live ones
    # The weights that are scored: the network's, or new random ones (from the second
    # stage on).
    score_weights: Literal["current", "fresh"] = "current"
    # The examples that are scored on: random ones, or the first that arrived.
    score_sample: Literal["random", "first"] = "random"
    score_on: Literal["replayed", "new"] = "replayed"  # of all visible, or the new ones
    score_fraction: float = 0.2  # examples that are scored on, over a megabatch
    score_batch: int = 100  # examples of one batch that is scored
    # app-2022 sets all options above in which the released code of APP differs.
    compat: Literal["none", "app-2022"] = "none"

    def __post_init__(self) -> None:
        """Refuses values out of their ranges and options without an effect."""
        check_least(self, _LEAST, most=math.inf)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if not 0 < self.score_fraction <= 1:
            raise ValueError(
                f"expected score_fraction in (0, 1], got {self.score_fraction}"
            )
        _check_effects(self)

    @property
    def resolved(self) -> "StreamOptions":
        """The options with those that `compat` stands for, and without it."""
        if self.compat == "none":
            return self
        return dataclasses.replace(released(self), permuted=False, compat="none")

    @property
    def stages(self) -> int:
        """How often the network is trained."""
        return max(self.megabatches // self.wait, 1)

    @property
    def densities(self) -> tuple[float, ...]:
        """Part of the weights that APP leaves at every stage.

        Raises:
          ValueError: a level is out of its range.
        """
        levels = anytime.levels(self.tau, self.stages, self.levels, self.first_level)
        return tuple(map(anytime.density, levels))


def released(options: StreamOptions) -> StreamOptions:
    """The options with those of the released code of APP, but for the data's order."""
    return dataclasses.replace(options, **RELEASED)


class Timetable(NamedTuple):
    """The examples of one run of a stream.

    Attributes:
      arrived: new examples of every stage.
      visible: examples that every stage may look at.
      scored: number of examples that a network is scored on.
    """

    arrived: Stream
    visible: Stream
    scored: int


def make_timetable(options: StreamOptions, labels: Any, seed: int) -> Timetable:
    """The examples of a run; they depend on its labels and its seed alone.

    Args:
      options: how the data arrive.
      labels: int[n], of all training examples.
      seed: of the run.

    Raises:
      ValueError: the data cannot be cut, replayed or waited for like that, a class
        would never be trained on, or nothing is held out to choose epochs by.

    >>> options = StreamOptions(megabatches=3, stream_validation=0.25)
    >>> timetable = make_timetable(options, np.arange(24) % 2, seed=0)
    >>> [len(stage.train) for stage in timetable.visible], timetable.scored
    ([6, 12, 18], 1)
    """
    chosen, labels = options.resolved, np.asarray(labels)
    cut = data.cut_stream(
        labels,
        chosen.megabatches,
        seed,
        chosen.stream_validation,
        chosen.stratified,
        chosen.permuted,
    )
    arrived = data.accumulate(cut, chosen.wait)
    _check_classes(chosen, labels, arrived)
    visible = data.visible(
        arrived, chosen.replay, seed, chosen.replay_size, chosen.replay_fraction
    )
    smallest = min(len(stage.train) for stage in arrived)
    scored = max(int(chosen.score_fraction * smallest), 1)
    return Timetable(arrived, visible, scored)


def timetable_of(options: StreamOptions, state: TrainState, data: Data) -> Timetable:
    """The timetable of the run of a state, by its setting "seed" and its labels.

    Args:
      options: how the data arrive.
      state: of a training on a stream, at any step.
      data: all its training examples.
    """
    labels = np.asarray(data.labels, np.int64).tobytes()
    return _cached(options, labels, int(state.settings["seed"]))


def plan(options: StreamOptions, labels: Any, batch_size: int) -> list[Stage]:
    """The stages of a stream, as steps.

    They depend on numbers of examples: with the labels of any seed they are the same,
    but where a class is so small that a seed would hold all of it out.

    Args:
      options: how the data arrive, and for how long a stage trains.
      labels: int[n], of all training examples of one seed.
      batch_size: examples per step.

    Raises:
      ValueError: as `make_timetable`, or a stage does not fill one batch.

    >>> options = StreamOptions(megabatches=3, stream_validation=0.25, epochs=2)
    >>> [stage.end for stage in plan(options, np.arange(24) % 2, batch_size=6)]
    [2, 6, 12]
    """
    timetable = make_timetable(options, labels, seed=0)
    sizes = [len(stage.train) for stage in timetable.visible]
    data.epoch_batches(np.arange(min(sizes)), 0, 1, batch_size, (0,))
    return anytime.plan_stages(sizes, batch_size, options.epochs, options.steps)


@functools.lru_cache(maxsize=16)
def _cached(options: StreamOptions, labels: bytes, seed: int) -> Timetable:
    return make_timetable(options, np.frombuffer(labels, np.int64), seed)


def _check_classes(options: StreamOptions, labels: np.ndarray, arrived: Stream) -> None:
    """Every class is trained on at some time, and every stage can be validated."""
    trained = np.concatenate([stage.train for stage in arrived])
    if len(missing := np.setdiff1d(labels, labels[trained])):
        raise ValueError(
            "expected every class to be trained on at some time, got none of the "
            f"examples of {missing.tolist()}, which come after the last megabatch that "
            f"wait={options.wait} trains on; choose a wait that divides "
            f"megabatches={options.megabatches}, or a stratified stream"
        )
    if options.select != "best" or not options.stream_validation:
        return
    if not all(len(stage.validation) for stage in arrived):
        raise ValueError(
            "expected something to hold out of every megabatch, got "
            f"stream_validation={options.stream_validation} of "
            f"{min(sum(map(len, stage)) for stage in arrived)} examples; raise it, "
            "lower megabatches, or choose select=last"
        )


def _check_effects(options: StreamOptions) -> None:
    """Refuses options that would change nothing beside the others."""
    effects: dict[str, tuple[bool, str]] = {
        "epochs": (not options.steps, f"since steps are {options.steps}"),
        "replay_size": (options.replay == "buffer", "which is for replay=buffer"),
        "replay_fraction": (
            options.replay == "fraction",
            "which is for replay=fraction",
        ),
    }
    if options.compat == "app-2022":
        for name, value in {**RELEASED, "permuted": False}.items():
            same = getattr(options, name) == value
            effects[name] = (same, f"which compat=app-2022 sets to {value}")
    defaults = {f.name: f.default for f in dataclasses.fields(options)}
    for name, (has_effect, why) in effects.items():
        value = getattr(options, name)
        if value != defaults[name] and not has_effect:
            raise ValueError(f"expected no {name}, {why}, got {value}; leave it away")


_LEAST = {
    "megabatches": 1,
    "replay_size": 0,
    "wait": 1,
    "epochs": 1,
    "steps": 0,
    "score_batch": 1,
}
_CHOICES: dict[str, Iterable[str]] = {
    "replay": REPLAYS,
    "schedule": STAGE_SCHEDULES,
    "select": ("best", "last"),
    "levels": LEVELS,
    "criterion": get_args(CriterionName),
    "scope": ("global", "leaf"),
    "dead": DEAD,
    "score_weights": ("current", "fresh"),
    "score_sample": ("random", "first"),
    "score_on": ("replayed", "new"),
    "compat": ("none", "app-2022"),
}
