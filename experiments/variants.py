"""Lists of numbers in one command: the same method with several learning rates."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.singles import Method, Settings

_SHORT = {"learning_rate": "lr"}


class Variant(NamedTuple):
    """A method with settings of its own; variants of one method share its program.

    Attributes:
      name: of its units, such as "rigl-lr0.05".
      base: name of the method.
      method: the method.
      settings: numbers by name, of those that the method leaves free.
    """

    name: str
    base: str
    method: Method
    settings: Settings


def exact(number: float) -> str:
    """The shortest text that tells a number from all others, for names.

    >>> exact(0.9), exact(2.0), exact(0.123456789)
    ('0.9', '2', '0.123456789')
    """
    return repr(float(number)).removesuffix(".0")


def variants(
    methods: Mapping[str, Method], lists: Mapping[str, Sequence[float]]
) -> dict[str, Variant]:
    """Every method with every combination of the settings that it leaves free.

    Args:
      methods: by name.
      lists: values by setting; an empty list leaves a setting as it is.

    Returns:
      Variants by name. Where no list is given they have the names of the methods.
    """
    found = {}
    for base, method in methods.items():
        own = {k: v for k, v in lists.items() if v and k in method.free}
        for values in itertools.product(*own.values()):
            settings = dict(zip(own, values, strict=True))
            name = base + "".join(
                f"-{_SHORT.get(k, k)}{exact(value)}" for k, value in settings.items()
            )
            found[name] = Variant(name, base, method, settings)
    return found
