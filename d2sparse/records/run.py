"""An open run directory: its units, what they measure and what they find."""

import collections
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from d2sparse import disk, schema
from d2sparse.records import files
from d2sparse.records.encoding import from_json, read_json, to_json

CONFIG, METRICS = "config.json", "metrics.jsonl"


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


class _Measurement(TypedDict):
    """What every line of measurements has, besides the metrics."""

    unit: str
    method: str
    seed: int
    step: int


class _Seal(NamedTuple):
    """What the results of a unit are sealed with.

    Attributes:
      unit: its name.
      metrics: `_digest` of its lines of measurements.
      results: `_digest` of the other fields of its file.
    """

    unit: str
    metrics: str
    results: str


class _Sealed(TypedDict):
    """The results of a unit on file; they have further fields."""

    seal: _Seal


class _Failed(NamedTuple):
    """The results of a unit that has none."""

    failed: str


_NAMED = _Measurement.__required_keys__
_MEND = "remove that file to run the unit again"


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run directory; made by `open_run`.

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

    def check(self) -> None:
        """Checks everything that is read later.

        Raises:
          ValueError: a file is damaged, or does not go with another one.
          OSError: a file cannot be read for now, such as without permission.
        """
        for unit in self.units():
            self.finished(unit)
        _checked_lines(self.workdir)

    def start(self, unit: Unit, lines: int = 0, digest: str | None = None) -> None:
        """Begins a unit, or goes on with it after its first lines of measurements.

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
        path = self.workdir / METRICS
        kept: list[str] = []
        own: list[str] = []
        shown: list[dict[str, Any]] = []
        for line, fields in _measurements(path):
            if fields["unit"] != unit.name:
                kept.append(line)
            elif len(own) < lines:
                kept.append(line)
                own.append(line)
                shown.append(fields)
        if len(own) < lines or digest not in (None, _digest(own)):
            raise ValueError(
                f"expected {lines} lines of {unit.name} in {path}, as its checkpoint "
                f"says, got {len(own)} or others; remove checkpoints/{unit.name} to "
                "begin the unit anew"
            )
        self._measured[unit] = own
        # Also without the end of a line that a crash has cut.
        files.write_text(path, "".join(kept))
        events = self.workdir / "tensorboard" / unit.name
        shutil.rmtree(events, ignore_errors=True)
        self._writers[unit] = SummaryWriter(str(events))
        for fields in shown:
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
        path, line = self.workdir / METRICS, json.dumps(to_json({**fields, **values}))
        with files.named(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._measured[unit].append(line + "\n")
        self._show(unit, int(step), values)

    def measured(self, unit: Unit) -> str:
        """A digest of the lines of a unit that has been started, for its checkpoint."""
        return _digest(self._measured[unit]) if self.writes else ""

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
                lines = _lines_of(self.workdir).get(unit.name, [])
            found = to_json(results)
            seal = _Seal(unit.name, _digest(lines), _digest(found))
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
        results = _read_sealed(path)[1]
        form = _Failed if "failed" in results else self.form
        try:
            schema.parse(results, form)
        except ValueError as error:
            raise ValueError(f"{path} is damaged, {error}; {_MEND}") from None
        return results

    def units(self) -> list[Unit]:
        """All units that have come to their end, with results or without, by name.

        Raises:
          ValueError: there is another file among theirs.
        """
        return [_unit_of(path) for path in _result_files(self.workdir)]

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
      ValueError: there is no run directory, a line is damaged, or lines of a finished
        unit are missing.
    """
    path = disk.local_path(workdir, "the run directory")
    if not (path / CONFIG).exists():
        kind = "which holds no config.json" if path.is_dir() else "which does not exist"
        raise ValueError(
            f"expected a run directory, got {path}, {kind}; check the path"
        )
    return _checked_lines(path)


def meet(why: str) -> None:
    """Waits for the other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(why)


def _result_files(workdir: Path) -> list[Path]:
    return sorted((workdir / "units").glob("*.json"))


def _unit_of(path: Path) -> Unit:
    match = re.fullmatch(r"(.*)-seed(-?\d+)", path.stem)
    unit = Unit(match[1], int(match[2])) if match else None
    if unit is None or unit.name != path.stem:
        raise ValueError(
            f"expected results of units in {path.parent}, such as rigl-seed0.json, got "
            f"{path.name}; move it away"
        )
    return unit


def _read_sealed(path: Path) -> tuple[_Seal, dict[str, Any]]:
    """The seal of a unit, and the results under it."""
    text = files.read_text(path)
    seal: _Seal = read_json(text, _Sealed, str(path), _MEND)["seal"]
    found = {key: v for key, v in json.loads(text).items() if key != "seal"}
    if seal.unit != path.stem:
        raise ValueError(f"{path} is damaged, it holds results of {seal.unit}; {_MEND}")
    if seal.results != _digest(found):
        raise ValueError(f"{path} is damaged, it is not what was written; {_MEND}")
    results: dict[str, Any] = from_json(found)
    return seal, results


def _checked_lines(workdir: Path) -> list[dict[str, Any]]:
    """The measurements, of which those of finished units are all there."""
    # The seals come first: what finishes meanwhile has more lines than now.
    seals = {path: _read_sealed(path)[0] for path in _result_files(workdir)}
    found = _measurements(workdir / METRICS)
    lines = _by_unit(found)
    for path, seal in seals.items():
        if seal.metrics != _digest(lines.get(seal.unit, [])):
            raise ValueError(
                f"{workdir / METRICS} is damaged, its lines of {seal.unit} are not "
                f"those that were measured; restore it, or remove {path} to run the "
                "unit again"
            )
    return [fields for _, fields in found]


def _lines_of(workdir: Path) -> dict[str, list[str]]:
    return _by_unit(_measurements(workdir / METRICS))


def _by_unit(found: list[tuple[str, dict[str, Any]]]) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = collections.defaultdict(list)
    for line, fields in found:
        lines[fields["unit"]].append(line)
    return lines


def _measurements(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The complete lines of a file of measurements, as they stand and as fields."""
    if not path.exists():
        return []  # Before the first measurement.
    mend, found = "remove that line to go on", []
    for number, line in enumerate(files.complete_lines(path), 1):
        place = f"{path} line {number}"
        fields = read_json(line, _Measurement, place, mend)
        name = Unit(fields["method"], fields["seed"]).name
        metrics = {k: v for k, v in fields.items() if k not in _NAMED}
        try:
            schema.parse(metrics, dict[str, float])
        except ValueError as error:
            raise ValueError(f"{place} is damaged, {error}; {mend}") from None
        if fields["unit"] != name:
            raise ValueError(f"{place} is damaged, its unit is not {name}; {mend}")
        found.append((line, fields))
    return found


def _digest(value: Any) -> str:
    """Of what JSON can hold, whatever the order of its fields."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _scalar(name: str, value: ArrayLike) -> float:
    if np.ndim(value) != 0:
        raise ValueError(
            f"metric {name} must be a scalar, got shape {np.shape(value)}; log each"
            " entry under a name of its own"
        )
    return float(np.asarray(value))
