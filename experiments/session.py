"""Units in training: what they have measured and spent, and where they go on."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from d2sparse import records, schema, train
from d2sparse.checkpoint import Checkpoints
from d2sparse.train import Data, Indices, Logs, Runner, TrainState
from d2sparse.train.loops import Stretch, take_steps
from d2sparse.tree import PyTree
from experiments.task import TaskConfig

PATIENCE = 60.0  # Seconds between two checkpoints, where no number of steps is given.

Around = Callable[[TrainState], PyTree]
Measure = Callable[[TrainState], Mapping[str, Any]]


class Interrupted(Protocol):
    """Whether a signal asks for the end."""

    def __call__(self) -> bool:
        """The answer."""


@dataclasses.dataclass
class Ledger:
    """What one unit has measured and spent.

    Attributes:
      taken: steps of all its trainings up to the last report.
      last: step of the present training at the last report.
      spent: multiply-accumulates per example of a batch, summed over steps.
      seconds: of training, over all attempts.
      lines: measurements in metrics.jsonl.
      digest: what `records.Run.measured` says of them.
      rounds: results of the parts of it that have finished.
      logs: metrics of the steps since the last report.
      means: metrics of the last report.
      score: what the last measurement says of the state, None where nothing does.
    """

    taken: int = 0
    last: int = 0
    spent: float = 0.0
    seconds: float = 0.0
    lines: int = 0
    digest: str = ""
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    logs: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    means: dict[str, float] = dataclasses.field(default_factory=dict)
    score: float | None = None


class Session:
    """One unit in training, from its last checkpoint or afresh, to its end.

    It trains, reports, counts what that costs, and saves; a unit that was interrupted
    anywhere goes on to the same bits.

    Attributes:
      unit: which method and seed.
      ledger: what it has measured and spent.
      config: how often there are reports and checkpoints.
      interrupted: whether to save and stop.
    """

    def __init__(
        self,
        config: TaskConfig,
        out: records.Run,
        unit: records.Unit,
        measure: Measure,
        note: Callable[[str], None],
        interrupted: Interrupted,
    ) -> None:
        """Opens the unit; nothing is read or written yet.

        Args:
          config: how often there are reports and checkpoints.
          out: where measurements go.
          unit: which method and seed.
          measure: what is recorded of a state besides the metrics of its steps.
          note: called with what is going on.
          interrupted: whether to save and stop.
        """
        self.unit, self.ledger = unit, Ledger()
        self.config, self._out, self._note = config, out, note
        self._measure, self.interrupted = measure, interrupted
        self._checkpoints = Checkpoints(
            out.workdir / "checkpoints" / unit.name,
            about=records.identity(config) | {"unit": unit.name},
            keep=config.keep_checkpoints,
        )
        self._saved = self._began = time.perf_counter()

    def begin(self, make: Callable[[], PyTree], state: Around) -> PyTree:
        """What is to be trained: restored, or made and measured.

        Args:
          make: makes it afresh.
          state: the training state in it.

        Raises:
          ValueError: the checkpoint is not one of this unit, or does not go with what
            has been measured.
        """
        self._note(f"{self.unit.name}, compiling")
        fresh = make()
        found = self._checkpoints.restore(like=fresh)
        if found is None:
            self._out.start(self.unit)
            self._log(0, state(fresh), {})
            return fresh
        try:
            self.ledger = schema.parse(found.notes, Ledger)
            step = self._position(state(found.state))
            if found.step != step:
                raise ValueError(f"its state stands at step {step}")
        except ValueError as error:
            raise ValueError(
                f"the checkpoint of step {found.step} of {self.unit.name} was not "
                f"written by this version of the code: {error}; remove checkpoints/"
                f"{self.unit.name} to begin the unit anew"
            ) from None
        self._out.start(self.unit, self.ledger.lines, self.ledger.digest)
        return found.state

    def train(
        self,
        run: Runner,
        state: TrainState,
        data: Data,
        steps: int,
        around: Around = lambda state: state,
        indices: Indices | None = None,
    ) -> TrainState:
        """Trains up to a step, see `train_together`."""
        return train_together([self], run, [state], [data], steps, [around], indices)[0]

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          OSError: it could not be written.
        """
        self._checkpoints.wait()

    @property
    def seconds(self) -> float:
        """Time of training so far, over all attempts."""
        return self.ledger.seconds + time.perf_counter() - self._began

    def report(self, step: int, state: TrainState, logs: dict[str, float]) -> None:
        """Records the means since the last report, and what the steps have cost."""
        ledger, taken = self.ledger, step - self.ledger.last
        ledger.spent += taken * logs.pop("macs", 0.0)
        ledger.taken += taken
        ledger.last, ledger.logs, ledger.means = step, {}, dict(logs)
        self._log(ledger.taken, state, logs)

    def save(self, state: TrainState, around: Around, logs: Logs) -> None:
        """Saves a checkpoint if it is due, or if this is the end of the unit."""
        now, stopped = time.perf_counter(), train.has_failed(state)
        due = self.config.checkpoint_every or now - self._saved > PATIENCE
        if not (due or stopped or self.interrupted()):
            return
        self._saved, state = now, train.last_good(state)
        self.ledger.logs = {k: np.asarray(v).tolist() for k, v in logs.items()}
        notes = dataclasses.asdict(self.ledger) | {"seconds": self.seconds}
        position = self._position(state)
        self._checkpoints.save(position, around(state), notes, self.ledger.score)

    def _position(self, state: TrainState) -> int:
        """Steps of all trainings of the unit."""
        return self.ledger.taken + int(state.step) - self.ledger.last

    def _log(self, step: int, state: TrainState, logs: dict[str, float]) -> None:
        values = logs | dict(self._measure(state))
        score = values.get("monitor_accuracy")
        self.ledger.score = None if score is None else float(score)
        self._out.log(self.unit, step, values)
        self.ledger.lines += 1
        self.ledger.digest = self._out.measured(self.unit)
        self._note(f"{self.unit.name}, step {step}")


