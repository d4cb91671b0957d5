"""Runs that are killed or stopped at any point resume to the same bits.

All attempts share their compiled programs: what a run remembers is on disk alone.
"""

import contextlib
import dataclasses
import functools
import json
import math
import signal

import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import read, without_time

from d2sparse import data, records, study
from d2sparse.checkpoint import store
from d2sparse.records import Run
from d2sparse.study import signals, splits
from d2sparse.study.tracking import Tracker

TINY = {
    **{"steps": 6, "seeds": 1, "progress": False},
    **{"report_every": 3, "checkpoint_every": 2},
}
ROUNDS = {"methods": ("imp",), "sparsity": 0.5, "rounds": 1, "rewind_fraction": 0.4}
# Two titled phases; another network is begun half-way; two runs in one program.
CASES = {
    "imp": ROUNDS,
    "self_distilled": {"methods": ("self_distilled",)},
    "together": {**ROUNDS, "seeds": 2, "runs_at_once": 2},
}


class Killed(BaseException):
    """The process is no more."""


class Case:
    """Runs of one configuration, whose programs are compiled once."""

    def __init__(self, **flags):
        self.config = study.Config(**{**TINY, **flags})
        self.draw = splits.make_draw_splits(data.load("digits"))
        build = runs.linear(10)
        self.plans = study.make_plans(self.config, self.draw, 10, lambda flags: build)

    def run(self, workdir, examine=lambda end: {}, **aside):
        config = dataclasses.replace(self.config, **aside)
        out = records.open_run(workdir, config, study.Finished)
        flags = [dataclasses.replace(plan.config, **aside) for plan in self.plans]
        plans = [p._replace(config=f) for p, f in zip(self.plans, flags, strict=True)]
        study.run_plans(study.Runner(config, out, self.draw, examine), plans)


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@functools.cache
def case(name):
    return Case(**CASES[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Cases, each with what it comes to where nobody interrupts it."""

    @functools.cache
    def trained(name):
        workdir = tmp_path_factory.mktemp("whole") / "run"
        case(name).run(workdir)
        return case(name), contents(workdir)

    return trained


def contents(workdir):
    """What has to come to the same: results, measurements, the last checkpoints."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = {"lines": sorted(lines, key=lambda line: json.loads(line)["unit"])}
    for unit in sorted((workdir / "units").iterdir()):
        found[unit.name] = without_time(read(unit))
        steps = (workdir / "checkpoints" / unit.stem).glob("[0-9]*")
        last = max(steps, key=lambda path: int(path.name))
        arrays, notes = store.read(last)
        found |= {f"{unit.stem} {name}": own for name, own in arrays.items()}
        found[f"{unit.stem} notes"] = last.name, without_time(notes["notes"])
    return found


def assert_same(found, expected, exact=True):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not exact and name.endswith(".json"):
            for key in ("nonzeros", "training_macs", "nll"):
                np.testing.assert_allclose(found[name][key], value[key], rtol=1e-4)
        elif not exact:  # Alone or beside others, sums are rounded otherwise.
            continue
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            assert found[name] == value, name


EVENTS = ("report", "save", "_end_part", "finish")


def die_once_at_every_event(monkeypatch, names=EVENTS):
    """Before and after every report, checkpoint, end of a phase and result."""
    died = []

    def deadly(owner, name, place):
        if name not in names:
            return
        act = getattr(owner, name)

        @functools.wraps(act)
        def killed(self, *given):
            where = place(self, *given)
            for moment in ("before", "after"):
                if moment == "after":
                    act(self, *given)
                if (event := (name, moment, *where)) not in died:
                    died.append(event)
                    raise Killed

        monkeypatch.setattr(owner, name, killed)

    def position(tracker, progress, logs):
        account = tracker.account
        taken = account.taken + int(progress.state.step) - account.last
        return tracker.unit, int(progress.phase), taken

    deadly(Tracker, "report", position)
    deadly(Tracker, "save", position)
    deadly(Tracker, "_end_part", lambda own, progress, title: (own.unit, title))
    deadly(Run, "finish", lambda own, unit, results: (unit,))
    return died


@pytest.mark.parametrize(
    "name",
    [
        "imp",
        pytest.param("self_distilled", marks=pytest.mark.slow),
        pytest.param("together", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_at_every_event_comes_to_the_same_end(
    name, whole, tmp_path, monkeypatch
):
    own, expected = whole(name)
    died, attempts = die_once_at_every_event(monkeypatch), 0
    while True:
        attempts += 1
        with contextlib.suppress(Killed):
            own.run(tmp_path / "run")
            break
    assert attempts == len(died) + 1
    names = {event[0] for event in died}
    assert names >= {"report", "save", "finish"}
    assert ("_end_part" in names) == (name != "self_distilled")
    assert_same(contents(tmp_path / "run"), expected, name != "together")


# At steps 2, 3, 4 and 6 of both phases; the second of imp begins at step 2.
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("imp", 4 + 3),
        pytest.param("self_distilled", 4 + 4, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_after_every_call_comes_to_the_same_end(
    name, calls, whole, tmp_path, monkeypatch
):
    own, expected = whole(name)
    asked = []

    @contextlib.contextmanager
    def deferred():
        asked.clear()
        yield lambda: asked.append(None) or len(asked) > 1  # First before the run.

    monkeypatch.setattr(signals, "deferred", deferred)
    attempts = 0
    while True:
        attempts += 1
        with contextlib.suppress(KeyboardInterrupt):
            own.run(tmp_path / "run")
            break
    assert attempts == calls + 1
    assert_same(contents(tmp_path / "run"), expected)


@pytest.mark.parametrize(
    "name", ["imp", pytest.param("together", marks=pytest.mark.slow)]
)
def test_a_signal_saves_where_no_checkpoint_is_due(name, whole, tmp_path, monkeypatch):
    own, expected = whole(name)
    report, told = Tracker.report, []

    def report_and_signal(self, progress, logs):
        report(self, progress, logs)
        if not told:
            told.append(signal.raise_signal(signal.SIGTERM))

    monkeypatch.setattr(Tracker, "report", report_and_signal)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as stopped:
        own.run(tmp_path / "run", checkpoint_every=0)
    assert stopped.value.args == (signal.SIGTERM,)
    assert signal.getsignal(signal.SIGTERM) is handler
    for seed in range(own.config.seeds):
        saved = tmp_path / "run" / "checkpoints" / f"imp-seed{seed}"
        assert [path.name for path in saved.glob("[0-9]*")] == ["3"]
    own.run(tmp_path / "run")
    assert_same(contents(tmp_path / "run"), expected)


def test_results_of_phases_are_those_of_their_ends(whole, tmp_path, monkeypatch):
    """They go through checkpoints, in which everything is a number of Python."""
    own, expected = whole("imp")
    die_once_at_every_event(monkeypatch, ("_end_part", "finish"))

    def examine(end):
        odd = {"array": np.ones(2), "number": jnp.float32(0.5), "missing": math.nan}
        return {"title_was": end.title, "step_was": end.progress.state.step, **odd}

    while True:
        with contextlib.suppress(Killed):
            own.run(tmp_path / "run", examine)
            break
    out = records.open_run(tmp_path / "run", own.config, study.Finished)
    results = out.finished(records.Unit("imp", 0))
    first, last = results.pop("parts")
    assert (first["title"], last["title"]) == ("round 0", "round 1")
    for part in (first, last):
        assert part["title_was"] == part["title"]
        assert (part["array"], part["number"], part["step_was"]) == ([1, 1], 0.5, 6)
        assert math.isnan(part["missing"])
    assert first["zeros"] == 0
    assert first["training_macs"] < last["training_macs"] == results["training_macs"]
    for name in ("accuracy", "nll", "nonzeros", "zeros"):
        assert last[name] == results[name]
        assert results[name] == expected["imp-seed0.json"][name]
    rows = study.read_runs(out, parts=True)
    assert rows["title"].tolist() == ["round 0", "round 1"]


def test_a_phase_that_has_failed_is_remembered(whole, tmp_path, monkeypatch):
    own, _ = whole("imp")
    die_once_at_every_event(monkeypatch, ("_end_part", "finish"))

    def examine(end):
        if end.title == "round 0":
            raise FloatingPointError("its predictions are not finite")
        return {}

    while True:
        with contextlib.suppress(Killed):
            own.run(tmp_path / "run", examine)
            break
    assert read(tmp_path / "run" / "units" / "imp-seed0.json")["failed"] == (
        "its predictions are not finite"
    )


def test_a_run_of_a_group_that_diverges_is_not_taken_up_again(whole, tmp_path):
    """A rewinding to sound weights does not heal it; the others are as without it."""
    own, expected = whole("together")
    wild = {0: 0.1, 1: 1e30}
    config, out = own.config, records.open_run(tmp_path, own.config, study.Finished)
    runner = study.Runner(
        *(config, out, own.draw),
        settings=lambda plan, seed, out: {"learning_rate": wild[seed]},
    )
    study.run_plans(runner, own.plans)
    why = out.failures()
    assert list(why) == ["imp-seed1"]
    assert why["imp-seed1"].startswith("the update of step 1 is not finite")
    sound = without_time(read(tmp_path / "units" / "imp-seed0.json"))
    assert sound == expected["imp-seed0.json"]
    steps = [line["step"] for line in records.read_metrics(tmp_path)]
    assert steps == [0, 0, 2, 3, 6, 7, 10]


def test_every_run_of_a_group_says_where_it_diverged(whole, tmp_path, monkeypatch):
    own, _ = whole("together")
    out = records.open_run(tmp_path, own.config, study.Finished)
    wild = {0: 1e30, 1: 1e12}
    runner = study.Runner(
        *(own.config, out, own.draw),
        settings=lambda plan, seed, out: {"learning_rate": wild[seed]},
    )
    study.run_plans(runner, own.plans)
    told = [why.split(" is not")[0] for why in out.failures().values()]
    assert len(set(told)) == 2, told
