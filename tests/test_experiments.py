"""The experiments, end to end at tiny size."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
from runs import modified, read, unit_files, without_time
from simple_parsing.docstring import get_attribute_docstring

from d2sparse import data, plots, records
from experiments import d2_sparse, units
from experiments.d2_sparse import Config
from experiments.methods import METHODS

TFDS = Path(os.environ.get("TFDS_DATA_DIR") or runs.ROOT.parent / "shared" / "tfds")
SEEDS = range(2)
TINY = Config(
    seeds=len(SEEDS),
    width=0.1,
    steps=12,
    refresh_interval=4,
    report_every=6,
    growth_samples=64,
    imp_rounds=2,
    progress=False,
)
KERNELS, BIASES = 64 * 30 + 30 * 10 + 10 * 10, 30 + 10 + 10


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory and the summary of a finished run of all methods."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    summary = d2_sparse.run(dataclasses.replace(TINY, workdir=str(workdir)))
    return workdir, summary


@pytest.fixture(scope="module")
def rows(finished):
    """The rows of the table, by method."""
    return {row["method"]: row for row in finished[1]["methods"]}


@pytest.fixture
def no_training(monkeypatch):
    def fail(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(units, "learn", fail)


@pytest.fixture
def draws(monkeypatch):
    """The splits each unit is given, with the training itself left out."""
    seen = {}

    def record(config, out, methods, conclude, jobs, statistics):
        seen.update({job.unit: job.splits for job in jobs})

    monkeypatch.setattr(units, "learn", record)
    monkeypatch.setattr(d2_sparse, "report", lambda *_: {})
    return seen


def results(workdir, method):
    return runs.results(workdir, method, SEEDS)


def images(split):
    return np.asarray(split.images).reshape(len(split.images), -1)


def test_without_flags_all_methods_meet_on_digits():
    config = Config()
    assert (config.dataset, config.methods) == ("digits", METHODS)
    assert len(METHODS) == 7
    assert config.seeds >= 5


def test_the_run_directory_holds_what_was_asked_for(finished):
    workdir, _ = finished
    expected = {f"{method}-seed{seed}" for method in METHODS for seed in SEEDS}
    assert set(unit_files(workdir)) == expected
    for name in expected:
        (events,) = (workdir / "tensorboard" / name).iterdir()
        assert events.stat().st_size > 0
    figures = {path.name for path in (workdir / "figures").iterdir()}
    assert figures == {"learning_curves.png", "accuracy_against_cost.png", "masks.png"}
    config = dataclasses.replace(TINY, workdir=str(workdir))
    assert read(workdir / "config.json") == json.loads(
        json.dumps(dataclasses.asdict(config))
    )


def test_the_learning_curves_of_every_unit_are_on_file(finished):
    workdir, _ = finished
    lines = records.read_metrics(workdir)
    for name in unit_files(workdir):
        own = [line for line in lines if line["unit"] == name]
        steps = [line["step"] for line in own]
        rounds = 1 if "imp" not in name else 3
        assert steps[:3] == ([0, 6, 12] if rounds == 1 else [0, 1, 6])
        assert steps[-1] == 12 + (rounds - 1) * (12 - 1)
        assert all(0 <= line["monitor_accuracy"] <= 1 for line in own)
        assert all("overlap" in line for line in own) == (
            name.split("-")[0] in ("uncoupled_pair", "dense_mutual", "d2_sparse")
        )


def test_the_table_has_a_row_for_every_method(finished):
    workdir, summary = finished
    title, _, *lines = (workdir / "table.md").read_text().splitlines()
    for column in ("test accuracy %", "minus RigL", "NLL", "ECE %", "non-zeros"):
        assert column in title
    assert [line.split("|")[1].strip() for line in lines] == list(METHODS)
    for line, row in zip(lines, summary["methods"], strict=True):
        assert f"{100 * row['accuracy']:.2f} ± " in line
        assert f" {row['nonzeros']:,.0f} " in line


def test_the_summary_agrees_with_numpy_on_the_units(finished, rows):
    workdir, summary = finished
    assert without_time(read(workdir / "summary.json")) == without_time(
        json.loads(json.dumps(summary))
    )
    rigl = np.array([unit["accuracy"] for unit in results(workdir, "rigl")])
    for method, row in rows.items():
        own = results(workdir, method)
        accuracy = np.array([unit["accuracy"] for unit in own])
        standard_error = accuracy.std(ddof=1) / np.sqrt(len(SEEDS))
        np.testing.assert_allclose(row["accuracy"], accuracy.mean())
        np.testing.assert_allclose(row["standard_error"], standard_error)
        for key in ("nll", "ece", "nonzeros", "inference_macs"):
            np.testing.assert_allclose(row[key], np.mean([unit[key] for unit in own]))
        assert ("to_rigl" in row) == (method != "rigl")
        if method != "rigl":
            paired = accuracy - rigl
            error = paired.std(ddof=1) / np.sqrt(len(SEEDS))
            np.testing.assert_allclose(row["to_rigl"], paired.mean(), atol=1e-12)
            np.testing.assert_allclose(row["to_rigl_error"], error, atol=1e-12)


def test_methods_meet_at_equal_stored_nonzeros(rows):
    stored = {method: row["nonzeros"] for method, row in rows.items()}
    live = round(0.2 * KERNELS)
    assert stored["dense"] == KERNELS + BIASES
    assert stored["dense_mutual"] == 2 * (KERNELS + BIASES)
    for method in ("static", "rigl", "imp"):
        assert stored[method] == live + BIASES
    for method in ("uncoupled_pair", "d2_sparse"):
        assert stored[method] == live + 2 * BIASES


def test_training_costs_are_relative_to_the_dense_network(rows):
    cost = {method: row["relative_macs"] for method, row in rows.items()}
    assert cost["dense"] == 1.0
    np.testing.assert_allclose(cost["dense_mutual"], 2.0)
    np.testing.assert_allclose(cost["static"], 0.2)
    assert cost["static"] < cost["rigl"] < 1
    densities = np.array([1.0, 0.2**0.5, 0.2])
    # Every round after the first begins at the rewind step, step 1 of 12.
    np.testing.assert_allclose(
        cost["imp"], densities @ np.array([12, 11, 11]) / 12, rtol=1e-3
    )


@pytest.mark.usefixtures("no_training")
def test_a_finished_run_is_not_repeated(finished):
    workdir, summary = finished
    before = modified(unit_files(workdir).values())
    again = d2_sparse.run(dataclasses.replace(TINY, workdir=str(workdir)))
    assert again == summary
    assert modified(unit_files(workdir).values()) == before


def test_an_interrupted_run_repeats_only_what_it_lacks(finished, tmp_path, monkeypatch):
    workdir, summary = finished
    resumed = shutil.copytree(workdir, tmp_path / "resumed")
    lost = unit_files(resumed)["rigl-seed1"]
    lost.unlink()
    (resumed / "summary.json").unlink()
    before = modified(unit_files(resumed).values())
    trained, learn = [], units.learn

    def counted(config, out, methods, conclude, jobs, statistics):
        trained.extend(job.unit.name for job in jobs)
        learn(config, out, methods, conclude, jobs, statistics)

    monkeypatch.setattr(units, "learn", counted)
    again = d2_sparse.run(dataclasses.replace(TINY, workdir=str(resumed)))
    assert trained == ["rigl-seed1"]
    assert without_time(read(lost)) == without_time(
        read(unit_files(workdir)["rigl-seed1"])
    )
    assert without_time(again) == without_time(summary)
    assert before.items() <= modified(unit_files(resumed).values()).items()
    assert sorted((resumed / "metrics.jsonl").read_text().splitlines()) == sorted(
        (workdir / "metrics.jsonl").read_text().splitlines()
    )


@pytest.mark.usefixtures("no_training")
def test_a_directory_of_another_configuration_is_refused(finished):
    workdir, _ = finished
    before = modified(workdir.rglob("*"))
    with pytest.raises(ValueError, match=r"sparsity was 0\.8 and is 0\.5; give anoth"):
        d2_sparse.run(dataclasses.replace(TINY, sparsity=0.5, workdir=str(workdir)))
    after = modified(workdir.rglob("*"))
    assert after == before


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dataset": "digit"},
            r"unknown data set 'digit'; close matches: \['digits'\]",
        ),
        ({"dataset": "mnist", "data_dir": "."}, "lacks a prepared 'mnist'.*prepare it"),
        ({"dataset": "mnist", "data_dir": "no"}, "no does not exist; to make it"),
        ({"model": "lenet"}, "unknown model 'lenet'; did you mean 'lenet5'"),
        ({"model": "lenet5"}, "needs images of at least 16x16.*choose convnet_s"),
        ({"width": -1.0}, "must be > 0, got -1"),
        ({"methods": ("rigl", "riggl")}, "expected a method of dense, .*got 'riggl'"),
        ({"methods": ()}, "expected methods of dense, .*got none"),
        ({"sparsity": 1.0}, r"sparsity in \[0, 1\).*got 1\.0"),
        ({"sparsity": -0.1}, r"sparsity in \[0, 1\).*got -0\.1"),
        ({"samples_per_class": 200}, "got 124 of class 8; lower samples_per_class"),
        ({"imbalance": 0.5}, "expected imbalance >= 1, got 0.5"),
        ({"imbalance": 2.0, "samples_per_class": 0}, "a long tail needs a number"),
        ({"label_noise": 1.5}, r"fraction of wrong labels in \[0, 1\], got 1\.5"),
        ({"validation_fraction": 1.5}, "between 0 and 1, got 1.5"),
        ({"seeds": 0}, "expected seeds >= 1, got 0"),
        ({"steps": 0}, "expected steps >= 1, got 0"),
        ({"growth_samples": -1}, "expected growth_samples >= 0, got -1"),
        ({"learning_rate": float("nan")}, "expected learning_rate >= 0, got nan"),
        ({"label_smoothing": 2.0}, r"label_smoothing in \[0, 1\], got 2"),
        ({"shift": 8}, "padding from 0 to 7 for images of 8 x 8, got 8"),
        ({"imp_rounds": 0}, "at least 1 round, got .*rounds=0"),
        ({"rewind_fraction": 1.5}, r"rewind_fraction in \[0, 1\), got 1\.5"),
        ({"mask_coupling": 2.0}, r"mask coupling in \[-1, 1\], got 2"),
        ({"temperature": 0.0}, "temperature above 0, got 0"),
        ({"mode": "slow"}, "expected a mode of .*got 'slow'"),
        ({"preset": "slow"}, "expected a preset of .*got 'slow'"),
        ({"optimizer": "adam"}, "expected optimizer 'sgd', .*got 'adam'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_is_written(
    change, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        d2_sparse.run(dataclasses.replace(TINY, **change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_training")
def test_a_file_in_the_place_of_the_run_directory_is_left_alone(tmp_path):
    place = tmp_path / "file"
    place.write_text("mine")
    with pytest.raises(ValueError, match=r"cannot be written .*another --workdir"):
        d2_sparse.run(dataclasses.replace(TINY, workdir=str(place)))
    assert place.read_text() == "mine"


def test_a_consolidating_pair_of_two_paces_is_judged_without_the_test_set(
    tmp_path, monkeypatch
):
    source = data.load("digits")
    monkeypatch.setattr(d2_sparse.data, "load", lambda *_: source._replace(test=None))
    config = dataclasses.replace(
        TINY,
        methods=("d2_sparse",),
        seeds=1,
        imp_rounds=Config.imp_rounds,
        mode="consolidated",
        preset="fast_slow",
        validation_fraction=0.3,
        workdir=str(tmp_path / "run"),
    )
    (row,) = d2_sparse.run(config)["methods"]
    assert row["accuracy"] == row["outputs"]["accuracy_slow"]
    outputs = {"accuracy_ensemble", "accuracy_fast", "accuracy_slow"}
    assert set(row["outputs"]) == outputs
    assert row["nonzeros"] >= round(0.2 * KERNELS) + 2 * BIASES
    # Three of ten examples of every class.
    np.testing.assert_allclose(30 * row["accuracy"], round(30 * row["accuracy"]), 1e-6)
    assert "validation accuracy %" in (tmp_path / "run" / "table.md").read_text()


def test_validation_is_paid_from_the_budget():
    source = data.load("digits")
    config = dataclasses.replace(TINY, validation_fraction=0.3)
    splits = d2_sparse.draw_splits(config, source._replace(test=None), seed=0)
    labels = source.train.labels
    budget = data.budget(labels, 10, seed=0)
    kept, held_out = data.holdout(labels, budget, 0.3, seed=0)
    assert (len(kept), len(held_out)) == (70, 30)
    np.testing.assert_array_equal(splits.train.images, source.train.images[kept])
    np.testing.assert_array_equal(splits.judge.images, source.train.images[held_out])


def test_without_validation_the_official_test_set_judges():
    source = data.load("digits")
    splits = d2_sparse.draw_splits(TINY, source, seed=0)
    np.testing.assert_array_equal(splits.judge.images, source.test.images)
    np.testing.assert_array_equal(splits.judge.mean, splits.train.mean)


def test_a_seed_draws_the_same_labels_for_every_method(draws, tmp_path):
    d2_sparse.run(dataclasses.replace(TINY, workdir=str(tmp_path / "run")))
    assert len(draws) == len(METHODS) * len(SEEDS)
    by_seed = [
        {
            images(splits.train).tobytes()
            for unit, splits in draws.items()
            if unit.seed == s
        }
        for s in SEEDS
    ]
    assert [len(distinct) for distinct in by_seed] == [1, 1]
    assert by_seed[0] != by_seed[1]
    one_method = dataclasses.replace(
        TINY, methods=("imp",), workdir=str(tmp_path / "b")
    )
    d2_sparse.run(one_method)
    assert {images(draws["imp", s].train).tobytes() for s in SEEDS} == set.union(
        *by_seed
    )


def test_budgets_are_nested_and_apart_from_the_monitor():
    source = data.load("digits")
    # Only distinct images can be told apart by their pixels.
    assert len(np.unique(images(source.train), axis=0)) == len(source.train.images)
    small, large = (
        d2_sparse.draw_splits(
            dataclasses.replace(TINY, samples_per_class=samples), source, seed=1
        )
        for samples in (3, 10)
    )
    np.testing.assert_array_equal(images(small.train), images(large.train)[:30])
    together = np.concatenate([images(large.train), images(large.monitor)])
    assert len(np.unique(together, axis=0)) == len(together) == 100 + 1000


def test_wrong_labels_are_those_of_training_alone():
    source = data.load("digits")
    clean, noisy = (
        d2_sparse.draw_splits(
            dataclasses.replace(TINY, label_noise=fraction, validation_fraction=0.3),
            source,
            seed=0,
        )
        for fraction in (0.0, 0.4)
    )
    np.testing.assert_array_equal(noisy.train.images, clean.train.images)
    assert (noisy.train.labels != clean.train.labels).sum() == round(0.4 * 70)
    np.testing.assert_array_equal(noisy.judge.labels, clean.judge.labels)
    np.testing.assert_array_equal(noisy.monitor.labels, clean.monitor.labels)


def test_an_imbalance_gives_a_long_tail_of_the_budget():
    source = data.load("digits")
    config = dataclasses.replace(TINY, imbalance=5.0)
    splits = d2_sparse.draw_splits(config, source, seed=1)
    chosen = data.long_tailed(source.train.labels, 10, 5.0, seed=1)
    np.testing.assert_array_equal(splits.train.images, source.train.images[chosen])
    assert sorted(np.bincount(splits.train.labels))[::9] == [2, 10]
    # What is measured on the way is outside of the budget still.
    inside = {image.tobytes() for image in images(splits.train)}
    assert not inside & {image.tobytes() for image in images(splits.monitor)}


def test_the_whole_data_set_leaves_nothing_to_monitor():
    source = data.load("digits")
    config = dataclasses.replace(TINY, samples_per_class=0)
    splits = d2_sparse.draw_splits(config, source, seed=0)
    assert splits.monitor is None
    assert len(splits.train.labels) == len(source.train.labels)


def command(*words):
    return runs.command("experiments.d2_sparse", *words)


def test_help_explains_every_flag():
    done = command("--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    for field in dataclasses.fields(Config):
        comment = get_attribute_docstring(Config, field.name).help_string
        assert f"--{field.name}" in text
        assert " ".join(comment.split()) in text


def test_a_refused_flag_is_one_line_on_the_command_line(tmp_path):
    done = command("--rewind_fraction=1.5", f"--workdir={tmp_path / 'run'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: expected a rewind_fraction in [0, 1), got 1.5; 0 rewinds to the "
        "initial weights\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(
    not (TFDS / "mnist").is_dir(),
    reason="needs mnist in TFDS_DATA_DIR or in ../shared/tfds",
)
def test_mnist_works_the_same_way(tmp_path):
    config = dataclasses.replace(
        TINY,
        dataset="mnist",
        data_dir=str(TFDS),
        methods=("rigl", "d2_sparse"),
        seeds=1,
        imp_rounds=Config.imp_rounds,
        workdir=str(tmp_path / "run"),
    )
    rigl, pair = d2_sparse.run(config)["methods"]
    kernels = 784 * 30 + 30 * 10 + 10 * 10
    assert rigl["nonzeros"] == round(0.2 * kernels) + BIASES
    assert pair["nonzeros"] == round(0.2 * kernels) + 2 * BIASES
    assert 0 < rigl["accuracy"] < 1


def cannot_draw(*_, **__):
    raise ValueError("nothing can be drawn")


@pytest.mark.usefixtures("no_training")
def test_a_figure_that_cannot_be_drawn_does_not_cost_the_table(
    finished, tmp_path, monkeypatch
):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("summary.json", "table.md"):
        (workdir / name).unlink()
    monkeypatch.setattr(plots, "learning_curves", cannot_draw)
    with pytest.raises(ValueError, match="nothing can be drawn"):
        d2_sparse.run(dataclasses.replace(TINY, workdir=str(workdir)))
    assert runs.table_rows(workdir)
    assert read(workdir / "summary.json")["methods"]
