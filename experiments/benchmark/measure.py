"""Timing candidates against each other, and reading compiled programs.

All candidates of a table take turns in one process, so that the load of the machine
falls on each alike; what is compared are medians.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import records
from d2sparse.tree import PyTree


class Candidate(NamedTuple):
    """Something that is timed.

    Attributes:
      call: does the work once; the arrays it returns are waited for.
      slow: it takes turns in the first few rounds only.
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
        """Of one of so many things that were done in the call."""
        return Timing(self.wall / times, self.cpu / times)


class Table(NamedTuple):
    """What a section has measured.

    Attributes:
      title: its heading.
      note: what the columns mean.
      columns: title by key, as `records.markdown_table` takes them.
      rows: cells by key; numbers are not rounded yet.
    """

    title: str
    note: str
    columns: Mapping[str, str]
    rows: list[dict[str, Any]]


def take_turns(
    candidates: Mapping[str, Candidate], rounds: int, slow_rounds: int
) -> dict[str, Timing]:
    """Median time of every candidate, its first call left out.

    Args:
      candidates: by name.
      rounds: timings of each.
      slow_rounds: timings of each that is slow.
    """
    for candidate in candidates.values():
        jax.block_until_ready(candidate.call())
    timings: dict[str, list[Timing]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name, candidate in candidates.items():
            if turn < slow_rounds or not candidate.slow:
                timings[name].append(time_call(candidate.call))
    return {n: Timing(*map(float, np.median(t, axis=0))) for n, t in timings.items()}


def time_call(call: Callable[[], object]) -> Timing:
    """Seconds of one call, until the arrays it returns are there."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def carried(step: Callable[..., Any], state: Any, *rest: Any) -> Callable[[], Any]:
    """Calls `state, _ = step(state, *rest)`, whose state is donated, again and again.

    Args:
      step: it returns the next state and anything else, which is given back.
      state: where to start. It is copied, so that the caller's arrays live on.
      rest: further arguments, the same for every call.
    """
    held = jax.tree.map(jnp.copy, state)

    def call() -> Any:
        nonlocal held
        held, other = step(held, *rest)
        jax.block_until_ready(held)
        return other

    return call


def in_one_program(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """Calls a function with the same arguments again and again, in a scan.

    Args:
      function: of arrays.
      times: how often it is called; once is without a scan.

    Returns:
      A function of the same arguments; it returns what the last call does.
    """
    if times == 1:
        return function

    def repeated(*args: Any) -> Any:
        # Each call waits for the one before it: none is moved out of the loop.
        def call(last: Any, _: None) -> tuple[Any, None]:
            given, _ = jax.lax.optimization_barrier((args, last))
            return function(*given), None

        shapes = jax.eval_shape(function, *args)
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(call, start, length=times)[0]

    return repeated


def num_bytes(tree: PyTree) -> int:
    """Bytes of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def temporary_bytes(compiled: jax.stages.Compiled) -> float:
    """Bytes a program needs beside its arguments and results; NaN if it does not say.

    >>> double = jax.jit(lambda x: 2 * x).lower(np.float32(1)).compile()
    >>> temporary_bytes(double)
    0.0
    """
    memory = compiled.memory_analysis()
    return math.nan if memory is None else float(memory.temp_size_in_bytes)


def to_markdown(table: Table) -> str:
    """Heading, table and note.

    >>> rows = [{"what": "sort", "ms": 1234.5}, {"what": "torch", "ms": "absent"}]
    >>> columns = {"what": "what", "ms": "ms"}
    >>> print(to_markdown(Table("Refresh", "Medians.", columns, rows)))
    ## Refresh
    <BLANKLINE>
    | what   |     ms |
    |:-------|-------:|
    | sort   |  1,234 |
    | torch  | absent |
    <BLANKLINE>
    Medians.
    """
    cells = [{key: shown(cell) for key, cell in row.items()} for row in table.rows]
    text = records.markdown_table(cells, table.columns)
    return f"## {table.title}\n\n{text}\n\n{table.note}"


def shown(cell: Any) -> str:
    """A cell as it is printed: numbers to about three digits.

    >>> [shown(x) for x in (1234.5, 123.4, 12.34, 1.234, 0.01234, 8, "yes", math.nan)]
    ['1,234', '123', '12.3', '1.23', '0.0123', '8', 'yes', '—']
    """
    if not isinstance(cell, float):
        return str(cell)
    if math.isnan(cell):
        return "—"
    if abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.3g}"
