"""The main experiment, end to end at tiny size, and what its seeds see."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
from runs import read, unit_files
from simple_parsing.docstring import get_attribute_docstring

from d2sparse import data, plots, records, study
from d2sparse.study import cli, splits
from experiments import d2_sparse
from experiments.d2_sparse import Config

TFDS = Path(os.environ.get("TFDS_DATA_DIR") or runs.ROOT.parent / "shared" / "tfds")
SEEDS = range(2)
TINY = Config(
    methods=("dense", "imp", "d2_sparse"),
    seeds=len(SEEDS),
    shift=0,
    steps=12,
    refresh_interval=4,
    report_every=6,
    growth_samples=16,
    rounds=2,
    progress=False,
)
KERNELS, BIASES = 64 * 10, 10
DIGITS = data.load("digits")


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with runs.quick_compilation(), runs.blank_figures():
        yield


def learn(config):
    with runs.linear_networks():
        return d2_sparse.run(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory and the frame of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, learn(dataclasses.replace(TINY, workdir=str(workdir)))


def drawn(seed=0, source=DIGITS, **flags):
    config = dataclasses.replace(TINY, **flags)
    return splits.make_draw_splits(source)(config, seed)


def images(split):
    return np.asarray(split.images).reshape(len(split.images), -1)


def test_the_run_directory_holds_what_was_asked_for(finished):
    workdir, _ = finished
    expected = {f"{method}-seed{seed}" for method in TINY.methods for seed in SEEDS}
    assert set(unit_files(workdir)) == expected
    for name in expected:
        (events,) = (workdir / "tensorboard" / name).iterdir()
        assert events.stat().st_size > 0
    figures = {path.name for path in (workdir / "figures").iterdir()}
    assert figures == {"learning_curves.png", "accuracy_against_cost.png", "masks.png"}


def test_the_learning_curves_of_every_run_are_on_file(finished):
    workdir, _ = finished
    lines = records.read_metrics(workdir)
    for name in unit_files(workdir):
        own = [line for line in lines if line["unit"] == name]
        steps = [line["step"] for line in own]
        rounds = 1 if "imp" not in name else 3
        assert steps[:3] == ([0, 6, 12] if rounds == 1 else [0, 1, 6])
        assert steps[-1] == 12 + (rounds - 1) * (12 - 1)
        assert all(0 <= line["monitor_accuracy"] <= 1 for line in own)
        assert all("overlap" in line for line in own) == (name.startswith("d2_sparse"))


def test_methods_meet_at_equal_stored_nonzeros_and_costs_add_up(finished):
    rows = finished[1].groupby("method")[["nonzeros", "relative_macs"]].mean()
    stored, cost = rows["nonzeros"], rows["relative_macs"]
    live = round(0.2 * KERNELS)
    assert stored["dense"] == KERNELS + BIASES
    assert stored["imp"] == live + BIASES
    assert stored["d2_sparse"] == live + 2 * BIASES
    np.testing.assert_allclose(cost["dense"], 1)
    assert 0.2 < cost["d2_sparse"] < 1
    densities = np.array([1.0, 0.2**0.5, 0.2])
    # Every round after the first begins at the rewind step, step 1 of 12.
    np.testing.assert_allclose(
        cost["imp"], densities @ np.array([12, 11, 11]) / 12, rtol=1e-3
    )


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
        ({"sparsity": 1.0}, r"sparsity in \[0, 1\).*got 1\.0"),
        ({"samples_per_class": 200}, "got 124 of class 8; lower samples_per_class"),
        ({"imbalance": 0.5}, "expected imbalance >= 1, got 0.5"),
        ({"imbalance": 2.0, "samples_per_class": 0}, "a long tail needs a number"),
        ({"label_noise": 1.5}, r"label_noise in \[0, 1\], got 1\.5"),
        ({"validation_fraction": 1.5}, r"validation_fraction in \[0, 1\], got 1.5"),
        ({"seeds": 0}, "expected seeds >= 1, got 0"),
        ({"growth_samples": -1}, "expected growth_samples >= 0, got -1"),
        ({"learning_rate": float("nan")}, "expected learning_rate >= 0, got nan"),
        ({"label_smoothing": 2.0}, r"label_smoothing in \[0, 1\], got 2"),
        ({"shift": 8}, "padding from 0 to 7 for images of 8 x 8, got 8"),
        ({"rounds": 0}, "expected rounds >= 1, got 0"),
        ({"rewind_fraction": 1.5}, r"rewind_fraction in \[0, 1\), got 1\.5"),
        ({"mask_coupling": 2.0}, r"mask coupling in \[-1, 1\], got 2"),
        ({"temperature": 0.0}, "temperature above 0, got 0"),
        ({"preset": "slow"}, "expected preset of .*got 'slow'"),
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


def test_a_file_in_the_place_of_the_run_directory_is_left_alone(tmp_path):
    place = tmp_path / "file"
    place.write_text("mine")
    config = dataclasses.replace(TINY, methods=("rigl",), rounds=5, workdir=str(place))
    with pytest.raises(ValueError, match=r"cannot be written .*another --workdir"):
        d2_sparse.run(config)
    assert place.read_text() == "mine"


@pytest.mark.parametrize(
    "method", ["static", pytest.param("d2_consolidated", marks=pytest.mark.slow)]
)
def test_validation_judges_without_the_test_set(method, tmp_path):
    config = dataclasses.replace(
        TINY,
        methods=(method,),
        seeds=1,
        rounds=Config.rounds,
        refresh_interval=4 if method == "d2_consolidated" else 0,
        growth_samples=Config.growth_samples,
        validation_fraction=0.3,
        workdir=str(tmp_path / "run"),
    )
    # With the name of the data set, so that it is not taken for a user's own.
    without_test = DIGITS._replace(test=None)
    with runs.linear_networks():
        frame = study.compare(config, study.Experiment("test"), without_test)
    (row,) = frame.to_dict("records")
    if method == "d2_consolidated":
        assert row["accuracy"] == row["accuracy_slow"]
        outputs = {"accuracy_ensemble", "accuracy_fast", "accuracy_slow"}
        assert {name for name in row if name.startswith("accuracy_")} == outputs
        assert row["nonzeros"] >= round(0.2 * KERNELS) + 2 * BIASES
    # Three of ten examples of every class.
    np.testing.assert_allclose(30 * row["accuracy"], round(30 * row["accuracy"]), 1e-6)
    table = (tmp_path / "run" / "table.md").read_text()
    assert table.startswith("Validation accuracy")


def test_validation_is_paid_from_the_budget():
    own = drawn(source=DIGITS._replace(test=None), validation_fraction=0.3)
    labels = DIGITS.train.labels
    budget = data.budget(labels, 10, seed=0)
    kept, held_out = data.holdout(labels, budget, 0.3, seed=0)
    assert (len(kept), len(held_out)) == (70, 30)
    np.testing.assert_array_equal(own.train.images, DIGITS.train.images[kept])
    np.testing.assert_array_equal(own.judge.images, DIGITS.train.images[held_out])


def test_without_validation_the_official_test_set_judges():
    own = drawn()
    np.testing.assert_array_equal(own.judge.images, DIGITS.test.images)
    np.testing.assert_array_equal(own.judge.mean, own.train.mean)


def test_budgets_are_nested_and_apart_from_the_monitor():
    # Only distinct images can be told apart by their pixels.
    assert len(np.unique(images(DIGITS.train), axis=0)) == len(DIGITS.train.images)
    small, large = (drawn(1, samples_per_class=samples) for samples in (3, 10))
    np.testing.assert_array_equal(images(small.train), images(large.train)[:30])
    together = np.concatenate([images(large.train), images(large.monitor)])
    assert len(np.unique(together, axis=0)) == len(together) == 100 + 1000
    assert images(drawn(0).train).tobytes() != images(drawn(1).train).tobytes()


def test_wrong_labels_are_those_of_training_alone():
    clean, noisy = (
        drawn(label_noise=fraction, validation_fraction=0.3) for fraction in (0.0, 0.4)
    )
    np.testing.assert_array_equal(noisy.train.images, clean.train.images)
    assert (noisy.train.labels != clean.train.labels).sum() == round(0.4 * 70)
    np.testing.assert_array_equal(noisy.judge.labels, clean.judge.labels)
    np.testing.assert_array_equal(noisy.monitor.labels, clean.monitor.labels)


def test_an_imbalance_gives_a_long_tail_of_the_budget():
    own = drawn(1, imbalance=5.0)
    chosen = data.long_tailed(DIGITS.train.labels, 10, 5.0, seed=1)
    np.testing.assert_array_equal(own.train.images, DIGITS.train.images[chosen])
    assert sorted(np.bincount(own.train.labels))[::9] == [2, 10]
    # What is measured in training is outside of the budget still.
    inside = {image.tobytes() for image in images(own.train)}
    assert not inside & {image.tobytes() for image in images(own.monitor)}


def test_the_whole_data_set_leaves_nothing_to_monitor():
    own = drawn(samples_per_class=0)
    assert own.monitor is None
    assert len(own.train.labels) == len(DIGITS.train.labels)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse_flags(Config, ["d2_sparse", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("Do two coupled sparse networks learn more from few labels")
    for field in dataclasses.fields(Config):
        if field.name == "axes":
            continue
        comment = get_attribute_docstring(Config, field.name).help_string
        assert f"--{field.name.rstrip('_')}" in text
        assert " ".join(comment.split()) in text


def test_a_refused_flag_is_one_line_on_the_command_line(tmp_path, capsys):
    words = ("--rewind_fraction=1.5", f"--workdir={tmp_path / 'run'}")
    with pytest.raises(SystemExit) as stopped:
        cli.parse_flags(Config, ["d2_sparse", *words])
    assert stopped.value.code == 2
    out, errors = capsys.readouterr()
    assert (out, errors) == (
        "",
        "error: expected rewind_fraction in [0, 1), got 1.5 (--help lists every flag)"
        "\n",
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
        rounds=Config.rounds,
        workdir=str(tmp_path / "run"),
    )
    rigl, pair = learn(config).to_dict("records")
    kernels = 784 * 10
    assert rigl["nonzeros"] == round(0.2 * kernels) + BIASES
    assert pair["nonzeros"] == round(0.2 * kernels) + 2 * BIASES
    assert 0 < rigl["accuracy"] < 1


def cannot_draw(*_, **__):
    raise ValueError("nothing can be drawn")


def test_a_figure_that_cannot_be_drawn_does_not_cost_the_table(
    finished, tmp_path, monkeypatch
):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("summary.json", "table.md"):
        (workdir / name).unlink()
    monkeypatch.setattr(plots, "learning_curves", cannot_draw)
    with pytest.raises(ValueError, match="nothing can be drawn"):
        learn(dataclasses.replace(TINY, workdir=str(workdir)))
    assert (workdir / "table.md").read_text().count("\n| ") == 2 + len(TINY.methods)
    assert len(read(workdir / "summary.json")["rows"]) == len(TINY.methods)
