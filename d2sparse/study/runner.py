"""Trains the runs of a comparison that have not finished: each once, resumable."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax

from d2sparse import records, train
from d2sparse.study import processes, signals
from d2sparse.study.display import in_short, shown
from d2sparse.study.flags import Config
from d2sparse.study.grid import Plan
from d2sparse.study.judging import judge, monitor_accuracy
from d2sparse.study.splits import DrawSplits, Splits
from d2sparse.study.tracking import Tracker
from d2sparse.study.trainings import run_width
from d2sparse.study.workers import Workers, count_workers, one_at_a_time
from d2sparse.train import Program, Progress, TrainState

_SHARE = 0.8  # Part of the memory that runs may take.
_MOST = 64  # Runs at once, where there is room for more.
_PROGRAMS = 32  # That are kept compiled at once.
_PAUSE = 0.1  # Seconds between two looks at a run that another one waits for.


class Finished(TypedDict):
    """What the results of every run hold; those of an experiment hold more."""

    method: str
    values: dict[str, Any]
    accuracy: float
    nll: float
    ece: float
    brier: float
    nonzeros: float
    zeros: float
    inference_macs: float
    relative_inference: float
    training_macs: float
    relative_macs: float
    seconds: float
    parts: list[dict[str, Any]]


class End(NamedTuple):
    """A run at its end, or at the end of a titled phase.

    Attributes:
      plan: how it is trained.
      seed: of everything random in it.
      title: of the phase; empty at the end of the run.
      program: of the phase.
      progress: where the training stands.
      state: what counts.
      splits: the data.
      means: metrics of the last report.
      out: the run directory.
    """

    plan: Plan
    seed: int
    title: str
    program: Program
    progress: Progress
    state: TrainState
    splits: Splits
    means: Mapping[str, float]
    out: records.Run


Examine = Callable[[End], Mapping[str, Any]]
Settings = Callable[[Plan, int, records.Run], Mapping[str, float] | None]
_Group = list[tuple[Plan, int]]  # Runs that one program can train at once.


class Runner(NamedTuple):
    """What the runs of a comparison share.

    Attributes:
      config: the flags.
      out: where measurements and results are recorded.
      draw_splits: data of a seed.
      examine: further results at the end of a run and of every titled phase.
      settings: (plan, seed, run directory) -> settings of a run besides those of its
        plan; None while they follow from a run before it that is under way; a
        FloatingPointError says why it cannot be trained.
    """

    config: Config
    out: records.Run
    draw_splits: DrawSplits
    examine: Examine = lambda end: {}
    settings: Settings = lambda plan, seed, out: {}


def run_plans(runner: Runner, plans: Sequence[Plan]) -> None:
    """Trains what has not finished yet, and records what it learned and cost.

    SIGINT and SIGTERM let the runs that are being trained save their states. On CPU
    runs are trained seed by seed, so that methods can be compared early, one for every
    core; on accelerators as many runs of one program at once as fit into the memory. Of
    many programs, some are trained with all seeds before others are compiled.

    Raises:
      KeyboardInterrupt: a signal has ended the run.
    """
    config, out = runner.config, runner.out
    every = [(plan, seed) for seed in range(config.seeds) for plan in plans]
    missing = [run for run in every if out.finished(unit_of(*run)) is None]
    done, total = len(every) - len(missing), len(every)
    with (
        signals.deferred() as interrupted,
        shown(config, done, total, out.writes) as display,
    ):
        agreed = processes.Agreed(interrupted)
        display.say(f"{out.workdir}: {done} of {total} runs have finished")
        groups = _groups(config, missing)
        workers = Workers(count_workers(config.workers, len(groups)), agreed)
        finished = one_at_a_time(display.finished)
        turns = runner._replace(
            draw_splits=one_at_a_time(runner.draw_splits),
            examine=one_at_a_time(runner.examine),
        )

        def note(text: str) -> None:
            display.note(text)
            agreed.ask()  # Here all processes are at the same step.

        def train_group(group: _Group) -> None:
            if workers.interrupted():
                raise KeyboardInterrupt
            _train_group(turns, group, note, workers.interrupted)
            for plan, seed in group:
                unit = unit_of(plan, seed)
                finished(in_short(judged(config), unit.name, out.finished(unit)))

        for number, part in enumerate(_parts(groups)):
            if number:
                jax.clear_caches()
            workers.share(train_group, part)


def unit_of(plan: Plan, seed: int) -> records.Unit:
    """The name of a run's files; what it is stands in them."""
    return records.Unit(plan.row.name, seed)


def judged(config: Config) -> str:
    """What the numbers were measured on."""
    return "validation" if config.validation_fraction else "test"


def _groups(config: Config, missing: _Group) -> list[_Group]:
    """Runs that one program can train at once."""
    on_cpu = jax.default_backend() == "cpu"
    if config.runs_at_once == 1 or (config.runs_at_once == 0 and on_cpu):
        return [[run] for run in missing]
    groups: dict[int, _Group] = {}
    for plan, seed in missing:
        groups.setdefault(id(plan.program.run), []).append((plan, seed))
    return list(groups.values())


