"""What every function asks of its arguments, refused with one sentence where it is not.

A word in the place of a function, an integer in the place of a random key, a module in
the place of a tree of arrays: without these checks they are found far from where they
were given.
"""

import contextlib
import inspect
import numbers
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@contextlib.contextmanager
def optional(module: str) -> Iterator[None]:
    """Around imports of what the core does not install: a sentence where it is absent.

    Args:
      module: which imports it.

    Raises:
      ModuleNotFoundError: naming the package and how it is installed.

    >>> with optional("d2sparse.models"):
    ...     import a_package_of_nobody
    Traceback (most recent call last):
    ...
    ModuleNotFoundError: d2sparse.models needs a_package_of_nobody, which is not
    installed; pip install "d2sparse[experiments]" brings it
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "a package").partition(".")[0]
        raise ModuleNotFoundError(
            f"{module} needs {missing}, which is not installed; "
            'pip install "d2sparse[experiments]" brings it',
            name=error.name,
        ) from error


def check_function(name: str, value: Any, takes: str, example: str) -> None:
    """Raises where an argument is no function that can be called as it will be.

    Args:
      name: of the argument.
      value: what was given for it.
      takes: the arguments it is called with, separated by commas.
      example: what could stand there.

    Raises:
      ValueError: it is no function, or takes other arguments: so does a function that
        makes one and was not called, as `cosine` in the place of `cosine(0.3, 1000)`.

    >>> check_function("score", abs, "params", "scores.magnitude")
    """
    if not callable(value):
        raise ValueError(
            f"expected a function as `{name}`, {takes} -> ..., such as `{example}`, "
            f"got {value!r}"
        )
    try:
        signature = inspect.signature(value)
    except ValueError:  # Some built-in functions tell of no arguments.
        return
    try:
        signature.bind(*takes.split(","))
    except TypeError as error:
        raise ValueError(
            f"expected as `{name}` a function of ({takes}), such as `{example}`, got "
            f"one of {signature}; call it first if it makes such a function"
        ) from error


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises where a number is known and not in its range, both ends included.

    Raises:
      ValueError: naming the argument.

    >>> check_number("drop_fraction", 0.3, 0, 1)
    """
    if isinstance(value, jax.core.Tracer):
        return
    if not is_number(value) or not low <= float(value) <= high:
        raise ValueError(
            f"expected a number in [{low:g}, {high:g}] as `{name}`, got {value!r}"
        )


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises where a number is no integer, or less than the least that makes sense.

    Raises:
      ValueError: naming the argument.

    >>> check_whole("interval", 100, least=1)
    """
    if isinstance(value, jax.core.Tracer):
        return
    if not is_whole(value) or value < least:
        raise ValueError(
            f"expected a whole number of at least {least} as `{name}`, got {value!r}"
        )


def check_least(
    options: Any, least: Mapping[str, float], most: float = sys.float_info.max
) -> None:
    """Raises where an option is below the least that makes sense.

    Args:
      options: with the numbers as attributes.
      least: by name, the least that each may be.
      most: the largest that any may be; if not given, they are finite.

    Raises:
      ValueError: naming the option.

    >>> import types
    >>> check_least(types.SimpleNamespace(steps=10), {"steps": 1})
    """
    for name, value in least.items():
        number = getattr(options, name)
        if not value <= number <= most:
            raise ValueError(f"expected {name} >= {value}, got {number}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises where a word is none of the choices.

    Raises:
      ValueError: naming the option and the choices.

    >>> check_choice("schedule", "cosine", ("cosine", "constant"))
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"expected {name} of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raises where a value is no number of entries: of arrays, by their type alone.

    Raises:
      ValueError: naming the argument.

    >>> check_count("k", 100)
    """
    if isinstance(value, jax.Array):
        valid = value.shape == () and jnp.issubdtype(value.dtype, jnp.integer)
    else:
        valid = is_whole(value) and value >= 0
    if not valid:
        raise ValueError(
            f"expected a whole number of entries, at least 0, as {name}, got {value!r}"
        )


def check_by_path(name: str, value: Any, of: str) -> None:
    """Raises where an argument is no mapping from the paths of leaves.

    Args:
      name: of the argument.
      value: what was given for it.
      of: what the mapping holds.

    Raises:
      ValueError: it is none.

    >>> check_by_path("inputs", {"kernel": jnp.ones((4, 2))}, of="arrays")
    """
    if not isinstance(value, Mapping):
        raise ValueError(
            f"expected {of} by path as `{name}`, {{'dense/kernel': ...}}, got "
            f"{type(value).__name__}; `tree.flatten` of a tree names its paths"
        )


def check_key(key: Any) -> None:
    """Raises where a random key is none; legacy keys of integers are keys as well.

    Raises:
      ValueError: saying how to make one.

    >>> check_key(jax.random.key(0))
    """
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and not (dtype == jnp.uint32 and jnp.ndim(key)):
        raise ValueError(
            f"expected a random key, got {key!r}; pass one such as `jax.random.key(0)`"
        )


def is_number(value: Any) -> bool:
    """Whether a value is one number: of Python, NumPy or JAX, but no bool or string.

    >>> is_number(0.9), is_number("0.9"), is_number([0.9])
    (True, False, False)
    """
    if isinstance(value, numbers.Real):
        return not isinstance(value, bool)
    arrays = (np.ndarray, np.generic, jax.Array)
    if not isinstance(value, arrays) or value.shape != ():
        return False
    return bool(jnp.issubdtype(value.dtype, jnp.number))


def is_whole(value: Any) -> bool:
    """Whether a value is one number without a fraction, of any type.

    >>> is_whole(3), is_whole(3.0), is_whole(2.5), is_whole("3")
    (True, True, False, False)
    """
    return is_number(value) and bool(value == value // 1)
