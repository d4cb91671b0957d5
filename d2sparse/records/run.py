"""An open run directory: its units, what they measure and what they find."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from d2sparse.records import files
from d2sparse.records.encoding import read_fields, to_json


class Unit(NamedTuple):
    """The part of a run that is repeated or not repeated as a whole.

    Attributes:
      method: what is trained, such as "rigl".
      seed: of everything random in it.
    """

    method: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files, such as "rigl-seed0"."""
        return f"{self.method}-seed{self.seed}"


_NAMED = frozenset({"unit", *Unit._fields, "step"})  # What every measurement has.


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run directory; made by `open_run`.

    Attributes:
      workdir: the directory.
      writes: whether this process writes; in others nothing comes of it.
    """

    workdir: Path
    writes: bool = True
    _writers: dict[Unit, SummaryWriter] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def start(self, unit: Unit, lines: int = 0) -> None:
        """Begins a unit, or goes on with it after its first lines of measurements.

        Args:
          unit: what is measured from now on.
          lines: how many lines of an interrupted attempt at it still hold; the others
            are forgotten.

        Raises:
          ValueError: there are not as many lines, or one is damaged.
        """
        if not self.writes:
            return
        path = self.workdir / "metrics.jsonl"
        kept: list[str] = []
        own: list[dict[str, Any]] = []
        for line, fields in _measurements(path):
            if fields["unit"] != unit.name:
                kept.append(line)
            elif len(own) < lines:
                kept.append(line)
                own.append(fields)
        if len(own) < lines:
            raise ValueError(
                f"expected {lines} lines of {unit.name} in {path}, as its checkpoint "
                f"says, got {len(own)}; remove that checkpoint to begin the unit anew"
            )
        # Also without the end of a line that a crash has cut.
        files.write_text(path, "".join(kept))
        events = self.workdir / "tensorboard" / unit.name
        shutil.rmtree(events, ignore_errors=True)
        self._writers[unit] = SummaryWriter(str(events))
        for fields in own:
            values = {k: v for k, v in fields.items() if k not in _NAMED}
            self._show(unit, fields["step"], values)

    def log(self, unit: Unit, step: int, metrics: Mapping[str, ArrayLike]) -> None:
        """Appends one line of measurements, and the same scalars for TensorBoard.

        The line holds the fields unit, method, seed and step, then the metrics. It is
        on disk when the call returns.

        Args:
          unit: what was measured; it has been started.
          step: after how many optimiser steps.
          metrics: scalars by name. What is not finite is written as null.

        Raises:
          ValueError: if a metric is not a scalar or has the name of another field, or
            the unit has not been started.
        """
        if not self.writes:
            return
        if unit not in self._writers:
            raise ValueError(f"unit {unit.name} has not been started: call run.start")
        fields = {"unit": unit.name, **unit._asdict(), "step": int(step)}
        if clash := fields.keys() & metrics.keys():
            raise ValueError(f"the metrics {sorted(clash)} need other names")
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        path = self.workdir / "metrics.jsonl"
        with files.named(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json({**fields, **values})) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._show(unit, int(step), values)

    def finish(self, unit: Unit, results: Mapping[str, Any]) -> None:
        """Records the results of a unit, which is not repeated from now on.

        Args:
          unit: what has finished.
          results: numbers, strings, arrays and mappings or sequences of these.
        """
        if writer := self._writers.pop(unit, None):
            writer.close()
        if self.writes:
            files.write_json(self._results(unit), results)
        meet(f"{unit.name} is written")

    def finished(self, unit: Unit) -> dict[str, Any] | None:
        """The results of a unit as `finish` got them, or None if it has to run.

        Arrays and tuples come back as lists, and what was not finite as NaN.

        Raises:
          ValueError: the file of the unit is damaged.
        """
        path = self._results(unit)
        return _read_results(path) if path.exists() else None

    def units(self) -> list[Unit]:
        """All units that have come to their end, with results or without, by name."""
        names = [path.stem for path in (self.workdir / "units").glob("*.json")]
        parts = [name.rpartition("-seed") for name in sorted(names)]
        return [Unit(method, int(seed)) for method, _, seed in parts]

    def fail(self, unit: Unit, why: str) -> None:
        """Records that a unit has no results, and why; it is not repeated either."""
        self.finish(unit, {"failed": why})

    def failures(self) -> dict[str, str]:
        """Why units have failed, by their names.

        Raises:
          ValueError: the file of a unit is damaged.
        """
        found = {}
        for path in sorted((self.workdir / "units").glob("*.json")):
            results = _read_results(path)
            if "failed" in results:
                found[path.stem] = results["failed"]
        return found

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, the results of the whole run."""
        if self.writes:
            files.write_json(self.workdir / "summary.json", summary)

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file, such as table.md, into the run directory."""
        if self.writes:
            files.write_text(self.workdir / name, text)

    def save_figure(self, name: str, figure: Figure) -> None:
        """Writes a figure to figures/<name>.png."""
        path = self.workdir / "figures" / f"{name}.png"
        if self.writes:
            files.replace(path, lambda file: figure.savefig(file, format="png"))

    def _show(self, unit: Unit, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writers[unit].add_scalar(name, value, step)

    def _results(self, unit: Unit) -> Path:
        return self.workdir / "units" / f"{unit.name}.json"


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every measurement of a run, finished or not.

    Args:
      workdir: the run directory, which may be in use.

    Returns:
      One dictionary per line of metrics.jsonl, with NaN for what was not finite. An
      incomplete last line is left out.

    Raises:
      ValueError: a line is damaged.
    """
    path = Path(workdir).expanduser() / "metrics.jsonl"
    return [fields for _, fields in _measurements(path)]


def meet(why: str) -> None:
    """Waits for the other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(why)


def _read_results(path: Path) -> dict[str, Any]:
    mend = "remove that file to run the unit again"
    return read_fields(files.read_text(path), str(path), mend)


def _measurements(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The complete lines of a file of measurements, as they stand and as fields."""
    mend, found = "remove that line to go on", []
    for number, line in enumerate(files.complete_lines(path), 1):
        place = f"{path} line {number}"
        found.append((line, read_fields(line, place, mend, _NAMED)))
    return found


def _scalar(name: str, value: ArrayLike) -> float:
    if np.ndim(value) != 0:
        raise ValueError(
            f"metric {name} must be a scalar, got shape {np.shape(value)}; log each"
            " entry under a name of its own"
        )
    return float(np.asarray(value))
