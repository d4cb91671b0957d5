"""Several processes of one run: how they meet, agree, and end when one is lost.

All are given the same command but for the index, and see the same directories:

    python -m experiments.prune --data_parallel=0 --distributed=host0:9876,2,0
    python -m experiments.prune --data_parallel=0 --distributed=host0:9876,2,1

All of them hold the same state and take the same steps; the first one writes.
"""

import atexit
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

MEETING = 60  # Seconds that processes wait for each other at the beginning.
HEARTBEAT = 30  # Seconds without a sign of life after which a process counts as lost.
_FORM = "HOST:PORT,COUNT,INDEX, such as 10.0.0.1:9876,4,0"
_LOST = (
    "error: a process of this run has ended or cannot be reached; to resume from the "
    "last checkpoint, run the same command again in all processes"
)
_SYMPTOMS = re.compile(
    "gloo|nccl|coordination service|heartbeat|socket closed|connection reset", re.I
)


class Place(NamedTuple):
    """Which process this is.

    Attributes:
      host: where the first process can be reached.
      port: free there.
      total: number of processes.
      number: of this one, from 0.
    """

    host: str
    port: int
    total: int
    number: int


@contextmanager
def joined(distributed: str) -> Iterator[None]:
    """Inside, this process is one of those that the flag names.

    It is entered before jax is used. If another process is lost, this one ends with a
    message, at the latest half a minute later.

    Args:
      distributed: "" for a single process, "auto", or "HOST:PORT,COUNT,INDEX".

    Raises:
      ValueError: the text has another form, or the processes do not meet.
    """
    if not distributed:
        yield
        return
    place = None if distributed == "auto" else parse(distributed)
    say = _last_words()
    say("error: " + _not_met(place))
    if place is None:
        _initialize()
    else:
        _reach(place)
        _initialize(f"{place.host}:{place.port}", place.total, place.number)
    say(_LOST)
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not _SYMPTOMS.search(str(error)):
            raise
        # What else is done at exit would wait for the lost process.
        sys.stdout.flush()
        os._exit(1)


def parse(distributed: str) -> Place:
    """Which process the flag says this is.

    Raises:
      ValueError: it has another form.

    >>> parse("localhost:9876,2,1")
    Place(host='localhost', port=9876, total=2, number=1)
    """
    match = re.fullmatch(r"(.+):(\d+),(\d+),(\d+)", distributed)
    if match is None:
        raise ValueError(f"expected distributed auto or {_FORM}, got {distributed!r}")
    place = Place(match[1], *map(int, match.groups()[1:]))
    if not (place.number < place.total and 0 < place.port < 2**16):
        raise ValueError(
            "expected distributed with an index below the count and a port below "
            f"65536, got {distributed!r}; write {_FORM}"
        )
    return place


class Agreed:
    """A question to which all processes give one answer, as of the last `ask`."""

    def __init__(self, question: Callable[[], bool]) -> None:
        """Nothing is asked yet.

        Args:
          question: what each process answers for itself.
        """
        self._question, self._answer = question, False

    def __call__(self) -> bool:
        """Whether any process has answered yes; where it is alone, whether it does."""
        return self._question() if jax.process_count() == 1 else self._answer

    def ask(self) -> None:
        """Asks all processes, which all call this at the same place."""
        if jax.process_count() > 1:
            answers = multihost_utils.process_allgather(np.array(self._question()))
            self._answer = bool(np.any(answers))


def _initialize(
    address: str | None = None, total: int | None = None, number: int | None = None
) -> None:
    # What moves numbers between processes where the devices are CPUs.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            address,
            total,
            number,
            initialization_timeout=MEETING,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected processes that meet, got {str(error).splitlines()[0]}; give "
            f"--distributed={_FORM}"
        ) from error


def _reach(place: Place) -> None:
    """Waits for the first process; jax would abort this one if it does not come."""
    if place.number == 0:
        _check_free(place)
        return
    end = time.monotonic() + MEETING
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise ValueError(_not_met(place)) from None
        time.sleep(0.1)


def _check_free(place: Place) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", place.port))
        except OSError as error:
            raise ValueError(
                f"expected a free port, got {place.port} ({error.strerror}); choose "
                "another one in --distributed of all processes"
            ) from None


def _not_met(place: Place | None) -> str:
    if place is None:
        return f"the processes of this run have not met within {MEETING} seconds"
    return (
        f"expected {place.total} processes to meet at {place.host}:{place.port} within "
        f"{MEETING} seconds, they did not; start all of them with the same address and "
        f"count, and one of each index from 0 to {place.total - 1}"
    )


def _last_words() -> Callable[[str], None]:
    """What is said last is written to stderr if this process comes to a sudden end.

    jax aborts a process that has lost another one, without asking Python. So a shell
    listens, and writes the words when this process is gone and has not taken them back.
    """
    script = (
        'while read -r line; do words=$line; done; [ -z "$words" ] || echo "$words"'
    )
    shell = subprocess.Popen(
        ["sh", "-c", script + " >&2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert shell.stdin is not None
    pipe = shell.stdin

    def say(words: str) -> None:
        pipe.write(words + "\n")
        pipe.flush()

    def take_back() -> None:
        say("")
        pipe.close()
        shell.wait()

    # After jax has left the other processes, which is registered later.
    atexit.register(take_back)
    return say
