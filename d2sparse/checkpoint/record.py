"""What is stored beside the arrays of a checkpoint, and what it says of it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from d2sparse.checkpoint import store


class Record(NamedTuple):
    """What is stored beside the arrays of a checkpoint."""

    step: int
    about: dict[str, Any]
    leaves: dict[str, str]
    score: float | None
    notes: dict[str, Any]


def read_record(path: Path) -> Record:
    """The record of a checkpoint; only it is checked.

    Raises:
      ValueError: the manifest is missing or damaged, or is of another version.
      OSError: it cannot be read for now, such as without permission.
    """
    record: Record = store.as_written(store.read_notes(path), Record, str(path))
    return record


def _score(path: Path, damaged: float) -> float:
    try:
        score = read_record(path).score
    except ValueError:
        return damaged
    return math.nan if score is None else float(score)


def ranking(paths: Mapping[int, Path], damaged: float) -> list[int]:
    """Steps with a score, the best one first; damaged ones have the given score."""
    scores = {step: _score(path, damaged) for step, path in paths.items()}
    ranked = [step for step, score in scores.items() if not math.isnan(score)]
    return sorted(ranked, key=lambda step: (scores[step], step), reverse=True)


def as_json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """What comes back when it is written and read."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected `{name}` of numbers, strings, lists and dictionaries, got a "
            f"mapping that is not JSON ({error}); convert its arrays with `.tolist()`"
        ) from None
    return copy


def refuse_other_origin(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises ValueError with the fields of `about` that differ."""
    differing = [
        f"{name} was {old.get(name, 'absent')} and is {new.get(name, 'absent')}"
        for name in {**new, **old}
        # As text, in which NaN equals NaN.
        if json.dumps(old.get(name, "absent")) != json.dumps(new.get(name, "absent"))
    ]
    if differing:
        raise ValueError(
            f"the checkpoint {path} belongs to another configuration: "
            f"{', '.join(differing)}; give another directory or the old configuration"
        )


def first_line(error: Exception) -> str:
    """An error in one line; those of Orbax go on for many."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
