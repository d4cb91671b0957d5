"""Attempts at a command, each a process of its own, and how signals end them."""

import collections
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # Seconds after which an attempt has hung.
_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


class Scenario(NamedTuple):
    """An experiment that is tried.

    Attributes:
      name: in the report.
      module: the experiment.
      words: its flags.
    """

    name: str
    module: str
    words: list[str]


class Moment(NamedTuple):
    """When signals come from inside of a process.

    Attributes:
      place: part of the path of files in the run directory.
      count: at which operation on them.
      signals: what is raised.
    """

    place: str
    count: int
    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)


class Ended(NamedTuple):
    """How an attempt has ended.

    Attributes:
      status: of the process, negative where a signal has ended it.
      said: what it wrote.
      place: what it left unfinished, "" for nothing.
      waited: seconds from the signal to the end, None without one.
    """

    status: int
    said: str
    place: str
    waited: float | None


def attempt(
    scenario: Scenario,
    workdir: Path,
    moment: Moment | None = None,
    delay: float | None = None,
    before: Callable[[], None] = lambda: None,
) -> Ended:
    """Runs the command once.

    Args:
      scenario: what is run.
      workdir: its run directory.
      moment: when signals come from inside.
      delay: seconds from the first change in the run directory to a SIGKILL.
      before: called in the process, before anything of the command.
    """
    earlier, log = _rests(workdir), workdir.with_suffix(".log")
    signalled = workdir.with_suffix(".signalled")
    pid = os.fork()
    if pid == 0:
        _command(scenario, workdir, log, moment, before)
    status = os.waitstatus_to_exitcode(_wait(pid, workdir, delay))
    waited = None
    if signalled.exists():
        waited = time.monotonic() - float(signalled.read_text())
        signalled.unlink()
    rests = _rests(workdir)
    places = [place for place in rests if rests[place] != earlier.get(place)]
    return Ended(status, log.read_text(), min(places, default=""), waited)


def _command(
    scenario: Scenario,
    workdir: Path,
    log: Path,
    moment: Moment | None,
    before: Callable[[], None],
) -> NoReturn:
    """What `python -m` does, in a child."""
    status = 70
    try:
        os.chdir(ROOT)
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        before()
        if moment is not None:
            _arm(workdir, moment)
        sys.argv[1:] = [*scenario.words, f"--workdir={workdir}"]
        runpy.run_module(scenario.module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _arm(workdir: Path, moment: Moment) -> None:
    """Raises the signals at their moment; a kill cuts the line it falls on."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _EVENTS or count == moment.count:
            return
        path = str(arguments[0])
        if not path.startswith(f"{workdir}/") or moment.place not in path:
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if count < moment.count:
            return
        if signal.SIGKILL in moment.signals and path.endswith("/metrics.jsonl"):
            with open(path, "a") as file:
                file.write('{"unit": "half a li')
        workdir.with_suffix(".signalled").write_text(str(time.monotonic()))
        for number in moment.signals:
            signal.raise_signal(number)

    sys.addaudithook(hook)


def _wait(pid: int, workdir: Path, delay: float | None) -> int:
    """The status of a child, which is killed some time after its first change."""
    began, first, due = time.monotonic(), _lines(workdir), None
    found = 0
    try:
        while not found:
            time.sleep(0.002)
            now = time.monotonic()
            if now > began + PATIENCE:
                raise TimeoutError(f"expected an end within {PATIENCE} s: {workdir}")
            if delay is not None and due is None and _lines(workdir) != first:
                due = now + delay
            if due is not None and now > due:
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
        return status
    finally:
        if not found:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _lines(workdir: Path) -> tuple[int, int]:
    """Changes when a unit begins or is measured."""
    path = workdir / "metrics.jsonl"
    return (path.stat().st_ino, path.stat().st_size) if path.exists() else (0, 0)


def _rests(workdir: Path) -> dict[str, Any]:
    """Places where something stands unfinished, and what tells it from other rests."""
    found: dict[str, Any] = collections.defaultdict(set)
    for path in workdir.rglob(".*"):
        place = path.relative_to(workdir).parts[0].strip(".").removesuffix(".tmp")
        found[place].add((path.name, path.stat().st_ino))
    metrics = workdir / "metrics.jsonl"
    if metrics.exists() and metrics.read_bytes()[-1:] not in (b"\n", b""):
        found[metrics.name].add(_lines(workdir))
    return found
