"""The low-data benchmark, end to end at tiny size: cells, costs, tuning, resuming."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import runs
from runs import modified, read, results, unit_files, without_time
from simple_parsing.docstring import get_attribute_docstring

from d2sparse import data, records
from experiments import low_data, units
from experiments.few_labels import tuning
from experiments.few_labels.cells import Cell, Setting, list_settings, parse_cell
from experiments.few_labels.contenders import CONTENDERS, narrow_width
from experiments.few_labels.options import CONTENDER_NAMES
from experiments.few_labels.plans import Planner
from experiments.few_labels.report import compare, list_designs
from experiments.low_data import Config
from experiments.splits import draw_splits

SEEDS = range(2)
# One for each way to build a method.
METHODS = (
    *("dense", "dense_short", "dense_averaged", "self_distilled"),
    *("rigl", "imp_capped", "free_tickets", "d2_sparse", "d2_merged"),
)
TINY = Config(
    methods=METHODS,
    budgets=(5,),
    seeds=len(SEEDS),
    width=0.1,
    steps=12,
    refresh_interval=3,
    report_every=6,
    growth_samples=20,
    finish_part=0.5,
    progress=False,
)
KERNELS, BIASES = 64 * 30 + 30 * 10 + 10 * 10, 30 + 10 + 10


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory and the summary of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, low_data.run(dataclasses.replace(TINY, workdir=str(workdir)))


@pytest.fixture(scope="module")
def rows(finished):
    """The rows of the table, by method."""
    return {row["method"]: row for row in finished[1]["budgets"]["5"]["methods"]}


@pytest.fixture
def no_training(monkeypatch):
    def fail(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(units, "learn", fail)


def in_directory(workdir, **changes):
    return dataclasses.replace(TINY, workdir=str(workdir), **changes)


def source():
    return data.load("digits")


# Rows


def test_every_contender_has_a_name_and_a_flag_value():
    assert tuple(CONTENDERS) == CONTENDER_NAMES
    assert Config().methods == CONTENDER_NAMES


@pytest.mark.parametrize("name", CONTENDER_NAMES)
def test_every_contender_can_be_built_and_what_it_tries_are_flags(name):
    config = dataclasses.replace(TINY, steps=100)
    planner = Planner(config, source(), Setting(5))
    plan = planner.plan("unit", name, {})
    assert {"learning_rate", "weight_decay"} <= set(plan.values)
    for flag, choices in CONTENDERS[name].own(config).items():
        assert getattr(config, flag, None) is not None
        assert len(set(choices)) == len(choices) > 1
        assert flag in plan.values


def test_methods_meet_at_equal_nonzeros(rows):
    stored = {name: row["nonzeros"] for name, row in rows.items()}
    live = round(0.2 * KERNELS)
    for name in ("dense", "dense_short", "dense_averaged", "self_distilled"):
        assert stored[name] == KERNELS + BIASES
    for name in ("rigl", "imp_capped"):
        assert stored[name] == live + BIASES
    for name in ("free_tickets", "d2_sparse"):
        assert stored[name] == live + 2 * BIASES
    assert stored["d2_merged"] == live / 2 + BIASES


def test_costs_are_those_of_the_protocol(rows):
    cost = {name: row["relative_macs"] for name, row in rows.items()}
    assert cost["dense"] == cost["dense_averaged"] == 1.0
    # A teacher before, and its forward pass in every step.
    np.testing.assert_allclose(cost["self_distilled"], 2 + 1 / 3, rtol=1e-6)
    assert abs(cost["dense_short"] - cost["rigl"]) <= 0.5 / TINY.steps + 1e-6
    assert abs(cost["imp_capped"] - 1) < 0.25
    inference = {name: row["relative_inference"] for name, row in rows.items()}
    assert inference["dense"] == 1.0
    np.testing.assert_allclose(inference["d2_merged"], 0.1, rtol=0.02)
    for name in ("rigl", "d2_sparse", "free_tickets"):
        np.testing.assert_allclose(inference[name], 0.2, rtol=0.02)


def test_the_summary_agrees_with_numpy_on_the_units(finished, rows):
    workdir, summary = finished
    assert without_time(read(workdir / "summary.json")) == without_time(
        json.loads(json.dumps(summary))
    )
    by_name = {
        name: np.array([u["accuracy"] for u in results(workdir, f"{name}-5", SEEDS)])
        for name in METHODS
    }
    for name, row in rows.items():
        np.testing.assert_allclose(row["accuracy"], by_name[name].mean())
        for key, other in (("to_rigl", "rigl"), ("to_dense", "dense")):
            assert (key in row) == (name != other)
            if name != other:
                apart = by_name[name] - by_name[other]
                error = apart.std(ddof=1) / np.sqrt(len(SEEDS))
                np.testing.assert_allclose(row[key], apart.mean(), atol=1e-12)
                np.testing.assert_allclose(row[f"{key}_error"], error, atol=1e-12)
        own = results(workdir, f"{name}-5", SEEDS)
        brier = np.mean([unit["brier"] for unit in own])
        np.testing.assert_allclose(row["brier"], brier)


def test_a_unit_knows_its_calibration_and_its_values(finished):
    workdir, _ = finished
    for name in METHODS:
        for unit in results(workdir, f"{name}-5", SEEDS):
            bins = {k: np.array(v) for k, v in unit["calibration"].items()}
            assert bins["count"].sum() == len(source().test.labels)
            gaps = np.abs(bins["correct"] - bins["confidence"])
            np.testing.assert_allclose(
                gaps.sum() / bins["count"].sum(), unit["ece"], rtol=1e-4
            )
            accuracy = bins["correct"].sum() / bins["count"].sum()
            np.testing.assert_allclose(accuracy, unit["accuracy"], rtol=1e-6)
            names = {"gaussian_noise-3", "blur-3", "contrast-3", "occlusion-3"}
            assert set(unit["corrupted"]) == names
            assert unit["values"]["learning_rate"] == 0.1


def test_the_tables_have_a_row_for_every_method(finished):
    workdir, _ = finished
    text = (workdir / "table.md").read_text()
    clean, harder = text.split("Test accuracy in % where something is wrong")
    harder, designs = harder.split("Accuracy in % on training images outside")
    assert clean.startswith("## 5 labels per class\n\n| method")
    for column in ("minus RigL", "minus dense", "Brier", "inference MACs"):
        assert column in clean
    for column in ("gaussian noise", "blur", "contrast", "occlusion"):
        assert column in harder
    for column in ("minus rigl", "minus d2_sparse"):
        assert column in designs
    for name in METHODS:
        for table in (clean, harder, designs):
            assert f"| {name} " in table
    figures = {path.name for path in (workdir / "figures").iterdir()}
    assert figures == {"accuracy_against_cost-5.png", "calibration-5.png", "ranks.png"}


def test_designs_are_compared_on_images_that_nobody_learned_from(finished):
    workdir, summary = finished
    rows = {row["method"]: row for row in summary["budgets"]["5"]["designs"]}
    by_name = {
        name: np.array([u["outside"] for u in results(workdir, f"{name}-5", SEEDS)])
        for name in METHODS
    }
    apart = by_name["dense"] - by_name["rigl"]
    error = apart.std(ddof=1) / np.sqrt(len(SEEDS))
    expected = f"{100 * apart.mean():+.2f} ± {100 * error:.2f}"
    assert rows["dense"]["minus rigl"] == expected
    assert rows["rigl"]["minus rigl"] == rows["d2_sparse"]["minus d2_sparse"] == ""
    for seed in SEEDS:
        splits = draw_splits(
            dataclasses.replace(TINY, samples_per_class=5), source(), seed
        )
        count = len(splits.outside.labels)
        assert count == len(source().train.labels) - 50
        hits = by_name["rigl"][seed] * count
        assert abs(hits - round(hits)) < 1e-3
    # In the units of a run that knew nothing of them, there is nothing to compare.
    cell = Cell("rigl", Setting(5))
    assert list_designs({cell: {0: {"accuracy": 0.5}}}, 5) == []


@pytest.mark.usefixtures("no_training")
def test_a_finished_run_is_not_repeated(finished):
    workdir, summary = finished
    before = modified(unit_files(workdir).values())
    assert low_data.run(in_directory(workdir)) == summary
    assert modified(unit_files(workdir).values()) == before


# Cells


def test_cells_run_alone_join_the_tables(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "joined")
    before = modified(unit_files(workdir).values())
    own = in_directory(workdir, methods=("static",), seeds=1)
    harder = {"label_noises": (0.4,), "imbalances": (5.0,)}
    low_data.run(dataclasses.replace(own, budgets=(4,)))
    summary = low_data.run(dataclasses.replace(own, **harder))
    assert {path: before[path] for path in before} == modified(before)
    assert set(summary["budgets"]) == {"4", "5"}
    (alone,) = summary["budgets"]["4"]["methods"]
    assert (alone["method"], alone["seeds"]) == ("static", 1)
    together = {row["method"]: row for row in summary["budgets"]["5"]["methods"]}
    assert set(together) == {*METHODS, "static"}
    assert together["static"]["seeds"] == 1
    assert "to_rigl" in together["static"]
    harder = {row["method"]: row for row in summary["budgets"]["5"]["robustness"]}
    for column in ("imbalance 5", "40 % wrong labels"):
        assert harder["static"][column] != ""
        assert harder["rigl"][column] == ""


def test_a_setting_is_every_budget_and_what_can_go_wrong_with_it():
    config = dataclasses.replace(
        TINY, budgets=(5, 10), label_noises=(0.2,), imbalances=(10.0, 50.0)
    )
    names = [setting.name for setting in list_settings(config)]
    assert names[:4] == ["5", "5-noise0.2", "5-tail10", "5-tail50"]
    assert names[4:] == [name.replace("5", "10", 1) for name in names[:4]]
    for setting in list_settings(config):
        assert parse_cell(Cell("rigl", setting).name) == Cell("rigl", setting)
    none = dataclasses.replace(TINY, budgets=(), samples_per_class=7)
    assert list_settings(none) == [Setting(7)]


def test_other_flags_are_another_configuration(finished):
    workdir, _ = finished
    with pytest.raises(ValueError, match=r"sparsity was 0\.8 and is 0\.9"):
        low_data.run(in_directory(workdir, sparsity=0.9))


def test_the_largest_table_without_holes_is_ranked():
    def cell(method, samples):
        return Cell(method, Setting(samples))

    found = {
        cell("dense", 5): {0: {"accuracy": 0.5}, 1: {"accuracy": 0.6}},
        cell("rigl", 5): {0: {"accuracy": 0.7}, 1: {"accuracy": 0.8}},
        cell("rigl", 10): {0: {"accuracy": 0.9}},
    }
    assert compare(found) == {"dense": [0.5, 0.6], "rigl": [0.7, 0.8]}
    # One more method with a single seed does not hide the other seeds.
    found[cell("set", 5)] = {0: {"accuracy": 0.4}}
    assert compare(found) == {"dense": [0.5, 0.6], "rigl": [0.7, 0.8]}
    found[cell("set", 5)][1] = {"accuracy": 0.3}
    assert set(compare(found)) == {"dense", "rigl", "set"}


def test_a_narrow_network_is_the_widest_that_fits():
    for model, width, unit in (("lenet_300_100", 1.0, 0.01), ("convnet_s", 16, 1)):
        config = dataclasses.replace(TINY, model=model, width=width)
        planner = Planner(config, source(), Setting(5))
        found = narrow_width(config, planner.base)
        sizes = {
            w: count(dataclasses.replace(config, width=w))
            for w in (found, found + unit, width)
        }
        most = round(0.2 * sizes[width][0]) + sizes[width][1]
        assert sum(sizes[found]) <= most < sum(sizes[found + unit])


def count(config):
    """Numbers of the network that may be pruned, and others."""
    params = Planner(config, source(), Setting(5)).base.task.params
    leaves = [leaf for layer in params.values() for leaf in layer.values()]
    kernels = sum(leaf.size for leaf in leaves if leaf.ndim > 1)
    return kernels, sum(leaf.size for leaf in leaves) - kernels


# Resuming


# In a first training, at its end, and in what follows.
@pytest.mark.parametrize(
    ("method", "stop"),
    [
        ("self_distilled", 17),
        ("free_tickets", 9),
        ("d2_merged", 6),
        *(
            pytest.param(*place, marks=pytest.mark.slow)
            for place in (
                *(("self_distilled", step) for step in (5, 12)),
                *(("free_tickets", step) for step in (3, 11)),
                *(("d2_merged", step) for step in (4, 9)),
                ("d2_sparse", 10),
            )
        ),
    ],
)
def test_interrupted_anywhere_a_unit_goes_on_to_the_same_bits(
    finished, tmp_path, monkeypatch, method, stop
):
    workdir, own = tmp_path / "run", {"methods": (method,), "seeds": 1}
    config = in_directory(workdir, **own, checkpoint_every=1)
    taken, save = [], units.Session.save

    def interrupt(self, *args):
        save(self, *args)
        taken.append(1)
        if len(taken) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(units.Session, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        low_data.run(config)
    assert not (workdir / "units").exists()
    low_data.run(config)
    name = f"{method}-5"
    (resumed,), (whole,) = results(workdir, name, [0]), results(finished[0], name, [0])
    assert without_time(resumed) == without_time(whole)


# Tuning


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The directory and the choice of a finished tuning."""
    workdir = tmp_path_factory.mktemp("runs") / "tuned"
    config = in_directory(
        workdir, methods=("dense", "rigl"), tune=True, trials=4, tuning_seeds=2
    )
    nothing_to_test_on = source()._replace(test=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_data.data, "load", lambda *_: nothing_to_test_on)
        return workdir, low_data.run(config)


