"""The low-data benchmark at tiny size: cells, costs, tuning, resuming, tables."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pandas as pd
import pytest
import runs
from runs import modified, read, unit_files, without_time

from d2sparse import data, plots, study
from d2sparse.constraints import METHODS, Method
from d2sparse.study import cli, robustness, runner, tuning
from d2sparse.study.tuned import list_tries
from experiments import low_data
from experiments.low_data import Config

SEEDS = range(2)
KERNELS, BIASES = 64 * 10, 10


def noisy(scale):
    """Inputs of training with Gaussian noise: a new method, with its row below."""

    def constrain(training):
        def inputs(batch, key):
            x = training.inputs(batch, key)
            return x if key is None else x + scale * jax.random.normal(key, x.shape)

        return training._replace(inputs=inputs)

    return constrain


NOISY = Method(lambda o: (noisy(o.power),), tries={"power": (1.0, 1.5)})
TABLE = {**METHODS, "noisy": NOISY}
NAMES = ("dense", "rigl", "rigl_half", "imp_capped", "d2_sparse")
TINY = Config(
    methods=NAMES,
    axes={"samples_per_class": (5,)},
    seeds=len(SEEDS),
    shift=0,
    steps=12,
    refresh_interval=3,
    report_every=6,
    growth_samples=20,
    progress=False,
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with runs.quick_compilation(), runs.blank_figures():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory and the summary of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    frame = learn(in_directory(workdir))
    assert sorted(set(frame["method"])) == sorted(NAMES)
    return workdir, read(workdir / "summary.json")["labels"]["5"]


@pytest.fixture(scope="module")
def rows(finished):
    """The rows of the table, by method."""
    return {row["method"]: row for row in finished[1]["methods"]}


@pytest.fixture
def no_training(monkeypatch):
    def fail(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(runner, "_train_group", fail)


def learn(config, source=None):
    with runs.linear_networks():
        return low_data.run(config, source, TABLE)


def in_directory(workdir, **changes):
    return dataclasses.replace(TINY, workdir=str(workdir), **changes)


def results(workdir, method, seeds=SEEDS, setting="label_noise0-imbalance1"):
    name = f"{method}-samples_per_class5-{setting}"
    return runs.results(workdir, name, seeds)


# Rows


def test_methods_try_values_of_flags_and_different_ones():
    flags = Config(steps=100)
    for name in METHODS:
        for flag, values in list_tries(flags, METHODS[name]).items():
            assert len(set(values)) == len(values) > 1
            for value in values:
                dataclasses.replace(flags, **{flag: value})
    assert set(Config().methods) <= set(METHODS)


def test_methods_meet_at_equal_nonzeros(rows):
    stored = {name: row["nonzeros"] for name, row in rows.items()}
    live = round(0.2 * KERNELS)
    assert stored["dense"] == KERNELS + BIASES
    for name in ("rigl", "imp_capped"):
        assert stored[name] == live + BIASES
    assert stored["rigl_half"] == live / 2 + BIASES
    assert stored["d2_sparse"] == live + 2 * BIASES


def test_costs_are_those_of_the_protocol(rows):
    cost = {name: row["relative_macs"] for name, row in rows.items()}
    assert cost["dense"] == 1
    assert abs(cost["imp_capped"] - 1) < 0.25
    splits = study.make_draw_splits(data.load("digits"))
    short = dataclasses.replace(TINY, methods=("dense_short",))
    with runs.linear_networks():
        (plan,) = study.make_plans(short, splits, 10)
    assert abs(plan.config.steps / TINY.steps - cost["rigl"]) <= 1 / TINY.steps
    inference = {name: row["relative_inference"] for name, row in rows.items()}
    for name in ("rigl", "d2_sparse", "imp_capped"):
        np.testing.assert_allclose(inference[name], 0.2, rtol=0.02)


def test_the_summary_agrees_with_numpy_on_the_runs(finished, rows):
    workdir, _ = finished
    accuracy = {
        name: np.array([run["accuracy"] for run in results(workdir, name)])
        for name in NAMES
    }
    for name, row in rows.items():
        np.testing.assert_allclose(row["accuracy"], accuracy[name].mean())
        brier = np.mean([run["brier"] for run in results(workdir, name)])
        np.testing.assert_allclose(row["brier"], brier)
        for other in ("rigl", "dense"):
            apart = accuracy[name] - accuracy[other]
            error = apart.std(ddof=1) / np.sqrt(len(SEEDS))
            if name == other:
                assert row[f"minus_{other}"] is None
                continue
            np.testing.assert_allclose(row[f"minus_{other}"], apart.mean(), atol=1e-12)
            np.testing.assert_allclose(row[f"minus_{other}_error"], error, atol=1e-12)
    slow = [run["accuracy_slow"] for run in results(workdir, "d2_sparse")]
    (row,) = [row for row in finished[1]["slow"] if row["method"] == "d2_sparse"]
    apart = np.array(slow) - accuracy["rigl_half"]
    np.testing.assert_allclose(row["minus_rigl_half"], apart.mean(), atol=1e-12)


def test_a_run_knows_its_calibration_its_setting_and_its_values(finished):
    count = len(data.load("digits").test.labels)
    for name in NAMES:
        for run in results(finished[0], name):
            bins = {k: np.array(v) for k, v in run["calibration"].items()}
            assert bins["count"].sum() == count
            gaps = np.abs(bins["correct"] - bins["confidence"])
            np.testing.assert_allclose(gaps.sum() / count, run["ece"], rtol=1e-4)
            np.testing.assert_allclose(
                bins["correct"].sum() / count, run["accuracy"], rtol=1e-6
            )
            corrupted = {"gaussian_noise-3", "blur-3", "contrast-3", "occlusion-3"}
            assert set(run["corrupted"]) == corrupted
            # Rounds of iterative pruning are not looked at so closely.
            assert not any("corrupted" in part for part in run["parts"])
            assert run["values"] == {
                "samples_per_class": 5,
                "label_noise": 0.0,
                "imbalance": 1.0,
            }
            tries = list_tries(TINY, TABLE[name])
            assert run["tuned"].keys() == {"learning_rate", "weight_decay", *tries}


def test_every_table_has_its_methods_and_fits_a_screen(finished):
    workdir, _ = finished
    text = (workdir / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert max(map(len, lines)) <= 110
    titles, tables = re.split(r"\n\n(?=\|)", text)[0], text.split("\n\n")
    assert titles.startswith("## 5 labels per class\n\nTest accuracy")
    quality, apart, slow, harder, designs = [
        table for table in tables if table.startswith("|")
    ]
    for column in ("accuracy %", "NLL", "ECE %", "Brier", "non-zeros", "inference"):
        assert column in quality
    assert apart.splitlines()[0].split() == [
        "|",
        "method",
        "|",
        "rigl",
        "|",
        "dense",
        "|",
    ]
    assert "minus rigl_half" in slow
    assert "| d2_sparse " in slow
    for column in ("gaussian noise", "blur", "contrast", "occlusion"):
        assert column in harder
    for name in NAMES:
        for table in (quality, apart, harder, designs):
            assert f"| {name} " in table
    figures = {path.name for path in (workdir / "figures").iterdir()}
    assert figures == {"accuracy_against_cost-5.png", "calibration-5.png", "ranks.png"}


def test_designs_are_compared_on_images_that_nobody_learned_from(finished):
    workdir, labels = finished
    designs = {row["method"]: row for row in labels["designs"]}
    outside = {
        name: np.array([run["outside"] for run in results(workdir, name)])
        for name in ("dense", "rigl")
    }
    apart = (outside["dense"] - outside["rigl"]).mean()
    np.testing.assert_allclose(designs["dense"]["minus_rigl"], apart, atol=1e-12)
    np.testing.assert_allclose(designs["rigl"]["accuracy"], outside["rigl"].mean())
    count = len(data.load("digits").train.labels) - 50
    hits = outside["rigl"] * count
    np.testing.assert_allclose(hits, hits.round(), atol=1e-3)


@pytest.mark.usefixtures("no_training")
def test_a_finished_run_is_not_repeated(finished):
    workdir, labels = finished
    before = modified(unit_files(workdir).values())
    learn(in_directory(workdir))
    assert read(workdir / "summary.json")["labels"]["5"] == labels
    assert modified(unit_files(workdir).values()) == before


def test_a_figure_that_fails_leaves_tables_and_summary(finished, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("nothing can be drawn")

    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    for name in ("table.md", "summary.json"):
        (workdir / name).unlink()
    monkeypatch.setattr(plots, "accuracy_against_cost", fail)
    with pytest.raises(ValueError, match="nothing can be drawn"):
        learn(in_directory(workdir))
    table, summary = "table.md", "summary.json"
    assert (workdir / table).read_text() == (finished[0] / table).read_text()
    before = without_time(read(finished[0] / summary))
    assert without_time(read(workdir / summary)) == before
    assert set(before["ranks"]) == set(NAMES)


# Cells


def test_cells_run_alone_join_the_tables(finished, tmp_path, monkeypatch):
    (known,) = results(finished[0], "dense", [0])

    def recall(runner_, group, *_):
        for plan, seed in group:
            unit, values = runner.unit_of(plan, seed), dict(plan.row.values)
            runner_.out.start(unit)
            runner_.out.finish(unit, {**known, "values": values})

    del known["seal"]
    monkeypatch.setattr(runner, "_train_group", recall)
    workdir = shutil.copytree(finished[0], tmp_path / "joined")
    before = modified(unit_files(workdir).values())
    alone = in_directory(workdir, methods=("dense",), seeds=1)
    fewer = dataclasses.replace(alone, axes={"samples_per_class": (4,)})
    learn(dataclasses.replace(fewer, label_noise=0.4))
    learn(dataclasses.replace(alone, label_noise=0.4, imbalance=5.0))
    labels = read(workdir / "summary.json")["labels"]
    assert modified(before) == before
    assert set(labels) == {"4", "5"}
    assert labels["4"]["methods"] == []  # With wrong labels alone.
    assert [row["method"] for row in labels["5"]["methods"]] == list(TABLE_ORDER)
    conditions = {row["condition"]: row for row in labels["5"]["conditions"]}
    row = conditions["40 % wrong labels, imbalance 5"]
    assert (row["method"], row["seeds"]) == ("dense", 1)
    text = (workdir / "table.md").read_text()
    assert text.startswith("## 4 labels per class\n\nTest accuracy in % where")


TABLE_ORDER = sorted(NAMES, key=list(TABLE).index)


def test_settings_are_a_product_of_axes_given_on_the_command_line():
    words = ["low_data", "--samples_per_class=5,10", "--label_noise=0,0.2"]
    config = cli.parse_flags(Config, [*words, "--methods=rigl", "--imbalance=10"])
    config = study.as_axes(config, robustness.SETTINGS)
    names = [row.name for row in study.list_rows(config)]
    assert names[0] == "rigl-samples_per_class5-label_noise0-imbalance10"
    assert len(names) == 4
    assert cli.parse_flags(Config, ["low_data"]).axes["samples_per_class"] == (10, 50)
    one = cli.parse_flags(Config, ["low_data", "--samples_per_class=7"])
    assert one.samples_per_class == 7
    assert set(one.axes) == {"label_noise", "imbalance"}


@pytest.mark.usefixtures("no_training")
def test_other_flags_are_another_configuration(finished):
    with pytest.raises(ValueError, match=r"sparsity was 0\.8 and is 0\.9"):
        learn(in_directory(finished[0], sparsity=0.9))


def test_a_flag_of_other_methods_belongs_to_the_directory(tmp_path):
    config = in_directory(tmp_path / "none", methods=("dense",), drop_fraction=0.4)
    learn(dataclasses.replace(config, dry_run=True))
    assert not (tmp_path / "none").exists()


def test_the_largest_table_without_holes_is_ranked():
    def frame(*cells):
        columns = ["method", "samples_per_class", "seed", "accuracy"]
        table = pd.DataFrame(cells, columns=columns)
        return table.assign(label_noise=0.0, imbalance=1.0)

    cells = [("dense", 5, 0, 0.5), ("dense", 5, 1, 0.6), ("rigl", 5, 0, 0.7)]
    cells += [("rigl", 5, 1, 0.8), ("rigl", 10, 0, 0.9)]
    both = {"dense": [0.5, 0.6], "rigl": [0.7, 0.8]}
    assert robustness.comparable(frame(*cells)) == both
    # One more method with a single seed does not hide the other seeds.
    cells.append(("set", 5, 0, 0.4))
    assert robustness.comparable(frame(*cells)) == both
    cells.append(("set", 5, 1, 0.3))
    assert robustness.comparable(frame(*cells)) == {**both, "set": [0.4, 0.3]}


def test_a_narrow_network_is_the_widest_that_fits():
    splits = study.make_draw_splits(data.load("digits"))
    config = dataclasses.replace(TINY, methods=("dense_narrow",))
    for changes, unit in (({}, 0.01), ({"model": "convnet_s", "width": 4}, 1)):
        (plan,) = study.make_plans(dataclasses.replace(config, **changes), splits, 10)
        known, narrow = plan.base, plan.config.width
        weights = known.network.weights
        most = numbers(known.network) - weights + round(0.2 * weights)
        assert numbers(known.resize(narrow)) <= most
        assert numbers(known.resize(narrow + unit)) > most


def numbers(network):
    return sum(leaf.size for leaf in jax.tree.leaves(network.params))


# Tuning


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The directory and the choice of a finished tuning."""
    workdir, cleared = tmp_path_factory.mktemp("runs") / "tuned", []
    nothing_to_test_on = data.load("digits")._replace(test=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: cleared.append(1))
        chosen = learn(in_directory(workdir, **TUNING), nothing_to_test_on)
    assert len(cleared) == len(TUNING["methods"])
    return workdir, chosen


