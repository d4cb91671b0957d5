"""Making a run directory, or opening the one of the same configuration again."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import jax

from d2sparse import disk
from d2sparse.records import files
from d2sparse.records.encoding import to_json
from d2sparse.records.reading import CONFIG
from d2sparse.records.run import Run, meet

_LOCK = "lock"


def open_run(
    workdir: str | os.PathLike[str], config: Any, form: Any = dict[str, Any]
) -> Run:
    """Makes a run directory, or opens one of the same configuration to resume it.

    Fields declared with `dataclasses.field(compare=False)` are recorded without being
    part of what makes two configurations differ: the display, the run directory itself.

    All files that are read later are checked. The directory is locked until the run is
    given up or the process ends, also by a kill, see `d2sparse.disk.lock`; of several
    processes of a run the first one holds the lock.

    Args:
      workdir: the directory, made if it is absent, on a local or mounted file system.
      config: a dataclass of numbers, strings, booleans, None and tuples of these.
      form: what the results of a unit have to be, see `d2sparse.schema`.

    Returns:
      The run.

    Raises:
      ValueError: if the directory cannot be made or written, holds files that are not
        those of a run, belongs to another configuration, is damaged, or is in use by
        another process. Nothing is overwritten.
    """
    path = disk.local_path(workdir, "--workdir")
    if jax.process_index() == 0:
        try:
            lock = _prepare(path, config)
            run = Run(path, form=form, lock=lock)
            run.check()
        finally:
            meet(f"{path.name} is prepared")
        return run
    meet(f"{path.name} is prepared")
    if not (path / CONFIG).exists():
        raise ValueError(
            f"workdir {path} was not prepared by the first process; give all of them a "
            "--workdir on a file system that they share, or see its message"
        )
    return Run(path, writes=False, form=form)


def identity(config: Any) -> dict[str, Any]:
    """The fields of a configuration that tell one run from another, as JSON has them.

    Args:
      config: a dataclass; fields declared with `compare=False` are left out.
    """
    ignored = _ignored(config)
    fields = to_json(dataclasses.asdict(config)).items()
    return {name: value for name, value in fields if name not in ignored}


def _prepare(path: Path, config: Any) -> disk.Lock | None:
    """Makes a run directory, or makes sure that it is one of the configuration."""
    recorded = path / CONFIG
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_others(path, recorded, config)
        lock = disk.lock(path / _LOCK, f"workdir {path}")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise ValueError(
            f"workdir {path} cannot be written ({disk.reason(error)}); "
            f"{disk.remedy(error)}, or give another --workdir"
        ) from error
    # Once more: another process may have made it before this one had the lock.
    _refuse_others(path, recorded, config)
    if not recorded.exists():
        files.write_json(recorded, dataclasses.asdict(config))
    return lock


def _refuse_others(path: Path, recorded: Path, config: Any) -> None:
    """Raises if the directory is one of another run, or of no run."""
    if recorded.exists():
        _refuse_other_config(recorded, config)
        return
    own = {_LOCK, files.temporary_path(recorded).name}
    foreign = sorted({entry.name for entry in path.iterdir()} - own)
    if foreign:
        raise ValueError(
            f"workdir {path} holds files that are not those of a run"
            f" ({', '.join(foreign[:3])}); give a new or an empty --workdir"
        )


def _ignored(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config) if not field.compare}


def _refuse_other_config(recorded: Path, config: Any) -> None:
    """Raises if a field that counts differs from config.json."""
    new, ignored = identity(config), _ignored(config)
    try:
        old = json.loads(files.read_text(recorded))
    except (RecursionError, json.JSONDecodeError):
        old = None
    if not isinstance(old, dict) or not old.keys() & new.keys():
        raise ValueError(
            f"{recorded} is not the configuration of a run; give another --workdir"
        )
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
