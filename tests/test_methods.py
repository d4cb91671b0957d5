"""Every method that prunes, as an experiment at tiny size: numbers, masks, costs."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import read, unit_files

from d2sparse import data, macs, models, scores, study, train, tree
from d2sparse.constraints import METHODS
from d2sparse.constraints.scored import per_output
from d2sparse.lottery import Ticket
from d2sparse.reparam import powerprop
from d2sparse.study import splits, trainings
from d2sparse.transforms import get_masks
from experiments import prune

KERNELS, BIASES = 64 * 30 + 30 * 10 + 10 * 10, 30 + 10 + 10
LIVE = round(0.25 * KERNELS)
TINY = prune.Config(
    seeds=1,
    width=0.1,
    shift=0,
    steps=12,
    refresh_interval=3,
    report_every=5,
    growth_samples=64,
    group=2,
    score_samples=64,
    threshold_decay=2.0,  # Enough for zeros within so few steps.
    progress=False,
    axes={"sparsity": (0.75,)},
)
# What training costs, in units of the dense network's. Masks are refreshed in steps 3
# and 6 of 12, of which the next ones see the result; a forward pass is a third.
RAMP = (4 + 3 * (1 - 0.75 * (1 - 0.5**3)) + 5 * 0.25) / 12
GRANET = (4 * 0.5, 3 * (0.25 + 0.25 * 0.5**3), 5 * 0.25)
# A gradient of twice a batch, where growth happens: sparse forward, dense backward.
GROWTH = 64 / 32 / 12 / 3
COST = {
    "dense": 1,
    "random": RAMP,
    "static": 0.25,
    "one_shot": (7 + 5 * 0.25) / 12,
    "gradual": RAMP,
    "movement": RAMP,
    "set": 0.25,
    "rigl": 0.25 + 2 * (2 * 0.25 + 1) * GROWTH,
    "sparse_momentum": (2 * 0.25 + 1) / 3,
    "granet": sum(GRANET) / 12
    + (2 * 0.5 + 1 + 2 * (0.25 + 0.25 * 0.5**3) + 1) * GROWTH,
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
ZOO = (*COST, "str")


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Results and final state of every method, from one comparison."""
    ends = {}

    def remember(end):
        ends[end.plan.row.method] = end.state
        return {}

    config = dataclasses.replace(
        TINY, methods=ZOO, workdir=str(tmp_path_factory.mktemp("runs") / "zoo")
    )
    frame = study.compare(config, study.Experiment("zoo", examine=remember))
    rows = {row["method"]: row for row in frame.to_dict("records")}
    return rows, ends


DIGITS = splits.make_draw_splits(data.load("digits"))


def examples(config=TINY):
    return DIGITS(config, 0).train


def plan_of(name, **flags):
    config = dataclasses.replace(TINY, methods=(name,), axes={}, group=4)
    used = study.flags_used([METHODS[name]], config)
    own = {k: v for k, v in vars(TINY).items() if k in used and k != "sparsity"}
    shared = ("score_samples", "threshold_decay", "growth_samples", "refresh_interval")
    reset = {k: getattr(study.Config, k) for k in shared if k not in used}
    config = dataclasses.replace(config, **(reset | own | flags))
    (plan,) = study.make_plans(config, DIGITS, 10)
    return plan


def learned(name, watch=None, **flags):
    """The plan, the initial and the trained state of one method."""
    program = (plan := plan_of(name, **flags)).program
    begin = program.init(jax.random.key(0), examples())
    copied = jax.tree.map(jnp.copy, begin.state)
    end = train.fit(program, begin, examples(), watch)
    return plan, copied, program.training.finish(end, examples(), program)


def kernels(values):
    leaves = tree.flatten(values)
    return {path: np.asarray(leaves[path]) for path in leaves if "kernel" in path}


def kernel_masks(state):
    masks = tree.flatten(get_masks(state.opt_state))
    return {path: np.asarray(masks[path]) for path in kernels(state.params)}


def live(plan, state):
    return kernels(plan.training.masks(state).used[0])


def saved_ticket(directory, width=TINY.width):
    """A ticket of a network of that width, in which every other weight is live."""
    model = models.make_model("lenet_300_100", 10, width)
    params, state = model.init(jax.random.key(5), train.inputs(examples()))
    masks = tree.map_with_path(
        lambda path, leaf: (
            (jnp.arange(leaf.size).reshape(leaf.shape) % 2 == 0)
            if path.endswith("kernel")
            else jnp.ones(leaf.shape, bool)
        ),
        params,
    )
    ticket = Ticket(jax.tree.map(jnp.multiply, params, masks), state, masks)
    study.save_ticket(directory, ticket)
    return ticket