TUNING = {"methods": ("dense", "noisy"), "tune": True, "trials": 2, "tuning_seeds": 2}


def test_every_method_has_as_many_trials_and_the_best_is_chosen(tuned):
    workdir, chosen = tuned
    trials = read(workdir / "tuning" / "summary.json")["trials"]
    assert set(chosen) == {"dense", "noisy"}
    for method in chosen:
        mine = [row for row in trials if row["method"] == method]
        assert [row["trial"] for row in mine] == [0, 1]
        for row in mine:
            name = f"{method}-samples_per_class5-trial{row['trial']}"
            found = runs.results(workdir / "tuning", name, range(2))
            mean = np.mean([run["accuracy"] for run in found])
            np.testing.assert_allclose(row["accuracy"], mean)
        best = max(mine, key=lambda row: (row["accuracy"], -row["nll"]))
        assert best["chosen"]
        assert sum(row["chosen"] for row in mine) == 1
        assert chosen[method]["5"] == best["values"]
    assert read(workdir / "tuned.json") == chosen
    assert not (workdir / "units").exists()


@pytest.mark.usefixtures("no_training")
def test_a_finished_tuning_is_not_repeated_and_joins_others(tuned, tmp_path):
    workdir = shutil.copytree(tuned[0], tmp_path / "again")
    config = in_directory(workdir, **TUNING | {"methods": ("noisy",)})
    assert learn(config) == tuned[1]
    with pytest.raises(AssertionError, match="something was trained"):
        learn(in_directory(workdir))  # Not another configuration.


