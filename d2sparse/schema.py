"""What a file holds, checked against the types that say what it has to hold."""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union

_NUMBERS: dict[Any, tuple[type, ...]] = {float: (int, float)}


def parse(value: Any, form: Any) -> Any:
    """A value of JSON as the type it has to have.

    >>> class Point(typing.NamedTuple):
    ...     x: float
    ...     names: list[str]
    >>> parse({"x": 1, "names": ["a"]}, Point)
    Point(x=1, names=['a'])
    >>> parse({"x": 1, "names": ["a", 2]}, Point)
    Traceback (most recent call last):
    ...
    ValueError: names[1] is 2, not str

    Args:
      value: as `json.loads` returns it.
      form: a NamedTuple or dataclass, which needs all of its fields and no others; a
        TypedDict, which needs its keys and may hold more; or a type of numbers, texts,
        `list[X]`, `tuple[X, ...]`, `dict[str, X]`, `Literal`, unions, `Any`. A bool is
        no number, an int is a float.

    Raises:
      ValueError: it is something else; the place in it is named.
    """
    return _parse(value, form, "")


def _parse(value: Any, form: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(form), typing.get_args(form)
    if form is Any:
        return value
    if origin in (Union, types.UnionType):
        return _parse_any(value, arguments, place)
    if origin is Literal:
        _check(value in arguments, value, " or ".join(map(repr, arguments)), place)
        return value
    if origin in (list, tuple):
        _check(isinstance(value, list | tuple), value, "a list", place)
        items = [_parse(v, arguments[0], f"{place}[{i}]") for i, v in enumerate(value)]
        return origin(items)
    if origin in (dict, Mapping):
        _check(isinstance(value, dict), value, "an object", place)
        return {k: _parse(v, arguments[1], _inside(place, k)) for k, v in value.items()}
    if isinstance(form, type) and (fields := _fields(form)):
        return _parse_fields(value, form, fields, place)
    kinds = _NUMBERS.get(form, (type(None) if form is None else form,))
    right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    _check(right, value, getattr(form, "__name__", str(form)), place)
    return value


def _parse_any(value: Any, forms: Iterable[Any], place: str) -> Any:
    errors = []
    for form in forms:
        try:
            return _parse(value, form, place)
        except ValueError as error:
            errors.append(str(error))
    # The one that got deepest knows best.
    raise ValueError(max(errors, key=lambda text: len(text.partition(" ")[0])))


def _parse_fields(value: Any, form: Any, fields: list[str], place: str) -> Any:
    _check(isinstance(value, dict), value, "an object", place)
    lacking = [name for name in fields if name not in value]
    if lacking:
        raise ValueError(f"{place or 'it'} lacks {', '.join(map(repr, lacking))}")
    kinds = typing.get_type_hints(form)
    found = {
        name: _parse(value[name], kinds[name], _inside(place, name)) for name in fields
    }
    unknown = [name for name in value if name not in fields]
    if typing.is_typeddict(form):
        return value | found
    if unknown:
        raise ValueError(
            f"{place or 'it'} has the unknown {', '.join(map(repr, unknown))}"
        )
    return form(**found)


def _fields(form: type) -> list[str]:
    if dataclasses.is_dataclass(form):
        return [field.name for field in dataclasses.fields(form)]
    if typing.is_typeddict(form):
        return sorted(getattr(form, "__required_keys__", ()))
    return list(getattr(form, "_fields", ()))


def _check(right: bool, value: Any, wanted: str, place: str) -> None:
    if not right:
        raise ValueError(f"{place or 'it'} is {value!r:.60}, not {wanted}")


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
