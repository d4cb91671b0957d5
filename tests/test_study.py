"""Comparisons: grids of runs, what is refused, rows and tables, resumption."""

import dataclasses
import functools
import math
import shutil
import statistics

import numpy as np
import pandas as pd
import pytest
from runs import blank_figures, linear, quick_compilation, read, without_time

from d2sparse import data, study
from d2sparse.constraints import METHODS
from d2sparse.study import cli, grid, splits, streams, tables
from experiments import anytime, compare, lottery, prune

TINY = study.Config(
    methods=("dense", "rigl", "imp"),
    with_=("averaged",),
    steps=8,
    refresh_interval=2,
    growth_samples=16,
    rounds=1,
    width=0.05,
    seeds=2,
    report_every=4,
    checkpoint_every=2,
    progress=False,
    axes={"sparsity": (0.5, 0.75)},
)
LINEAR = linear(10)
TRAINED = dataclasses.replace(TINY, methods=("dense", "rigl"), rounds=5)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation(), blank_figures():
        yield


def learn(config):
    return study.compare(config, study.Experiment("test", ("dense",)), model=LINEAR)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study") / "run"
    config = dataclasses.replace(TRAINED, workdir=str(workdir))
    return config, workdir, learn(config)


@functools.cache
def digits():
    return splits.make_draw_splits(data.load("digits"))


def plans_of(**flags):
    return study.make_plans(dataclasses.replace(TINY, **flags), digits(), 10)


def names(**flags):
    return [row.name for row in study.list_rows(dataclasses.replace(TINY, **flags))]


def test_a_method_has_a_row_for_every_value_of_the_flags_that_it_goes_by():
    assert names() == [
        "dense",
        *("rigl-sparsity0.5", "rigl-sparsity0.75"),
        *("imp-sparsity0.5", "imp-sparsity0.75"),
    ]
    rates = {"sparsity": (0.5,), "learning_rate": (0.1, 0.2)}
    assert names(methods=("dense", "static"), axes=rates) == [
        *("dense-learning_rate0.1", "dense-learning_rate0.2"),
        "static-sparsity0.5-learning_rate0.1",
        "static-sparsity0.5-learning_rate0.2",
    ]
    assert len(set(names(axes={"sparsity": (0.1234567, 0.1234568)}))) == 5


def test_rows_that_differ_in_settings_alone_share_a_program():
    dense, *rigl_and_imp = plans_of(with_=())
    rigl, imp = rigl_and_imp[:2], rigl_and_imp[2:]
    assert rigl[0].program.run is rigl[1].program.run
    assert [plan.training.settings["sparsity"] for plan in rigl] == [0.5, 0.75]
    assert imp[0].program.run is not imp[1].program.run
    assert dense.base.network.dense_macs == rigl[0].base.network.dense_macs


def test_flags_of_a_method_are_those_given_then_its_own_then_the_axes():
    flags = {"with_": (), "rounds": study.Config.rounds}
    (sharp,) = plans_of(methods=("d2_averaged_sharp",), axes={}, **flags)
    assert (sharp.config.sharpness, sharp.config.preset) == (0.05, "averaged")
    axes = {"sharpness": (0.02, 0.04)}
    first, _ = plans_of(methods=("d2_sharp",), axes=axes, **flags)
    assert (first.config.sharpness, first.config.preset) == (0.02, "symmetric")


