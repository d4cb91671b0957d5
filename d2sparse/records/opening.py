"""Making a run directory, or opening the one of the same configuration again."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax

from d2sparse.records import files
from d2sparse.records.encoding import to_json
from d2sparse.records.run import Run, meet


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
            meet(f"{path.name} is prepared")
        return Run(path)
    meet(f"{path.name} is prepared")
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
    fields = to_json(dataclasses.asdict(config)).items()
    return {name: value for name, value in fields if name not in ignored}


def _prepare(path: Path, config: Any) -> None:
    """Makes a run directory, or makes sure that it is one of the configuration."""
    _make_writable(path)
    recorded = path / "config.json"
    if recorded.exists():
        _refuse_other_config(recorded, config)
        return
    foreign = sorted(entry.name for entry in path.iterdir())
    if set(foreign) - {files.temporary_path(recorded).name}:
        raise ValueError(
            f"workdir {path} holds files that are not those of a run"
            f" ({', '.join(foreign[:3])}); give a new or an empty --workdir"
        )
    files.write_json(recorded, dataclasses.asdict(config))


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
