"""SIGINT and SIGTERM as a question that a training asks between two calls."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Defers both signals: inside, a call tells whether one has come.

    A second signal acts at once. When the block is left by a `KeyboardInterrupt`, that
    one carries the number of the signal. In other threads than the main one, where
    Python handles no signals, nothing is deferred.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    earlier = {number: signal.getsignal(number) for number in _STOPPING}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        restore()

    for number in _STOPPING:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*received[:1]) from None
    finally:
        restore()
