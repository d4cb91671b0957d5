"""Experiments killed at random moments, compared with runs that were left alone.

    python tests/chaos.py --kills=56 --out=docs/chaos.md

Every attempt is a process of its own that does what `python -m` does. SIGKILL comes
from outside after a random time, or from inside at the n-th operation on the files of a
place: in the middle of a checkpoint, of a line of metrics.jsonl, of a result. After a
kill everything that can be seen must be whole. A run that has come to its end must
equal the one that was left alone to the last bit.
"""

import argparse
import collections
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import runs

from d2sparse import records
from d2sparse.checkpoint import store

# Imported before a process forks, so that its child is quick; jax starts in the child.
for _module in ("cli", "methods", "recipes", "results", "units"):
    importlib.import_module(f"experiments.{_module}")

_TINY = [
    "--width=0.1",
    "--samples_per_class=2",
    "--batch_size=8",
    "--steps=12",
    "--refresh_interval=2",
    "--growth_samples=8",
    "--report_every=4",
    "--checkpoint_every=3",
    "--noprogress",
]
_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
# How deep into the operations on its files a process is killed, at most.
PLACES = {"checkpoints": 150, "metrics.jsonl": 6, "units": 4, "tickets": 80}
_PLACE_TITLES = {"": "between writes", "units": "in units/"}
REPORT = ("summary.json", "table.md", "figures")
PATIENCE = 300  # Seconds after which an attempt has hung.


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


SCENARIOS = [
    Scenario(
        "d2_sparse, trained: rigl, imp, d2_sparse",
        "experiments.d2_sparse",
        [*_TINY, "--seeds=2", "--methods=rigl,imp,d2_sparse", "--imp_rounds=2"],
    ),
    Scenario(
        "d2_sparse, consolidated",
        "experiments.d2_sparse",
        [*_TINY, "--seeds=2", "--methods=d2_sparse", "--mode=consolidated"],
    ),
    Scenario(
        "prune: gradual, rigl, str, snip",
        "experiments.prune",
        [*_TINY, "--seeds=1", "--rules=gradual,rigl,str,snip", "--sparsities=0.9"],
    ),
    Scenario(
        "lottery: magnitude, random",
        "experiments.lottery",
        [*_TINY, "--seeds=1", "--rounds=2"],
    ),
]


def attempt(
    scenario: Scenario,
    workdir: Path,
    moment: Moment | None = None,
    delay: float | None = None,
) -> Ended:
    """Runs the command once.

    Args:
      scenario: what is run.
      workdir: its run directory.
      moment: when signals come from inside.
      delay: seconds from the first change in the run directory to a SIGKILL.
    """
    before, log = _rests(workdir), workdir.with_suffix(".log")
    signalled = workdir.with_suffix(".signalled")
    pid = os.fork()
    if pid == 0:
        _command(scenario, workdir, log, moment)
    status = os.waitstatus_to_exitcode(_wait(pid, workdir, delay))
    waited = None
    if signalled.exists():
        waited = time.monotonic() - float(signalled.read_text())
        signalled.unlink()
    rests = _rests(workdir)
    places = [place for place in rests if rests[place] != before.get(place)]
    return Ended(status, log.read_text(), min(places, default=""), waited)


def _command(
    scenario: Scenario, workdir: Path, log: Path, moment: Moment | None
) -> NoReturn:
    """What `python -m` does, in a child."""
    status = 70
    try:
        os.chdir(ROOT)
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
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


def damages(workdir: Path, reference: Path) -> list[str]:
    """What can be seen and is not whole, or not what the reference says."""
    expected = _by_unit(reference / "metrics.jsonl")
    found = [
        f"lines of {unit}"
        for unit, lines in _by_unit(workdir / "metrics.jsonl").items()
        if lines != expected[unit][: len(lines)]
    ]
    seen = [workdir / "summary.json", *workdir.glob("units/[!.]*")]
    for name in (path.relative_to(workdir) for path in seen if path.exists()):
        if _results(workdir / name) != _results(reference / name):
            found.append(str(name))
    return found


def _results(path: Path) -> Any:
    try:
        return runs.without_time(runs.read(path))
    except ValueError as error:
        return repr(error)


