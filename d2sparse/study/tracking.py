"""One run in training: what it has measured and spent, and where it resumes."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from d2sparse import records, schema, train
from d2sparse.checkpoint import Checkpoints
from d2sparse.records.encoding import to_json
from d2sparse.study.flags import Config
from d2sparse.train import Data, Logs, Program, Progress, Watch

PATIENCE = 60.0  # Seconds between two checkpoints, where no number of steps is given.

Measure = Callable[[Progress], Mapping[str, Any]]
Judge = Callable[[Progress, str], Mapping[str, Any]]


@dataclasses.dataclass
class Account:
    """What a run has measured and spent; a checkpoint stores it.

    Attributes:
      taken: steps of all phases up to the last report.
      last: step of the present state at the last report.
      phase: the phase the run is in.
      spent: multiply-accumulates of its steps, per example of a batch.
      seconds: of training, over all attempts.
      lines: measurements in metrics.jsonl.
      digest: of these lines, see `records.Run.measured`.
      parts: results of the titled phases that have ended.
      logs: metrics of the steps since the last report.
      means: metrics of the last report.
      score: accuracy outside of the budget at the last report, if there is any.
      failure: why it has no results, empty where it has.
    """

    taken: int = 0
    last: int = 0
    phase: int = 0
    spent: float = 0.0
    seconds: float = 0.0
    lines: int = 0
    digest: str = ""
    parts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    logs: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    means: dict[str, float] = dataclasses.field(default_factory=dict)
    score: float | None = None
    failure: str = ""


@dataclasses.dataclass
class Tracker:
    """A run in training, from its last checkpoint or from its start, to its end.

    It reports, counts costs and saves; a run that is interrupted resumes to the same
    bits.

    Attributes:
      unit: the run.
      config: how often there are reports and checkpoints.
      out: where measurements go.
      note: called with what is going on.
      interrupted: whether to save and stop.
      measure: progress -> what is recorded besides the metrics of the steps.
      judge: (progress, title) -> results of a titled phase that has ended.
      account: what the run has measured and spent.
    """

    unit: records.Unit
    config: Config
    out: records.Run
    note: Callable[[str], None]
    interrupted: Callable[[], bool]
    measure: Measure = lambda progress: {}
    judge: Judge = lambda progress, title: {}
    account: Account = dataclasses.field(default_factory=Account)

    def __post_init__(self) -> None:
        """Opens the checkpoints; nothing is read or written yet."""
        self._checkpoints = Checkpoints(
            self.out.workdir / "checkpoints" / self.unit.name,
            about=records.identity(self.config) | {"unit": self.unit.name},
            keep=self.config.keep_checkpoints,
        )
        self._saved = self._began = time.perf_counter()

    def begin(
        self, program: Program, data: Data, settings: Mapping[str, Any], key: Any
    ) -> Progress:
        """The run at its last checkpoint; without one at its start, and measured.

        Raises:
          ValueError: the checkpoint is not one of this run, or does not go with what
            has been measured.
        """
        self.note(f"{self.unit.name}, compiling")

        def form(notes: Mapping[str, Any]) -> Progress:
            phase = notes.get("phase")  # What it has to be is checked with the rest.
            number = phase if isinstance(phase, int) else 0
            return program.form(number, data, settings)

        restored = self._checkpoints.restore(form=form)
        if restored is None:
            self.out.start(self.unit)
            progress = program.init(key, data, settings)
            self._log(0, progress, {})
            return progress
        try:
            self.account = schema.parse(restored.notes, Account)
            position = self._position(restored.state)
            if restored.step != position:
                raise ValueError(f"its state stands at step {position}")
        except ValueError as error:
            raise ValueError(
                f"the checkpoint of step {restored.step} of {self.unit.name} was not "
                f"written by this version of the code: {error}; remove checkpoints/"
                f"{self.unit.name} to begin the run anew"
            ) from None
        self.out.start(self.unit, self.account.lines, self.account.digest)
        progress = restored.state
        return progress

    @property
    def watch(self) -> Watch:
        """What the loop of the training tells, and asks."""
        config = self.config
        return Watch(
            every=config.report_every,
            report=self.report,
            save_every=config.checkpoint_every or config.report_every,
            save=self.save,
            begun=self._enter,
            ended=self._end_part,
            interrupted=self.interrupted,
            logs=self.account.logs,
        )

    @property
    def seconds(self) -> float:
        """Time of training so far, over all attempts."""
        return self.account.seconds + time.perf_counter() - self._began

    def spent(self, progress: Progress) -> float:
        """Multiply-accumulates per example of a batch, those between steps included."""
        return self.account.spent + float(progress.memory.get("macs", 0.0))

    def report(self, progress: Progress, logs: dict[str, float]) -> None:
        """Records the means since the last report, and what the steps have cost."""
        if self._has_failed(progress):  # Others of its group go on.
            return
        account, step = self.account, int(progress.state.step)
        taken = step - account.last
        account.spent += taken * logs.pop("macs", 0.0)
        account.taken += taken
        account.last, account.logs, account.means = step, {}, dict(logs)
        self._log(account.taken, progress, logs)

    def save(self, progress: Progress, logs: Logs) -> None:
        """Saves a checkpoint if it is due, or if this is the end of the run."""
        now, failed = time.perf_counter(), self._has_failed(progress)
        due = self.config.checkpoint_every or now - self._saved > PATIENCE
        if not (due or failed or self.interrupted()):
            return
        progress = progress._replace(state=train.last_good(progress.state))
        self._saved, account = now, self.account
        account.logs = {name: np.asarray(v).tolist() for name, v in logs.items()}
        account.phase = int(progress.phase)
        notes = dataclasses.asdict(account) | {"seconds": self.seconds}
        position = self._position(progress)
        self._checkpoints.save(position, progress, notes, account.score)

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          OSError: it could not be written.
        """
        self._checkpoints.wait()

    def _enter(self, progress: Progress) -> None:
        if not self.account.logs:  # Else it resumes between two reports.
            self.account.last = int(progress.state.step)

    def _end_part(self, progress: Progress, title: str) -> None:
        try:
            self.account.parts.append(to_json(self.judge(progress, title)))
        except FloatingPointError as error:  # Others of its group go on.
            self.account.failure = self.account.failure or str(error)

    def _has_failed(self, progress: Progress) -> bool:
        failed = train.has_failed(progress.state)
        if failed:
            self.account.failure = train.failure(progress.state)
        return failed

    def _position(self, progress: Progress) -> int:
        """Steps of all phases."""
        return self.account.taken + int(progress.state.step) - self.account.last

    def _log(self, step: int, progress: Progress, logs: Mapping[str, float]) -> None:
        values = {**logs, **self.measure(progress)}
        score = values.get("monitor_accuracy")
        self.account.score = None if score is None else float(score)
        self.out.log(self.unit, step, values)
        self.account.lines += 1
        self.account.digest = self.out.measured(self.unit)
        self.note(f"{self.unit.name}, step {step}")
