"""The methods on a stream by name.

given = Streamed(Options(), StreamOptions(megabatches=8), labels)
training = constrain(plain(model, data), *STREAM_METHODS["app"].constraints(given))
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from d2sparse import anytime
from d2sparse.constraints.arrivals import Arrival
from d2sparse.constraints.methods import METHODS, Constraints, Method
from d2sparse.constraints.options import Options
from d2sparse.constraints.streams import as_long_as_stream, stream
from d2sparse.constraints.timetables import StreamOptions, make_timetable, released
from d2sparse.data import steps_per_epoch
from d2sparse.schedules import refresh_interval, refresh_stop
from d2sparse.train import Training, constrain


class Streamed(NamedTuple):
    """What the methods on a stream are made from.

    Attributes:
      options: of the training within. The sparsity is that of the last level; a refresh
        interval or a horizon of 0 follows from the data and the steps of the stream.
      stream: how the data arrive, and what an arrival looks at.
      labels: int[n], of the training examples of one seed.
    """

    options: Options
    stream: StreamOptions
    labels: Any


def _released(options: StreamOptions) -> StreamOptions:
    return released(options.resolved)


def _by_magnitude(options: StreamOptions) -> StreamOptions:
    return dataclasses.replace(options, criterion="magnitude")


def _at_random(options: StreamOptions) -> StreamOptions:
    """Random live weights fall."""
    return dataclasses.replace(
        _released(options), criterion="random", dead="exclude", score_weights="current"
    )


def _pruned(
    change: Callable[[StreamOptions], StreamOptions] = lambda o: o, once: bool = False
) -> Callable[[Streamed], Constraints]:
    """Pruned when megabatches arrive, at all or at the first of them."""

    def constraints(s: Streamed) -> Constraints:
        each, nothing = s.stream.densities, (None,) * (s.stream.stages - 1)
        arrival = Arrival((each[-1], *nothing) if once else each)
        length = as_long_as_stream(s.stream, s.labels)
        return (length, stream(change(s.stream.resolved), s.labels, arrival))

    return constraints


def _unpruned(
    inner: Callable[[Options], Constraints],
    anew: bool = False,
    anneals: bool = True,
) -> Callable[[Streamed], Constraints]:
    """Under constraints that no arrival changes."""

    def constraints(s: Streamed) -> Constraints:
        def within(training: Training) -> Training:
            return constrain(training, *inner(_known(s, training)))

        length = as_long_as_stream(s.stream, s.labels)
        around = stream(s.stream, s.labels, Arrival(anew=anew), anneals)
        return (length, within, around)

    return constraints


def _known(s: Streamed, training: Training) -> Options:
    """The options of the training within, for the steps of the stream."""
    steps, size = training.horizon, training.batch_size
    first = make_timetable(s.stream, s.labels, seed=0).visible[0].train
    epoch = steps_per_epoch(len(first), size)
    usual = refresh_interval(len(s.labels), size, refresh_stop(steps))
    changes: dict[str, Any] = {
        "sparsity": 1 - anytime.density(s.stream.tau),
        "refresh_interval": s.options.refresh_interval or usual,
        "horizon": s.options.horizon or max(steps / 6, epoch),
    }
    return dataclasses.replace(s.options, **changes)


_PAIR = {"growth_samples": 0, "preset": "constant"}

# The methods on a stream; their constraints are made from `Streamed`. app_2022 is APP
# as its released code does it, and random_matched deletes random weights down to the
# densities that are given to its runs as settings: those that app_2022 came to.
STREAM_METHODS: Mapping[str, Method] = {
    "dense": Method(_unpruned(METHODS["dense"].constraints)),
    "scratch": Method(_unpruned(METHODS["dense"].constraints, anew=True)),
    "one_shot": Method(_pruned(once=True)),
    "app": Method(_pruned()),
    "app_magnitude": Method(_pruned(_by_magnitude)),
    "gradual": Method(_unpruned(METHODS["gradual"].constraints)),
    "rigl": Method(_unpruned(METHODS["rigl"].constraints), {"growth_samples": 0}),
    "d2_sparse": Method(_unpruned(METHODS["d2_sparse"].constraints), _PAIR),
    # A fast learner that anneals would leave nothing to consolidate.
    "d2_consolidated": Method(
        _unpruned(METHODS["d2_consolidated"].constraints, anneals=False), _PAIR
    ),
    "app_2022": Method(_pruned(_released)),
    "random_matched": Method(_pruned(_at_random)),
}