@pytest.mark.parametrize("name", COST)
def test_a_method_reaches_the_numbers_that_it_was_asked_for(name, zoo):
    # 1:2 is as sparse as pairs can be.
    left = {"dense": KERNELS, "sr_ste": KERNELS // 2}.get(name, LIVE)
    row = zoo[0][name]
    assert row["nonzeros"] == left + BIASES
    np.testing.assert_allclose(row["zeros"], 1 - left / KERNELS, atol=1e-12)
    assert 0 < row["accuracy"] < 1


@pytest.mark.parametrize("name", COST)
def test_training_costs_what_the_masks_of_every_step_say(name, zoo):
    np.testing.assert_allclose(zoo[0][name]["relative_macs"], COST[name], rtol=1e-3)


@pytest.mark.parametrize("name", sorted(set(COST) - {"dense", "top_kast", "sr_ste"}))
def test_what_is_pruned_is_zero_and_what_is_left_is_stored(name, zoo):
    rows, ends = zoo
    masks = kernel_masks(ends[name])
    count = sum(mask.sum() for mask in masks.values())
    assert count + BIASES == rows[name]["nonzeros"]
    for path, weight in kernels(ends[name].params).items():
        np.testing.assert_array_equal(weight[~masks[path]], 0)


@pytest.mark.parametrize("name", ["top_kast", "sr_ste"])
def test_latent_weights_stay_dense(name, zoo):
    rows, ends = zoo
    assert all(np.all(weight) for weight in kernels(ends[name].params).values())
    assert rows[name]["nonzeros"] < KERNELS


def test_soft_thresholds_find_a_sparsity_of_their_own(zoo):
    row, params = zoo[0]["str"], zoo[1]["str"].params
    assert np.isnan(row["sparsity"])
    zeros = 0
    for path, weight in kernels(params["params"]).items():
        threshold = 1 / (1 + np.exp(-float(params["thresholds"][path])))
        zeros += np.sum(np.abs(weight) <= threshold)
    assert 0.02 * KERNELS < zeros < KERNELS
    # A weight at the threshold itself may round to either side of it.
    np.testing.assert_allclose(row["nonzeros"], KERNELS + BIASES - zeros, atol=1)
    np.testing.assert_allclose(row["zeros"], zeros / KERNELS, atol=1e-3)
    assert 1 - row["zeros"] < row["relative_macs"] < 1


def test_a_larger_decay_of_the_thresholds_leaves_fewer_weights():
    def count(decay):
        plan, _, end = learned("str", threshold_decay=decay)
        return sum(mask.sum() for mask in live(plan, end).values())

    assert count(2.0) < count(1.0) < count(0.0)


def test_powers_begin_as_the_dense_network():
    _, dense, _ = learned("dense")
    _, theta, _ = learned("powerprop", sparsity=0.5)
    for path, weight in kernels(dense.params).items():
        latent = kernels(theta.params)[path]
        np.testing.assert_allclose(latent * np.abs(latent), weight, rtol=1e-5)


def test_powers_go_on_from_a_ticket_with_its_weights(tmp_path):
    ticket = saved_ticket(tmp_path / "ticket")
    _, begin, end = learned(
        "powerprop", ticket=str(tmp_path / "ticket"), power=3.0, sparsity=0.75
    )
    weights = kernels(powerprop(begin.params, 3.0))
    for path, weight in kernels(ticket.params).items():
        np.testing.assert_allclose(weights[path], weight, rtol=1e-5)
    assert sum(mask.sum() for mask in kernel_masks(end).values()) == LIVE


def test_wanda_keeps_as_many_weights_of_every_output(zoo):
    for mask in kernel_masks(zoo[1]["wanda"]).values():
        count = mask.sum(axis=0)
        assert count.max() - count.min() <= 1


def test_wanda_prunes_a_trained_network_by_its_own_activations():
    seen = {}

    def report(progress, logs):
        del logs
        state = progress.state
        seen[int(state.step)] = jax.device_get(state.params), kernel_masks(state)

    size = len(examples().labels)
    watch = train.Watch(every=5, report=report)
    learned("wanda", watch, score_samples=size, sparsity=0.75)
    (params, _), (_, masks) = seen[6], seen[10]
    x = np.asarray(train.inputs(examples())).reshape(size, -1)
    for layer in ("dense1", "dense2", "head"):
        kernel = params[layer]["kernel"]
        score = np.abs(kernel) * np.linalg.norm(x, axis=0)[:, None]
        for values, mask in zip(score.T, masks[f"{layer}/kernel"].T, strict=True):
            assert values[mask].min() > values[~mask].max() * (1 - 1e-5)
        x = np.maximum(x @ kernel + params[layer]["bias"], 0)


def test_wanda_compares_all_weights_where_the_distribution_is_global():
    masks = kernel_masks(learned("wanda", distribution="global", sparsity=0.75)[2])
    assert sum(mask.sum() for mask in masks.values()) == LIVE
    count = masks["dense1/kernel"].sum(axis=0)
    assert count.max() - count.min() > 1


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


@pytest.mark.parametrize("name", ["static", "gradual", "wanda"])
def test_named_leaves_have_the_sparsity_of_the_table(name):
    table = ("head*:0.3", "dense[2]/*:0.5")
    masks = kernel_masks(learned(name, layer_sparsities=table, sparsity=0.75)[2])
    count = {path: mask.sum() for path, mask in masks.items()}
    assert (count["head/kernel"], count["dense2/kernel"]) == (70, 150)
    assert sum(count.values()) == LIVE


def test_random_patterns_share_the_budget_by_erk_and_magnitudes_globally(zoo):
    density = {
        name: {path: mask.mean() for path, mask in kernel_masks(zoo[1][name]).items()}
        for name in ("static", "set", "rigl", "sparse_momentum", "gradual")
    }
    for name in ("set", "rigl", "sparse_momentum"):
        assert density[name] == density["static"] != density["gradual"]
    # ERK: the smaller the layer, the denser.
    first, second, head = (f"{name}/kernel" for name in ("dense1", "dense2", "head"))
    static = density["static"]
    assert static[first] < static[second] < static[head]


def test_methods_move_masks_or_keep_them(zoo):
    drawn = kernel_masks(zoo[1]["static"])
    for name in ("set", "rigl", "sparse_momentum"):
        masks = kernel_masks(zoo[1][name])
        assert any(np.any(mask != drawn[path]) for path, mask in masks.items())


def test_the_cost_of_a_static_mask_is_that_of_its_leaves(zoo):
    network = plan_of("static").training.network
    mask = get_masks(zoo[1]["static"].opt_state)
    share = float(macs.masked_macs(network.macs, mask)) / network.dense_macs
    np.testing.assert_allclose(zoo[0]["static"]["relative_macs"], share, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "pattern", "group", "holds"),
    [
        ("gradual", "n_of_m", 2, lambda m: m.reshape(-1, 2, m.shape[1]).sum(1) == 1),
        ("rigl", "channels", 4, lambda m: m.all(0) | ~m.any(0)),
    ],
    ids=["n_of_m", "channels"],
)
def test_patterns_hold_at_the_end(name, pattern, group, holds):
    masks = kernel_masks(
        learned(
            name, pattern=pattern, group=group, distribution="uniform", sparsity=0.5
        )[2]
    )
    for mask in masks.values():
        assert np.all(holds(mask))
        # To the nearest number of pairs or channels.
        np.testing.assert_allclose(mask.mean(), 0.5, atol=0.01)


