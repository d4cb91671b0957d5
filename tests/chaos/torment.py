"""Experiments killed at random moments, compared with runs that were left alone.

SIGKILL comes from outside after a random time, or from inside at the n-th operation on
the files of a place: in the middle of a checkpoint, of a line of metrics.jsonl, of a
result. After a kill everything that can be seen must be whole. A run that has come to
its end must equal the one that was left alone to the last bit.
"""

import collections
import dataclasses
import itertools
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from attempts import Moment, Scenario, attempt
from outcomes import damages, differences, in_child, saving

# How deep into the operations on its files a process is killed, at most.
PLACES = {"checkpoints": 150, "metrics.jsonl": 6, "units": 4, "tickets": 80}
REPORT = ("summary.json", "table.md", "figures")

TINY = [
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
SCENARIOS = [
    Scenario(
        "d2_sparse: rigl, imp, d2_sparse",
        "experiments.d2_sparse",
        [*TINY, "--seeds=2", "--methods=rigl,imp,d2_sparse", "--rounds=2"],
    ),
    Scenario(
        "compare: dense",
        "experiments.compare",
        [
            *(word for word in TINY if "refresh" not in word and "growth" not in word),
            "--seeds=1",
            "--methods=dense",
        ],
    ),
    Scenario(
        "compare: d2_consolidated",
        "experiments.compare",
        [*TINY, "--seeds=1", "--methods=d2_consolidated"],
    ),
    Scenario(
        "prune: gradual, rigl, str, snip",
        "experiments.prune",
        [*TINY, "--seeds=1", "--methods=gradual,rigl,str,snip", "--sparsity=0.9"],
    ),
    Scenario(
        "lottery: magnitude, random",
        "experiments.lottery",
        [
            *(word for word in TINY if "refresh" not in word and "growth" not in word),
            "--seeds=1",
            "--rounds=2",
        ],
    ),
    Scenario(
        "anytime: app_2022, d2_consolidated",
        "experiments.anytime",
        [
            "--width=0.1",
            "--samples_per_class=6",
            "--batch_size=8",
            "--megabatches=2",
            "--epochs=2",
            "--refresh_interval=2",
            "--report_every=4",
            "--checkpoint_every=3",
            "--noprogress",
            "--seeds=1",
            "--methods=app_2022,d2_consolidated",
        ],
    ),
    Scenario(
        "low_data: self_distilled, free_tickets, d2_distilled",
        "experiments.low_data",
        [
            *(word for word in TINY if "samples" not in word or "growth" in word),
            "--samples_per_class=2",
            "--seeds=1",
            "--methods=self_distilled,free_tickets,d2_distilled",
        ],
    ),
]


@dataclasses.dataclass
class Tally:
    """What has come of a scenario.

    Attributes:
      kills: by the place that was left unfinished.
      resumes: attempts that went on from what another had left.
      ends: runs that were killed and came to their end.
      stops: seconds from each SIGTERM or SIGINT to the end.
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
    tally.saving = in_child(saving, reference)
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