def test_tuned_values_are_used_and_cannot_change_later(tmp_path):
    values = {"learning_rate": 0.05, "weight_decay": 0.0}
    other = tmp_path / "elsewhere.json"
    other.write_text(json.dumps({"dense": {"5": values}}))
    alone = {"methods": ("dense",), "seeds": 1}
    config = in_directory(tmp_path / "a", **alone, tuned=str(other))
    learn(config)
    learn(in_directory(tmp_path / "b", **alone, **values))
    (first,), (second,) = (results(tmp_path / name, "dense", [0]) for name in "ab")
    assert first["tuned"] == values
    assert without_time(first) == without_time(second)
    with pytest.raises(ValueError, match=r"dense-.* with the values of its finished"):
        learn(dataclasses.replace(config, tuned=""))
    learn(config)


def test_of_many_programs_some_have_all_seeds_before_others_are_compiled(
    tmp_path, monkeypatch
):
    order = []

    def fail(learner, group, *_):
        for plan, seed in group:
            order.append((plan.row.method, seed))
            learner.out.fail(runner.unit_of(plan, seed), "a reason")

    monkeypatch.setattr(runner, "_PROGRAMS", 1)
    monkeypatch.setattr(runner, "_train_group", fail)
    monkeypatch.setattr(jax, "clear_caches", lambda: order.append("cleared"))
    config = in_directory(tmp_path, methods=("dense", "rigl"))
    with pytest.raises(FloatingPointError, match="all 4 runs have failed"):
        learn(config)
    first, then = [[(name, seed) for seed in SEEDS] for name in ("dense", "rigl")]
    assert order == [*first, "cleared", *then]


