"""The zoo of rules as an experiment, end to end at tiny size."""

import dataclasses
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import modified, read, unit_files, without_time

from d2sparse import data, macs, models, records, scores, train, tree
from d2sparse.lottery import Ticket
from d2sparse.reparam import powerprop
from d2sparse.transforms import get_masks
from experiments import prune, units
from experiments.prune import Config, Point
from experiments.recipes import LEARNED_SPARSITY, RECIPES, Options, make_method
from experiments.recipes.scored import per_output
from experiments.session import Ledger
from experiments.splits import draw_splits
from experiments.task import default_workdir, make_prunable, make_task
from experiments.tickets import save_ticket

SEEDS = range(2)
KERNELS, BIASES = 64 * 30 + 30 * 10 + 10 * 10, 30 + 10 + 10
LIVE = round(0.25 * KERNELS)
ZOO = tuple(rule for rule in RECIPES if rule != "fixed")  # It needs a ticket.
TOLD = tuple(rule for rule in ZOO if rule not in LEARNED_SPARSITY)
TINY = Config(
    seeds=1,
    width=0.1,
    shift=0,
    steps=12,
    refresh_interval=3,
    report_every=5,
    growth_samples=64,
    rules=ZOO,
    sparsities=(0.75,),
    group=2,
    score_samples=64,
    threshold_decay=2.0,  # Enough for zeros within so few steps.
    progress=False,
)
PLAIN = dataclasses.replace(TINY, group=4, score_samples=256, threshold_decay=0.03)
SWEEP = dataclasses.replace(
    PLAIN, seeds=len(SEEDS), rules=("dense", "static"), sparsities=(0.5, 0.75)
)
# What training costs, in units of the dense network's. Masks are refreshed in steps 3
# and 6 of 12, of which the next ones see the result; a forward pass is a third.
RAMP = (4 + 3 * (1 - 0.75 * (1 - 0.5**3)) + 5 * 0.25) / 12
GRANET = (4 * 0.5 + 3 * (0.25 + 0.25 * 0.5**3) + 5 * 0.25) / 12
GROWTH = 64 / 32 * 2 / 12 / 3  # Two gradients of twice a batch, in as many thirds.
COST = {
    "dense": 1,
    "random": RAMP,
    "static": 0.25,
    "one_shot": (7 + 5 * 0.25) / 12,
    "gradual": RAMP,
    "movement": RAMP,
    "set": 0.25,
    "rigl": 0.25 + (2 * 0.25 + 1) * GROWTH,
    "sparse_momentum": (2 * 0.25 + 1) / 3,
    "granet": GRANET + (2 * GRANET + 1) * GROWTH,
    "ac_dc": (4 + 8 * 0.25) / 12,  # Dense in steps 0, 1, 3 and 5.
    "top_kast": (2 * 0.25 + 2 * 0.25) / 3,
    "sr_ste": (2 * 0.5 + 1) / 3,
    "powerprop": (7 + 5 * 0.25) / 12,
    "snip": 0.25,
    "grasp": 0.25,
    "synflow": 0.25,
    "fisher": 0.25,
    "wanda": (6 + 6 * 0.25) / 12,  # Pruned between two steps.
}


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@pytest.fixture(scope="module")
def states():
    """The trained states of `zoo`, by rule."""
    return {}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, states):
    """The rows of a finished run of all rules, by rule."""
    learn = units.learn

    def remembered(config, out, methods, conclude, jobs):
        def noted(job, state):
            states[job.unit.method.split("-")[0]] = state
            return conclude(job, state)

        learn(config, out, methods, noted, jobs)

    workdir = tmp_path_factory.mktemp("runs") / "zoo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "learn", remembered)
        points = prune.run(dataclasses.replace(TINY, workdir=str(workdir)))["points"]
    return {row["method"]: row for row in points}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The directory and the summary of a finished sweep over sparsities and seeds."""
    workdir = tmp_path_factory.mktemp("runs") / "swept"
    return workdir, prune.run(dataclasses.replace(SWEEP, workdir=str(workdir)))


@pytest.fixture
def no_training(monkeypatch):
    def fail(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(units, "learn", fail)


@pytest.fixture(scope="module")
def labelled():
    return draw_splits(TINY, data.load("digits"), seed=0).train


class Silent:
    """A session that records and saves nothing."""

    def __init__(self, config, report):
        self.config, self.report, self.ledger = config, report, Ledger()

    def save(self, *_):
        pass

    def interrupted(self):
        return False


def fit(method, config, begin, labelled, report=lambda *_: None):
    return method.fit([Silent(config, report)], [begin], [labelled])[0]


def learned(config, labelled, rule, sparsity=None):
    """The initial and the trained state of one rule."""
    task = make_task(config, labelled, 10, 0.0)
    method = prune.make_method(Point(rule, sparsity), task, config)
    begin = method.init(jax.random.key(0), labelled)
    copied = jax.tree.map(jnp.copy, begin)
    return copied, fit(method, config, begin, labelled)


def kernels(values):
    leaves = tree.flatten(values)
    return {path: np.asarray(leaves[path]) for path in leaves if "kernel" in path}


def kernel_masks(state):
    masks = tree.flatten(get_masks(state.opt_state))
    return {path: np.asarray(masks[path]) for path in kernels(state.params)}


def make_ticket(labelled, width=TINY.width):
    """A ticket of a network of that width, in which every other weight is live."""
    task = make_task(dataclasses.replace(TINY, width=width), labelled, 10, 0.0)
    params, model_state = task.model.init(jax.random.key(5), train.inputs(labelled))
    masks = tree.map_with_path(
        lambda path, leaf: (
            (jnp.arange(leaf.size).reshape(leaf.shape) % 2 == 0)
            if path.endswith("kernel")
            else jnp.ones(leaf.shape, bool)
        ),
        params,
    )
    return Ticket(jax.tree.map(jnp.multiply, params, masks), model_state, masks)


def test_without_flags_known_rules_meet_on_digits():
    config = Config()
    assert (config.dataset, config.ticket) == ("digits", "")
    assert {"dense", "static", "gradual", "rigl"} <= set(config.rules)
    assert config.seeds >= 5


@pytest.mark.parametrize("rule", TOLD)
def test_a_rule_reaches_the_numbers_it_was_asked_for(rule, zoo):
    # 1:2 is as sparse as pairs can be.
    live = {"dense": KERNELS, "sr_ste": KERNELS // 2}.get(rule, LIVE)
    assert zoo[rule]["nonzeros"] == live + BIASES
    np.testing.assert_allclose(zoo[rule]["sparsity"], 1 - live / KERNELS, atol=1e-12)
    assert zoo[rule]["asked"] == (None if rule == "dense" else 0.75)
    assert 0 < zoo[rule]["accuracy"] < 1


@pytest.mark.parametrize("rule", TOLD)
def test_training_costs_what_the_masks_of_every_step_say(rule, zoo):
    assert set(COST) == set(TOLD)
    np.testing.assert_allclose(zoo[rule]["relative_macs"], COST[rule], rtol=1e-3)


def test_costs_are_in_the_order_of_their_density(zoo):
    cost = {rule: row["relative_macs"] for rule, row in zoo.items()}
    assert cost["static"] < cost["gradual"] < cost["dense"]
    assert cost["static"] < cost["rigl"] < cost["sparse_momentum"] < cost["dense"]


@pytest.mark.parametrize("rule", sorted(set(TOLD) - {"top_kast", "sr_ste"}))
def test_what_is_pruned_is_zero_and_what_is_left_is_stored(rule, zoo, states):
    state = states[rule]
    masks = kernel_masks(state)
    assert sum(mask.sum() for mask in masks.values()) + BIASES == zoo[rule]["nonzeros"]
    for path, weight in kernels(state.params).items():
        np.testing.assert_array_equal(weight[~masks[path]], 0)


@pytest.mark.parametrize("rule", ["top_kast", "sr_ste"])
def test_latent_weights_stay_dense(rule, zoo, states):
    assert all(np.all(weight) for weight in kernels(states[rule].params).values())
    assert zoo[rule]["nonzeros"] < KERNELS


def test_soft_thresholds_find_a_sparsity_of_their_own(zoo, states):
    row, params = zoo["str"], states["str"].params
    assert row["asked"] is None
    zeros = 0
    for path, weight in kernels(params["params"]).items():
        threshold = 1 / (1 + np.exp(-float(params["thresholds"][path])))
        zeros += np.sum(np.abs(weight) <= threshold)
    assert 0.02 * KERNELS < zeros < KERNELS
    # A weight at the threshold itself may round to either side of it.
    np.testing.assert_allclose(row["nonzeros"], KERNELS + BIASES - zeros, atol=1)
    np.testing.assert_allclose(row["sparsity"], zeros / KERNELS, atol=1e-3)
    assert 1 - row["sparsity"] < row["relative_macs"] < 1


def test_a_larger_decay_of_the_thresholds_leaves_fewer_weights(labelled):
    def live(decay):
        config = dataclasses.replace(TINY, threshold_decay=decay)
        task = make_task(config, labelled, 10, 0.0)
        method = prune.make_method(Point("str", None), task, config)
        state = method.init(jax.random.key(0), labelled)
        state = fit(method, config, state, labelled)
        return sum(mask.sum() for mask in kernels(method.live(state)).values())

    assert live(2.0) < live(1.0) < live(0.0)


def test_powers_begin_as_the_dense_network(labelled):
    dense, _ = learned(TINY, labelled, "dense")
    theta, _ = learned(TINY, labelled, "powerprop", 0.5)
    for path, weight in kernels(dense.params).items():
        latent = kernels(theta.params)[path]
        np.testing.assert_allclose(latent * np.abs(latent), weight, rtol=1e-5)


def test_powers_go_on_from_a_ticket_with_its_weights(labelled, tmp_path):
    ticket = make_ticket(labelled)
    save_ticket(tmp_path / "ticket", ticket)
    config = dataclasses.replace(TINY, ticket=str(tmp_path / "ticket"), power=3.0)
    begin, end = learned(config, labelled, "powerprop", 0.75)
    weights = kernels(powerprop(begin.params, 3.0))
    for path, weight in kernels(ticket.params).items():
        np.testing.assert_allclose(weights[path], weight, rtol=1e-5)
    assert sum(mask.sum() for mask in kernel_masks(end).values()) == LIVE


def test_wanda_keeps_as_many_weights_of_every_output(states, zoo):
    del zoo
    for mask in kernel_masks(states["wanda"]).values():
        live = mask.sum(axis=0)
        assert live.max() - live.min() <= 1


def test_wanda_prunes_a_trained_network_by_its_own_activations(labelled):
    config = dataclasses.replace(TINY, score_samples=len(labelled.labels))
    task = make_task(config, labelled, 10, 0.0)
    method = prune.make_method(Point("wanda", 0.75), task, config)
    seen = {}

    def report(step, state, logs):
        del logs
        seen[step] = jax.device_get(state.params), kernel_masks(state)

    fit(method, config, method.init(jax.random.key(0), labelled), labelled, report)
    (params, _), (_, masks) = seen[6], seen[10]
    x = np.asarray(train.inputs(labelled)).reshape(len(labelled.labels), -1)
    for layer in ("dense1", "dense2", "head"):
        kernel = params[layer]["kernel"]
        scores = np.abs(kernel) * np.linalg.norm(x, axis=0)[:, None]
        for score, mask in zip(scores.T, masks[f"{layer}/kernel"].T, strict=True):
            assert score[mask].min() > score[~mask].max() * (1 - 1e-5)
        x = np.maximum(x @ kernel + params[layer]["bias"], 0)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_wanda_goes_on_from_where_it_was_interrupted(step, labelled):
    config = dataclasses.replace(TINY, checkpoint_every=3)
    task = make_task(config, labelled, 10, 0.0)
    method = prune.make_method(Point("wanda", 0.75), task, config)
    saved = {}

    class Saving(Silent):
        def save(self, state, *_):
            saved[int(state.step)] = jax.tree.map(jnp.copy, state)

    begin = method.init(jax.random.key(0), labelled)
    (end,) = method.fit([Saving(config, lambda *_: None)], [begin], [labelled])
    again = fit(method, config, saved[step], labelled)
    jax.tree.map(np.testing.assert_array_equal, again.params, end.params)
    jax.tree.map(
        np.testing.assert_array_equal,
        get_masks(again.opt_state),
        get_masks(end.opt_state),
    )


def test_wanda_compares_all_weights_where_the_distribution_is_global(labelled):
    config = dataclasses.replace(TINY, distribution="global")
    masks = kernel_masks(learned(config, labelled, "wanda", 0.75)[1])
    assert sum(mask.sum() for mask in masks.values()) == LIVE
    live = masks["dense1/kernel"].sum(axis=0)
    assert live.max() - live.min() > 1


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_outputs_share_what_is_eligible(count):
    score = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    score[:, :, 1] = -np.inf
    score[0, :, 2] = -np.inf
    (mask,) = per_output({"w": jnp.asarray(score)}, {"w": count}).values()
    assert mask.sum() == min(count, 15)
    assert not np.any(mask & np.isinf(score))
    for ranks, kept in zip(
        score.reshape(6, 4).T, np.asarray(mask).reshape(6, 4).T, strict=True
    ):
        assert set(np.flatnonzero(kept)) <= set(np.argsort(-ranks)[: kept.sum()])


@pytest.mark.parametrize("rule", ["static", "gradual", "wanda"])
def test_named_leaves_have_the_sparsity_of_the_table(rule, labelled):
    table = ("head*:0.3", "dense[2]/*:0.5")
    config = dataclasses.replace(TINY, layer_sparsities=table)
    masks = kernel_masks(learned(config, labelled, rule, 0.75)[1])
    live = {path: mask.sum() for path, mask in masks.items()}
    assert (live["head/kernel"], live["dense2/kernel"]) == (70, 150)
    assert sum(live.values()) == LIVE


def test_random_patterns_share_the_budget_by_erk_and_magnitudes_globally(states, zoo):
    del zoo
    density = {
        rule: {path: mask.mean() for path, mask in kernel_masks(states[rule]).items()}
        for rule in ("static", "set", "rigl", "sparse_momentum", "gradual")
    }
    for rule in ("set", "rigl", "sparse_momentum"):
        assert density[rule] == density["static"] != density["gradual"]
    # ERK: the smaller the layer, the denser.
    first, second, head = (f"{name}/kernel" for name in ("dense1", "dense2", "head"))
    static = density["static"]
    assert static[first] < static[second] < static[head]


def test_rules_move_weights_or_keep_them(states, zoo):
    del zoo
    drawn = kernel_masks(states["static"])
    for rule in ("set", "rigl", "sparse_momentum"):
        moved = [
            np.any(mask != drawn[path])
            for path, mask in kernel_masks(states[rule]).items()
        ]
        assert any(moved)


def test_the_cost_of_a_static_mask_is_that_of_its_leaves(labelled, states, zoo):
    task = make_task(TINY, labelled, 10, 0.0)
    mask = get_masks(states["static"].opt_state)
    share = float(macs.masked_macs(task.macs, mask)) / sum(task.macs.values())
    np.testing.assert_allclose(zoo["static"]["relative_macs"], share, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "pattern", "holds"),
    [
        ("gradual", "n_of_m", lambda m: m.reshape(-1, 2, m.shape[1]).sum(1) == 1),
        ("rigl", "channels", lambda m: m.all(0) | ~m.any(0)),
    ],
    ids=["n_of_m", "channels"],
)
def test_patterns_hold_at_the_end(rule, pattern, holds, labelled):
    config = dataclasses.replace(TINY, pattern=pattern, distribution="uniform")
    masks = kernel_masks(learned(config, labelled, rule, 0.5)[1])
    for mask in masks.values():
        assert np.all(holds(mask))
        # To the nearest number of pairs or channels.
        np.testing.assert_allclose(mask.mean(), 0.5, atol=0.01)


def test_the_run_directory_holds_what_was_asked_for(swept):
    workdir, _ = swept
    names = ("dense", "static-0.5", "static-0.75")
    expected = {f"{name}-seed{seed}" for name in names for seed in SEEDS}
    assert set(unit_files(workdir)) == expected
    assert {path.name for path in (workdir / "figures").iterdir()} == {
        "accuracy_against_sparsity.png",
        "learning_curves-0.5.png",
        "learning_curves-0.75.png",
    }
    config = dataclasses.replace(SWEEP, workdir=str(workdir))
    recorded = json.loads(json.dumps(dataclasses.asdict(config)))
    assert read(workdir / "config.json") == recorded
    for name in expected:
        lines = [m for m in records.read_metrics(workdir) if m["unit"] == name]
        assert [line["step"] for line in lines] == [0, 5, 10, 12]
        assert "macs" not in lines[-1]


def test_every_sparsity_has_curves_of_its_own(swept, monkeypatch):
    workdir, _ = swept
    drawn = []
    monkeypatch.setattr(
        prune.plots,
        "learning_curves",
        lambda lines, *_, **__: drawn.append({line["method"] for line in lines}),
    )
    monkeypatch.setattr(records.Run, "save_figure", lambda *_: None)
    prune.run(dataclasses.replace(SWEEP, workdir=str(workdir)))
    assert drawn == [{"dense", "static"}] * 2


def test_the_summary_agrees_with_numpy_on_the_units(swept):
    workdir, summary = swept
    assert without_time(read(workdir / "summary.json")) == without_time(
        json.loads(json.dumps(summary))
    )
    dense = np.array([u["accuracy"] for u in runs.results(workdir, "dense", SEEDS)])
    points = [(row["method"], row["asked"]) for row in summary["points"]]
    assert points == [("dense", None), ("static", 0.5), ("static", 0.75)]
    for row in summary["points"]:
        own = runs.results(workdir, Point(row["method"], row["asked"]).name, SEEDS)
        accuracy = np.array([unit["accuracy"] for unit in own])
        np.testing.assert_allclose(row["accuracy"], accuracy.mean())
        np.testing.assert_allclose(row["deviation"], accuracy.std(ddof=1), atol=1e-12)
        for key in ("nll", "ece", "nonzeros", "inference_macs", "sparsity"):
            np.testing.assert_allclose(row[key], np.mean([unit[key] for unit in own]))
        assert ("to_dense" in row) == (row["method"] != "dense")
        if row["method"] != "dense":
            paired = accuracy - dense
            error = paired.std(ddof=1) / np.sqrt(len(SEEDS))
            np.testing.assert_allclose(row["to_dense"], paired.mean(), atol=1e-12)
            np.testing.assert_allclose(row["to_dense_error"], error, atol=1e-12)


def test_the_table_says_what_the_summary_says(swept):
    workdir, summary = swept
    for cells, row in zip(runs.table_rows(workdir), summary["points"], strict=True):
        assert cells["rule"] == row["method"]
        assert cells["sparsity %"] == f"{100 * row['sparsity']:.4g}"
        mean, deviation = 100 * row["accuracy"], 100 * row["deviation"]
        assert cells["test accuracy %"] == f"{mean:.2f} ± {deviation:.2f}"
        assert cells["non-zeros"] == f"{row['nonzeros']:,.0f}"
        if row["method"] != "dense":
            mean, error = 100 * row["to_dense"], 100 * row["to_dense_error"]
            assert cells["minus dense"] == f"{mean:+.2f} ± {error:.2f}"


@pytest.mark.usefixtures("no_training")
def test_a_finished_run_is_not_repeated(swept):
    workdir, summary = swept
    before = modified(unit_files(workdir).values())
    assert prune.run(dataclasses.replace(SWEEP, workdir=str(workdir))) == summary
    assert modified(unit_files(workdir).values()) == before


def test_an_interrupted_sweep_repeats_only_what_it_lacks(swept, tmp_path, monkeypatch):
    workdir, summary = swept
    resumed = shutil.copytree(workdir, tmp_path / "resumed")
    for name in ("static-0.5-seed1", "static-0.75-seed0"):
        unit_files(resumed)[name].unlink()
    trained, learn = [], units.learn

    def counted(*given):
        trained.extend(job.unit.name for job in given[-1])
        learn(*given)

    monkeypatch.setattr(units, "learn", counted)
    again = prune.run(dataclasses.replace(SWEEP, workdir=str(resumed)))
    assert trained == ["static-0.75-seed0", "static-0.5-seed1"]
    assert without_time(again) == without_time(summary)
    for name, path in unit_files(workdir).items():
        assert without_time(read(unit_files(resumed)[name])) == without_time(read(path))


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsities": (0.5,)}, r"sparsities was \[0\.5, 0\.75\] and is \[0\.5\]"),
        ({"momentum": 0.5}, r"momentum was 0\.9 and is 0\.5; give another"),
    ],
)
def test_a_directory_of_another_configuration_is_refused(change, message, swept):
    workdir, _ = swept
    before = modified(workdir.rglob("*"))
    with pytest.raises(ValueError, match=message):
        prune.run(dataclasses.replace(SWEEP, **change, workdir=str(workdir)))
    assert modified(workdir.rglob("*")) == before


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": ()}, "expected rules of dense, .*got rules=()"),
        ({"sparsities": ()}, "and sparsities, got .*sparsities=()"),
        ({"rules": ("riggl",)}, "expected a rule of dense, .*got 'riggl'"),
        *[
            (
                {"rules": (rule,), "sparsities": (0.5, value)},
                rf"in \[0, 1\).*got {value}",
            )
            for rule in ("gradual", "static", "granet", "snip", "sr_ste", "wanda")
            for value in (1.0, -0.1)
        ],
        ({"distribution": "erkk"}, "expected distribution of auto, .*got 'erkk'"),
        ({"pattern": "rows"}, "expected pattern of unstructured, .*got 'rows'"),
        ({"score": "size"}, "expected score of magnitude, .*got 'size'"),
        ({"drop_fraction": 1.5}, r"drop_fraction in \[0, 1\), got 1\.5"),
        ({"prune_at": 1.0}, r"prune_at in \[0, 1\), got 1\.0"),
        ({"start_sparsity": -0.5}, r"start_sparsity in \[0, 1\), got -0\.5"),
        ({"backward_density": 0.5}, "backward_density >= 1, got 0.5"),
        ({"group": 0}, "group >= 1, got 0"),
        ({"score_samples": 0}, "score_samples >= 1, got 0"),
        ({"power": 0.5}, "power >= 1, got 0.5"),
        ({"threshold_decay": -1.0}, "threshold_decay >= 0, got -1"),
        *[
            ({"layer_sparsities": (entry,)}, f"layer_sparsities of .*got '{entry}'")
            for entry in ("head", ":0.5", "head:", "head:half", "head:1.5", "head:nan")
        ],
        (
            {"layer_sparsities": ("head*:0.5", "head*:0.6")},
            "layer_sparsities with every pattern once, got 'head",
        ),
        *[
            (
                {"rules": (rule,), "layer_sparsities": ("conv*:0.5",)},
                r"match a prunable leaf, got 'conv\*'; .*\(--layer_sparsities\)",
            )
            for rule in ("static", "gradual", "snip", "wanda", "powerprop")
        ],
        (
            {"rules": ("static",), "layer_sparsities": ("dense*:0.5",)},
            r"a sparsity of at most .*\(--layer_sparsities\)",
        ),
        (
            {"distribution": "global", "layer_sparsities": ("head*:0.5",)},
            "uniform, er, erk beside layer_sparsities, got 'global'",
        ),
        *[
            (
                {"rules": (rule,), "layer_sparsities": ("head*:0.5",)},
                f"no other pattern for {rule}, .* and layer_sparsities=head",
            )
            for rule in ("sr_ste", "str")
        ],
        (
            {"rules": ("str",), "distribution": "uniform"},
            "no other pattern for str, .*=unstructured and distribution=uniform",
        ),
        (
            {"rules": ("str", "rigl"), "ticket": "no"},
            "rules that go on from a ticket, got str; choose --rules=fixed",
        ),
        *[
            (
                {"rules": (rule,), "refresh_interval": 9},
                "a refresh within the first 9 steps, got one every 9; lower",
            )
            for rule in ("gradual", "movement", "granet", "set", "rigl")
        ],
        ({"rules": ("ac_dc",), "steps": 5}, "more than 5 steps, .*ac_dc, got 5; raise"),
        ({"rules": ("fixed",)}, "a --ticket whose masks fixed can keep, got none"),
        (
            {"rules": ("sr_ste",), "pattern": "channels"},
            "no other pattern for sr_ste, .*got pattern=channels and distribution=auto",
        ),
        (
            {"rules": ("sr_ste",), "distribution": "erk"},
            "no other pattern for sr_ste, .*=unstructured and distribution=erk",
        ),
        ({"prunable": "all"}, "prunable of kernels, convolutions, body, got 'all'"),
        ({"prunable": "convolutions"}, "network with prunable convolutions, .*without"),
        (
            {"rules": ("gradual",), "pattern": "n_of_m", "group": 4},
            r"divisible by 4, got shape \(30, 10\) at 'dense2/kernel'",
        ),
        (
            {"rules": ("sr_ste",), "group": 4},
            r"divisible by 4, got shape \(30, 10\) at 'dense2/kernel'",
        ),
        (
            {
                "rules": ("gradual",),
                "pattern": "n_of_m",
                "distribution": "uniform",
                "sparsities": (0.9,),
            },
            "192 weights at 'dense1/kernel'.*lower the sparsity",
        ),
        (
            {"rules": ("rigl",), "pattern": "blocks", "group": 4},
            r"divisible by 4 and 4, got shape \(64, 30\) at 'dense1/kernel'",
        ),
        ({"rules": ("fixed",), "ticket": "no"}, "written by `save_sparse`, got .*no"),
        (
            {"rules": ("dense", "static", "rigl"), "ticket": "no"},
            "rules that go on from a ticket, got dense, static; choose --rules=fixed",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_anything_is_written(
    change, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        prune.run(dataclasses.replace(TINY, **change))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_ticket_of_another_network_is_refused(labelled, tmp_path):
    save_ticket(tmp_path / "ticket", make_ticket(labelled, width=0.2))
    config = dataclasses.replace(
        PLAIN, rules=("fixed",), ticket=str(tmp_path / "ticket"), workdir=str(tmp_path)
    )
    with pytest.raises(ValueError, match="dense1") as refused:
        prune.run(config)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ticket"]


def test_fixed_starts_from_a_ticket_and_keeps_its_masks(labelled, tmp_path):
    ticket = make_ticket(labelled)
    save_ticket(tmp_path / "ticket", ticket)
    config = dataclasses.replace(TINY, ticket=str(tmp_path / "ticket"))
    begin, end = learned(config, labelled, "fixed")
    for state in (begin, end):
        jax.tree.map(
            np.testing.assert_array_equal, get_masks(state.opt_state), ticket.masks
        )
    jax.tree.map(np.testing.assert_array_equal, begin.params, ticket.params)
    for path, weight in kernels(end.params).items():
        mask = kernels(ticket.params)[path] != 0
        assert np.any(weight != kernels(ticket.params)[path])
        np.testing.assert_array_equal(weight[~mask], 0)


def test_what_a_ticket_has_pruned_does_not_come_back(labelled, tmp_path):
    save_ticket(tmp_path / "ticket", make_ticket(labelled))
    config = dataclasses.replace(TINY, ticket=str(tmp_path / "ticket"))
    with pytest.raises(ValueError, match=r"that of the ticket, 0\.5, got 0\.4"):
        learned(config, labelled, "gradual", 0.4)
    _, end = learned(config, labelled, "gradual", 0.5)
    live = sum(mask.sum() for mask in kernel_masks(end).values())
    assert live == KERNELS // 2


def test_rules_that_move_weights_have_the_sparsity_of_the_ticket():
    config = dataclasses.replace(
        TINY, rules=("fixed", "rigl", "gradual"), sparsities=(0.5, 0.9), ticket="any"
    )
    assert prune.list_points(config) == [
        Point("fixed", None),
        Point("rigl", None),
        Point("gradual", 0.5),
        Point("gradual", 0.9),
    ]


def test_every_point_is_run_once_and_in_order():
    config = dataclasses.replace(
        TINY, rules=("rigl", "dense", "rigl"), sparsities=(0.9, 0.5, 0.9)
    )
    points = prune.list_points(config)
    assert [point.name for point in points] == ["rigl-0.5", "rigl-0.9", "dense"]


def test_points_that_differ_in_the_seventh_digit_have_names_of_their_own():
    config = dataclasses.replace(
        TINY,
        rules=("rigl",),
        sparsities=(0.123456789, 0.1234567),
        learning_rates=(0.01234567, 0.01234568),
    )
    points = prune.list_points(config)
    assert points[0].name == "rigl-0.1234567-lr0.01234567"
    assert len({point.name for point in points}) == len(points) == 4
    assert len({point.label for point in points}) == 2


def test_without_a_dense_network_nothing_is_compared_to_it(tmp_path):
    config = dataclasses.replace(
        PLAIN, rules=("static",), validation_fraction=0.3, workdir=str(tmp_path / "run")
    )
    (row,) = prune.run(config)["points"]
    assert "to_dense" not in row
    (cells,) = runs.table_rows(tmp_path / "run")
    assert "minus dense" not in cells
    # Three of ten examples of every class validate; one seed has no deviation.
    assert cells["validation accuracy %"] == f"{100 * row['accuracy']:.2f}"
    np.testing.assert_allclose(30 * row["accuracy"], round(30 * row["accuracy"]), 1e-6)


def test_every_configuration_has_a_directory_of_its_own():
    changes = [{}, {"rules": ("rigl",)}, {"sparsities": (0.5,)}, {"seeds": 3}]
    names = [
        default_workdir("prune", dataclasses.replace(TINY, **change))
        for change in changes
    ]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("runs/prune-digits-10-[0-9a-f]{6}", n) for n in names)
    moved = dataclasses.replace(TINY, workdir="elsewhere", progress=True)
    assert default_workdir("prune", moved) == names[0]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("lenet_300_100", "dense1"),
        ("lenet5", "conv1"),
        ("convnet_s", "conv1"),
        ("resnet8", "stem_conv"),
        ("resnet50", "stem_conv"),
        ("vgg11", "stage1_conv1"),
    ],
)
def test_the_body_is_all_but_the_first_layer_and_the_head(name, first, labelled):
    model, x = models.make_model(name, 10), jax.ShapeDtypeStruct((1, 32, 32, 3), "f4")
    params, _ = jax.eval_shape(model.init, jax.random.key(0), x)
    task = make_task(TINY, labelled, 10, 0.0)
    task = task._replace(params=params, image_shape=x.shape[1:])
    body = tree.prunable_leaves(params, make_prunable("body", task))
    ends = {f"{first}/kernel", "head/kernel"}
    assert set(body) == set(tree.prunable_leaves(params)) - ends


@pytest.mark.parametrize(
    "rule", ["gradual", "static", "top_kast", "sr_ste", "snip", "powerprop", "wanda"]
)
def test_no_rule_prunes_the_ends_of_a_body(rule, labelled):
    config = dataclasses.replace(TINY, prunable="body")
    task = make_task(config, labelled, 10, 0.0)
    method = prune.make_method(Point(rule, 0.5), task, config)
    _, end = learned(config, labelled, rule, 0.5)
    live = {path: mask.mean() for path, mask in kernels(method.live(end)).items()}
    assert live == {"dense1/kernel": 1, "dense2/kernel": 0.5, "head/kernel": 1}


def test_a_pattern_that_fits_the_body_alone_says_so(labelled):
    task = make_task(
        dataclasses.replace(TINY, model="convnet_s", width=8), labelled, 10, 0.5
    )
    options = Options(pattern="n_of_m", group=4)
    with pytest.raises(ValueError, match=r"'conv1/kernel'.*choose --prunable=body"):
        make_method("gradual", task, options)
    task = task._replace(prunable=make_prunable("body", task))
    make_method("gradual", task, options)


@pytest.mark.parametrize("rule", ["snip", "grasp", "fisher", "synflow", "wanda"])
def test_a_score_on_data_that_is_nan_is_named(rule, labelled, monkeypatch):
    def broken(*_):
        return lambda params, grads, key: tree.map_with_path(
            lambda path, leaf: leaf * (jnp.nan if path == "dense2/kernel" else 1),
            params,
        )

    monkeypatch.setattr(scores, rule, broken)
    with pytest.raises(ValueError, match="got NaN at 'dense2/kernel'"):
        learned(TINY, labelled, rule, 0.5)


def test_the_forward_set_of_top_kast_is_part_of_what_is_trained(labelled):
    config = dataclasses.replace(TINY, learning_rate=1.0, report_every=1)
    task = make_task(config, labelled, 10, 0.0)
    method = prune.make_method(Point("top_kast", 0.75), task, config)
    states, left = [], []

    def report(step, state, logs):
        del step, logs
        states.append((kernels(method.live(state)), kernels(state.params)))

    fit(method, config, method.init(jax.random.key(0), labelled), labelled, report)
    for (live, before), (_, after) in itertools.pairwise(states):
        changed = {path: before[path] != after[path] for path in live}
        assert not any(np.any(live[path] & ~changed[path]) for path in live)
        assert sum(mask.sum() for mask in changed.values()) <= KERNELS // 2
        left.append(any(np.any(live[p] & ~states[0][0][p]) for p in live))
    assert any(left)  # Otherwise a set that never changes would do.


def test_the_figure_stands_at_the_sparsity_that_is_there(zoo, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        prune.plots, "accuracy_against_sparsity", lambda rows, *_: drawn.extend(rows)
    )
    monkeypatch.setattr(records.Run, "save_figure", lambda *_: None)
    config = dataclasses.replace(
        PLAIN, rules=("sr_ste",), group=2, workdir=str(tmp_path / "run")
    )
    prune.run(config)
    (row,) = drawn
    assert (row["sparsity"], row["asked"]) == (0.5, 0.75)
    (cells,) = runs.table_rows(tmp_path / "run")
    assert cells["sparsity %"] == "50"


def test_skipped_updates_do_not_hide_a_network_that_has_diverged(tmp_path):
    config = dataclasses.replace(
        PLAIN,
        rules=("dense", "wanda"),
        learning_rates=(0.1, 1e38),
        on_nonfinite="skip",
        workdir=str(tmp_path / "run"),
    )
    failed = prune.run(config)["failed"]
    assert list(failed) == ["dense-lr1e+38-seed0", "wanda-0.75-lr1e+38-seed0"]
    for what, why in zip(("predictions", "activations"), failed.values(), strict=True):
        assert re.match(rf"its {what} are not finite after \d+ skipped updates", why)
    table = (tmp_path / "run" / "table.md").read_text()
    assert all(f"{name} failed and is not counted" in table for name in failed)
    rows = [line.split("|") for line in table.splitlines() if ", lr " in line]
    accuracies = [cells[3].strip() for cells in rows]
    assert [text == "no result" for text in accuracies] == [False, True] * 2


@pytest.mark.usefixtures("no_training")
def test_networks_without_weights_are_in_the_table_and_not_in_the_figure(
    swept, tmp_path, monkeypatch
):
    emptied, drawn = shutil.copytree(swept[0], tmp_path / "run"), []
    for seed in SEEDS:
        path = unit_files(emptied)[f"static-0.75-seed{seed}"]
        runs.reseal(path, lambda found: found.update(sparsity=1.0))
    draw = prune.plots.accuracy_against_sparsity
    monkeypatch.setattr(
        prune.plots,
        "accuracy_against_sparsity",
        lambda rows, *given: drawn.extend(rows) or draw(rows, *given),
    )
    prune.run(dataclasses.replace(SWEEP, workdir=str(emptied)))
    assert [row["asked"] for row in drawn] == [0.5]
    cells = [row["sparsity %"] for row in runs.table_rows(emptied)]
    assert cells[-1] == "100"
