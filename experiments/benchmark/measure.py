"""Interleaved timings, and the memory of compiled programs.

All candidates of a table are timed in turns in one process, so that other load of the
machine slows each of them alike. Medians are compared.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.tree import PyTree


class Candidate(NamedTuple):
    """Something that is timed.

    Attributes:
      call: does the work once; the arrays it returns are waited for.
      slow: whether it is timed in the first few rounds only.
    """

    call: Callable[[], object]
    slow: bool = False


class Timing(NamedTuple):
    """Seconds of one call.

    Attributes:
      wall: by the clock.
      cpu: summed over all threads of the process.
    """

    wall: float
    cpu: float

    def over(self, times: int) -> "Timing":
        """The time of each of several repetitions inside of one call."""
        return Timing(self.wall / times, self.cpu / times)

    def cells(self) -> dict[str, float]:
        """The two columns of a table."""
        return {"ms": 1e3 * self.wall, "CPU ms": 1e3 * self.cpu}


def time_in_turns(
    candidates: Mapping[str, Candidate], rounds: int, slow_rounds: int
) -> dict[str, Timing]:
    """Median time of every candidate, its first call left out.

    Args:
      candidates: by name.
      rounds: number of timings of each.
      slow_rounds: number of timings of each slow one.
    """
    for candidate in candidates.values():
        jax.block_until_ready(candidate.call())
    timings: dict[str, list[Timing]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name, candidate in candidates.items():
            if number < slow_rounds or not candidate.slow:
                timings[name].append(time_call(candidate.call))
    return {n: Timing(*map(float, np.median(t, axis=0))) for n, t in timings.items()}


def time_call(call: Callable[[], object]) -> Timing:
    """Seconds of one call, until the arrays it returns are computed."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def stateful(step: Callable[..., Any], state: Any, *rest: Any) -> Callable[[], Any]:
    """Calls `state, output = step(state, *rest)`, each time with the last state.

    Args:
      step: may donate its state.
      state: of the first call. It is copied, so that the caller's arrays live on.
      rest: further arguments, the same for every call.

    Returns:
      A function without arguments that waits for the state and returns the output.
    """
    current = jax.tree.map(jnp.copy, state)

    def call() -> Any:
        nonlocal current
        current, output = step(current, *rest)
        jax.block_until_ready(current)
        return output

    return call


def repeated(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """Calls a function several times with the same arguments, in a scan.

    Args:
      function: of arrays.
      times: number of calls; for 1 the function itself is returned.

    Returns:
      A function of the same arguments, which returns the result of the last call.
    """
    if times == 1:
        return function

    def scanned(*args: Any) -> Any:
        # Each call waits for the one before it: none is moved out of the loop.
        def call(last: Any, _: None) -> tuple[Any, None]:
            given, _ = jax.lax.optimization_barrier((args, last))
            return function(*given), None

        shapes = jax.eval_shape(function, *args)
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(call, start, length=times)[0]

    return scanned


def num_bytes(tree: PyTree) -> int:
    """Bytes of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def temporary_bytes(compiled: jax.stages.Compiled) -> float:
    """Bytes a program needs beside its arguments and results; NaN if it is not known.

    >>> double = jax.jit(lambda x: 2 * x).lower(np.float32(1)).compile()
    >>> temporary_bytes(double)
    0.0
    """
    memory = compiled.memory_analysis()
    return math.nan if memory is None else float(memory.temp_size_in_bytes)