def test_trials_that_differ_in_settings_alone_share_a_program():
    splits = study.make_draw_splits(data.load("digits"))
    config = study.Config(
        methods=("rigl",), axes={"report_every": (4, 5, 6)}, steps=8, refresh_interval=2
    )
    values = {
        4: {"report_every": 4, "learning_rate": 0.1},
        5: {"report_every": 4, "learning_rate": 0.2, "weight_decay": 0.0},
        6: {"report_every": 4, "drop_fraction": 0.1},
    }
    plans = study.make_plans(
        config, splits, 10, values=lambda row, base: values[base.flags.report_every]
    )
    runs = [plan.program.run for plan in plans]
    assert runs[0] is runs[1] is not runs[2]
    assert [plan.config.learning_rate for plan in plans] == [0.1, 0.2, 0.1]
    assert plans[1].training.settings["learning_rate"] == 0.2


def test_trials_are_those_published_and_fill_the_ranges():
    trials = tuning.draw_trials(
        dataclasses.replace(TINY, tune=True, trials=64), METHODS["rigl"]
    )
    assert trials[:3] == [
        {},
        {"learning_rate": 0.03, "weight_decay": 3.3e-05, "drop_fraction": 0.1},
        {"learning_rate": 0.016, "weight_decay": 0.0034, "drop_fraction": 0.3},
    ]
    dense = tuning.draw_trials(TINY, METHODS["dense"])
    assert dense[1:3] == [
        {"learning_rate": 0.024, "weight_decay": 1.6e-05},
        {"learning_rate": 0.01, "weight_decay": 0.00083},
    ]
    rates = np.array([trial["learning_rate"] for trial in trials[1:]])
    # Every eighth of the range, on its logarithmic scale.
    places = np.log(rates / 0.01) / np.log(30)
    assert set((places * 8).astype(int).clip(0, 7)) == set(range(8))
    assert {trial["drop_fraction"] for trial in trials[1:]} == {0.1, 0.3, 0.5}
    assert tuning.draw_trials(TINY, METHODS["rigl"]) == trials[: TINY.trials]


