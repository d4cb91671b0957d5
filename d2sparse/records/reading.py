"""What a run directory holds, read back: everything is checked before it is used."""

import collections
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from d2sparse import disk, schema
from d2sparse.records import files
from d2sparse.records.encoding import from_json, read_json

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


class Measurement(TypedDict):
    """What every line of measurements has, besides the metrics."""

    unit: str
    method: str
    seed: int
    step: int


class Seal(NamedTuple):
    """What the results of a unit are sealed with.

    Attributes:
      unit: its name.
      metrics: `digest_of` of its lines of measurements.
      results: `digest_of` of the other fields of its file.
    """

    unit: str
    metrics: str
    results: str


class Sealed(TypedDict):
    """The results of a unit on file; they have further fields."""

    seal: Seal


class Failed(NamedTuple):
    """The results of a unit that has none."""

    failed: str


NAMED = Measurement.__required_keys__
MEND = "remove that file to run the unit again"


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
    return checked_lines(path)


def result_files(workdir: Path) -> list[Path]:
    """The files of finished units, by name."""
    return sorted((workdir / "units").glob("*.json"))


def unit_of(path: Path) -> Unit:
    """The unit whose results a file is to hold.

    Raises:
      ValueError: it is the file of no unit.
    """
    match = re.fullmatch(r"(.*)-seed(-?\d+)", path.stem)
    unit = Unit(match[1], int(match[2])) if match else None
    if unit is None or unit.name != path.stem:
        raise ValueError(
            f"expected results of units in {path.parent}, such as rigl-seed0.json, got "
            f"{path.name}; move it away"
        )
    return unit


def read_sealed(path: Path) -> tuple[Seal, dict[str, Any]]:
    """The seal of a unit, and the results under it."""
    text = files.read_text(path)
    seal: Seal = read_json(text, Sealed, str(path), MEND)["seal"]
    found = {key: v for key, v in json.loads(text).items() if key != "seal"}
    if seal.unit != path.stem:
        raise ValueError(f"{path} is damaged, it holds results of {seal.unit}; {MEND}")
    if seal.results != digest_of(found):
        raise ValueError(f"{path} is damaged, it is not what was written; {MEND}")
    results: dict[str, Any] = from_json(found)
    return seal, results


def checked_lines(workdir: Path) -> list[dict[str, Any]]:
    """The measurements, of which those of finished units are all there."""
    # The seals come first: what finishes meanwhile has more lines than now.
    seals = {path: read_sealed(path)[0] for path in result_files(workdir)}
    found = measurements(workdir / METRICS)
    lines = _by_unit(found)
    for path, seal in seals.items():
        if seal.metrics != digest_of(lines.get(seal.unit, [])):
            raise ValueError(
                f"{workdir / METRICS} is damaged, its lines of {seal.unit} are not "
                f"those that were measured; restore it, or remove {path} to run the "
                "unit again"
            )
    return [fields for _, fields in found]


def lines_of(workdir: Path) -> dict[str, list[str]]:
    """The lines of measurements by the name of their unit, as they stand."""
    return _by_unit(measurements(workdir / METRICS))


def _by_unit(found: list[tuple[str, dict[str, Any]]]) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = collections.defaultdict(list)
    for line, fields in found:
        lines[fields["unit"]].append(line)
    return lines


def measurements(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The complete lines of a file of measurements, as they stand and as fields."""
    if not path.exists():
        return []  # Before the first measurement.
    mend, found = "remove that line to go on", []
    for number, line in enumerate(files.complete_lines(path), 1):
        place = f"{path} line {number}"
        fields = read_json(line, Measurement, place, mend)
        name = Unit(fields["method"], fields["seed"]).name
        metrics = {k: v for k, v in fields.items() if k not in NAMED}
        try:
            schema.parse(metrics, dict[str, float])
        except ValueError as error:
            raise ValueError(f"{place} is damaged, {error}; {mend}") from None
        if fields["unit"] != name:
            raise ValueError(f"{place} is damaged, its unit is not {name}; {mend}")
        found.append((line, fields))
    return found


def digest_of(value: Any) -> str:
    """Of what JSON can hold, whatever the order of its fields."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
