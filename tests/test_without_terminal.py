"""Experiments whose output goes to a file, that are stopped, or of which all fails.

The trainings are stood in for by results.
"""

import dataclasses

import pytest
from runs import read

from d2sparse import data
from experiments import cli, d2_sparse, prune, units

RESULT = {
    "accuracy": 0.5,
    **dict.fromkeys(("nll", "ece", "brier", "sparsity"), 0.5),
    **dict.fromkeys(("nonzeros", "training_macs", "inference_macs", "seconds"), 1),
    "accuracy_network": 0.5,
    "calibration": {"count": [1], "confidence": [0.5], "correct": [1]},
    "corrupted": {f"{name}-3": 0.5 for name in data.CORRUPTIONS},
}
TINY = {"seeds": 1, "width": 0.1, "steps": 12, "refresh_interval": 3}
EXPERIMENTS = [
    (prune, prune.Config(**TINY, rules=("dense", "static"), sparsities=(0.5,))),
    (d2_sparse, d2_sparse.Config(**TINY, methods=("dense", "static"))),
]
NAMES = ["prune", "d2_sparse"]
EACH = pytest.mark.parametrize(("experiment", "config"), EXPERIMENTS, ids=NAMES)


@pytest.fixture
def learn(monkeypatch):
    """What becomes of the units in their order: a number of them ends, the rest too."""
    fates = []

    def learned(config, out, plans, conclude, jobs, statistics=None):
        for job in jobs:
            out.start(job.unit)
            out.log(job.unit, 0, {"monitor_accuracy": 0.1})
            fate = fates.pop(0)
            if fate == "stop":
                raise KeyboardInterrupt
            if fate == "fail":
                out.fail(job.unit, "its update of step 3 is not finite")
            else:
                out.finish(job.unit, RESULT)

    monkeypatch.setattr(units, "learn", learned)
    return fates


def run(experiment, config, workdir):
    return experiment.run(dataclasses.replace(config, workdir=str(workdir)))


@EACH
def test_every_run_that_comes_to_its_end_is_a_line(
    experiment, config, learn, tmp_path, capsys
):
    learn += ["end", "fail"]
    run(experiment, config, tmp_path / "run")
    first, *lines = capsys.readouterr().out.splitlines()[:3]
    assert first == f"{tmp_path / 'run'}: 0 of 2 runs have finished"
    assert lines[0].startswith("1/2 dense")
    assert lines[0].endswith(": 50.00 % test accuracy, 1.0 s")
    assert lines[1].startswith("2/2 static")
    assert lines[1].endswith(" failed: its update of step 3 is not finite")


@EACH
def test_a_run_that_is_stopped_leaves_the_table_of_what_has_finished(
    experiment, config, learn, tmp_path, capsys
):
    learn += ["end", "stop", "end"]
    with pytest.raises(KeyboardInterrupt):
        run(experiment, config, tmp_path / "run")
    told = "This table is partial: the run was stopped before its end."
    table = (tmp_path / "run" / "table.md").read_text()
    assert table.startswith(told)
    assert "| dense " in table
    assert " 50.00 " in table
    assert told in capsys.readouterr().out
    assert read(tmp_path / "run" / "summary.json")["partial"] is True
    run(experiment, config, tmp_path / "run")
    assert "partial" not in (tmp_path / "run" / "table.md").read_text()
    assert "partial" not in read(tmp_path / "run" / "summary.json")


def test_where_nothing_has_finished_there_is_no_table(learn, tmp_path):
    learn += ["stop"]
    with pytest.raises(KeyboardInterrupt):
        run(*EXPERIMENTS[0], tmp_path / "run")
    assert not (tmp_path / "run" / "table.md").exists()


@pytest.mark.parametrize(("experiment", "config"), EXPERIMENTS[:2], ids=NAMES[:2])
def test_a_run_of_which_everything_fails_has_status_1(
    experiment, config, learn, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    learn += ["fail", "fail"]
    config = dataclasses.replace(config, workdir=str(tmp_path / "run"))
    for _ in range(2):  # Again where all of it is found.
        with pytest.raises(SystemExit) as stopped:
            cli.run_or_exit(experiment.run, config)
        assert stopped.value.code == 1
        told = capsys.readouterr().err
        assert told.startswith("error: all 2 runs have failed, dense-seed0 since")
        assert told.count("\n") == 1
    assert (tmp_path / "run" / "table.md").read_text().count("is not counted") == 2
