"""Lottery tickets as an experiment, end to end at tiny size."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import runs
from runs import modified, read, unit_files, without_time

from d2sparse import checkpoint, data, records, study, train, tree
from d2sparse.lottery import Ticket, round_sparsities
from d2sparse.study import cli, splits
from d2sparse.transforms import get_masks
from experiments import d2_sparse, data_efficient_lth, lottery, prune
from experiments.lottery import Config

SEEDS = range(2)
KERNELS, BIASES = 64 * 10, 10
TINY = Config(
    seeds=len(SEEDS),
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
ROUNDS = ("round0", "round1", "round2")
ONE = dataclasses.replace(TINY, seeds=1, axes={"score": ("magnitude",)})
RANDOM, MAGNITUDE = "imp-scorerandom", "imp-scoremagnitude"


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with runs.quick_compilation(), runs.blank_figures():
        yield


def learn(config, workdir):
    with runs.linear_networks():
        return lottery.run(dataclasses.replace(config, workdir=str(workdir)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory and the frame of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, learn(TINY, workdir)


@pytest.fixture(scope="module")
def tickets(finished):
    return {name: [load(finished[0], name, r) for r in ROUNDS] for name in FOUND}


FOUND = (MAGNITUDE, RANDOM)


def load(workdir, name, number, seed=0):
    model = runs.linear(10)
    x = jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    form = dict(zip(("params", "model_state"), shapes, strict=True))
    directory = workdir / "tickets" / f"{name}-seed{seed}" / number
    values, masks = checkpoint.load_sparse(directory, form)
    return Ticket(values["params"], values["model_state"], masks["params"])


def kernels(values):
    leaves = tree.flatten(values)
    return {path: np.asarray(leaves[path]) for path in leaves if "kernel" in path}


def parts(workdir, name, seed=0):
    return read(workdir / "units" / f"{name}-seed{seed}.json")["parts"]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_round_stores_exactly_its_share_and_costs_add_up(finished):
    workdir, _ = finished
    stored = [round(density * KERNELS) + BIASES for density in DENSITIES]
    # Every round after the first begins at the rewind step.
    steps = np.array([12, 12 - REWIND, 12 - REWIND])
    costs = np.cumsum(np.array(DENSITIES) * steps / 12)
    for name in FOUND:
        for seed in SEEDS:
            rounds = parts(workdir, name, seed)
            assert [own["title"] for own in rounds] == ["round 0", "round 1", "round 2"]
            assert [own["nonzeros"] for own in rounds] == stored
            np.testing.assert_allclose(
                [own["pruned"] for own in rounds], [0, 0.5, 0.75]
            )
            np.testing.assert_allclose(
                [own["relative_macs"] for own in rounds], costs, rtol=1e-3
            )
            whole = read(workdir / "units" / f"{name}-seed{seed}.json")
            assert whole["accuracy"] == rounds[-1]["accuracy"]


def test_the_run_directory_holds_what_was_asked_for(finished):
    workdir, _ = finished
    expected = {f"{name}-seed{seed}" for name in FOUND for seed in SEEDS}
    assert set(unit_files(workdir)) == expected
    for name in expected:
        stored = sorted(path.name for path in (workdir / "tickets" / name).iterdir())
        assert stored == list(ROUNDS)
        lines = [m for m in records.read_metrics(workdir) if m["unit"] == name]
        steps = [line["step"] for line in lines]
        assert steps == [0, REWIND, 6, 12, 15, 21, 24, 30]
    figures = {path.name for path in (workdir / "figures").iterdir()}
    assert figures == {"accuracy_against_sparsity.png", "learning_curves.png"}


def test_a_row_of_the_table_is_a_round_with_its_differences(finished):
    workdir, _ = finished
    rows = read(workdir / "summary.json")["rows"]
    assert [(row["score"], row["round"]) for row in rows] == [
        (score, str(n)) for score in ("magnitude", "random") for n in range(3)
    ]
    table = (workdir / "table.md").read_text()
    for row in rows:
        name = f"imp-score{row['score']}"
        number = int(row["round"])
        own, dense, control = (
            np.array([parts(workdir, of, seed)[n]["accuracy"] for seed in SEEDS])
            for of, n in ((name, number), (name, 0), (RANDOM, number))
        )
        np.testing.assert_allclose(row["accuracy"], own.mean())
        np.testing.assert_allclose(row["deviation"], own.std(ddof=1), atol=1e-12)
        if number:
            np.testing.assert_allclose(row["minus_dense"], (own - dense).mean())
        if row["score"] == "magnitude":
            np.testing.assert_allclose(row["minus_random"], (own - control).mean())
        assert study.percent(row["accuracy"], row["standard_error"]) in table
    assert max(map(len, table.splitlines())) <= 110


def test_the_control_shares_the_first_round_and_nothing_else(finished, tickets):
    workdir, _ = finished
    for seed in SEEDS:
        ours, control = (
            [{**own, "values": {}} for own in without_time(parts(workdir, name, seed))]
            for name in FOUND
        )
        assert ours[0] == control[0]
        assert ours[1]["nll"] != control[1]["nll"]
    ours, control = (kernels(tickets[name][1].masks) for name in FOUND)
    # Random choices have half of the live weights in common with any others.
    together = sum(np.sum(ours[path] & control[path]) for path in ours)
    assert 0.4 < together / (0.5 * KERNELS) < 0.6


def test_a_ticket_is_the_early_weights_under_the_masks_of_its_round(tickets):
    draw_splits = splits.make_draw_splits(data.load("digits"))
    with runs.linear_networks():
        plan, _ = study.make_plans(TINY, draw_splits, 10)
    labelled = draw_splits(TINY, 0).train
    early = plan.program.init(jax.random.key(0), labelled)
    first = plan.training._replace(phases=(train.Phase(REWIND),))
    program = plan.program._replace(training=first)
    early = train.fit(program, early, labelled).state
    for name in FOUND:
        for density, ticket in zip(DENSITIES, tickets[name], strict=True):
            masks = kernels(ticket.masks)
            assert sum(mask.sum() for mask in masks.values()) == density * KERNELS
            for path, weight in kernels(early.params).items():
                expected = np.where(masks[path], weight, 0)
                np.testing.assert_array_equal(kernels(ticket.params)[path], expected)
        _, before, after = (kernels(ticket.masks) for ticket in tickets[name])
        assert not any(np.any(after[path] & ~before[path]) for path in before)


def test_another_experiment_starts_from_a_ticket(finished, tickets, tmp_path):
    place = finished[0] / "tickets" / f"{MAGNITUDE}-seed0" / ROUNDS[2]
    config = prune.Config(
        seeds=1,
        shift=0,
        steps=12,
        methods=("fixed",),
        axes={},
        ticket=str(place),
        workdir=str(tmp_path / "run"),
        progress=False,
    )
    begun = []

    def examine(end):
        begun.append(end.plan)
        return {}

    experiment = study.Experiment("prune", examine=examine)
    runs_of = study.compare(config, experiment, model=runs.linear(10))
    assert runs_of["nonzeros"].tolist() == [0.25 * KERNELS + BIASES]
    labelled = splits.make_draw_splits(data.load("digits"))(config, 0).train
    state = begun[0].program.init(jax.random.key(3), labelled).state
    assert_same(state.params, tickets[MAGNITUDE][2].params)
    assert_same(get_masks(state.opt_state), tickets[MAGNITUDE][2].masks)
    pairs = d2_sparse.Config(
        methods=("rigl", "uncoupled_pair"),
        ticket=str(place),
        workdir=str(tmp_path / "pairs"),
        progress=False,
    )
    with pytest.raises(ValueError, match="can start from a ticket, got uncoupled_pair"):
        d2_sparse.run(pairs)
    assert not (tmp_path / "pairs").exists()


def test_frozen_weights_leave_a_dense_network_and_no_ticket(finished, tmp_path):
    workdir = tmp_path / "run"
    learn(dataclasses.replace(ONE, methods=("rise",)), workdir)
    rise = parts(workdir, "rise-scoremagnitude")
    assert [own["nonzeros"] for own in rise] == 3 * [KERNELS + BIASES]
    np.testing.assert_allclose([own["pruned"] for own in rise], [0, 0.5, 0.75])
    assert not (workdir / "tickets").exists()
    zero = parts(finished[0], MAGNITUDE)
    assert rise[0]["nll"] == zero[0]["nll"]
    assert rise[2]["nll"] != zero[2]["nll"]


def test_rewinding_the_learning_rate_keeps_the_trained_weights(tickets, tmp_path):
    workdir = tmp_path / "run"
    learn(dataclasses.replace(ONE, rewinding="learning_rate"), workdir)
    first, second = (load(workdir, MAGNITUDE, name) for name in ROUNDS[:2])
    # Up to the first pruning nothing differs, so its masks do not either.
    assert_same(first, tickets[MAGNITUDE][0])
    assert_same(second.masks, tickets[MAGNITUDE][1].masks)
    for path, weight in kernels(tickets[MAGNITUDE][1].params).items():
        assert np.all((kernels(second.params)[path] != weight) == (weight != 0))


def test_a_lost_run_is_repeated_with_its_tickets(finished, tmp_path):
    workdir, frame = finished
    resumed = shutil.copytree(workdir, tmp_path / "resumed")
    unit_files(resumed)[f"{MAGNITUDE}-seed1"].unlink()
    shutil.rmtree(resumed / "checkpoints" / f"{MAGNITUDE}-seed1", ignore_errors=True)
    lost = resumed / "tickets" / f"{MAGNITUDE}-seed1"
    shutil.rmtree(lost / ROUNDS[2])
    others = modified((resumed / "tickets" / f"{MAGNITUDE}-seed0").rglob("*"))
    again = learn(TINY, resumed)
    assert sorted(path.name for path in lost.iterdir()) == list(ROUNDS)
    assert others == modified((resumed / "tickets" / f"{MAGNITUDE}-seed0").rglob("*"))
    assert again["nll"].tolist() == frame["nll"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"axes": {}, "score": "size"},
            "expected score of magnitude, random",
        ),
        (
            {"axes": {"score": ("size",)}},
            "expected score of magnitude, random",
        ),
        ({"prunable": "all"}, "prunable of kernels, convolutions, body, got 'all'"),
        ({"rewinding": "rate"}, "rewinding of weights, learning_rate, got 'rate'"),
        ({"prunable": "convolutions"}, "network with prunable convolutions, .*without"),
        ({"sparsity": 1.0}, r"sparsity in \[0, 1\).*got 1\.0"),
        ({"rounds": 0}, "expected rounds >= 1, got 0"),
        ({"rewind_fraction": 1.0}, r"rewind_fraction in \[0, 1\), got 1\.0"),
        ({"epochs": -1}, "expected epochs >= 0, got -1"),
        ({"refresh_interval": 5}, "expected no refresh_interval, which none of imp"),
        ({"ticket": "no"}, "no ticket, .*got no; go on .*experiments.prune"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_is_written(
    change, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        lottery.run(dataclasses.replace(TINY, **change))
    assert list(tmp_path.iterdir()) == []


def test_the_published_recipe_prunes_a_fifth_of_the_convolutions():
    config = cli.parse_flags(data_efficient_lth.Config, ["data_efficient_lth"])
    data_set = (config.dataset, config.model, config.samples_per_class)
    assert data_set == ("cifar10", "resnet18", 500)
    assert (config.prunable, config.rounds) == ("convolutions", 15)
    # A fifth of what is left goes in every round.
    left = np.array([1.0, *(1 - s for s in round_sparsities(config.sparsity, 15))])
    np.testing.assert_allclose(left[1:] / left[:-1], 0.8)
    # 200 epochs of 50 steps; the release rewinds to the end of epoch 3.
    assert config.epochs * 5000 / config.batch_size == 200 * 50
    assert int(config.rewind_fraction * 200 * 50) == 3 * 50
    for name in ("seeds", "optimizer", "learning_rate", "workdir", "axes"):
        assert getattr(config, name) == getattr(Config(), name)
    given = cli.parse_flags(data_efficient_lth.Config, ["x", "--model=lenet_300_100"])
    assert given.model == Config().model


def test_epochs_are_passes_over_the_labels():
    draw_splits = splits.make_draw_splits(data.load("digits"))
    config = dataclasses.replace(ONE, steps=Config.steps, epochs=7.0)
    (plan,) = study.make_plans(config, draw_splits, 10)
    assert plan.config.steps == plan.training.horizon == 7 * 3


def test_a_search_that_diverges_is_a_failure_in_the_table(tmp_path):
    config = dataclasses.replace(ONE, rounds=1, learning_rate=1e38, on_nonfinite="skip")
    with pytest.raises(FloatingPointError, match="all 1 runs have failed"):
        learn(config, tmp_path)
    (why,) = read(tmp_path / "summary.json")["failed"].values()
    assert why.startswith("its predictions are not finite after ")
    table = (tmp_path / "table.md").read_text()
    assert f"{MAGNITUDE}-seed0 failed and is not counted: {why}" in table
