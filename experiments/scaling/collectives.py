"""The operations between devices, read off the text of a compiled program."""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*-> .*\{$")
_COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|all-to-all|collective-broadcast|"
    r"collective-permute|ragged-all-to-all|reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"(pred|[a-z]+(\d+))\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.-]+)|"
    r"branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")


class Collective(NamedTuple):
    """An operation between devices, as a compiled program has it.

    Attributes:
      kind: such as `"all-reduce"`.
      sizes: bytes of each of its results; an all-reduce has as many operands.
      in_search: it is in a loop whose length is not known to the compiler.
    """

    kind: str
    sizes: tuple[int, ...]
    in_search: bool


def collectives(text: str) -> list[Collective]:
    """The operations between devices of a compiled program, as often as they happen.

    Those of a loop count as often as it runs, if the compiler knows; else once, and are
    marked.

    Args:
      text: of the program, as `compiled.as_text()` returns it.
    """
    entry, bodies = "", collections.defaultdict[str, list[str]](list)
    name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            entry = name if head[1] else entry
        else:
            bodies[name].append(line)
    return list(_collectives(bodies, entry, in_search=False))


def _collectives(
    bodies: Mapping[str, Sequence[str]], name: str, in_search: bool
) -> Iterator[Collective]:
    for line in bodies[name]:
        if found := _COLLECTIVE.search(line):
            yield Collective(found[2], _sizes(found[1]), in_search)
        trips = _TRIPS.search(line)
        inside = in_search or (" while(" in line and trips is None)
        for one, several in _CALLED.findall(line):
            for called in [one] if one else re.findall(r"[\w.-]+", several):
                for _ in range(int(trips[1]) if trips else 1):
                    yield from _collectives(bodies, called, inside)


def _sizes(result: str) -> tuple[int, ...]:
    """Bytes of the arrays of a type, such as `(s32[2048]{0}, pred[])`."""
    return tuple(
        int(bits or 8) // 8 * math.prod(map(int, filter(None, shape.split(","))))
        for _, bits, shape in _ARRAY.findall(result)
    )
