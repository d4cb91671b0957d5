"""How units are run: every method with every seed, each once, with a live display."""

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from experiments.finite import check_finite
from experiments.session import Interrupted, Session
from experiments.singles import Method
from experiments.splits import Splits, draw_splits
from experiments.task import TaskConfig, run_width
from experiments.variants import Variant

_SHARE = 0.8  # Part of the memory that runs may take.
_MOST = 64  # Runs at once, where there is room for more.

Note = Callable[[str], None]
Statistics = Callable[[TrainState], Mapping[str, Any]]


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
Conclude = Callable[[Job, TrainState], Mapping[str, Any]]


class Judged(Protocol):
    """What can be asked of a trained state: `Method` and `Network` answer."""

    @property
    def predict(self) -> Callable[[TrainState, Data], dict[str, np.ndarray]]:
        """Probabilities by output, the headline first."""

    @property
    def costs(self) -> Callable[[TrainState, Data], tuple[int, float]]:
        """Numbers stored, and MACs of the headline at inference."""

    @property
    def settle(self) -> Callable[[TrainState, Data], TrainState]:
        """What counts of a state: the averages of its weights, where there are any."""


def run_each(
    config: TaskConfig,
    out: records.Run,
    source: data.Source,
    names: Iterable[str],
    learn: Learn,
    program: Callable[[str], object] | None = None,
) -> None:
    """Runs what is not finished yet.

    SIGINT and SIGTERM let the units that are being trained save their states.

    Args:
      config: how many seeds, and what each learns from.
      out: where finished units are found.
      source: the data set.
      names: of the methods.
      learn: trains and records some units.
      program: what the units of a method share with others, so that they can be trained
        at once: all of them are given to `learn` together. If None, and where runs are
        trained one after another, every unit comes alone, seed by seed, so that the
        methods can be compared early.

    Raises:
      KeyboardInterrupt: a signal has ended the run.
    """
    names = list(names)
    every = [records.Unit(name, n) for n in range(config.seeds) for name in names]
    missing = [unit for unit in every if out.finished(unit) is None]
    splits_of = functools.cache(functools.partial(draw_splits, config, source))
    with signals.deferred() as interrupted, _display(config) as progress:
        done = len(every) - len(missing)
        bar = progress.add_task("", total=len(every), completed=done)
        agreed = processes.Agreed(interrupted)
        say = functools.partial(_say, progress) if out.writes else _be_silent
        say(f"{out.workdir}: {done} of {len(every)} runs have finished")

        def note(text: str) -> None:
            progress.update(bar, description=text)
            agreed.ask()  # Here all processes are at the same step.

        for units in _groups(missing, None if _one_by_one(config) else program):
            if agreed():
                raise KeyboardInterrupt
            learn([Job(u, splits_of(u.seed), note, agreed) for u in units])
            progress.advance(bar, len(units))
            for unit in units:
                done += 1
                line = _in_short(config, unit, out.finished(unit))
                say(f"{done}/{len(every)} {line}")


