"""Results as JSON has them, which knows no arrays, and no number that is not finite."""

import json
import math
from collections.abc import Mapping, Set
from typing import Any

import numpy as np


def to_json(value: Any) -> Any:
    """Plain lists, dictionaries and scalars, with None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "__array__"):
        return to_json(np.asarray(value).tolist())
    return value


def read_fields(
    text: str, place: str, mend: str, needs: Set[str] = frozenset()
) -> dict[str, Any]:
    """The fields that a text of JSON holds.

    Args:
      text: an object.
      place: where it is, for the error.
      mend: what to do where it is damaged.
      needs: names of fields that it has.

    Raises:
      ValueError: it is damaged, no object, or lacks a field.
    """
    try:
        found = from_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not needs <= found.keys():
        raise ValueError(f"{place} is damaged, got {text.strip()!r:.60}; {mend}")
    return found


def from_json(text: str) -> Any:
    """What a text of JSON holds; null is a number that was not finite."""

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restore(item) for key, item in value.items()}
        if isinstance(value, list):
            return [restore(item) for item in value]
        return math.nan if value is None else value

    return restore(json.loads(text))