def _by_unit(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = collections.defaultdict(list)
    for line in records._complete_lines(path):
        found[json.loads(line)["unit"]].append(line)
    return found


def outcome(workdir: Path) -> dict[str, Any]:
    """All that a finished run has found, by file; of arrays and figures a digest.

    Times are left out. Of checkpoints only the end of every unit counts.
    """
    found: dict[str, Any] = {
        "metrics.jsonl": (workdir / "metrics.jsonl").read_text(),
        "table.md": [
            {title: cell for title, cell in row.items() if "seconds" not in title}
            for row in runs.table_rows(workdir)
        ],
    }
    for path in [workdir / "summary.json", *workdir.glob("units/*")]:
        found[str(path.relative_to(workdir))] = _results(path)
    ends = [
        max(unit.glob("[0-9]*"), key=lambda path: int(path.name))
        for unit in workdir.glob("checkpoints/*")
    ]
    for path in [*ends, *workdir.glob("tickets/*/*")]:
        found[str(path.relative_to(workdir))] = _digest(store.read(path)[0])
    for path in workdir.glob("figures/*"):
        found[str(path.relative_to(workdir))] = _digest(path.read_bytes())
    return found


def _digest(value: Any) -> str:
    if isinstance(value, dict):
        array = [
            (k, str(v.dtype), v.shape, _digest(v.tobytes())) for k, v in value.items()
        ]
        value = repr(array).encode()
    return hashlib.sha256(value).hexdigest()


def differences(workdir: Path, reference: Path) -> list[str]:
    """What a finished run has found otherwise than the reference."""
    one, other = _in_child(outcome, workdir), _in_child(outcome, reference)
    return sorted(k for k in {**one, **other} if one.get(k) != other.get(k))


def saving(workdir: Path) -> float:
    """Seconds that it takes to write the largest checkpoint of a run once more."""
    paths = workdir.glob("checkpoints/*/[0-9]*")
    largest = max(paths, key=lambda path: len((path / store.MANIFEST).read_bytes()))
    arrays, began = store.read(largest)[0], time.monotonic()
    store.write(workdir.with_suffix(".copy"), arrays, {})
    return time.monotonic() - began


def _in_child(function: Callable[[Path], Any], workdir: Path) -> Any:
    """What a function says of a run directory; it reads arrays, which starts jax."""
    path = workdir.with_suffix(f".{function.__name__}")
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        assert status == 0, f"{workdir} cannot be read"
        return runs.read(path)
    try:
        path.write_text(json.dumps(function(workdir)))
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


@dataclasses.dataclass
class Tally:
    """What has come of a scenario.

    Attributes:
      kills: by the place that was left unfinished.
      resumes: attempts that went on from what another had left.
      ends: runs that were killed and came to their end.
      stops: by signal, seconds to the end.
      wrong: what was not whole after a kill, or differed in the end.
      saving: seconds of one save.
      seconds: that all of it took.
    """

    kills: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    resumes: int = 0
    ends: int = 0
    stops: list[float] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    saving: float = 0.0
    seconds: float = 0.0


def torment(scenario: Scenario, directory: Path, kills: int, seed: int = 0) -> Tally:
    """Kills and stops a run until there have been so many kills, then lets it end."""
    tally, rng, began = Tally(), random.Random(seed), time.monotonic()
    directory.mkdir(parents=True)
    reference = directory / "reference"
    done = attempt(scenario, reference)
    assert done.status == 0, done.said
    tally.saving = _in_child(saving, reference)
    moments, numbers = _moments(scenario, reference, rng), itertools.count()
    workdir, fresh = directory / f"run{next(numbers)}", True
    while tally.kills.total() < kills or not fresh:
        over = tally.kills.total() >= kills
        done = attempt(scenario, workdir, *((None, None) if over else next(moments)))
        tally.resumes += not fresh
        fresh = done.status == 0
        if fresh:
            tally.ends += 1
            tally.wrong += differences(workdir, reference)
            workdir = directory / f"run{next(numbers)}"
            continue
        tally.wrong += damages(workdir, reference)
        if done.status == -signal.SIGKILL:
            tally.kills[done.place] += 1
        elif done.status - 128 in (signal.SIGTERM, signal.SIGINT):
            tally.stops.append(done.waited or 0.0)
            name = signal.Signals(done.status - 128).name
            told = f"stopped by {name}; to go on" in done.said and (
                f"python -m {scenario.module} --width" in done.said
            )
            tally.wrong += [] if told else [f"said: {done.said}"]
        else:
            tally.wrong.append(f"status {done.status}: {done.said}")
            break
    tally.seconds = time.monotonic() - began
    return tally


def _moments(
    scenario: Scenario, reference: Path, rng: random.Random
) -> Iterator[tuple[Moment | None, float | None]]:
    """From inside and from outside by turns, and now and then a signal to stop."""
    places = [place for place in PLACES if (reference / place).exists()]
    stops = itertools.cycle([signal.SIGTERM, signal.SIGINT])
    while True:
        for place in places:
            yield Moment(place, rng.randint(1, PLACES[place])), None
            yield None, rng.uniform(0, 3)
            yield Moment("metrics.jsonl", rng.randint(3, 5), (next(stops),)), None
        yield Moment(rng.choice(REPORT), rng.randint(1, 2)), None


def _table(tallies: Mapping[str, Tally]) -> str:
    places = sorted({place for tally in tallies.values() for place in tally.kills})
    columns = {
        "name": "experiment",
        "kills": "kills",
        **{place: _PLACE_TITLES.get(place, place) for place in places},
        "resumes": "resumed",
        "stops": "SIGTERM, SIGINT",
        "ends": "ended",
        "wrong": "differences",
    }
    rows = [
        {
            "name": name,
            "kills": tally.kills.total(),
            **{place: tally.kills[place] for place in places},
            "resumes": tally.resumes,
            "stops": len(tally.stops),
            "ends": tally.ends,
            "wrong": len(tally.wrong),
        }
        for name, tally in tallies.items()
    ]
    total = {key: sum(row[key] for row in rows) for key in columns if key != "name"}
    return records.markdown_table([*rows, {"name": "all"} | total], columns)


def main() -> None:
    """Reads the flags, torments every scenario, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=56, help="over all experiments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="scenarios with this in their name")
    parser.add_argument("--out", type=Path, help="Markdown file; none: only printed")
    given = parser.parse_args()
    chosen = [s for s in SCENARIOS if given.only in s.name]
    tallies = {}
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "cache"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for number, scenario in enumerate(chosen):
            kills = -(-given.kills // len(chosen))
            tallies[scenario.name] = torment(
                scenario, Path(directory) / str(number), kills, given.seed + number
            )
            print(scenario.name, tallies[scenario.name], flush=True)
    print(_table(tallies))


if __name__ == "__main__":
    main()
