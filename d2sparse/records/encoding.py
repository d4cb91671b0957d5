"""Results as JSON has them, which knows no arrays, and no number that is not finite."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from d2sparse import schema


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


def read_json(text: str, form: Any, place: str, mend: str) -> Any:
    """What a text of JSON holds, as the type it has to have.

    Args:
      text: as `to_json` and `json.dumps` make it; null is a number that is not finite.
      form: the type, see `d2sparse.schema`.
      place: where it is, for the error.
      mend: what to do where it is damaged.

    Raises:
      ValueError: it is no JSON, or of another form.
    """
    try:
        return schema.parse(from_json(json.loads(text)), form)
    except json.JSONDecodeError:
        why = f"got {text.strip()!r:.60}"
    except (RecursionError, ValueError) as error:
        why = str(error)
    raise ValueError(f"{place} is damaged, {why}; {mend}")


def from_json(value: Any) -> Any:
    """What `to_json` was given, as far as JSON has it: null is NaN."""
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return math.nan if value is None else value
