"""Experiments whose output goes to a file, that are stopped, or of which all fails.

The trainings are stood in for by results.
"""

import dataclasses

import pytest
from runs import blank_figures, linear_networks, read

from d2sparse import records, study
from d2sparse.data import CORRUPTIONS
from d2sparse.study import cli, reporting, runner
from experiments import compare, d2_sparse, lottery, low_data, prune

RESULT = {
    **dict.fromkeys(study.Finished.__required_keys__, 0.5),
    **{"nonzeros": 1, "seconds": 1, "pruned": 0.5, "title": "", "outside": 0.5},
    "calibration": {"count": [1], "confidence": [0.5], "correct": [1]},
    "corrupted": {f"{name}-3": 0.5 for name in CORRUPTIONS},
}
TINY = {"seeds": 1, "steps": 8, "workers": 1}
PAIR = {**TINY, "methods": ("dense", "static")}
# Two runs of each. Here anytime joins once it is a comparison:
#   "anytime": (anytime.run, anytime.Config(...)),
EXPERIMENTS = {
    "compare": (study.compare, compare.Config(**PAIR)),
    "prune": (prune.run, prune.Config(**PAIR, axes={"sparsity": (0.5,)})),
    "d2_sparse": (d2_sparse.run, d2_sparse.Config(**PAIR)),
    "low_data": (low_data.run, low_data.Config(**PAIR, axes={})),
    "lottery": (lottery.run, lottery.Config(**TINY, rounds=1)),
}
EACH = pytest.mark.parametrize(("run", "config"), EXPERIMENTS.values(), ids=EXPERIMENTS)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with blank_figures(), linear_networks():
        yield


@pytest.fixture
def learn(monkeypatch):
    """The fates of the runs, which one worker takes in order; others finish."""
    fates = []

    def train_group(runner, group, note, interrupted):
        out = runner.out
        for plan, seed in group:
            unit = study.runner.unit_of(plan, seed)
            out.start(unit)
            out.log(unit, 0, {"monitor_accuracy": 0.1})
            fate = fates.pop(0) if fates else "end"
            if fate == "stop":
                raise KeyboardInterrupt
            if fate == "fail":
                out.fail(unit, "its update of step 3 is not finite")
                continue
            named = {"method": plan.row.method, "values": dict(plan.row.values)}
            parts = [{**RESULT, **named, "title": f"round {n}"} for n in range(2)]
            out.finish(unit, {**RESULT, **named, "parts": parts})

    monkeypatch.setattr(runner, "_train_group", train_group)
    return fates


def at(workdir, config):
    return dataclasses.replace(config, workdir=str(workdir))


@EACH
def test_every_run_that_comes_to_its_end_is_a_line(
    run, config, learn, tmp_path, capsys
):
    learn += ["end", "fail"]
    run(at(tmp_path / "run", config))
    first, *lines = capsys.readouterr().out.splitlines()[:3]
    assert first == f"{tmp_path / 'run'}: 0 of 2 runs have finished"
    assert lines[0].startswith("1/2 ")
    assert lines[0].endswith("-seed0: 50.00 % test accuracy, 1.0 s")
    assert lines[1].startswith("2/2 ")
    assert lines[1].endswith("-seed0 failed: its update of step 3 is not finite")


@EACH
def test_a_run_that_is_stopped_leaves_the_table_of_what_has_finished(
    run, config, learn, tmp_path, capsys
):
    learn += ["end", "stop"]
    with pytest.raises(KeyboardInterrupt):
        run(at(tmp_path / "run", config))
    told = "This table is partial: the run was stopped before its end."
    table = (tmp_path / "run" / "table.md").read_text()
    assert table.startswith(told)
    assert " 50.00 " in table
    assert told in capsys.readouterr().out
    partial = read(tmp_path / "run" / "summary.json")
    assert partial["partial"] is True
    run(at(tmp_path / "run", config))
    assert "partial" not in (tmp_path / "run" / "table.md").read_text()
    whole = read(tmp_path / "run" / "summary.json")
    assert "partial" not in whole
    if "rows" in whole:  # Else there are several tables.
        assert len(whole["rows"]) == 2 * len(partial["rows"])


@pytest.mark.parametrize("fates", [["stop"], ["fail", "stop"]], ids=" ".join)
def test_where_nothing_has_finished_there_is_no_table(fates, learn, tmp_path):
    run, config = EXPERIMENTS["prune"]
    learn += fates
    with pytest.raises(KeyboardInterrupt):
        run(at(tmp_path / "run", config))
    assert not (tmp_path / "run" / "table.md").exists()


@pytest.mark.parametrize("name", ["prune", "lottery"])
def test_a_run_of_which_everything_fails_has_status_1(
    name, learn, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    run, config = EXPERIMENTS[name]
    learn += ["fail", "fail"]
    for _ in range(2):  # The second time all of it is read.
        with pytest.raises(SystemExit) as stopped:
            cli.run_or_exit(run, at(tmp_path / "run", config))
        assert stopped.value.code == 1
        told = capsys.readouterr().err
        assert told.startswith("error: all 2 runs have failed, ")
        assert "-seed0 since its update of step 3 is not finite" in told
        assert told.count("\n") == 1
    assert (tmp_path / "run" / "table.md").read_text().count("is not counted") == 2


def test_of_several_processes_only_the_first_writes_and_prints(tmp_path, capsys):
    config = EXPERIMENTS["prune"][1]
    for number, writes in enumerate((False, True)):
        out = records.Run(tmp_path, writes=writes)
        reporting.write(study.Comparison(config, out, (), None), {}, "| a table |")
        assert ("| a table |" in capsys.readouterr().out) == writes
        assert len(list(tmp_path.iterdir())) == 2 * number