def test_every_method_has_as_many_trials_and_the_best_is_chosen(tuned):
    workdir, chosen = tuned
    trials = read(workdir / "tuning" / "summary.json")["trials"]
    assert set(chosen) == {"dense", "rigl"}
    for method in chosen:
        own = [row for row in trials if row["trial"].startswith(method)]
        assert [row["trial"] for row in own] == [
            f"{method}-5-trial{n}" for n in range(4)
        ]
        for row in own:
            found = results(workdir / "tuning", row["trial"], range(2))
            mean = np.mean([unit["accuracy"] for unit in found])
            np.testing.assert_allclose(row["accuracy"], mean)
        best = max(own, key=lambda row: (row["accuracy"], -row["nll"]))
        assert best["chosen"]
        assert sum(row["chosen"] for row in own) == 1
        assert chosen[method]["5"] == best["values"]
    assert read(workdir / "tuned.json") == chosen
    assert not (workdir / "units").exists()


@pytest.mark.usefixtures("no_training")
def test_a_finished_tuning_is_not_repeated_and_joins_others(tuned, tmp_path):
    workdir = shutil.copytree(tuned[0], tmp_path / "again")
    config = in_directory(
        workdir, methods=("rigl",), tune=True, trials=4, tuning_seeds=2
    )
    assert low_data.run(config) == tuned[1]