def train_together(
    sessions: Sequence[Session],
    run: Runner,
    states: Sequence[TrainState],
    data: Sequence[Data],
    steps: int,
    arounds: Sequence[Around],
    indices: Indices | None = None,
) -> list[TrainState]:
    """Trains several units up to a step, in one program, counting steps and costs.

    Args:
      sessions: of the units; they stand at one step.
      run: a runner whose metrics may hold what a step costs, "macs".
      states: where to start; they are used up.
      data: training data.
      steps: the step to stop before.
      arounds: what has to be saved of a unit when its training stands at a state.
      indices: which examples the steps are trained on, see `Stretch`; where they are
        given, there is one report, at the end.

    Raises:
      FloatingPointError: no unit is left whose updates have all been finite; the states
        before the others are saved.
      KeyboardInterrupt: it was asked to stop; the states are saved.
    """
    first, alone = sessions[0], len(sessions) == 1
    for session, state in zip(sessions, states, strict=True):
        if not session.ledger.logs:
            session.ledger.last = int(state.step)
    pending = [session.ledger.logs for session in sessions]

    def split(state: TrainState) -> list[TrainState]:
        state = train.bring(state)
        return [state] if alone else train.unstack_runs(state)

    def report(step: int, state: TrainState, logs: dict[str, Any]) -> None:
        for number, (session, own) in enumerate(
            zip(sessions, split(state), strict=True)
        ):
            session.report(step, own, {k: _of(v, number) for k, v in logs.items()})

    def save(state: TrainState, logs: Logs) -> None:
        owns = zip(sessions, split(state), arounds, strict=True)
        for number, (session, own, around) in enumerate(owns):
            columns = {
                k: [_of(v, number) for v in values] for k, values in logs.items()
            }
            session.save(own, around, columns)

    end = take_steps(
        run,
        states[0] if alone else train.stack_runs(states),
        data[0] if alone else train.stack_runs(data),
        Stretch(
            steps,
            first.config.batch_size,
            first.config.report_every if indices is None else steps,
            report,
            save,
            first.config.checkpoint_every or first.config.report_every,
            pending[0] if alone else _merged(pending),
            first.interrupted,
            indices,
        ),
    )
    return split(end)


def _of(value: Any, number: int) -> float:
    """The part of one of the runs; of a run alone, everything."""
    return float(np.ravel(value)[number if np.ndim(value) else 0])


def _merged(logs: Sequence[Mapping[str, list[float]]]) -> dict[str, list[Any]]:
    """Metrics of several runs, step by step."""
    return {name: list(np.array([own[name] for own in logs]).T) for name in logs[0]}