@contextlib.contextmanager
def reporting(
    out: records.Run, report: Callable[[], Mapping[str, Any]]
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Around the runs of an experiment: it reports on them, also where it is stopped.

    Args:
      out: the run directory.
      report: writes table.md and the summary of what has finished, and returns the
        summary.

    Returns:
      `() -> summary`, to be called after the block.

    Raises:
      FloatingPointError: by the function, if every run has failed.
      KeyboardInterrupt: it was stopped; the table is there, and says so.
    """

    def whole() -> dict[str, Any]:
        summary, failures = dict(report()), out.failures()
        if failures and len(failures) == len(out.units()):
            name, why = next(iter(failures.items()))
            raise FloatingPointError(
                f"all {len(failures)} runs have failed, {name} since {why}"
            )
        return summary

    try:
        yield whole
    except KeyboardInterrupt:
        if out.writes and len(out.units()) > len(out.failures()):
            summary = report()
            partial = "This table is partial: the run was stopped before its end."
            table = (out.workdir / "table.md").read_text(encoding="utf-8")
            out.write_text("table.md", f"{partial}\n\n{table}")
            out.write_summary({**summary, "partial": True})
            print(partial, flush=True)
        raise


def _one_by_one(config: TaskConfig) -> bool:
    """On CPU runs that are vmapped are slower than one after another."""
    return config.runs_at_once == 1 or (
        config.runs_at_once == 0 and jax.default_backend() == "cpu"
    )


def _groups(
    units: Sequence[records.Unit], program: Callable[[str], object] | None
) -> list[list[records.Unit]]:
    if program is None:
        return [[unit] for unit in units]
    found: dict[object, list[records.Unit]] = {}
    for unit in units:
        found.setdefault(program(unit.method), []).append(unit)
    return list(found.values())


def learn(
    config: TaskConfig,
    out: records.Run,
    plans: Mapping[str, Variant],
    conclude: Conclude,
    jobs: Sequence[Job],
    statistics: Statistics = lambda state: {},
) -> None:
    """Trains units of one program, and records what they learned and cost.

    As many are trained at once as `--runs_at_once` says or as fit into the memory.

    Args:
      config: the flags.
      out: where measurements and results are recorded.
      plans: methods and settings, by the name of the units.
      conclude: further results of a trained unit.
      jobs: units of one program.
      statistics: further measurements of a state in training.
    """
    method, size = plans[jobs[0].unit.method].method, 1

    def begin(job: Job) -> tuple[Job, Session, Any]:
        session = open_session(config, out, method, job, statistics)
        make = functools.partial(
            method.init,
            jax.random.key(job.unit.seed),
            job.splits.train,
            plans[job.unit.method].settings,
        )
        return job, session, session.begin(make, method.state)

    def position(member: tuple[Job, Session, Any]) -> int:
        return member[1].ledger.taken + int(method.state(member[2]).step)

    while jobs:
        members = [begin(jobs[0])]
        if len(jobs) > 1:
            size = _how_many(config, method, *members[0], len(jobs))
        members += [begin(job) for job in jobs[1:size]]
        jobs = jobs[size:]
        # One that had to go back to an earlier checkpoint is behind the others.
        for _, together in itertools.groupby(sorted(members, key=position), position):
            _train(out, method, conclude, list(together))


def _how_many(
    config: TaskConfig,
    method: Method,
    job: Job,
    session: Session,
    begun: Any,
    left: int,
) -> int:
    """How many of the runs that are left of a method are trained at once.

    Where there are more runs than devices to share them out, every device has as many.
    """
    del session
    if method.run is None:
        return 1
    if config.runs_at_once:
        return config.runs_at_once
    need = train.estimate_memory(
        method.run, method.state(begun), job.splits.train, config.batch_size
    )
    room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    width = run_width(config)
    each = max(int(min(_SHARE * room / need, _MOST / width)), 1)
    size = min(each * width, left)
    return size - size % width if size > width else size


def _train(
    out: records.Run,
    method: Method,
    conclude: Conclude,
    members: Sequence[tuple[Job, Session, Any]],
) -> None:
    """Trains units that stand at one step, to their end."""
    jobs, sessions, begun = zip(*members, strict=True)
    labelled, failure = [job.splits.train for job in jobs], ""
    try:
        states = method.fit(sessions, begun, labelled)
    except FloatingPointError as error:
        failure = str(error)
    finally:
        for session in sessions:
            session.wait()
    for number, (job, session) in enumerate(zip(jobs, sessions, strict=True)):
        if failure or train.has_failed(states[number]):
            out.fail(job.unit, failure or train.failure(states[number]))
            continue
        state = states[number]
        try:
            found = judge(method, state, job.splits) | {
                "training_macs": session.ledger.spent,
                "seconds": session.seconds / len(jobs),
            }
        except FloatingPointError as error:
            out.fail(job.unit, str(error))
            continue
        out.finish(job.unit, found | dict(conclude(job, state)))


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
            counts = method.settle(state, job.splits.train)
            headline = _headline(method.predict(counts, monitor))
            values["monitor_accuracy"] = accuracy(headline, monitor)
        return values

    return Session(config, out, job.unit, measure, job.note, job.interrupted)


def judge(method: Judged, state: TrainState, splits: Splits) -> dict[str, float]:
    """What the table says of a trained state: its quality, its size, its cost.

    Raises:
      FloatingPointError: it predicts what is not finite, such as after updates that
        were large, or were skipped.
    """
    outputs = method.predict(state, splits.judge)
    check_finite(outputs, "predictions", state)
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


def _in_short(
    config: TaskConfig, unit: records.Unit, found: Mapping[str, Any] | None
) -> str:
    """A line on a unit: its accuracy at the end of its last part, or why it failed."""
    if found is None or "failed" in found:
        return f"{unit.name} failed: {(found or {}).get('failed', 'no result')}"
    parts = found.get("rounds") or found.get("stages") or [found]
    judged = "validation" if config.validation_fraction else "test"
    accuracy, seconds = (parts[-1][key] for key in ("accuracy", "seconds"))
    return f"{unit.name}: {100 * accuracy:.2f} % {judged} accuracy, {seconds:.1f} s"


def _say(progress: Progress, line: str) -> None:
    """Prints a line above the display; at once, wherever the output goes."""
    if not progress.disable and progress.console.is_terminal:
        progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
    else:
        print(line, flush=True)


def _be_silent(line: str) -> None:
    del line


def _display(config: TaskConfig) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        disable=not config.progress or not sys.stdout.isatty(),
        transient=True,
    )