def test_frozen_values_are_used_and_cannot_change_later(tuned, tmp_path):
    workdir = shutil.copytree(tuned[0], tmp_path / "frozen")
    values = {"learning_rate": 0.05, "weight_decay": 1e-3, "drop_fraction": 0.5}
    (workdir / "tuned.json").write_text(json.dumps({"rigl": {"5": values}}))
    own = in_directory(workdir, methods=("rigl",), seeds=1)
    low_data.run(own)
    (unit,) = results(workdir, "rigl-5", [0])
    assert unit["values"] == values
    (workdir / "tuned.json").unlink()
    with pytest.raises(ValueError, match=r"rigl-5 with the values of its finished"):
        low_data.run(own)
    other = tmp_path / "elsewhere.json"
    other.write_text(json.dumps({"rigl": {"5": values}}))
    low_data.run(dataclasses.replace(own, tuned=str(other)))


@pytest.mark.usefixtures("no_training")
def test_how_much_is_validated_on_is_no_matter_of_the_runs_that_follow(tmp_path):
    own = in_directory(tmp_path / "run", methods=("rigl",), validation_fraction=0.4)
    with pytest.raises(AssertionError, match="something was trained"):
        low_data.run(dataclasses.replace(own, tune=True))
    with pytest.raises(AssertionError, match="something was trained"):
        low_data.run(dataclasses.replace(own, validation_fraction=0.0))
    trials = read(tmp_path / "run" / "tuning" / "config.json")
    assert trials["validation_fraction"] == 0.4


