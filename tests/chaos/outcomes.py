"""What can be seen in a run directory, and whether it is what it has to be."""

import collections
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runs

from d2sparse import records
from d2sparse.checkpoint import store


def damages(workdir: Path, reference: Path) -> list[str]:
    """What can be seen and is not whole, or not what the reference says."""
    expected = _by_unit(reference / "metrics.jsonl")
    found = [
        f"lines of {unit}"
        for unit, lines in _by_unit(workdir / "metrics.jsonl").items()
        if lines != expected[unit][: len(lines)]
    ]
    seen = [workdir / "summary.json", *workdir.glob("units/[!.]*")]
    for name in (path.relative_to(workdir) for path in seen if path.exists()):
        if _results(workdir / name) != _results(reference / name):
            found.append(str(name))
    return found


def _results(path: Path) -> Any:
    try:
        return runs.without_time(runs.read(path))
    except ValueError as error:
        return repr(error)


def _by_unit(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = collections.defaultdict(list)
    for line in records.complete_lines(path) if path.exists() else []:
        found[json.loads(line)["unit"]].append(line)
    return found


def outcome(workdir: Path) -> dict[str, Any]:
    """All that a finished run has found, by file; of arrays and figures a digest.

    Times are left out. Of checkpoints only the end of every unit counts.
    """
    found: dict[str, Any] = {
        "metrics.jsonl": (workdir / "metrics.jsonl").read_text(),
        "table.md": [
            _without_seconds(block)
            for block in (workdir / "table.md").read_text().split("\n\n")
        ],
    }
    for path in [workdir / "summary.json", *workdir.glob("units/*")]:
        found[str(path.relative_to(workdir))] = _results(path)
    ends = [checkpoints(unit)[-1] for unit in workdir.glob("checkpoints/*")]
    for path in [*ends, *workdir.glob("tickets/*/*")]:
        found[str(path.relative_to(workdir))] = _digest(store.read(path)[0])
    for path in workdir.glob("figures/*"):
        found[str(path.relative_to(workdir))] = _digest(path.read_bytes())
    return found


def _without_seconds(block: str) -> list[list[str]]:
    """The cells of a table, or the lines of a text."""
    rows = [[cell.strip() for cell in line.split("|")] for line in block.splitlines()]
    kept = [
        n for n, title in enumerate(rows[0] if rows else []) if "seconds" not in title
    ]
    return [[row[n] for n in kept if n < len(row)] for row in rows]


def checkpoints(unit: Path) -> list[Path]:
    """The checkpoints of a unit that nothing is wrong with, the oldest first."""
    found = [path for path in unit.iterdir() if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def _digest(value: Any) -> str:
    if isinstance(value, dict):
        array = [
            (k, str(v.dtype), v.shape, _digest(v.tobytes())) for k, v in value.items()
        ]
        value = repr(array).encode()
    return hashlib.sha256(value).hexdigest()


def differences(workdir: Path, reference: Path) -> list[str]:
    """What a finished run has found otherwise than the reference."""
    one, other = in_child(outcome, workdir), in_child(outcome, reference)
    return sorted(k for k in {**one, **other} if one.get(k) != other.get(k))


def saving(workdir: Path) -> float:
    """Seconds that it takes to write the largest checkpoint of a run once more."""
    paths = workdir.glob("checkpoints/*/[0-9]*")
    largest = max(paths, key=lambda path: len((path / store.MANIFEST).read_bytes()))
    arrays, began = store.read(largest)[0], time.monotonic()
    store.write(workdir.with_suffix(".copy"), arrays, {})
    return time.monotonic() - began


def in_child(function: Callable[[Path], Any], workdir: Path) -> Any:
    """What a function says of a run directory; it reads arrays, which starts jax."""
    path = workdir.with_suffix(f".{function.__name__}")
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        assert status == 0, f"{workdir} cannot be read"
        return runs.read(path)
    try:
        path.write_text(json.dumps(function(workdir)))
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)
