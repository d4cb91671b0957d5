"""Run directories: what an experiment was told, measured and found.

A run directory belongs to one configuration and holds

    config.json          the configuration
    metrics.jsonl        one line per measurement, in the order of measuring
    tensorboard/<unit>   the same measurements for TensorBoard
    units/<unit>.json    the results of a finished unit: one method with one seed
    checkpoints/<unit>   where an unfinished one goes on, see `d2sparse.checkpoint`
    summary.json         the results of the whole run, next to tables and figures

The same command with the same directory resumes: finished units are read back, and an
unfinished one goes on from its last checkpoint, or starts afresh where it has none.
Files appear whole or not at all.

In a run of several processes all of them make the same calls. The first one writes, and
all read what it has written: the directory is on a file system that they share.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from tabulate import tabulate
from tensorboardX import SummaryWriter


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
          ValueError: there are not as many lines.
        """
        if not self.writes:
            return
        path = self.workdir / "metrics.jsonl"
        everything = _complete_lines(path)
        own = [line for line in everything if json.loads(line)["unit"] == unit.name]
        if len(own) < lines:
            raise ValueError(
                f"expected {lines} lines of {unit.name} in {path}, as its checkpoint "
                f"says, got {len(own)}; remove that checkpoint to begin the unit anew"
            )
        others = [line for line in everything if json.loads(line)["unit"] != unit.name]
        # Also without the end of a line that a crash has cut.
        _write(path, "".join(others + own[:lines]))
        events = self.workdir / "tensorboard" / unit.name
        shutil.rmtree(events, ignore_errors=True)
        self._writers[unit] = SummaryWriter(str(events))
        for line in own[:lines]:
            fields = _from_json(line)
            named = {"unit", *Unit._fields, "step"}
            values = {k: v for k, v in fields.items() if k not in named}
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
        with (self.workdir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(_to_json({**fields, **values})) + "\n")
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
            _write_json(self._results(unit), results)
        _meet(f"{unit.name} is written")

    def finished(self, unit: Unit) -> dict[str, Any] | None:
        """The results of a unit as `finish` got them, or None if it has to run.

        Arrays and tuples come back as lists, and what was not finite as NaN.
        """
        path = self._results(unit)
        if not path.exists():
            return None
        results: dict[str, Any] = _from_json(path.read_text(encoding="utf-8"))
        return results

    def units(self) -> list[Unit]:
        """All units that have come to their end, with results or without, by name."""
        names = [path.stem for path in (self.workdir / "units").glob("*.json")]
        parts = [name.rpartition("-seed") for name in sorted(names)]
        return [Unit(method, int(seed)) for method, _, seed in parts]

    def fail(self, unit: Unit, why: str) -> None:
        """Records that a unit has no results, and why; it is not repeated either."""
        self.finish(unit, {"failed": why})

    def failures(self) -> dict[str, str]:
        """Why units have failed, by their names."""
        found = {}
        for path in sorted((self.workdir / "units").glob("*.json")):
            results = _from_json(path.read_text(encoding="utf-8"))
            if "failed" in results:
                found[path.stem] = results["failed"]
        return found

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, the results of the whole run."""
        if self.writes:
            _write_json(self.workdir / "summary.json", summary)

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file, such as table.md, into the run directory."""
        if self.writes:
            _write(self.workdir / name, text)

    def save_figure(self, name: str, figure: Figure) -> None:
        """Writes a figure to figures/<name>.png."""
        path = self.workdir / "figures" / f"{name}.png"
        if self.writes:
            _replace(path, lambda file: figure.savefig(file, format="png"))

    def _show(self, unit: Unit, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writers[unit].add_scalar(name, value, step)

    def _results(self, unit: Unit) -> Path:
        return self.workdir / "units" / f"{unit.name}.json"


def open_run(workdir: str | os.PathLike[str], config: Any) -> Run:
    """Makes a run directory, or opens one of the same configuration to resume it.

    Fields declared with `dataclasses.field(compare=False)` are recorded without being
    part of what makes two configurations differ: the display, the run directory itself.

    Args:
      workdir: the directory, made if it is absent.
      config: a dataclass of numbers, strings, booleans, None and tuples of these.

    Returns:
      The run.

    Raises:
      ValueError: if the directory cannot be made or written, holds files that are not
        those of a run, or belongs to another configuration. Nothing is overwritten.
    """
    path = Path(workdir).expanduser()
    if jax.process_index() == 0:
        try:
            _prepare(path, config)
        finally:
            _meet(f"{path.name} is prepared")
        return Run(path)
    _meet(f"{path.name} is prepared")
    if not (path / "config.json").exists():
        raise ValueError(
            f"workdir {path} was not prepared by the first process; give all of them a "
            "--workdir on a file system that they share, or see its message"
        )
    return Run(path, writes=False)


def identity(config: Any) -> dict[str, Any]:
    """The fields of a configuration that tell one run from another, as JSON has them.

    Args:
      config: a dataclass; fields declared with `compare=False` are left out.
    """
    ignored = _ignored(config)
    fields = _to_json(dataclasses.asdict(config)).items()
    return {name: value for name, value in fields if name not in ignored}


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every measurement of a run, finished or not.

    Args:
      workdir: the run directory, which may be in use.

    Returns:
      One dictionary per line of metrics.jsonl, with NaN for what was not finite. An
      incomplete last line is left out.
    """
    lines = _complete_lines(Path(workdir).expanduser() / "metrics.jsonl")
    return [_from_json(line) for line in lines]


class Summary(NamedTuple):
    """What repeated measurements say of a quantity.

    Attributes:
      mean: their mean.
      standard_error: of the mean; NaN for a single measurement.
      n: how many there are.
    """

    mean: float
    standard_error: float
    n: int


def summarize(values: Iterable[ArrayLike]) -> Summary:
    """Mean and standard error over repetitions, `s / sqrt(n)` with `n - 1` in `s`.

    >>> summarize([0.8, 0.9, 1.0])
    Summary(mean=0.9, standard_error=0.0577..., n=3)

    Args:
      values: one number per repetition.

    Returns:
      Their summary.

    Raises:
      ValueError: if there are no values.
    """
    numbers = np.array([float(np.asarray(value)) for value in values])
    if numbers.size == 0:
        raise ValueError("a summary needs at least one value, got none")
    spread = numbers.std(ddof=1) if numbers.size > 1 else math.nan
    error = float(spread) / math.sqrt(numbers.size)
    return Summary(float(numbers.mean()), error, numbers.size)


def paired_difference(
    a: Mapping[int, ArrayLike], b: Mapping[int, ArrayLike]
) -> Summary:
    """Mean and standard error of `a - b` over the seeds that both have.

    Runs of one seed share data and initial weights, so their difference varies less
    than either of them.

    >>> paired_difference({0: 0.75, 1: 0.5}, {0: 0.5, 1: 0.25, 2: 0.1})
    Summary(mean=0.25, standard_error=0.0, n=2)

    Args:
      a: a number per seed.
      b: what it is compared to.

    Returns:
      The summary of the differences.

    Raises:
      ValueError: if no seed is in both.
    """
    seeds = [seed for seed in a if seed in b]
    if not seeds:
        raise ValueError(
            f"no seed is in both, got seeds {sorted(a)} and {sorted(b)}; run the"
            " compared methods with the same seeds"
        )
    return summarize(np.asarray(a[seed]) - np.asarray(b[seed]) for seed in seeds)


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]
) -> str:
    """A Markdown table that is aligned in the source as well.

    >>> rows = [{"method": "RigL", "size": 2660}, {"method": "dense", "size": 26610}]
    >>> print(markdown_table(rows, {"method": "method", "size": "non-zeros"}))
    | method   |   non-zeros |
    |:---------|------------:|
    | RigL     |        2660 |
    | dense    |       26610 |

    Args:
      rows: cells by key, printed with `str`; a key may be absent.
      columns: title of every column by key, in order. The first column is the name of
        a row and aligned left, the others hold numbers and are aligned right.

    Returns:
      The table, without a newline at its end.
    """
    cells = [[str(row.get(key, "")) for key in columns] for row in rows]
    align = ["left", *["right"] * (len(columns) - 1)]
    return tabulate(
        [list(columns.values()), *cells],
        headers="firstrow",
        tablefmt="pipe",
        colalign=align,
        disable_numparse=True,
    )


def _meet(why: str) -> None:
    """Waits for the other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(why)


def _prepare(path: Path, config: Any) -> None:
    """Makes a run directory, or makes sure that it is one of the configuration."""
    _make_writable(path)
    recorded = path / "config.json"
    if recorded.exists():
        _refuse_other_config(recorded, config)
        return
    foreign = sorted(entry.name for entry in path.iterdir())
    if set(foreign) - {_temporary(recorded).name}:
        raise ValueError(
            f"workdir {path} holds files that are not those of a run"
            f" ({', '.join(foreign[:3])}); give a new or an empty --workdir"
        )
    _write_json(recorded, dataclasses.asdict(config))


def _make_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(path, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise ValueError(
            f"workdir {path} cannot be written ({problem}); give another --workdir"
        )


def _ignored(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config) if not field.compare}


def _refuse_other_config(recorded: Path, config: Any) -> None:
    """Raises if a field that counts differs from config.json."""
    try:
        old = dict(json.loads(recorded.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        raise ValueError(
            f"{recorded} is not the configuration of a run; give another --workdir"
        ) from None
    new, ignored = identity(config), _ignored(config)
    differing = [
        f"{name} was {old.get(name, 'absent')} and is {new.get(name, 'absent')}"
        for name in {**new, **old}
        if name not in ignored and old.get(name, "absent") != new.get(name, "absent")
    ]
    if differing:
        raise ValueError(
            f"workdir {recorded.parent} belongs to another configuration:"
            f" {', '.join(differing)}; give another --workdir or the old flags"
        )


def _scalar(name: str, value: ArrayLike) -> float:
    if np.ndim(value) != 0:
        raise ValueError(
            f"metric {name} must be a scalar, got shape {np.shape(value)}; log each"
            " entry under a name of its own"
        )
    return float(np.asarray(value))


def _to_json(value: Any) -> Any:
    """Plain lists, dictionaries and scalars, with None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "__array__"):
        return _to_json(np.asarray(value).tolist())
    return value


def _from_json(text: str) -> Any:
    """The inverse of writing: null is a number that was not finite."""

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restore(item) for key, item in value.items()}
        if isinstance(value, list):
            return [restore(item) for item in value]
        return math.nan if value is None else value

    return restore(json.loads(text))


def _complete_lines(path: Path) -> list[str]:
    """The lines of a file that end in a newline; a crash may have cut the last."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, json.dumps(_to_json(value), indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    _replace(path, lambda file: file.write(text.encode()))


def _replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes beside the file and renames, so that a crash leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