def test_a_tuned_cell_is_that_of_the_same_flags(tmp_path):
    values = {"learning_rate": 0.05, "weight_decay": 0.0, "drop_fraction": 0.5}
    chosen = tmp_path / "tuned.json"
    chosen.write_text(json.dumps({"rigl": {"5": values}}))
    own = {"methods": ("rigl",), "seeds": 1}
    low_data.run(in_directory(tmp_path / "a", **own, tuned=str(chosen)))
    low_data.run(in_directory(tmp_path / "b", **own, **values))
    (first,), (second,) = (results(tmp_path / d, "rigl-5", [0]) for d in "ab")
    assert without_time(first) == without_time(second)


def test_trials_are_the_flags_and_then_fill_the_ranges():
    trials = tuning.draw_trials(dataclasses.replace(TINY, trials=64), "rigl")
    assert trials[0] == {}
    rates = np.array([trial["learning_rate"] for trial in trials[1:]])
    assert (rates.min() >= 0.01, rates.max() <= 0.3) == (True, True)
    # Every eighth of the range, on its logarithmic scale.
    places = np.log(rates / 0.01) / np.log(30)
    assert len(set((places * 8).astype(int).clip(0, 7))) == 8
    assert {trial["drop_fraction"] for trial in trials[1:]} == {0.1, 0.3, 0.5}
    fewer = tuning.draw_trials(dataclasses.replace(TINY, trials=8), "rigl")
    assert fewer == trials[:8]