def test_fixed_starts_from_a_ticket_and_keeps_its_masks(tmp_path):
    ticket = saved_ticket(tmp_path / "ticket")
    _, begin, end = learned("fixed", ticket=str(tmp_path / "ticket"))
    for state in (begin, end):
        jax.tree.map(
            np.testing.assert_array_equal, get_masks(state.opt_state), ticket.masks
        )
    jax.tree.map(np.testing.assert_array_equal, begin.params, ticket.params)
    for path, weight in kernels(end.params).items():
        mask = kernels(ticket.params)[path] != 0
        assert np.any(weight != kernels(ticket.params)[path])
        np.testing.assert_array_equal(weight[~mask], 0)


def test_what_a_ticket_has_pruned_does_not_come_back(tmp_path):
    saved_ticket(tmp_path / "ticket")
    flags = {"ticket": str(tmp_path / "ticket")}
    with pytest.raises(ValueError, match=r"that of the ticket, 0\.5, got 0\.4"):
        plan_of("gradual", sparsity=0.4, **flags)
    with pytest.raises(ValueError, match="can start from a ticket, got str"):
        plan_of("str", **flags)
    _, _, end = learned("gradual", sparsity=0.5, **flags)
    assert sum(mask.sum() for mask in kernel_masks(end).values()) == KERNELS // 2


def test_a_ticket_of_another_network_is_refused(tmp_path):
    saved_ticket(tmp_path / "ticket", width=0.2)
    with pytest.raises(ValueError, match="dense1") as refused:
        plan_of("fixed", ticket=str(tmp_path / "ticket"))
    assert "\n" not in str(refused.value)


