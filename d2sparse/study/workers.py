"""Groups of runs that are trained side by side, each by a thread of its own.

Compiled programs let other threads go on, and the steps of a small network keep one
core busy. What a run computes does not depend on what is trained beside it.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, ParamSpec, TypeVar

import jax

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Given = ParamSpec("Given")
_LOOK = 0.1  # Seconds after which the thread that waits looks for a signal.
_MOST = 4  # Threads of one process, which trace and record in turn.


def count_workers(asked: int, parts: int) -> int:
    """How many threads train runs.

    Args:
      asked: --workers; 0 for one a core and at most four, on CPU alone.
      parts: how many groups of runs there are.
    """
    if jax.default_backend() != "cpu" or jax.process_count() > 1 or _is_in_a_context():
        return 1
    return max(min(asked or min(_cores(), _MOST), parts), 1)


def one_at_a_time(function: Callable[Given, ResultT]) -> Callable[Given, ResultT]:
    """A function that threads call in turn."""
    lock = threading.Lock()

    def locked(*given: Given.args, **named: Given.kwargs) -> ResultT:
        with lock:
            return function(*given, **named)

    return locked


class Workers:
    """Threads that share out items, or the present thread where it is the only one."""

    def __init__(self, count: int, interrupted: Callable[[], bool]) -> None:
        """Nothing is started yet.

        Args:
          count: number of threads.
          interrupted: whether the user has asked to stop.
        """
        self._count, self._asked = count, interrupted
        self._halted = threading.Event()

    def interrupted(self) -> bool:
        """Whether to save and stop: the user has asked to, or another item failed."""
        return self._asked() or self._halted.is_set()

    def share(self, work: Callable[[ItemT], None], items: Sequence[ItemT]) -> None:
        """Does the work of every item; they are begun in their order.

        Raises:
          BaseException: the first that the work of an item has raised, once all that
            was under way has come to its end; a `KeyboardInterrupt` comes last.
        """
        if self._count == 1:
            for item in items:
                work(item)
            return
        with ThreadPoolExecutor(self._count, "run") as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                # Signals are handled in this thread, but may wake up another one.
                while not _ended(wait(futures, _LOOK, FIRST_EXCEPTION)):
                    pass
            finally:  # Also at the second of two signals.
                if not all(future.done() for future in futures):
                    self._halted.set()
                    pool.shutdown(cancel_futures=True)
        ended = [future for future in futures if not future.cancelled()]
        errors = [error for future in ended if (error := future.exception())]
        errors.sort(key=lambda error: isinstance(error, KeyboardInterrupt))
        if errors:
            raise errors[0]


def _ended(futures: Any) -> bool:
    """Whether all have come to their end, or one of them to an error."""
    return not futures.not_done or any(own.exception() for own in futures.done)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_in_a_context() -> bool:
    """Whether settings of jax hold in this thread alone, as in `jax.enable_x64`."""
    elsewhere: dict[str, Any] = {}
    reader = threading.Thread(target=lambda: elsewhere.update(jax.config.values))
    reader.start()
    reader.join()
    return elsewhere != dict(jax.config.values)
