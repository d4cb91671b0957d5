"""Lottery tickets as an experiment, end to end at tiny size."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import runs
from runs import modified, read, unit_files, without_time

from d2sparse import data, records, rules, train, tree
from d2sparse.lottery import round_sparsities
from d2sparse.masks import dense_masks
from d2sparse.transforms import get_masks
from experiments import cli, d2_sparse, data_efficient_lth, lottery, prune
from experiments.lottery import Config, resolve
from experiments.prune import Point
from experiments.singles import Recipe, make_network
from experiments.splits import draw_splits
from experiments.task import make_task, shapes_and_macs
from experiments.tickets import load_ticket

SEEDS = range(2)
KERNELS, BIASES = 64 * 30 + 30 * 10 + 10 * 10, 30 + 10 + 10
TINY = Config(
    seeds=len(SEEDS),
    width=0.1,
    shift=0,
    steps=12,
    report_every=6,
    sparsity=0.75,
    rounds=2,
    rewind_fraction=0.25,
    progress=False,
)
REWIND = 3
DENSITIES = (1.0, 0.5, 0.25)
TICKETS = ("round0-sparsity-0.0000", "round1-sparsity-0.5000", "round2-sparsity-0.7500")
ONE = dataclasses.replace(TINY, seeds=1, score=("magnitude",))


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory and the summary of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, lottery.run(dataclasses.replace(TINY, workdir=str(workdir)))


@pytest.fixture(scope="module")
def labelled():
    return draw_splits(TINY, data.load("digits"), seed=0).train


@pytest.fixture(scope="module")
def tickets(finished, labelled):
    """The tickets of seed 0 by score, one for every round."""
    model = make_task(TINY, labelled, 10, 0.0).model
    params, model_state, _ = shapes_and_macs(model, labelled.images.shape[1:])
    return {
        score: [
            load_ticket(place(finished[0], score) / name, params, model_state)
            for name in TICKETS
        ]
        for score in TINY.score
    }


@pytest.fixture
def no_training(monkeypatch):
    def fail(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(lottery, "run_unit", fail)


def place(workdir, score, seed=0):
    return workdir / "tickets" / f"{score}-seed{seed}"


def kernels(values):
    leaves = tree.flatten(values)
    return {path: np.asarray(leaves[path]) for path in leaves if "kernel" in path}


def rounds(workdir, score, number):
    return [unit["rounds"][number] for unit in runs.results(workdir, score, SEEDS)]


def accuracies(workdir, score, number):
    return np.array([found["accuracy"] for found in rounds(workdir, score, number)])


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_without_flags_tickets_meet_their_control_on_digits():
    config = Config()
    assert config.dataset == "digits"
    assert resolve(config, samples=100).steps == 1000
    assert config.score == ("magnitude", "random")
    assert config.seeds >= 5


def test_every_round_stores_exactly_its_share(finished):
    workdir, summary = finished
    stored = [round(density * KERNELS) + BIASES for density in DENSITIES]
    for score in TINY.score:
        for unit in runs.results(workdir, score, SEEDS):
            assert [found["nonzeros"] for found in unit["rounds"]] == stored
    assert [row["nonzeros"] for row in summary["rounds"]] == 2 * stored
    for name in ("sparsity", "asked"):
        sparsities = [row[name] for row in summary["rounds"]]
        np.testing.assert_allclose(sparsities, 2 * [0.0, 0.5, 0.75])


def test_costs_add_up_over_rounds(finished):
    cost = [row["relative_macs"] for row in finished[1]["rounds"]]
    # Every round after the first begins at the rewind step.
    parts = np.array(DENSITIES) * np.array([12, 12 - REWIND, 12 - REWIND]) / 12
    np.testing.assert_allclose(cost, np.tile(np.cumsum(parts), 2), rtol=1e-3)


def test_the_run_directory_holds_what_was_asked_for(finished):
    workdir, _ = finished
    expected = {f"{score}-seed{seed}" for score in TINY.score for seed in SEEDS}
    assert set(unit_files(workdir)) == expected
    assert {path.name for path in (workdir / "tickets").iterdir()} == expected
    for name in expected:
        stored = sorted(path.name for path in (workdir / "tickets" / name).iterdir())
        assert stored == list(TICKETS)
    figures = {path.name for path in (workdir / "figures").iterdir()}
    assert figures == {"accuracy_against_sparsity.png", "learning_curves.png"}


def test_the_learning_curve_of_a_unit_goes_through_all_rounds(finished):
    workdir, _ = finished
    for name in unit_files(workdir):
        lines = [m for m in records.read_metrics(workdir) if m["unit"] == name]
        steps = [line["step"] for line in lines]
        assert steps == [0, REWIND, 6, 12, 15, 21, 24, 30]
        assert all(0 <= line["monitor_accuracy"] <= 1 for line in lines)


def test_the_summary_agrees_with_numpy_on_the_units(finished):
    workdir, summary = finished
    assert without_time(read(workdir / "summary.json")) == without_time(
        json.loads(json.dumps(summary))
    )
    numbers = [(score, number) for score in TINY.score for number in range(3)]
    for (score, number), row in zip(numbers, summary["rounds"], strict=True):
        assert row["method"] == score
        own = accuracies(workdir, score, number)
        np.testing.assert_allclose(row["accuracy"], own.mean())
        np.testing.assert_allclose(row["deviation"], own.std(ddof=1), atol=1e-12)
        for key in ("nll", "ece", "inference_macs", "sparsity"):
            expected = np.mean([unit[key] for unit in rounds(workdir, score, number)])
            np.testing.assert_allclose(row[key], expected)
        others = {
            "to_dense": accuracies(workdir, score, 0) if number else None,
            "to_random": accuracies(workdir, "random", number)
            if number and score == "magnitude"
            else None,
        }
        for key, other in others.items():
            assert (key in row) == (other is not None)
            if other is not None:
                paired = own - other
                error = paired.std(ddof=1) / np.sqrt(len(SEEDS))
                np.testing.assert_allclose(row[key], paired.mean(), atol=1e-12)
                np.testing.assert_allclose(row[f"{key}_error"], error, atol=1e-12)


def test_the_table_says_what_the_summary_says(finished):
    workdir, summary = finished
    for cells, row in zip(runs.table_rows(workdir), summary["rounds"], strict=True):
        assert cells["pruned by"] == row["method"]
        assert cells["sparsity %"] == f"{100 * row['sparsity']:.4g}"
        mean, deviation = 100 * row["accuracy"], 100 * row["deviation"]
        assert cells["test accuracy %"] == f"{mean:.2f} ± {deviation:.2f}"
        for key, title in (("to_dense", "minus dense"), ("to_random", "minus random")):
            expected = ""
            if key in row:
                mean, error = 100 * row[key], 100 * row[f"{key}_error"]
                expected = f"{mean:+.2f} ± {error:.2f}"
            assert cells[title] == expected


def test_the_control_shares_the_first_round_and_nothing_else(finished, tickets):
    workdir, _ = finished
    for seed in SEEDS:
        magnitude, random = (
            runs.results(workdir, score, SEEDS)[seed]["rounds"] for score in TINY.score
        )
        assert without_time(magnitude[0]) == without_time(random[0])
        assert magnitude[1]["nll"] != random[1]["nll"]
    ours, control = (kernels(tickets[score][1].masks) for score in TINY.score)
    # Random choices have half of the live weights in common with any others.
    together = sum(np.sum(ours[path] & control[path]) for path in ours)
    assert 0.4 < together / (0.5 * KERNELS) < 0.6


def test_a_ticket_is_the_early_weights_under_the_masks_of_its_round(tickets, labelled):
    task = make_task(TINY, labelled, 10, 0.0)
    network = make_network(task, Recipe(rules.fixed(dense_masks(task.params))))
    state = network.init(jax.random.key(0), labelled)
    early = train.fit(network.run, state, labelled, REWIND, task.batch_size)
    for score in TINY.score:
        for density, ticket in zip(DENSITIES, tickets[score], strict=True):
            masks = kernels(ticket.masks)
            assert sum(mask.sum() for mask in masks.values()) == density * KERNELS
            for path, weight in kernels(early.params).items():
                expected = np.where(masks[path], weight, 0)
                np.testing.assert_array_equal(kernels(ticket.params)[path], expected)


def test_what_a_round_prunes_stays_pruned(tickets):
    for score in TINY.score:
        _, before, after = (kernels(ticket.masks) for ticket in tickets[score])
        assert not any(np.any(after[path] & ~before[path]) for path in before)


def test_another_experiment_starts_from_a_ticket(finished, tickets, tmp_path, labelled):
    ticket = tickets["magnitude"][2]
    config = prune.Config(
        seeds=1,
        width=0.1,
        steps=12,
        rules=("fixed",),
        ticket=str(place(finished[0], "magnitude") / TICKETS[2]),
        workdir=str(tmp_path / "run"),
        progress=False,
    )
    (row,) = prune.run(config)["points"]
    assert row["nonzeros"] == 0.25 * KERNELS + BIASES
    task = make_task(config, labelled, 10, 0.0)
    method = prune.make_method(Point("fixed", None), task, config)
    state = method.init(jax.random.key(3), labelled)
    assert int(state.step) == 0
    assert_same(state.params, ticket.params)
    assert_same(get_masks(state.opt_state), ticket.masks)


def test_a_pair_does_not_start_from_a_ticket(finished, tmp_path):
    config = d2_sparse.Config(
        methods=("rigl", "uncoupled_pair", "d2_sparse"),
        ticket=str(place(finished[0], "magnitude") / TICKETS[2]),
        workdir=str(tmp_path / "run"),
        progress=False,
    )
    message = "one network to start from a ticket, got d2_sparse, uncoupled_pair; choo"
    with pytest.raises(ValueError, match=message):
        d2_sparse.run(config)
    assert list(tmp_path.iterdir()) == []


def test_frozen_losers_leave_a_dense_network_and_no_ticket(finished, tmp_path):
    workdir = tmp_path / "run"
    config = dataclasses.replace(ONE, losers="freeze", workdir=str(workdir))
    summary = lottery.run(config)
    assert [row["nonzeros"] for row in summary["rounds"]] == 3 * [KERNELS + BIASES]
    frozen = [row["frozen %"] for row in runs.table_rows(workdir)]
    assert frozen == ["0", "50", "75"]
    assert not (workdir / "tickets").exists()
    (unit,) = runs.results(workdir, "magnitude", range(1))
    zero = runs.results(finished[0], "magnitude", range(1))[0]
    assert unit["rounds"][0]["nll"] == zero["rounds"][0]["nll"]
    assert unit["rounds"][2]["nll"] != zero["rounds"][2]["nll"]
    assert not any("ticket_bytes" in found for found in unit["rounds"])
    assert all("to_random" not in row for row in summary["rounds"])


def test_rewinding_the_learning_rate_keeps_the_trained_weights(
    finished, tickets, tmp_path, labelled
):
    workdir = tmp_path / "run"
    config = dataclasses.replace(ONE, rewinding="learning_rate", workdir=str(workdir))
    lottery.run(config)
    task = make_task(TINY, labelled, 10, 0.0)
    _, state, _ = shapes_and_macs(task.model, labelled.images.shape[1:])
    first, second, _ = (
        load_ticket(place(workdir, "magnitude") / name, task.params, state)
        for name in TICKETS
    )
    # Up to the first pruning nothing differs, so its masks do not either.
    assert_same(first, tickets["magnitude"][0])
    assert_same(second.masks, tickets["magnitude"][1].masks)
    for path, weight in kernels(tickets["magnitude"][1].params).items():
        assert np.all((kernels(second.params)[path] != weight) == (weight != 0))


@pytest.mark.usefixtures("no_training")
def test_a_finished_run_is_not_repeated(finished):
    workdir, summary = finished
    before = modified((workdir / "tickets").rglob("*"))
    assert lottery.run(dataclasses.replace(TINY, workdir=str(workdir))) == summary
    assert modified((workdir / "tickets").rglob("*")) == before


def test_an_interrupted_unit_is_repeated_with_its_tickets(
    finished, tmp_path, monkeypatch
):
    workdir, summary = finished
    resumed = shutil.copytree(workdir, tmp_path / "resumed")
    unit_files(resumed)["magnitude-seed1"].unlink()
    half_written = place(resumed, "magnitude", 1)
    shutil.rmtree(half_written / TICKETS[2])
    (half_written / "round2-half").mkdir()
    others = modified(place(resumed, "magnitude", 0).rglob("*"))
    trained, run_unit = [], lottery.run_unit

    def counted(*arguments):
        trained.append(arguments[5].unit.name)
        run_unit(*arguments)

    monkeypatch.setattr(lottery, "run_unit", counted)
    again = lottery.run(dataclasses.replace(TINY, workdir=str(resumed)))
    assert trained == ["magnitude-seed1"]
    assert sorted(path.name for path in half_written.iterdir()) == list(TICKETS)
    assert modified(place(resumed, "magnitude", 0).rglob("*")) == others
    assert without_time(again) == without_time(summary)


@pytest.mark.usefixtures("no_training")
def test_a_directory_of_another_configuration_is_refused(finished):
    workdir, _ = finished
    before = modified(workdir.rglob("*"))
    with pytest.raises(ValueError, match="rounds was 2 and is 3; give another"):
        lottery.run(dataclasses.replace(TINY, rounds=3, workdir=str(workdir)))
    assert modified(workdir.rglob("*")) == before


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": ()}, "expected a score to prune by, magnitude or random, got none"),
        ({"score": ("size",)}, "expected score of magnitude, random, got 'size'"),
        ({"losers": "keep"}, "expected losers of zero, freeze, got 'keep'"),
        ({"prunable": "all"}, "prunable of kernels, convolutions, body, got 'all'"),
        ({"rewinding": "rate"}, "rewinding of weights, learning_rate, got 'rate'"),
        ({"prunable": "convolutions"}, "network with prunable convolutions, .*without"),
        ({"sparsity": 1.0}, r"sparsity in \[0, 1\).*got 1\.0"),
        ({"sparsity": 0.0}, "sparsity above 0 to prune to, got 0"),
        ({"rounds": 0}, "at least 1 round, got .*rounds=0"),
        ({"rewind_fraction": 1.0}, r"rewind_fraction in \[0, 1\), got 1\.0"),
        ({"epochs": -1}, "expected epochs >= 0, got -1"),
        ({"batch_size": 0}, "expected batch_size >= 1, got 0"),
        ({"steps": -1}, "expected steps >= 0, got -1"),
        ({"ticket": "no"}, "no ticket, .*got no; go on .*experiments.prune"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_is_written(
    change, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        lottery.run(dataclasses.replace(TINY, **change))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_only_the_body_is_pruned_where_it_is_asked_for(tmp_path):
    config = dataclasses.replace(ONE, prunable="body", workdir=str(tmp_path / "run"))
    rows = lottery.run(config)["rounds"]
    body = 30 * 10
    stored = [KERNELS - body + round(density * body) + BIASES for density in DENSITIES]
    assert [row["nonzeros"] for row in rows] == stored
    np.testing.assert_allclose([row["sparsity"] for row in rows], [0, 0.5, 0.75])


def recipe(*words):
    """The recipe of DataEfficientLTH as the command line gives it."""
    words = ["data_efficient_lth", *words]
    return resolve(cli.parse_flags(data_efficient_lth.Config, words), samples=5000)


def test_the_published_recipe_prunes_a_fifth_of_the_convolutions():
    config = recipe()
    data_set = (config.dataset, config.model, config.samples_per_class)
    assert data_set == ("cifar10", "resnet18", 500)
    assert (config.prunable, config.rounds, config.steps) == (
        "convolutions",
        15,
        200 * 50,
    )
    # A fifth of what is left goes in every round.
    left = np.array([1.0, *(1 - s for s in round_sparsities(config.sparsity, 15))])
    np.testing.assert_allclose(left[1:] / left[:-1], 0.8)
    # The end of epoch 3, where the release rewinds to.
    assert lottery.rewind_step(config.rewind_fraction, config.steps) == 3 * 50
    for name in ("seeds", "optimizer", "learning_rate", "workdir", "score", "losers"):
        assert getattr(config, name) == getattr(Config(), name)


@pytest.mark.parametrize(
    "flag",
    [
        ("samples_per_class", 10),
        ("model", "lenet_300_100"),
        ("batch_size", 32),
        ("shift", 1),
        ("sparsity", 0.95),
        ("rewind_fraction", 0.1),
        ("steps", 1000),
    ],
    ids=lambda flag: flag[0],
)
def test_flags_win_against_the_recipe_even_at_the_default_of_others(flag):
    name, value = flag
    assert getattr(resolve(Config(), 100), name) == value
    assert getattr(recipe(f"--{name}={value}"), name) == value


def test_the_sparsity_of_the_recipe_follows_its_rounds():
    np.testing.assert_allclose(recipe("--rounds=3").sparsity, 1 - 0.8**3)


def test_epochs_are_passes_over_the_labels():
    assert recipe("--epochs=7").steps == 7 * 50
    assert recipe("--epochs=7", "--steps=12").steps == 12
    assert resolve(dataclasses.replace(Config(), epochs=7), 100).steps == 7 * 3
    assert resolve(TINY, samples=100).steps == 12


def test_a_search_that_diverges_is_a_failure_in_the_table(tmp_path):
    config = dataclasses.replace(
        ONE, rounds=1, learning_rate=1e38, on_nonfinite="skip", workdir=str(tmp_path)
    )
    with pytest.raises(FloatingPointError, match="all 1 runs have failed"):
        lottery.run(config)
    summary = read(tmp_path / "summary.json")
    (why,) = summary["failed"].values()
    assert re.match(r"its predictions are not finite after \d+ skipped updates", why)
    assert [row["seeds"] for row in summary["rounds"]] == [0, 0]
    assert f"magnitude-seed0 failed and is not counted: {why}" in (
        (tmp_path / "table.md").read_text()
    )


@pytest.mark.usefixtures("no_training")
def test_rounds_that_leave_no_weight_are_in_the_table_alone(finished, tmp_path):
    emptied = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(emptied / "figures")

    def empty(found):
        for own in found["rounds"][1:]:
            own["sparsity"] = 1.0

    for path in unit_files(emptied).values():
        runs.reseal(path, empty)
    lottery.run(dataclasses.replace(TINY, workdir=str(emptied)))
    rows = runs.table_rows(emptied)
    assert [row["sparsity %"] for row in rows] == ["0", "100", "100"] * 2
    drawn = [path.name for path in (emptied / "figures").iterdir()]
    assert drawn == ["learning_curves.png"]