def test_methods_that_move_weights_have_the_sparsity_of_the_ticket():
    config = dataclasses.replace(
        TINY,
        methods=("fixed", "rigl", "gradual"),
        axes={"sparsity": (0.5, 0.9)},
        ticket="any",
    )
    assert [row.name for row in study.list_rows(config)] == [
        *("fixed", "rigl", "gradual-sparsity0.5", "gradual-sparsity0.9"),
    ]


def test_every_configuration_has_a_directory_of_its_own():
    changes = [{}, {"methods": ("rigl",)}, {"axes": {}}, {"seeds": 3}]
    names = [
        study.default_workdir("prune", dataclasses.replace(TINY, **change))
        for change in changes
    ]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("runs/prune-digits-10-[0-9a-f]{6}", n) for n in names)
    moved = dataclasses.replace(TINY, workdir="elsewhere", progress=True)
    assert study.default_workdir("prune", moved) == names[0]


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
def test_the_body_is_all_but_the_first_layer_and_the_head(name, first):
    model, x = models.make_model(name, 10), jax.ShapeDtypeStruct((1, 32, 32, 3), "f4")
    params, _ = jax.eval_shape(model.init, jax.random.key(0), x)
    prunable = trainings.make_prunable("body", train.Network(params, {}), x.shape[1:])
    ends = {f"{first}/kernel", "head/kernel"}
    body = set(tree.prunable_leaves(params, prunable))
    assert body == set(tree.prunable_leaves(params)) - ends


@pytest.mark.parametrize("name", ["gradual", "static", "top_kast", "sr_ste", "wanda"])
def test_no_method_prunes_the_ends_of_a_body(name):
    group = {"group": 2} if name == "sr_ste" else {}
    plan, _, end = learned(name, prunable="body", sparsity=0.5, **group)
    density = {path: mask.mean() for path, mask in live(plan, end).items()}
    assert density == {"dense1/kernel": 1, "dense2/kernel": 0.5, "head/kernel": 1}


def test_a_pattern_that_fits_the_body_alone_says_so():
    flags = {"pattern": "n_of_m", "model": "convnet_s", "width": 8, "sparsity": 0.5}
    with pytest.raises(ValueError, match=r"'conv1/kernel'.*choose --prunable=body"):
        plan_of("gradual", **flags)
    plan_of("gradual", prunable="body", **flags)


@pytest.mark.parametrize("name", ["snip", "grasp", "fisher", "synflow", "wanda"])
def test_a_score_on_data_that_is_nan_is_named(name, monkeypatch):
    def broken(*_):
        return lambda params, grads, key: tree.map_with_path(
            lambda path, leaf: leaf * (jnp.nan if path == "dense2/kernel" else 1),
            params,
        )

    monkeypatch.setattr(scores, name, broken)
    with pytest.raises(ValueError, match="got NaN at 'dense2/kernel'"):
        learned(name, sparsity=0.5)


def test_the_forward_set_of_top_kast_is_part_of_what_is_trained():
    states, left, plan = [], [], plan_of("top_kast", learning_rate=1.0, sparsity=0.75)

    def report(progress, logs):
        del logs
        state = progress.state
        states.append((live(plan, state), kernels(state.params)))

    watch = train.Watch(every=1, report=report)
    begin = plan.program.init(jax.random.key(0), examples())
    train.fit(plan.program, begin, examples(), watch)
    for (used, before), (_, after) in itertools.pairwise(states):
        changed = {path: before[path] != after[path] for path in used}
        assert not any(np.any(used[path] & ~changed[path]) for path in used)
        assert sum(mask.sum() for mask in changed.values()) <= KERNELS // 2
        left.append(any(np.any(used[p] & ~states[0][0][p]) for p in used))
    assert any(left)  # Otherwise a set that never changes would do.


def test_skipped_updates_do_not_hide_a_network_that_has_diverged(tmp_path):
    config = prune.Config(
        methods=("dense", "wanda"),
        seeds=1,
        width=0.1,
        steps=12,
        report_every=5,
        axes={"learning_rate": (0.1, 1e38)},
        on_nonfinite="skip",
        workdir=str(tmp_path / "run"),
        progress=False,
    )
    prune.run(config)
    failed = read(tmp_path / "run" / "summary.json")["failed"]
    assert list(failed) == [
        *("dense-learning_rate1e+38-seed0", "wanda-learning_rate1e+38-seed0"),
    ]
    for what, why in zip(("predictions", "activations"), failed.values(), strict=True):
        assert re.match(rf"its {what} are not finite after \d+ skipped updates", why)
    table = (tmp_path / "run" / "table.md").read_text()
    assert all(f"{name} failed and is not counted" in table for name in failed)
    assert len(unit_files(tmp_path / "run")) == 4