def _parts(groups: Sequence[_Group]) -> list[list[_Group]]:
    """Groups in parts of a number of programs, which are dropped before the next part.

    A process that keeps thousands of compiled functions has no room left in its table
    of memory maps.
    """
    programs = dict.fromkeys(id(group[0][0].program.run) for group in groups)
    part_of = {program: n // _PROGRAMS for n, program in enumerate(programs)}
    parts: dict[int, list[_Group]] = {}
    for group in groups:
        parts.setdefault(part_of[id(group[0][0].program.run)], []).append(group)
    return list(parts.values())


class _Member(NamedTuple):
    """A run of a group."""

    plan: Plan
    seed: int
    splits: Splits
    tracker: Tracker


def _train_group(
    runner: Runner,
    runs: Sequence[tuple[Plan, int]],
    note: Callable[[str], None],
    interrupted: Callable[[], bool],
) -> None:
    """Trains runs of one program, as many at once as there is room for."""

    def begin(plan: Plan, seed: int) -> tuple[_Member, Progress]:
        tracker = Tracker(
            unit_of(plan, seed), plan.config, runner.out, note, interrupted
        )
        splits = runner.draw_splits(plan.config, seed)
        names = plan.program.training.settings
        settings = {
            **{name: plan.training.settings[name] for name in names},
            **given[unit_of(plan, seed)],
        }
        member = _Member(plan, seed, splits, tracker)
        tracker.measure = functools.partial(_measure, member)
        tracker.judge = functools.partial(_results, runner, member)
        data, key = splits.train, jax.random.key(seed)
        return member, tracker.begin(plan.program, data, settings, key)

    given = _settings_of(runner, runs, interrupted)
    rest = [run for run in runs if unit_of(*run) in given]
    while rest:
        group = [begin(*rest[0])]
        size = _how_many(runner.config, *group[0], len(rest))
        group += [begin(*run) for run in rest[1:size]]
        rest = rest[size:]
        # A run that has lost its last checkpoint is behind the others.
        for _, together in itertools.groupby(sorted(group, key=_place), _place):
            _train_together(runner, list(together))


def _settings_of(
    runner: Runner, runs: Sequence[tuple[Plan, int]], interrupted: Callable[[], bool]
) -> dict[records.Unit, Mapping[str, float]]:
    """The settings of the runs that can be trained; the others have failed."""
    given: dict[records.Unit, Mapping[str, float]] = {}
    for plan, seed in runs:
        try:
            while (own := runner.settings(plan, seed, runner.out)) is None:
                if interrupted():
                    raise KeyboardInterrupt
                time.sleep(_PAUSE)
            given[unit_of(plan, seed)] = own
        except FloatingPointError as error:
            runner.out.fail(unit_of(plan, seed), str(error))
    return given


def _place(begun: tuple[_Member, Progress]) -> tuple[int, int]:
    progress = begun[1]
    return int(progress.phase), int(progress.state.step)


def _train_together(runner: Runner, group: Sequence[tuple[_Member, Progress]]) -> None:
    """Trains runs that stand at one step of one phase, to their end."""
    members, begun = zip(*group, strict=True)
    program, failure = members[0].plan.program, ""
    ends: list[Progress] = []
    try:
        ends = train.fit_together(
            program,
            begun,
            [member.splits.train for member in members],
            [member.tracker.watch for member in members],
        )
    except FloatingPointError as error:
        failure = str(error)
    finally:
        for member in members:
            member.tracker.wait()
    for number, member in enumerate(members):
        unit, why = member.tracker.unit, member.tracker.account.failure or failure
        try:
            results = {} if why else _results(runner, member, ends[number], "")
        except FloatingPointError as error:
            why = str(error)
        if why:
            runner.out.fail(unit, why)
        else:
            parts = [_share(part, members) for part in member.tracker.account.parts]
            runner.out.finish(unit, {**_share(results, members), "parts": parts})


def _share(results: Mapping[str, Any], members: Sequence[_Member]) -> dict[str, Any]:
    """Results with a run's part of the time that its group has taken."""
    return {**results, "seconds": results["seconds"] / len(members)}


def _measure(member: _Member, progress: Progress) -> dict[str, Any]:
    """What is recorded of a run besides the metrics of its steps."""
    program = member.plan.program
    own = program.of(int(progress.phase))
    return {
        **own.training.measure(progress.state),
        **monitor_accuracy(program, progress, member.splits),
    }


def _results(
    runner: Runner, member: _Member, progress: Progress, title: str
) -> dict[str, Any]:
    """What a run has learned and cost, at its end or at that of a titled phase."""
    plan, tracker, program = member.plan, member.tracker, member.plan.program
    state = program.training.finish(progress, member.splits.train, program)
    spent = tracker.spent(progress)
    end = End(
        plan,
        member.seed,
        title,
        program,
        progress,
        state,
        member.splits,
        tracker.account.means,
        runner.out,
    )
    return {
        "method": plan.row.method,
        "values": dict(plan.row.values),
        "title": title,
        **judge(plan, program, state, member.splits),
        "training_macs": spent,
        "relative_macs": spent / plan.dense_training_macs,
        "seconds": tracker.seconds,
        **runner.examine(end),
    }


def _how_many(config: Config, member: _Member, progress: Progress, left: int) -> int:
    """How many of the runs that are left are trained at once.

    Where there are more runs than devices to share them out, every device has as many.
    """
    if left == 1 or config.runs_at_once:
        return config.runs_at_once or 1
    need = train.estimate_memory(
        member.plan.program.of(int(progress.phase)).run,
        progress.state,
        member.splits.train,
        config.batch_size,
    )
    room = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    width = run_width(config)
    each = max(int(min(_SHARE * room / need, _MOST / width)), 1)
    size = min(each * width, left)
    return size - size % width if size > width else size