# Refusals


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ()}, "expected different methods of dense, .*got none"),
        ({"methods": ("rig",)}, "expected methods of dense, .*got 'rig'"),
        ({"ticket": "somewhere"}, "can start from a ticket, got dense"),
        ({"validation_fraction": 0.2}, "no validation_fraction, which is for --tune"),
        ({"severities": (0,)}, "severities from 1 to 5, got 0"),
        ({"trials": 0}, "expected trials >= 1, got 0"),
        ({"trials": 3}, "no trials, which is for --tune, got 3"),
        ({"tune": True, "tuned": "x"}, "no tuned, since --tune chooses the values"),
        ({"tuning_rates": (0.1,)}, r"tuning_rates from above 0 .*got \(0\.1,\)"),
        ({"tuning_decays": (0.1, 0.01)}, "tuning_decays from above 0 to no less"),
        ({"tuned": "nowhere.json"}, "file of chosen values, got nowhere.json"),
        ({"axes": {"samples_per_class": (500,)}}, "lower samples_per_class"),
        ({"axes": {"sparsity": (0.5, 0.9)}}, "axes of samples_per_class.*sparsity"),
        ({"imbalance": 0.5}, "expected imbalance >= 1, got 0.5"),
        ({"label_noise": 2.0}, r"expected label_noise in \[0, 1\], got 2"),
        ({"preset": "constant", "methods": ("d2_annealed",)}, "preset of symmetric"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(
    change, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        learn(dataclasses.replace(TINY, **change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"riggl": {}}', "method of .* got 'riggl'"),
        ("[]", "not an object"),
        ('{"rigl": {"5": {"learning_rate": "high"}}}', "learning_rate is 'high', not"),
        ('{"rigl": {"5": {"rate": 0.1}}}', "flag of .* got 'rate'"),
        ('{"rigl": {"five": {}}}', "values for 'five', not a number"),
    ],
)
def test_a_file_of_something_else_is_no_choice(text, said, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(text)
    with pytest.raises(ValueError, match=f"file of chosen values.*{said}"):
        learn(dataclasses.replace(TINY, tuned=str(other)))