ALONE = {
    **{"with_": (), "axes": {}, "rounds": 5},
    **{"refresh_interval": 0, "growth_samples": 1024},
}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({**ALONE, "methods": ("dense",), "drop_fraction": 0.1}, "expected no drop"),
        (
            {**ALONE, "methods": ("dense",), "axes": {"sparsity": (0.5, 0.7)}},
            "expected no sparsity, which none of dense goes by",
        ),
        ({"sparsity": 0.3}, "expected either a value of sparsity or an axis of it"),
        (
            {**ALONE, "methods": ("d2_annealed",), "preset": "constant"},
            "expected preset of symmetric for d2_annealed, got constant",
        ),
        ({"methods": ("static", "nope")}, "expected methods of dense, "),
        ({"methods": ("rigl", "rigl")}, "expected different methods of"),
        ({"methods": ()}, "expected different methods of .*, got none"),
        (
            {"with_": ("rigl",)},
            "expected with of averaged, quantised, sharp, smoothed, got",
        ),
        ({"axes": {"sparsity": (0.5, 1.5)}}, "sparsity"),
        ({"axes": {"sparsity": ()}}, "expected different values of sparsity"),
        ({"axes": {"seedz": (1, 2)}}, "expected axes of"),
        ({"steps": 0}, "expected steps >= 1, got 0"),
        ({"epochs": 2.0}, "expected either steps or epochs, got both"),
        ({"label_noise": 1.5}, r"expected label_noise in \[0, 1\]"),
        ({"optimizer": "lion"}, "expected optimizer of sgd, sgdw, adamw, got 'lion'"),
        ({"model": "lenet"}, "unknown model 'lenet'"),
        ({"pattern": "n_of_m", "group": 7}, "n:m"),
        ({**ALONE, "methods": ("fixed",)}, "expected a --ticket whose"),
        ({"prunable": "convolutions"}, "expected a network with prunable convolutions"),
        ({"batch_size": 0}, "expected batch_size >= 1"),
        ({"with_": ("averaged",), "schedule": "cosine", "tail": 1.5}, "tail"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    flags, message, tmp_path
):
    workdir = str(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        study.compare(dataclasses.replace(TINY, workdir=workdir, **flags))
    assert list(tmp_path.iterdir()) == []


def test_a_row_of_the_frame_is_a_run(finished):
    _, _, runs = finished
    assert len(runs) == 6
    assert runs["method"].value_counts().to_dict() == {"rigl": 4, "dense": 2}
    assert runs["sparsity"].isna().sum() == 2  # The dense network goes by none.
    rigl = runs[(runs["method"] == "rigl") & (runs["sparsity"] == 0.75)]
    np.testing.assert_allclose(rigl["zeros"], 0.75, atol=0.01)
    assert (rigl["relative_macs"] < 1).all()


def test_summaries_and_differences_are_those_of_numpy(finished):
    config, workdir, runs = finished
    by = ("method", "sparsity")
    rows = study.summarise(runs, by).set_index(list(by))
    apart = study.difference(runs, {"method": "dense"}, by).set_index(list(by))
    dense = runs[runs["method"] == "dense"].sort_values("seed")["accuracy"].to_numpy()
    for key in apart.index:
        chosen = (runs["method"] == key[0]) & (runs["sparsity"] == key[1])
        values = runs[chosen].sort_values("seed")["accuracy"].to_numpy()
        row, difference = rows.loc[key], values - dense
        np.testing.assert_allclose(row["accuracy"], values.mean())
        np.testing.assert_allclose(row["standard_error"], values.std(ddof=1) / 2**0.5)
        np.testing.assert_allclose(apart.loc[key, "difference"], difference.mean())
        error = difference.std(ddof=1) / 2**0.5
        np.testing.assert_allclose(apart.loc[key, "difference_error"], error)
    assert len(apart) == 2
    summary = read(workdir / "summary.json")
    order = [row["method"] for row in summary["rows"]]
    assert order == ["dense", "rigl", "rigl"]
    assert summary["config"]["axes"] == {"sparsity": [0.5, 0.75]}
    assert config.axes == {"sparsity": (0.5, 0.75)}


def runs_of(method, values):
    columns = {"method": method, "seed": list(values), "accuracy": values.values()}
    return pd.DataFrame(columns).assign(seconds=1.0)


def test_means_and_errors_agree_with_the_standard_library():
    values = [0.5, 0.75, 0.8, 0.1]
    row = study.summarise(runs_of("rigl", dict(enumerate(values)))).iloc[0]
    assert row["accuracy"] == pytest.approx(statistics.mean(values), rel=1e-6)
    error = statistics.stdev(values) / math.sqrt(4)
    assert row["standard_error"] == pytest.approx(error, rel=1e-6)
    assert row["seeds"] == 4


def test_one_run_has_no_standard_error_and_none_have_no_row():
    row = study.summarise(runs_of("rigl", {0: 0.5})).iloc[0]
    assert (row["accuracy"], row["seeds"]) == (0.5, 1)
    assert math.isnan(row["standard_error"])
    assert study.summarise(runs_of("rigl", {})).empty


def test_a_number_that_is_not_finite_in_one_run_shows_in_the_mean():
    runs = runs_of("rigl", {0: 0.5, 1: 0.6}).assign(nll=[0.3, math.nan])
    row = study.summarise(runs).iloc[0]
    assert math.isnan(row["nll"])
    assert row["accuracy"] == pytest.approx(0.55)


def test_paired_differences_match_seeds_not_positions():
    a, b = {3: 0.9, 1: 0.5, 2: 0.7}, {1: 0.4, 2: 0.5, 3: 0.6, 9: 0.0}
    runs = pd.concat([runs_of("a", a), runs_of("b", b)])
    (row,) = study.difference(runs, {"method": "b"}).to_dict("records")
    differences = [0.9 - 0.6, 0.5 - 0.4, 0.7 - 0.5]
    assert row["difference"] == pytest.approx(statistics.mean(differences))
    error = statistics.stdev(differences) / math.sqrt(3)
    assert row["difference_error"] == pytest.approx(error)
    apart = pd.concat([runs_of("a", a), runs_of("b", {4: 0.0})])
    assert study.difference(apart, {"method": "b"}).empty


def test_the_table_fits_a_terminal_and_says_what_the_summary_says(finished):
    _, workdir, _ = finished
    heading, _, title, _, *lines = (workdir / "table.md").read_text().splitlines()
    assert heading.startswith("Test accuracy, mean ± standard error over 2 seeds")
    assert [cell.strip() for cell in title.split("|")][1:5] == [
        *("method", "sparsity %", "accuracy %", "minus dense"),
    ]
    rows = read(workdir / "summary.json")["rows"]
    for line, row in zip(lines, rows, strict=True):
        assert tables.percent(row["accuracy"], row["standard_error"]) in line
        assert f"{row['nonzeros']:,.0f}" in line
        assert len(line) <= 110
    for name in ("accuracy_against_cost", "learning_curves-0.5"):
        assert (workdir / "figures" / f"{name}.png").stat().st_size > 0


def test_a_finished_run_is_not_repeated_and_a_lost_one_comes_to_the_same(finished):
    config, workdir, runs = finished
    unit = workdir / "units" / "dense-seed1.json"
    before = without_time(read(unit))
    unit.unlink()
    saved = workdir / "checkpoints" / unit.stem
    shutil.rmtree(max(saved.glob("[0-9]*"), key=lambda path: int(path.name)))
    others = {p: p.stat().st_mtime_ns for p in unit.parent.iterdir()}
    again = learn(config)
    assert without_time(read(unit)) == before
    assert {p: p.stat().st_mtime_ns for p in others} == others
    timeless = [name for name in runs.columns if name not in ("seconds", "parts")]
    pd.testing.assert_frame_equal(
        again[timeless].reset_index(drop=True), runs[timeless].reset_index(drop=True)
    )


def test_a_directory_of_another_comparison_is_refused(finished):
    config, workdir, _ = finished
    with pytest.raises(ValueError, match="steps was 8 and is 9"):
        learn(dataclasses.replace(config, steps=9))
    assert (workdir / "summary.json").exists()


@pytest.mark.slow
def test_runs_of_one_program_are_those_alone(finished, tmp_path):
    _, _, runs = finished
    config = dataclasses.replace(
        TRAINED,
        methods=("rigl",),
        runs_at_once=4,
        workdir=str(tmp_path / "together"),
    )
    together = study.compare(config, model=LINEAR)
    alone = runs[runs["method"] == "rigl"]
    keys = ["sparsity", "seed"]
    both = together.merge(alone, on=keys, suffixes=("", "_alone"))
    assert len(both) == 4
    np.testing.assert_allclose(both["nll"], both["nll_alone"], rtol=1e-4)
    np.testing.assert_array_equal(both["nonzeros"], both["nonzeros_alone"])


def test_a_run_that_diverges_is_in_the_table(tmp_path):
    config = dataclasses.replace(
        TINY,
        **(ALONE | {"methods": ("dense",), "axes": {"learning_rate": (0.1, 1e30)}}),
        seeds=1,
        workdir=str(tmp_path),
    )
    runs = study.compare(config, model=LINEAR)
    assert runs["learning_rate"].tolist() == [0.1]
    assert "failed and is not counted" in (tmp_path / "table.md").read_text()


def test_arrays_and_a_network_of_ones_own_are_compared(tmp_path):
    def floats(split):
        return split.images.astype(np.float32) / 255 - 0.3, split.labels

    known = data.load("digits")
    source = data.from_arrays(*floats(known.train), *floats(known.test))
    config = study.Config(
        methods=("static",),
        sparsity=0.5,
        steps=20,
        seeds=1,
        progress=False,
        workdir=str(tmp_path / "run"),
    )
    (run,) = study.compare(config, source=source, model=LINEAR).to_dict("records")
    assert run["accuracy"] > 0.5
    assert run["nonzeros"] == 320 + 10
    recorded = read(tmp_path / "run" / "config.json")
    assert recorded["dataset"].startswith("arrays-")
    assert recorded["model"].startswith("own-")
    with pytest.raises(ValueError, match="expected no cutout, which is for uint8"):
        study.compare(dataclasses.replace(config, cutout=2), source=source)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(tmp_path, capsys):
    config = dataclasses.replace(
        TRAINED,
        methods=("rigl",),
        axes={"sparsity": (0.75,)},
        workdir=str(tmp_path / "run"),
        dry_run=True,
    )
    assert study.compare(config, model=LINEAR).empty
    text = capsys.readouterr().out
    assert "2 runs, about" in text
    assert "Nothing has been written." in text
    assert "rigl-sparsity0.75" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "words", "field", "value"),
    [
        (prune, [], "axes", {"sparsity": prune.SPARSITIES}),
        (prune, ["--sparsity=0.9"], "sparsity", 0.9),
        (prune, ["--sparsity=0.9"], "axes", {}),
        (prune, ["--sparsity=0.5,0.9"], "axes", {"sparsity": (0.5, 0.9)}),
        (
            prune,
            ["--learning_rate=0.1,0.2"],
            "axes",
            {"sparsity": prune.SPARSITIES, "learning_rate": (0.1, 0.2)},
        ),
        (compare, ["--steps=10,20"], "axes", {"steps": (10, 20)}),
        (compare, ["--with=averaged"], "with_", ("averaged",)),
        (lottery, ["--score=magnitude"], "score", "magnitude"),
        (
            lottery,
            ["--score=saliency,random"],
            "axes",
            {"score": ("saliency", "random")},
        ),
    ],
)
def test_a_flag_with_several_values_is_an_axis(module, words, field, value):
    config = cli.parse_flags(module.Config, [module.__name__, *words])
    assert getattr(config, field) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsity=0.5,2"], "sparsity"),
        (["--steps=0"], "expected steps >= 1, got 0"),
        (["--workdir=a,b", "--nope"], "unknown flag --nope"),
    ],
)
def test_a_value_out_of_its_range_is_one_line_of_the_command(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse_flags(compare.Config, ["compare", *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("module", [compare, prune, lottery, anytime])
def test_no_flag_is_listed_that_is_always_refused(module, capsys):
    with pytest.raises(SystemExit):
        cli.parse_flags(module.Config, [module.__name__, "--help"])
    text = capsys.readouterr().out
    names = {
        compare: METHODS,
        prune: METHODS,
        lottery: ("imp", "rise", "imp_distilled"),
    }
    unread = study.unread_options(names.get(module, streams.WITHIN))
    listed = [
        f.name for f in dataclasses.fields(grid.Options) if f"--{f.name} " in text
    ]
    assert listed
    assert not set(listed) & set(unread)
    assert ("--ticket STR" in text) == (module in (compare, prune))