# Refusals


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ()}, "expected methods of dense, .*got none"),
        ({"methods": ("rig",)}, "expected a method of dense, .*got 'rig'"),
        ({"ticket": "somewhere"}, "expected no ticket.*got somewhere"),
        ({"validation_fraction": 0.2}, "with --tune alone, got 0.2"),
        ({"severities": (0,)}, "severities from 1 to 5, got 0"),
        ({"trials": 0}, "expected trials >= 1, got 0"),
        ({"tuning_rates": (0.1,)}, r"tuning_rates from above 0 .*got \(0\.1,\)"),
        ({"tuning_decays": (0.1, 0.01)}, "tuning_decays from above 0 to no less"),
        ({"tuned": "nowhere.json"}, "file of chosen values, got nowhere.json"),
        ({"budgets": (500,)}, "lower samples_per_class"),
        ({"imbalances": (0.5,)}, "expected imbalance >= 1, got 0.5"),
        ({"label_noises": (2.0,)}, "fraction of wrong labels"),
        ({"averaging": 2.0}, r"averaging in \[0, 1\], got 2"),
        ({"sharpness": -1.0}, "expected sharpness >= 0, got -1"),
        ({"finish_part": 0.0}, "finish_part to leave both trainings steps, got 0"),
        ({"explore": 1.0}, "explored part in .*explore=1"),
        ({"members": 0}, "at least 1 member .*members=0"),
        ({"trust_threshold": 1.0}, "threshold of confidence"),
        ({"averaging": 0.25}, "no averaging of free_tickets"),
        ({"schedule": "linear"}, "schedule of cosine, constant, got 'linear'"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(
    change, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        low_data.run(dataclasses.replace(TINY, **change))
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
        low_data.run(dataclasses.replace(TINY, tuned=str(other)))


def test_the_units_of_a_directory_are_listed_by_method_and_seed(finished):
    run = records.open_run(finished[0], in_directory(finished[0]))
    expected = {records.Unit(f"{name}-5", seed) for name in METHODS for seed in SEEDS}
    assert set(run.units()) == expected


def test_help_explains_every_flag():
    done = runs.command("experiments.low_data", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    for field in dataclasses.fields(Config):
        comment = get_attribute_docstring(Config, field.name).help_string
        assert f"--{field.name}" in text
        assert comment
        assert " ".join(comment.split()) in text
