"""Runs that are trained side by side come to what they come to one after another."""

import dataclasses
import json
import os
import signal
import threading

import jax
import pytest
import runs
from runs import read, without_time

from d2sparse import data, records, study
from d2sparse.study import splits, workers
from d2sparse.study.tracking import Tracker
from d2sparse.study.workers import Workers, count_workers

CONFIG = study.Config(
    **{"methods": ("dense", "static"), "steps": 6, "seeds": 2},
    **{"report_every": 2, "checkpoint_every": 2, "progress": False},
)


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@pytest.fixture(scope="module")
def compared():
    draw, model = splits.make_draw_splits(data.load("digits")), runs.linear(10)
    return draw, study.make_plans(CONFIG, draw, 10, lambda flags: model)


@pytest.fixture(scope="module")
def train(compared):
    draw, plans = compared

    def train(workdir, count, **further):
        config = dataclasses.replace(CONFIG, workers=count)
        out = records.open_run(workdir, config, study.Finished)
        study.run_plans(study.Runner(config, out, draw, **further), plans)
        return contents(workdir)

    return train


@pytest.fixture(scope="module")
def one_by_one(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("one") / "run", 1)


def contents(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    names = {path.stem for path in (workdir / "units").iterdir()}
    of = {name: [x for x in lines if json.loads(x)["unit"] == name] for name in names}
    found = {name: read(workdir / "units" / f"{name}.json") for name in names}
    return {name: (of[name], without_time(found[name])) for name in names}


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_results_do_not_depend_on_the_number_of_workers(
    count, train, one_by_one, tmp_path, capsys
):
    assert train(tmp_path / "run", count) == one_by_one
    shown = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in shown] == [f"{n}/4" for n in range(1, 5)]


def test_a_signal_stops_all_of_them_and_they_resume(
    train, one_by_one, tmp_path, monkeypatch
):
    report, together, told = Tracker.report, threading.Barrier(2), threading.Event()

    def report_and_signal(self, progress, logs):
        report(self, progress, logs)
        if not told.is_set() and together.wait(60) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            told.set()
        told.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "report", report_and_signal)
        with pytest.raises(KeyboardInterrupt) as stopped:
            train(tmp_path / "run", 2)
    assert stopped.value.args == (signal.SIGTERM,)
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert saved == {"dense-seed0", "static-seed0"}
    assert train(tmp_path / "run", 2) == one_by_one


def test_where_one_cannot_go_on_the_other_saves(
    train, one_by_one, tmp_path, monkeypatch
):
    report, together = Tracker.report, threading.Barrier(2)

    def report_or_fail(self, progress, logs):
        report(self, progress, logs)
        together.wait(60)
        if self.unit.method == "dense":
            raise OSError("the disk is full")
        halted.wait(60)

    halted = threading.Event()
    halt = workers.ThreadPoolExecutor.shutdown

    def shutdown(self, wait=True, *, cancel_futures=False):
        halted.set()
        halt(self, wait, cancel_futures=cancel_futures)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "report", report_or_fail)
        patch.setattr(workers.ThreadPoolExecutor, "shutdown", shutdown)
        with pytest.raises(OSError, match="the disk is full"):
            train(tmp_path / "run", 2)
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert "static-seed0" in saved
    assert train(tmp_path / "run", 2) == one_by_one


def test_a_run_waits_for_another_one_whose_results_it_needs(
    train, one_by_one, tmp_path
):
    asked = []

    def after_dense(plan, seed, out):
        if plan.row.method == "static":
            asked.append(out.finished(records.Unit("dense", seed)))
            return None if asked[-1] is None else {}
        return {}

    assert train(tmp_path / "run", 2, settings=after_dense) == one_by_one
    assert asked[0] is None


def test_functions_of_an_experiment_are_called_one_at_a_time(train, tmp_path):
    inside, most = [], []

    def examine(end):
        inside.append(end)
        most.append(len(inside))
        inside.pop()
        return {}

    train(tmp_path / "run", 4, examine=examine)
    assert set(most) == {1}


def test_threads_measure_in_one_directory(tmp_path):
    out = records.open_run(tmp_path, CONFIG)
    units = [records.Unit("dense", seed) for seed in range(4)]

    def measure(unit):
        for attempt in range(3):
            out.start(unit)
            for step in range(10):
                out.log(unit, step, {"loss": attempt})
        out.finish(unit, {})

    Workers(4, lambda: False).share(measure, units)
    lines = records.read_metrics(tmp_path)
    for unit in units:
        own = [line for line in lines if line["unit"] == unit.name]
        assert [line["step"] for line in own] == list(range(10))
        assert {line["loss"] for line in own} == {2}


def test_errors_come_before_interruptions_and_nothing_is_begun_after_them():
    begun, both = [], threading.Barrier(2)

    def work(number):
        begun.append(number)
        both.wait(60)
        raise KeyboardInterrupt if number == 0 else OSError("full")

    with pytest.raises(OSError, match="full"):
        Workers(2, lambda: False).share(work, range(2))
    own = Workers(1, lambda: False)
    both.abort()
    with pytest.raises(threading.BrokenBarrierError):
        own.share(work, range(2))
    assert sorted(begun[:2]) == [0, 1]
    assert begun[2:] == [0]


def test_there_are_as_many_workers_as_cores_and_parts():
    assert count_workers(3, 2) == 2
    assert count_workers(3, 0) == 1
    assert 1 <= count_workers(0, 100) <= 4


def test_settings_of_jax_that_hold_in_one_thread_keep_all_runs_in_it():
    with jax.enable_x64(True):
        assert count_workers(3, 3) == 1
    assert count_workers(3, 3) == 3
