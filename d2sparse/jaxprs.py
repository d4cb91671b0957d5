"""Programs as jax traces them: what is inside of their equations."""

from collections.abc import Collection, Iterator
from typing import Any


def bodies(eqn: Any) -> Iterator[Any]:
    """Programs among the parameters of an equation, such as the body of a loop.

    >>> import jax
    >>> traced = jax.make_jaxpr(lambda x: jax.lax.cond(x > 0, jax.lax.sin, abs, x))(1.0)
    >>> [body.eqns[0].primitive.name for body in bodies(traced.jaxpr.eqns[-1])]
    ['abs', 'sin']
    """
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            program = getattr(item, "jaxpr", item)
            if hasattr(program, "eqns"):
                yield program


def contains(jaxpr: Any, names: Collection[str]) -> bool:
    """Whether a program does any of some operations, at any depth.

    >>> import jax
    >>> traced = jax.make_jaxpr(jax.jit(jax.lax.sin))(1.0)
    >>> contains(traced.jaxpr, ["sin"]), contains(traced.jaxpr, ["cos"])
    (True, False)
    """
    return any(
        eqn.primitive.name in names
        or any(contains(body, names) for body in bodies(eqn))
        for eqn in jaxpr.eqns
    )
