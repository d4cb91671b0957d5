"""The one resumable loop: phase after phase, from wherever a training stands."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from d2sparse.train.devices import bring, settle
from d2sparse.train.faults import has_failed
from d2sparse.train.loops import Logs, Stretch, take_steps
from d2sparse.train.program import Program
from d2sparse.train.runs import stack_runs, unstack_runs
from d2sparse.train.state import Data, TrainState
from d2sparse.train.training import Phase, Progress


class Watch(NamedTuple):
    """Callbacks of a run in training.

    Attributes:
      every: steps between two reports; None for one at the end of each phase.
      report: called with the progress and the mean metrics since the last report. It
        must not keep the state, which the next step uses up.
      save_every: steps between two calls of `save`; None for none but at an end.
      save: called with the progress and the metrics since the last report: all that is
        needed to resume. It must not keep the state.
      begun: called with the progress where a phase has been entered, or a run resumed.
      ended: called with the progress and the title at the end of each titled phase.
      interrupted: whether to stop; asked between two calls on CPU, of up to 32 steps
        or of one of a network with convolutions; between two reports or saves on
        accelerators.
      logs: metrics of the steps since the last report, where a run is resumed.
    """

    every: int | None = None
    report: Callable[[Progress, dict[str, float]], None] = lambda progress, logs: None
    save_every: int | None = None
    save: Callable[[Progress, Logs], None] = lambda progress, logs: None
    begun: Callable[[Progress], None] = lambda progress: None
    ended: Callable[[Progress, str], None] = lambda progress, title: None
    interrupted: Callable[[], bool] = lambda: False
    logs: Mapping[str, list[Any]] = {}


def fit(
    program: Program, progress: Progress, data: Data, watch: Watch | None = None
) -> Progress:
    """Trains through all phases, from wherever the progress stands.

    A training that is interrupted resumes to the same bits: give the progress and the
    logs that `Watch.save` was last called with.

    Args:
      program: from `make_program`.
      progress: where to start; its state is used up.
      data: training data.
      watch: callbacks.

    Returns:
      The progress after the last step; `program.training.finish` makes of it what
      counts.

    Raises:
      FloatingPointError: a non-finite update has stopped the run.
      KeyboardInterrupt: it was interrupted, after saving.
    """
    return fit_together(program, [progress], [data], [watch or Watch()])[0]


def fit_together(
    program: Program,
    runs: Sequence[Progress],
    data: Sequence[Data],
    watches: Sequence[Watch],
) -> list[Progress]:
    """`fit` of several runs in one program; they stand at one step of one phase.

    A run leaves the others where its training ends early, or a non-finite update has
    stopped it: no later phase takes it up again.

    Raises:
      FloatingPointError: no run is left that a non-finite update has not stopped.
      KeyboardInterrupt: it was interrupted, after saving.
    """
    runs, watches = list(runs), list(watches)
    for number, phase in enumerate(program.training.phases):
        sound = [i for i, run in enumerate(runs) if not has_failed(run.state)]
        for i in sound:
            if int(runs[i].phase) < number:
                runs[i] = _enter(phase, number, runs[i], data[i], program)
        going = [i for i in sound if int(runs[i].phase) == number]
        if not going:
            continue
        for i in going:
            watches[i].begun(runs[i])
        own = [watches[i] for i in going]
        states = _take_steps(
            program.of(number),
            [runs[i] for i in going],
            [data[i] for i in going],
            own,
            phase,
        )
        for i, state in zip(going, states, strict=True):
            runs[i] = runs[i]._replace(state=state)
            watches[i] = watches[i]._replace(logs={})
            if phase.title and not has_failed(state):
                watches[i].ended(runs[i], phase.title)
    return runs


def _enter(
    phase: Phase, number: int, run: Progress, data: Data, program: Program
) -> Progress:
    after = phase.enter(run, data, program)
    ended = int(after.phase) > number
    return after if ended else after._replace(phase=jnp.int32(number))


def _take_steps(
    program: Program,
    runs: Sequence[Progress],
    data: Sequence[Data],
    watches: Sequence[Watch],
    phase: Phase,
) -> list[TrainState]:
    """The steps of one phase, of one run or of several stacked ones."""
    first, alone = watches[0], len(runs) == 1

    def split(state: TrainState) -> list[TrainState]:
        state = bring(state)
        return [state] if alone else unstack_runs(state)

    def each(state: TrainState) -> list[tuple[int, Progress]]:
        states = zip(runs, split(state), strict=True)
        return list(enumerate(p._replace(state=own) for p, own in states))

    def report(step: int, state: TrainState, logs: dict[str, Any]) -> None:
        del step
        for i, progress in each(state):
            watches[i].report(progress, {k: _of(v, i) for k, v in logs.items()})

    def save(state: TrainState, logs: Logs) -> None:
        for i, progress in each(state):
            own = {k: [_of(v, i) for v in values] for k, values in logs.items()}
            watches[i].save(progress, own)

    def batches(state: TrainState, steps: int) -> Any:
        assert phase.batches is not None
        rows = [phase.batches(own, data[i], steps) for i, own in each(state)]
        return rows[0] if alone else np.stack(rows, axis=1)

    states = [progress.state for progress in runs]
    pending = [watch.logs for watch in watches]
    stretch = Stretch(
        phase.stop,
        program.training.batch_size,
        first.every,
        report,
        save,
        first.save_every,
        pending[0] if alone else _merged(pending),
        first.interrupted,
        None if phase.batches is None else batches,
    )
    end = take_steps(
        program.run,
        states[0] if alone else stack_runs(states),
        data[0] if alone else stack_runs(data),
        stretch,
    )
    return [settle(state) for state in split(end)]


def _of(value: Any, number: int) -> float:
    """The part of one of the runs; of a run alone, everything."""
    return float(np.ravel(value)[number if np.ndim(value) else 0])


def _merged(logs: Sequence[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """Metrics of several runs, step by step."""
    return {name: list(np.array([own[name] for own in logs]).T) for name in logs[0]}
