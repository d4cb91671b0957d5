"""Kills, stops and damages runs of all experiments, and reports what came of it.

    python tests/chaos --kills=56 --out=docs/chaos.md

Every attempt is a process of its own that does what `python -m` does.
"""

import argparse
import importlib
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path[1:1] = [str(Path(__file__).parents[level]) for level in (1, 2)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

from torment import SCENARIOS, Tally, torment
from trials import PRUNE, Tried, try_all

from d2sparse import records

# Imported before a process forks, so that its child is quick; jax starts in the child.
for _module in ("d2sparse.study.cli", "d2sparse.study.comparing"):
    importlib.import_module(_module)

_PLACES = {"": "between writes", "units": "in units/"}
_REPORT = """\
# Runs that were killed, stopped and damaged

    {command}

On {machine}.

Every attempt is a process of its own at a tiny size: some 12 steps with a refresh of
the masks every second and a checkpoint every third. SIGKILL comes from outside after a
random time, or from inside at a random operation on a file: in the middle of a
checkpoint, of a line of `metrics.jsonl` (which it cuts), of a result. The columns say
what was left unfinished. After every kill all that can be seen was compared with a run
that was left alone: no line was lost, doubled or changed, no file was half there. After
the last one the run went on to its end, and everything in it was compared to the bit:
metrics, results, table, figures, tickets, the arrays of the last checkpoints.

{kills}

{stops}

## Damaged checkpoints and bad input

One run of `experiments.prune` was stopped by SIGTERM; then a copy of it was damaged,
and the same command was given again. "The same end" is that of the run that was left
alone, to the bit. What the commands said is quoted.

{trials}

Every file of a checkpoint, in seven ways each, a kill at every seventh operation of a
save, traps for unpickling, some seventy damages of a run directory, updates that are
not finite, and bad flags of every experiment are in the tests:
`tests/test_checkpoints.py`, `tests/test_damage.py`, `tests/test_faults.py`,
`tests/test_interruptions.py`, `tests/test_flags.py`.
"""


def kills_table(tallies: Mapping[str, Tally]) -> str:
    """A row for every experiment, and one for all."""
    places = sorted({place for tally in tallies.values() for place in tally.kills})
    columns = {
        "name": "experiment",
        "kills": "kills",
        **{place: _PLACES.get(place, place) for place in places},
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


def stops_sentence(tallies: Mapping[str, Tally]) -> str:
    """How long signals to stop took."""
    stops = sorted(seconds for tally in tallies.values() for seconds in tally.stops)
    saving = max(tally.saving for tally in tallies.values())
    if not stops:
        return "No run was stopped."
    return (
        f"From SIGTERM or SIGINT to the end of the process it took {stops[0]:.2f} to "
        f"{stops[-1]:.2f} s (median {stops[len(stops) // 2]:.2f} s); writing the "
        f"largest checkpoint alone takes {saving:.2f} s. All said how to go on."
    )


def trials_list(tried: Sequence[Tried]) -> str:
    """An item for every trial."""
    said = (f": `{t.said}`" if t.said else "" for t in tried)
    return "\n".join(
        f"- **{t.name}** → {t.end}{text}" for t, text in zip(tried, said, strict=True)
    )


def main() -> int:
    """Reads the flags, torments every experiment, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=56, help="over all experiments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--only", default="", help="experiments with this in their name"
    )
    parser.add_argument("--out", type=Path, help="Markdown file; none: only printed")
    given = parser.parse_args()
    chosen = [s for s in SCENARIOS if given.only in s.name]
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "cache"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for number, scenario in enumerate(chosen):
            kills = -(-given.kills // len(chosen))
            place = Path(directory) / str(number)
            tallies[scenario.name] = torment(
                scenario, place, kills, given.seed + number
            )
            print(scenario.name, tallies[scenario.name], flush=True)
        tried = try_all(Path(directory) / "trials") if given.only in PRUNE.name else []
    report = _REPORT.format(
        command=" ".join(["python", "tests/chaos", *sys.argv[1:]]),
        machine=f"{platform.machine()} with {os.cpu_count()} cores, Python "
        f"{platform.python_version()}",
        kills=kills_table(tallies),
        stops=stops_sentence(tallies),
        trials=trials_list(tried),
    )
    print(report)
    if given.out:
        given.out.write_text(report)
    wrong = [line for tally in tallies.values() for line in tally.wrong]
    wrong += [f"{t.name}: {t.end}: {t.said}" for t in tried if not t.good]
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
