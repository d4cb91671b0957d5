"""Compiled refreshes, and the operations between devices that they hold."""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from experiments.scaling.formulae import Method, Traffic
from experiments.scaling.leaves import Shapes

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
      in_search: whether it is in a loop whose length the compiler does not know.
    """

    kind: str
    sizes: tuple[int, ...]
    in_search: bool


def compile_refresh(
    method: Method, shapes: Shapes, shardings: Mapping[str, NamedSharding]
) -> jax.stages.Compiled:
    """The refresh `(masks, params, grads, step, key) -> masks` of sharded leaves."""
    masks, weights = (_leaves(shapes, shardings, x) for x in (jnp.bool, jnp.float32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    refresh = jax.jit(method.rule.update, out_shardings=dict(shardings))
    return refresh.lower(masks, weights, weights, np.int32(0), key).compile()


def compile_sort(
    shapes: Shapes, shardings: Mapping[str, NamedSharding]
) -> jax.stages.Compiled:
    """The larger half of every leaf, by sorting it."""

    def masks(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        scores = {path: jnp.abs(w) for path, w in params.items()}
        return {p: s >= jnp.sort(s.reshape(-1))[s.size // 2] for p, s in scores.items()}

    sort = jax.jit(masks, out_shardings=dict(shardings))
    return sort.lower(_leaves(shapes, shardings, jnp.float32)).compile()


def _leaves(
    shapes: Shapes, shardings: Mapping[str, NamedSharding], dtype: type
) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract leaves, which need no memory."""
    return {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path])
        for path, shape in shapes.items()
    }


def compiled_traffic(operations: Sequence[Collective]) -> Traffic:
    """The all-reduces among the collectives of a compiled refresh.

    A search has two loops, of which one at a time is passed through: among the scores,
    and among those that tie.
    """
    reduces = [c for c in operations if c.kind == "all-reduce"]
    once = [sum(c.sizes) for c in reduces if not c.in_search]
    a_pass = [sum(c.sizes) for c in reduces if c.in_search]
    return Traffic(len(once), sum(once), len(a_pass) // 2, sum(a_pass) // 2)


def collectives(text: str) -> list[Collective]:
    """The operations between devices of a compiled program, as often as they happen.

    Those in a loop count once for each of its iterations, if the compiler knows their
    number; otherwise they count once and are marked.

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
        if match := _COLLECTIVE.search(line):
            yield Collective(match[2], _sizes(match[1]), in_search)
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
