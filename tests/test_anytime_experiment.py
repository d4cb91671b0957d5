"""The experiment on a stream: one tiny run, its records, its tables, its refusals."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import runs
from runs import read, unit_files

from d2sparse import data, study
from d2sparse.anytime import density
from d2sparse.constraints import STREAM_METHODS
from d2sparse.study import cli, grid, runner, stream_report, streams
from experiments import anytime

METHODS = ("dense", "one_shot", "app_2022", "random_matched")
TINY = anytime.Config(
    methods=METHODS,
    samples_per_class=12,
    megabatches=2,
    epochs=2,
    batch_size=16,
    tau=2.0,
    seeds=2,
    shift=0,
    report_every=4,
    progress=False,
)
SIZES = {"head/kernel": 64 * 10}
KERNELS = 64 * 10
STEPS = (6, 18)  # After the stages: 54 and 108 examples, twice.


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with runs.quick_compilation(), runs.blank_figures():
        yield


def run(workdir, **changes):
    with runs.linear_networks():
        return anytime.run(dataclasses.replace(TINY, workdir=str(workdir), **changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("streams") / "finished"
    return workdir, run(workdir)


@pytest.fixture(scope="module")
def stages(finished):
    """The results after every stage, by method and seed."""
    return {
        (name, seed): runs.results(finished[0], name, [seed])[0]["parts"]
        for name in METHODS
        for seed in range(2)
    }


def values_of(parts, name):
    return [part[name] for part in parts]


# What is recorded


@pytest.mark.parametrize("seed", [0, 1])
def test_densities_are_those_of_the_levels_and_of_the_released_code(stages, seed):
    def left(name):
        return values_of(stages[name, seed], "density")

    levels = [round(density(level) * KERNELS) / KERNELS for level in (1, 2)]
    assert left("dense") == [1, 1]
    assert left("one_shot") == [levels[-1]] * 2
    assert left("app_2022")[0] == levels[0]
    assert all(np.less(left("app_2022")[1:], levels[1:]))
    assert left("random_matched") == left("app_2022")
    for name in METHODS:
        for part in stages[name, seed]:
            live = sum(SIZES[path] * d for path, d in part["layers"].items())
            np.testing.assert_allclose(live / KERNELS, part["density"], rtol=1e-9)


def test_a_stage_is_recorded_with_what_was_seen_and_its_gaps(finished, stages):
    assert values_of(stages["dense", 0], "seen") == [60, 120]
    lines = [line for part in stages.values() for line in part]
    for part in lines:
        assert part["test_error"] == 1 - part["accuracy"]
        assert part["gap"] == part["train_accuracy"] - part["accuracy"]
        assert 0 <= part["validation_accuracy"] <= 1
    last = finished[1].set_index(["method", "seed"])["accuracy"]
    for key, parts in stages.items():
        assert last[key] == parts[-1]["accuracy"]


def test_costs_are_those_of_the_live_weights_and_of_scoring(stages):
    dense = 3.0 * KERNELS
    costs = values_of(stages["dense", 0], "training_macs")
    np.testing.assert_allclose(costs, dense * np.array(STEPS), rtol=1e-5)
    assert stages["dense", 0][-1]["relative_macs"] == 1
    first = stages["one_shot", 0][0]
    sparse = 3 * sum(SIZES[path] * d for path, d in first["layers"].items())
    scoring = dense * 10 / TINY.batch_size  # A fifth of 54 examples.
    expected = sparse * STEPS[0] + scoring
    np.testing.assert_allclose(first["training_macs"], expected, rtol=1e-5)


# Tables


def test_tables_and_summary_agree_with_numpy_on_the_stages(finished, stages):
    summary = read(finished[0] / "summary.json")
    rows = {row["method"]: row for row in summary["rows"]}
    assert list(rows) == list(METHODS)
    errors = {
        name: np.array([values_of(stages[name, seed], "test_error") for seed in (0, 1)])
        for name in METHODS
    }
    for name, row in rows.items():
        mean = errors[name].mean(axis=1)
        assert row["mean_error"] == pytest.approx(mean.mean())
        assert row["mean_error_error"] == pytest.approx(abs(mean[0] - mean[1]) / 2)
        assert row["cumulative_error"] == pytest.approx(2 * mean.mean())
        count = errors[name].sum(axis=1) * len(data.load("digits").test.labels)
        assert row["error_count"] == pytest.approx(count.mean())
        stored = values_of(stages[name, 0] + stages[name, 1], "nonzeros")
        assert row["sum_nonzeros"] == sum(stored) / 2
        for other in {"dense", "one_shot"} - {name}:
            apart = mean - errors[other].mean(axis=1)
            assert row[f"error_minus_{other}"] == pytest.approx(apart.mean())
            last = errors[other][:, -1] - errors[name][:, -1]
            assert row[f"minus_{other}"] == pytest.approx(last.mean())
        along = summary["stages"][name]["test_error"]
        assert along == pytest.approx(errors[name].mean(axis=0))


def test_tables_are_narrow_and_name_their_columns(finished):
    text = (finished[0] / "table.md").read_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    titles = [line.split("|") for line in lines if line.startswith("| method")]
    assert [[title.strip() for title in words[2:-1]] for words in titles] == [
        ["mean error %", "minus dense", "minus one_shot", "gap %"],
        [
            *("last accuracy %", "minus dense", "minus one_shot", "density %"),
            *("non-zeros", "MACs"),
        ],
    ]


def test_figures_are_there(finished):
    names = {path.name for path in (finished[0] / "figures").iterdir()}
    assert {"anytime_accuracy.png", "density.png", "gap.png"} <= names
    assert {"layers-one_shot.png", "layers-app_2022.png"} <= names
    assert "layers-dense.png" not in names


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    def fail(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(runner, "_train_group", fail)
    pd.testing.assert_frame_equal(run(finished[0]), finished[1])


def test_a_run_that_waits_is_measured_on_the_finest_grid():
    waits = {"methods": ("dense",), "megabatches": 5, "wait": 2}
    config = dataclasses.replace(TINY, tau=4.5, **waits)
    splits = study.make_draw_splits(data.load("digits"))
    table = streams.stream_methods(splits)
    plans = study.make_plans(config, splits, 10, methods=table)
    parts = [
        {"test_error": error, "nonzeros": 7, "gap": 0.1, "layers": {}, "title": ""}
        for error in (0.5, 0.25)
    ]
    frame = pd.DataFrame(parts).assign(run="dense", seed=0)
    (row,) = stream_report.measure_streams(frame, plans, 10, 100).to_dict("records")
    assert row["cumulative_error"] == pytest.approx(0.9 + 2 * 0.5 + 2 * 0.25)
    assert row["test_error"] == 0.25


# Flags


def names_of(**changes):
    given = {"tau": 4.5, "epochs": 10, **changes}
    config = dataclasses.replace(TINY, **given)
    table = streams.stream_methods(study.make_draw_splits(data.load("digits")))
    grid.check_effects(config, table)
    return [row.name for row in study.list_rows(config, table)]


def test_axes_are_those_of_the_methods_that_go_by_them():
    assert names_of(axes={"tau": (2.0, 4.5)})[:3] == [
        *("dense", "one_shot-tau2", "one_shot-tau4.5"),
    ]
    levels = {"levels": ("constant", "cubic")}
    assert names_of(methods=("one_shot", "rigl", "app"), axes=levels) == [
        *("one_shot", "rigl", "app-levelsconstant", "app-levelscubic"),
    ]
    assert names_of(methods=("dense",), axes={"epochs": (1, 2)}) == [
        *("dense-epochs1", "dense-epochs2"),
    ]
    matched = names_of(methods=METHODS[2:], axes={"criterion": ("snip", "wanda")})
    assert [name.partition("-")[2] for name in matched[:2]] == [
        name.partition("-")[2] for name in matched[2:]
    ]


def test_every_flag_of_a_stream_is_read_by_a_method():
    table = streams.stream_methods(study.make_draw_splits(data.load("digits")))
    used = grid.flags_used(table.values(), TINY)
    names = {field.name for field in dataclasses.fields(streams.StreamOptions)}
    assert names - used == {"epochs", "steps", "schedule"}  # Read by all trainings.
    assert table.keys() == STREAM_METHODS.keys()


def test_flags_of_a_stage_are_flags_of_the_command():
    words = ["--epochs=3", "--schedule=cosine", "--methods=app,rigl", "--tau=2,4.5"]
    config = cli.parse_flags(anytime.Config, ["anytime", *words])
    assert (config.epochs, config.schedule) == (3, "cosine")
    assert config.methods == ("app", "rigl")
    assert config.axes == {"tau": (2.0, 4.5)}
    assert TINY.count_steps(np.arange(120) % 10) == STEPS[-1]


BAD = [
    ({"megabatches": 200}, "from 1 to 120 megabatches"),
    ({"tau": 0.0}, "target level above 0, got 0"),
    ({"megabatches": 8}, "fill a batch of 16, got 14 examples to train on"),
    ({"stream_validation": 0.01}, "stream_validation=0.01 of 60 examples; raise it"),
    ({"wait": 4}, "wait for 1 to 2 megabatches, as there are, got 4"),
    ({"methods": ()}, r"methods of dense, scratch, .*got none"),
    ({"methods": ("apps",)}, r"methods of dense, .*got 'apps'"),
    ({"methods": ("random_matched", "app_2022")}, "app_2022 among the methods before"),
    ({"criterion": "snap"}, r"criterion of snip, .*got 'snap'"),
    ({"score_fraction": 0.0}, r"score_fraction in \(0, 1\], got 0"),
    ({"schedule": "linear"}, "schedule of .*, got 'linear'"),
    ({"ticket": "here"}, "no --ticket, since a stream begins with a new network"),
    ({"growth_samples": 5}, "no --growth_samples, since other examples than those"),
    ({"sparsity": 0.9}, "no --sparsity, since --tau says how many weights are left"),
    ({"with_": ("averaged",)}, "no --with=averaged, since the best epoch"),
    ({"epochs": 3, "steps": 4}, "expected no epochs, since steps are 4, got 3"),
    ({"replay_size": 20}, "no replay_size, which is for replay=buffer, got 20"),
    (
        {"compat": "app-2022", "dead": "revive"},
        "no dead, which compat=app-2022 sets to intersect, got revive",
    ),
    ({"epochs": 0}, "expected epochs >= 1, got 0"),
    ({"methods": ("dense",)}, "no tau, which none of dense goes by"),
    ({"methods": ("app_magnitude",), "criterion": "wanda"}, "no criterion, which none"),
    ({"methods": ("dense",), "tau": 4.5, "rounds": 3}, "no rounds, which none of"),
    ({"methods": ("rigl",), "refresh_interval": 10_000}, "a refresh within the first"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input_is_refused_before_anything_is_written(
    changes, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        anytime.run(dataclasses.replace(TINY, **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_match_has_failed_says_so(tmp_path):
    with pytest.raises(FloatingPointError, match="all 2 runs have failed, app_2022-s"):
        run(tmp_path / "run", methods=METHODS[2:], learning_rate=1e30, seeds=1)
    failed = read(tmp_path / "run" / "summary.json")["failed"]
    assert set(failed) == {"app_2022-seed0", "random_matched-seed0"}
    assert failed["random_matched-seed0"] == (
        "app_2022-seed0, whose densities it takes, has failed"
    )
    assert len(unit_files(tmp_path / "run")) == 2
    assert "failed" in (tmp_path / "run" / "table.md").read_text()
