"""An open run directory: its units, what they measure and what they find."""

import dataclasses
import json
import math
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike

from d2sparse import disk, schema
from d2sparse.checks import optional
from d2sparse.records import files
from d2sparse.records.encoding import to_json
from d2sparse.records.reading import (
    MEND,
    METRICS,
    NAMED,
    Failed,
    Seal,
    Unit,
    checked_lines,
    digest_of,
    lines_of,
    measurements,
    read_sealed,
    result_files,
    unit_of,
)

with optional(__name__):
    from matplotlib.figure import Figure
    from tensorboardX import SummaryWriter


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run directory; made by `open_run`. Threads may share it.

    Attributes:
      workdir: the directory.
      writes: whether this process writes; in others nothing comes of it.
      form: what the results of a unit have to be.
      lock: kept as long as the run is.
    """

    workdir: Path
    writes: bool = True
    form: Any = dict[str, Any]
    lock: disk.Lock | None = dataclasses.field(default=None, repr=False, compare=False)
    _writers: dict[Unit, SummaryWriter] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _measured: dict[Unit, list[str]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _turn: threading.Lock = dataclasses.field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    def check(self) -> None:
        """Checks everything that is read later.

        Raises:
          ValueError: a file is damaged, or does not go with another one.
          OSError: a file cannot be read for now, such as without permission.
        """
        for unit in self.units():
            self.finished(unit)
        checked_lines(self.workdir)

    def start(self, unit: Unit, lines: int = 0, digest: str | None = None) -> None:
        """Begins a unit, or resumes it after its first lines of measurements.

        Args:
          unit: what is measured from now on.
          lines: how many lines of an interrupted attempt at it still hold; the others
            are forgotten.
          digest: what `measured` said of them.

        Raises:
          ValueError: there are not as many lines, one is damaged, or they are others.
        """
        if not self.writes:
            return
        with self._turn:
            own = self._keep(unit, lines, digest)
        events = self.workdir / "tensorboard" / unit.name
        shutil.rmtree(events, ignore_errors=True)
        self._writers[unit] = SummaryWriter(str(events))
        for fields in own:
            values = {k: v for k, v in fields.items() if k not in NAMED}
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
        path, line = self.workdir / METRICS, json.dumps(to_json({**fields, **values}))
        with self._turn, files.named(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._measured[unit].append(line + "\n")
        self._show(unit, int(step), values)

    def measured(self, unit: Unit) -> str:
        """A digest of the lines of a unit that has been started, for its checkpoint."""
        return digest_of(self._measured[unit]) if self.writes else ""

    def finish(self, unit: Unit, results: Mapping[str, Any]) -> None:
        """Records the results of a unit, which is not repeated from now on.

        Args:
          unit: what has finished.
          results: numbers, strings, arrays and mappings or sequences of these.
        """
        if writer := self._writers.pop(unit, None):
            writer.close()
        if "seal" in results:
            raise ValueError("the result 'seal' needs another name")
        if self.writes:
            lines = self._measured.pop(unit, None)
            if lines is None:
                lines = lines_of(self.workdir).get(unit.name, [])
            found = to_json(results)
            seal = Seal(unit.name, digest_of(lines), digest_of(found))
            files.write_json(self._results(unit), found | {"seal": seal._asdict()})
        meet(f"{unit.name} is written")

    def finished(self, unit: Unit) -> dict[str, Any] | None:
        """The results of a unit as `finish` got them, or None if it has to run.

        Arrays and tuples come back as lists, and what was not finite as NaN.

        Raises:
          ValueError: the file of the unit is damaged, or is not its own.
        """
        path = self._results(unit)
        if not path.exists():
            return None
        results = read_sealed(path)[1]
        form = Failed if "failed" in results else self.form
        try:
            schema.parse(results, form)
        except ValueError as error:
            raise ValueError(f"{path} is damaged, {error}; {MEND}") from None
        return results

    def units(self) -> list[Unit]:
        """All units that have come to their end, with results or without, by name.

        Raises:
          ValueError: there is another file among theirs.
        """
        return [unit_of(path) for path in result_files(self.workdir)]

    def fail(self, unit: Unit, why: str) -> None:
        """Records that a unit has no results, and why; it is not repeated either."""
        self.finish(unit, {"failed": why})

    def failures(self) -> dict[str, str]:
        """Why units have failed, by their names.

        Raises:
          ValueError: the file of a unit is damaged.
        """
        results = {unit.name: self.finished(unit) or {} for unit in self.units()}
        return {name: own["failed"] for name, own in results.items() if "failed" in own}

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

    def _keep(self, unit: Unit, lines: int, digest: str | None) -> list[dict[str, Any]]:
        """Forgets the lines of a unit after its first ones, which it returns."""
        path = self.workdir / METRICS
        if not lines and _is_new_in(path, unit):
            self._measured[unit] = []
            return []
        kept: list[str] = []
        own: list[str] = []
        shown: list[dict[str, Any]] = []
        for line, fields in measurements(path):
            if fields["unit"] != unit.name:
                kept.append(line)
            elif len(own) < lines:
                kept.append(line)
                own.append(line)
                shown.append(fields)
        if len(own) < lines or digest not in (None, digest_of(own)):
            raise ValueError(
                f"expected {lines} lines of {unit.name} in {path}, as its checkpoint "
                f"says, got {len(own)} or others; remove checkpoints/{unit.name} to "
                "begin the unit anew"
            )
        self._measured[unit] = own
        # Also without the end of a line that a crash has cut.
        files.write_text(path, "".join(kept))
        return shown

    def _show(self, unit: Unit, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writers[unit].add_scalar(name, value, step)

    def _results(self, unit: Unit) -> Path:
        return self.workdir / "units" / f"{unit.name}.json"


def _is_new_in(path: Path, unit: Unit) -> bool:
    """Whether lines that are all whole do not name a unit; reading each takes long."""
    text = files.read_text(path) if path.exists() else ""
    return text.endswith("\n") and unit.name not in text


def meet(why: str) -> None:
    """Waits for the other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(why)


def _scalar(name: str, value: ArrayLike) -> float:
    if np.ndim(value) != 0:
        raise ValueError(
            f"metric {name} must be a scalar, got shape {np.shape(value)}; log each"
            " entry under a name of its own"
        )
    return float(np.asarray(value))
