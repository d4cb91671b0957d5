"""Files that appear whole or not at all, and lines that a crash may have cut."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from d2sparse import disk
from d2sparse.records.encoding import to_json


def complete_lines(path: Path) -> list[str]:
    """The lines of a file that end in a newline; a crash may have cut the last.

    Raises:
      ValueError: there is no such file.
      OSError: it cannot be read for now, such as without permission.
    """
    lines = read_text(path).splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def read_text(path: Path) -> str:
    r"""A text of JSON; a byte that is none of it becomes \xNN, which no JSON holds.

    Raises:
      ValueError: there is no such file.
      OSError: it cannot be read for now, such as without permission.
    """
    try:
        return path.read_text(encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        if error.errno not in disk.ABSENT:
            raise disk.unreadable(path, error) from error
        raise ValueError(
            f"expected a file at {path}, got {disk.reason(error)}; check the path, or "
            "restore what was moved away"
        ) from None


def temporary_path(path: Path) -> Path:
    """Where a file is written before it has its name; a crash may leave it there."""
    return path.with_name(f".{path.name}.tmp")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes results, with null for what is not finite."""
    write_text(path, json.dumps(to_json(value), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text."""
    replace(path, lambda file: file.write(text.encode()))


def replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes beside the file and renames, so that a crash leaves the old or the new."""
    temporary = temporary_path(path)
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the operating system inside name the file, and what can be done."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"expected to write {path}, got {disk.reason(error)}; what has finished is "
            f"kept: {disk.remedy(error)} and run the same command again"
        ) from error
