"""How units are run: every method with every seed, each once, with a live display."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from d2sparse import data, metrics, records, train
from d2sparse.train import Data, TrainState
from experiments import processes, signals
from experiments.session import Interrupted, Session
from experiments.singles import Method
from experiments.task import Splits, TaskConfig, draw_splits

Note = Callable[[str], None]
Statistics = Callable[[TrainState], Mapping[str, Any]]
Conclude = Callable[[records.Unit, TrainState], Mapping[str, Any]]


class Job(NamedTuple):
    """A unit that has to run.

    Attributes:
      unit: which method and seed.
      splits: the data of the seed.
      note: called with what is going on.
      interrupted: whether to save and stop.
    """

    unit: records.Unit
    splits: Splits
    note: Note
    interrupted: Interrupted


Learn = Callable[[Sequence[Job]], None]


class Judged(Protocol):
    """What can be asked of a trained state: `Method` and `Network` answer."""

    @property
    def predict(self) -> Callable[[TrainState, Data], dict[str, np.ndarray]]:
        """Probabilities by output, the headline first."""

    @property
    def costs(self) -> Callable[[TrainState, Data], tuple[int, float]]:
        """Numbers stored, and MACs of the headline at inference."""


def run_each(
    config: TaskConfig,
    out: records.Run,
    source: data.Source,
    names: Iterable[str],
    learn: Learn,
    at_once: int = 1,
) -> None:
    """Runs what is not finished yet.

    SIGINT and SIGTERM let the unit that is being trained save its state.

    Args:
      config: how many seeds, and what each learns from.
      out: where finished units are found.
      source: the data set.
      names: of the methods.
      learn: trains and records some units of one method.
      at_once: how many units of one method it is given; 1 goes seed by seed, so that
        the methods can be compared early.

    Raises:
      KeyboardInterrupt: a signal has ended the run.
    """
    names = list(names)
    every = [records.Unit(name, n) for n in range(config.seeds) for name in names]
    missing = [unit for unit in every if out.finished(unit) is None]
    splits_of = functools.lru_cache(at_once)(
        functools.partial(draw_splits, config, source)
    )
    with signals.deferred() as asked, _display(config) as progress:
        interrupted = processes.Agreed(asked)
        done = len(every) - len(missing)
        bar = progress.add_task("", total=len(every), completed=done)

        def note(text: str) -> None:
            progress.update(bar, description=text)
            interrupted.ask()

        for units in _groups(missing, at_once):
            if interrupted():
                raise KeyboardInterrupt
            learn([Job(u, splits_of(u.seed), note, interrupted) for u in units])
            progress.advance(bar, len(units))


def _groups(units: Sequence[records.Unit], size: int) -> list[list[records.Unit]]:
    """Units of one method, `size` of them at most."""
    if size == 1:
        return [[unit] for unit in units]
    by_method: dict[str, list[records.Unit]] = {}
    for unit in units:
        by_method.setdefault(unit.method, []).append(unit)
    return [
        members[begin : begin + size]
        for members in by_method.values()
        for begin in range(0, len(members), size)
    ]


def learn(
    config: TaskConfig,
    out: records.Run,
    methods: Mapping[str, Method],
    conclude: Conclude,
    jobs: Sequence[Job],
    statistics: Statistics = lambda state: {},
) -> None:
    """Trains one method with one or more seeds, and records what it learned and cost.

    Args:
      config: the flags.
      out: where measurements and results are recorded.
      methods: by name.
      conclude: further results of a trained unit.
      jobs: units of one method.
      statistics: further measurements of a state in training.
    """
    method = methods[jobs[0].unit.method]
    sessions = [open_session(config, out, method, job, statistics) for job in jobs]
    begun = []
    for job, session in zip(jobs, sessions, strict=True):
        key, labelled = jax.random.key(job.unit.seed), job.splits.train
        make = functools.partial(method.init, key, labelled)
        begun.append((job, session, session.begin(make, method.state)))

    def position(member: tuple[Job, Session, Any]) -> int:
        return member[1].ledger.taken + int(method.state(member[2]).step)

    # One that had to go back to an earlier checkpoint is behind the others.
    for _, together in itertools.groupby(sorted(begun, key=position), key=position):
        _train(out, method, conclude, list(together))


def _train(
    out: records.Run,
    method: Method,
    conclude: Conclude,
    members: Sequence[tuple[Job, Session, Any]],
) -> None:
    jobs, sessions, begun = zip(*members, strict=True)
    data_of_each = [job.splits.train for job in jobs]
    failure = ""
    try:
        states = method.fit(sessions, begun, data_of_each)
    except FloatingPointError as error:
        failure = str(error)
    finally:
        for session in sessions:
            session.wait()
    for number, (job, session) in enumerate(zip(jobs, sessions, strict=True)):
        if failure or train.has_failed(states[number]):
            message = failure or train.failure(states[number])
            out.fail(job.unit, message)
            continue
        state = states[number]
        found = judge(method, state, job.splits) | {
            "training_macs": method.training_macs(state, data_of_each[number])
            if method.training_macs
            else session.ledger.spent,
            "seconds": session.seconds / len(jobs),
        }
        out.finish(job.unit, found | dict(conclude(job.unit, state)))


def open_session(
    config: TaskConfig,
    out: records.Run,
    method: Judged,
    job: Job,
    statistics: Statistics = lambda state: {},
) -> Session:
    """A unit that measures its accuracy outside of the budget on the way."""

    def measure(state: TrainState) -> dict[str, Any]:
        values = dict(statistics(state))
        if (monitor := job.splits.monitor) is not None:
            headline = _headline(method.predict(state, monitor))
            values["monitor_accuracy"] = accuracy(headline, monitor)
        return values

    return Session(config, out, job.unit, measure, job.note, job.interrupted)


def judge(method: Judged, state: TrainState, splits: Splits) -> dict[str, float]:
    """What the table says of a trained state: its quality, its size, its cost."""
    outputs = method.predict(state, splits.judge)
    stored, inference_macs = method.costs(state, splits.train)
    return {
        **train.evaluate(_headline(outputs), np.asarray(splits.judge.labels)),
        **{f"accuracy_{k}": accuracy(v, splits.judge) for k, v in outputs.items()},
        "nonzeros": stored,
        "inference_macs": inference_macs,
    }


def accuracy(probabilities: np.ndarray, examples: Data) -> float:
    """Fraction of examples whose label has the largest probability."""
    return float(metrics.accuracy(jnp.asarray(probabilities), examples.labels))


def _headline(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return next(iter(outputs.values()))


def _display(config: TaskConfig) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        disable=not config.progress,
        transient=True,
    )
