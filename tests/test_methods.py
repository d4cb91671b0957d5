"""Every method, as an experiment at tiny size: numbers, masks, costs, resumption."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import read, unit_files

from d2sparse import data, macs, models, scores, study, train, tree
from d2sparse.checkpoint import Checkpoints
from d2sparse.constraints import METHODS
from d2sparse.constraints.scored import per_output
from d2sparse.lottery import Ticket
from d2sparse.models.mlp import MLP
from d2sparse.reparam import powerprop
from d2sparse.study import splits, trainings
from d2sparse.transforms import get_masks
from experiments import prune

# A network of one layer compiles in a moment; how layers share is tested with three.
ONE_LAYER = models.from_linen(MLP((), 10))
KERNELS, BIASES = 64 * 10, 10
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
    threshold_decay=0.5,  # Enough for zeros within so few steps.
    rounds=2,
    threshold_interval=1,
    patience=1,
    pair_rule="set",  # Compiles sooner than RigL.
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
    "dense_short": 5 / 12,  # What RigL costs.
    "dense_smoothed": 1,
    "dense_averaged": 1,
    "dense_sharp": 2,
    "self_distilled": 2 + 1 / 3,  # The teacher, and its forward passes.
    "dense_mutual": 2,
    "dense_ensemble": 2,
    "random": RAMP,
    "static": 0.25,
    "one_shot": (7 + 5 * 0.25) / 12,
    "gradual": RAMP,
    "movement": RAMP,
    "set": 0.25,
    "rigl": 0.25 + 2 * (2 * 0.25 + 1) * GROWTH,
    "rigl_averaged": 0.25 + 2 * (2 * 0.25 + 1) * GROWTH,
    "rigl_half": 0.125 + 2 * (2 * 0.125 + 1) * GROWTH,
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
    # Rounds at 1, 0.5 and 0.25, the later ones rewound to step 1; those of soup and
    # swamp are whole and of two networks, the first one of soup of one.
    "imp": 1 + (0.5 + 0.25) * 11 / 12,
    "rise": 1 + 2 * 11 / 12,
    # The teacher, the rounds, and the teacher's forward passes.
    "imp_distilled": 1 + 1 + (0.5 + 0.25) * 11 / 12 + (12 + 2 * 11) / 12 / 3,
    "imp_capped": (1 + 0.25 ** (1 / 3) + 0.25 ** (2 / 3) + 0.25) * 6 / 12,
    "soup": 1 + 2 * (0.5 + 0.25),
    "swamp": 2 * (1 + 0.5 + 0.25),
    # Two networks of half of the weights; their masks move without gradients.
    **dict.fromkeys(
        ("uncoupled_pair", "uncoupled_annealed", "uncoupled_averaged"), 0.25
    ),
    **dict.fromkeys(("d2_sparse", "d2_annealed", "d2_views", "d2_confident"), 0.25),
    "d2_averaged_views": 0.25,
    **dict.fromkeys(("d2_sharp", "d2_averaged_sharp"), 0.5),
}
# The others are trained by themselves: on a ticket, as narrower or deeper networks.
MASKED = [
    name
    for name in COST
    if name not in ("top_kast", "sr_ste", "self_distilled", "rise")
    and not name.startswith(("dense", "uncoupled", "d2"))
]
DENSE = ("self_distilled", "rise")  # Frozen weights of rise stay.
# They need activation functions or blocks: see tests/test_depth.py.
DEPTH = ("easier", "easier_random", "egp", "nepenthe", "lacoot", "tlc")
# They need hidden neurons.
HIDDEN = ("serene", "serene_lower", "neuron_lobster", "group_lasso")
APART = ("fixed", "dense_narrow", "imp_stopped", *HIDDEN, *DEPTH)
ZOO = tuple(name for name in METHODS if name not in APART)
# Rows that are another one with flags: those that they set, or these.
VARIANTS = {
    **dict.fromkeys(("dense_smoothed", "dense_sharp"), ("dense", {})),
    "rigl_half": ("rigl", {"sparsity": 0.875}),
    "imp_capped": ("imp", {}),
    **dict.fromkeys(
        ("uncoupled_annealed", "uncoupled_averaged"), ("uncoupled_pair", {})
    ),
    **dict.fromkeys(
        (
            *("d2_annealed", "d2_views", "d2_confident", "d2_sharp"),
            *("d2_averaged_views", "d2_averaged_sharp"),
        ),
        ("d2_sparse", {}),
    ),
    "d2_distilled": ("d2_averaged_distilled", {}),
}
# Rows made of constraints, rules and scores that are trained in other rows or files.
COMPOSED = (
    *("set", "random", "rigl_averaged", "dense_ensemble", "uncoupled_pair"),
    *("d2_consolidated", "d2_averaged_distilled", "imp_distilled"),
    *("thresholded", "l2_thresholded", "sensitivity"),
    # Other scores than that of snip, and fewer steps than those of dense.
    *("grasp", "fisher", "dense_short"),
    *("dense_averaged", "dense_mutual"),
)
TRAINED = tuple(name for name in ZOO if name not in (*VARIANTS, *COMPOSED))


def rows_of(names):
    """Parameters of a test, those that are not among the trained ones slow."""
    return [
        pytest.param(name, marks=() if name in TRAINED else pytest.mark.slow)
        for name in names
    ]


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Result and end of the run of a method, of one comparison of all or of most."""

    @functools.cache
    def trained(names):
        ends = {}

        def remember(end):
            ends[end.plan.row.method] = end
            return {}

        workdir = str(tmp_path_factory.mktemp("runs") / "zoo")
        config = dataclasses.replace(TINY, methods=names, workdir=workdir)
        bare = study.Experiment("zoo", examine=remember, report=lambda comparison: {})
        frame = study.compare(config, bare, model=ONE_LAYER)
        return {row["method"]: row for row in frame.to_dict("records")}, ends

    def of(name):
        rows, ends = trained(TRAINED if name in TRAINED else ZOO)
        return rows[name], ends[name]

    return of


DIGITS = splits.make_draw_splits(data.load("digits"))


def examples(config=TINY):
    return DIGITS(config, 0).train


def plan_of(name, layers=1, **flags):
    config = dataclasses.replace(TINY, methods=(name,), axes={}, group=4)
    used = study.flags_used([METHODS[name]], config)
    own = {k: v for k, v in vars(TINY).items() if k in used and k != "sparsity"}
    shared = (
        *("score_samples", "threshold_decay", "growth_samples", "refresh_interval"),
        *("rounds", "pair_rule", "threshold_interval", "patience"),
    )
    reset = {k: getattr(study.Config, k) for k in shared if k not in used}
    config = dataclasses.replace(config, **(reset | own | flags))
    build = (lambda flags: ONE_LAYER) if layers == 1 else None
    (plan,) = study.make_plans(config, DIGITS, 10, build)
    return plan


def learned(name, **flags):
    """The plan, the initial and the trained state of one method."""
    program = (plan := plan_of(name, **flags)).program
    begin = program.init(jax.random.key(0), examples())
    copied = jax.tree.map(jnp.copy, begin.state)
    end = train.fit(program, begin, examples())
    return plan, copied, program.training.finish(end, examples(), program)


def begun(plan):
    return plan.program.init(jax.random.key(0), examples())


def entered(plan, progress=None):
    """The state after what happens between the steps of a method, without these."""
    progress = progress or begun(plan)
    for phase in plan.training.phases:
        progress = phase.enter(progress, examples(), plan.program)
    return progress.state


def random_weights(progress):
    """The progress with other weights, biases included."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), progress.state.params
    )
    return progress._replace(state=progress.state._replace(params=params))


def kernels(values):
    leaves = tree.flatten(values)
    return {path: np.asarray(leaves[path]) for path in leaves if "kernel" in path}


def kernel_masks(state):
    masks = tree.flatten(get_masks(state.opt_state))
    return {path: np.asarray(masks[path]) for path in kernels(state.params)}


def live(plan, state):
    return kernels(plan.training.masks(state).used[0])


def saved_ticket(directory, model=ONE_LAYER):
    """A ticket of a network in which every other weight is live."""
    x = train.inputs(examples())
    params, state = jax.device_get(jax.jit(model.init)(jax.random.key(5), x))
    masks = tree.map_with_path(
        lambda path, leaf: (
            (np.arange(leaf.size).reshape(leaf.shape) % 2 == 0)
            if path.endswith("kernel")
            else np.ones(leaf.shape, bool)
        ),
        params,
    )
    ticket = Ticket(jax.tree.map(np.multiply, params, masks), state, masks)
    study.save_ticket(directory, ticket)
    return ticket


@pytest.mark.parametrize("name", rows_of(ZOO))
def test_a_method_predicts_and_has_the_numbers_of_its_masks(name, zoo):
    row, end = zoo(name)
    assert 0 < row["accuracy"] < 1
    assert np.isfinite(row["nll"])
    assert row["relative_macs"] > 0
    masks = end.program.training.masks(end.state)
    sizes = jax.tree.map(jnp.shape, end.program.training.network.params)
    for found in (*masks.used, *masks.trained, *masks.stored):
        assert jax.tree.map(jnp.shape, found) == sizes
    stored = sum(int(np.sum(m)) for m in jax.tree.leaves(masks.stored))
    assert row["nonzeros"] == stored


@pytest.mark.parametrize("name", DEPTH)
def test_a_network_of_one_layer_has_no_depth_to_lose(name):
    with pytest.raises(ValueError, match=r"activation functions .* or blocks") as error:
        plan_of(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_what_it_varies_with_other_flags(name):
    base, flags = VARIANTS[name]
    asked = {} if base == "dense" else {"sparsity": 0.75}
    plan = plan_of(name, **asked)
    sets = {flag: getattr(plan.config, flag) for flag in METHODS[name].sets}
    constants = {k: v for k, v in METHODS[name].sets.items() if not callable(v)}
    assert flags or sets
    assert constants.items() <= sets.items()
    other = plan_of(base, **(asked | sets | flags))
    # A flag besides those that it sets is one that it makes another of.
    own = {flag: getattr(plan.config, flag) for flag in flags}
    expected = dataclasses.replace(other.config, methods=(name,), **own)
    assert plan.config == expected
    assert outline(plan) == outline(other)


def outline(plan):
    """What there is to see of a training before it is compiled."""
    training, phases = plan.training, plan.training.phases
    form = plan.program.form(len(phases) - 1, examples())
    return (
        {k: float(v) for k, v in training.settings.items()},
        *(training.batch_size, training.horizon, training.growth_samples),
        [(phase.stop, phase.title, phase.training is None) for phase in phases],
        dict(training.claims),
        # Through all that happens between phases: jax.eval_shape traces it.
        jax.tree.leaves(form),
    )


@pytest.mark.parametrize("name", rows_of(COST))
def test_a_method_reaches_the_numbers_that_it_was_asked_for(name, zoo):
    # 1:2 is as sparse as pairs can be.
    left = {"sr_ste": KERNELS // 2, "rigl_half": KERNELS // 8}.get(name, LIVE)
    left = KERNELS if name in DENSE or name.startswith("dense") else left
    networks = 1
    if name in ("dense_mutual", "dense_ensemble"):
        networks, left = 2, 2 * KERNELS
    elif name.startswith(("d2", "uncoupled")):
        networks = 2
    row = zoo(name)[0]
    assert row["nonzeros"] == left + networks * BIASES
    np.testing.assert_allclose(row["zeros"], 1 - left / networks / KERNELS, atol=1e-12)


@pytest.mark.parametrize("name", rows_of(COST))
def test_training_costs_what_the_masks_of_every_step_say(name, zoo):
    np.testing.assert_allclose(zoo(name)[0]["relative_macs"], COST[name], rtol=1e-3)


@pytest.mark.parametrize("name", rows_of(MASKED))
def test_what_is_pruned_is_zero_and_what_is_left_is_stored(name, zoo):
    row, end = zoo(name)
    masks = kernel_masks(end.state)
    count = sum(mask.sum() for mask in masks.values())
    assert count + BIASES == row["nonzeros"]
    for path, weight in kernels(end.state.params).items():
        np.testing.assert_array_equal(weight[~masks[path]], 0)


@pytest.mark.parametrize("name", ["top_kast", "sr_ste"])
def test_latent_weights_stay_dense(name, zoo):
    row, end = zoo(name)
    assert all(np.all(weight) for weight in kernels(end.state.params).values())
    assert row["nonzeros"] < KERNELS


def test_soft_thresholds_find_a_sparsity_of_their_own(zoo):
    row, end = zoo("str")
    params = end.state.params
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


# Passes of a step, and of the scores of one that is dense, over those of a gradient.
SENSITIVE = {
    "thresholded": 3,
    "l2_thresholded": 3,
    "lobster": 3,
    "sensitivity": 6,
    "serene": 14,
    "serene_lower": 5,
    "neuron_lobster": 5,
}


@pytest.mark.parametrize("name", SENSITIVE)
def test_decays_begin_dense_and_are_charged_for_their_scores(name):
    plan = plan_of(name, layers=3)
    network, state = plan.training.network, jax.eval_shape(lambda: begun(plan)).state
    dense = jax.tree.map(lambda x: np.ones(x.shape, bool), network.params)
    alone = plan.training._replace(masks=lambda state: train.same_masks(dense))
    np.testing.assert_allclose(
        float(alone.cost(alone, state, 0)), SENSITIVE[name] * network.dense_macs
    )
    strength = plan.training.settings.get("decay_strength")
    assert strength == (None if name == "thresholded" else 0.0004)


@pytest.mark.slow
@pytest.mark.parametrize("name", HIDDEN)
def test_methods_by_neurons_train_networks_that_have_some(name):
    often = {} if name == "group_lasso" else {"threshold_interval": 1, "patience": 1}
    plan, begin, end = learned(name, layers=3, **often)
    before, after = kernels(begin.params), kernels(end.params)
    assert all(np.any(before[path] != after[path]) for path in before)
    assert np.all(np.isfinite(plan.program.predict(end, examples())["network"]))


@pytest.mark.parametrize("name", HIDDEN)
def test_methods_by_neurons_refuse_a_network_without(name):
    with pytest.raises(ValueError, match=r"hidden neurons .*, got the .*\['head"):
        plan_of(name)


def test_a_larger_decay_of_the_thresholds_leaves_fewer_weights(zoo):
    plan, _, end = learned("str", threshold_decay=0.0)
    size = sum(mask.sum() for mask in live(plan, end).values())
    assert zoo("str")[0]["nonzeros"] - BIASES < size


def test_the_narrow_network_has_no_more_numbers_than_the_sparse_one():
    sparse = plan_of("static", layers=3, sparsity=0.75).training.network
    narrow = plan_of("dense_narrow", layers=3, sparsity=0.75).training.network
    kept = tree.size(sparse.params) - sparse.weights + round(0.25 * sparse.weights)
    assert 0.5 * kept < tree.size(narrow.params) <= kept


def test_powers_begin_as_the_dense_network():
    dense = begun(plan_of("dense")).state
    theta = begun(plan_of("powerprop", sparsity=0.5)).state
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
    for mask in kernel_masks(zoo("wanda")[1].state).values():
        count = mask.sum(axis=0)
        assert count.max() - count.min() <= 1


@pytest.mark.parametrize("layers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_wanda_prunes_by_its_own_activations_to_the_sparsities_of_the_table(layers):
    size = len(examples().labels)
    table = TABLE if layers == 3 else ("head*:0.75",)
    flags = {"score_samples": size, "layer_sparsities": table, "sparsity": 0.75}
    plan = plan_of("wanda", layers=layers, **flags)
    progress = random_weights(begun(plan))
    params = jax.device_get(progress.state.params)
    masks = kernel_masks(entered(plan, progress))
    if layers == 3:
        assert_table(masks)
    else:
        assert masks["head/kernel"].sum() == LIVE
    x = np.asarray(train.inputs(examples())).reshape(size, -1)
    for layer in ("dense1", "dense2", "head")[-layers:]:
        kernel = params[layer]["kernel"]
        score = np.abs(kernel) * np.linalg.norm(x, axis=0)[:, None]
        for values, mask in zip(score.T, masks[f"{layer}/kernel"].T, strict=True):
            assert values[mask].min() > values[~mask].max() * (1 - 1e-5)
        x = np.maximum(x @ kernel + params[layer]["bias"], 0)


def test_wanda_compares_all_weights_where_the_distribution_is_global():
    masks = kernel_masks(
        entered(plan_of("wanda", distribution="global", sparsity=0.75))
    )
    assert sum(mask.sum() for mask in masks.values()) == LIVE
    count = masks["head/kernel"].sum(axis=0)
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


TABLE = ("head*:0.3", "dense[2]/*:0.5")


def assert_table(masks):
    count = {path: mask.sum() for path, mask in masks.items()}
    assert (count["head/kernel"], count["dense2/kernel"]) == (70, 150)
    assert sum(count.values()) == round(0.25 * (64 * 30 + 30 * 10 + 10 * 10))


def test_named_leaves_have_the_sparsity_of_the_table():
    plan = plan_of("static", layers=3, layer_sparsities=TABLE, sparsity=0.75)
    assert_table(kernel_masks(begun(plan).state))


@pytest.mark.slow
def test_pruning_in_training_comes_to_the_sparsities_of_the_table():
    flags = {"layers": 3, "layer_sparsities": TABLE, "sparsity": 0.75}
    assert_table(kernel_masks(learned("gradual", **flags)[2]))


def test_random_patterns_share_the_budget_by_erk_and_magnitudes_globally():
    states = {
        name: begun(plan_of(name, layers=3, sparsity=0.75)).state
        for name in ("static", "set", "rigl", "sparse_momentum")
    }
    states["gradual"] = learned("gradual", layers=3, sparsity=0.75)[2]
    density = {
        name: {path: mask.mean() for path, mask in kernel_masks(state).items()}
        for name, state in states.items()
    }
    for name in ("set", "rigl", "sparse_momentum"):
        assert density[name] == density["static"] != density["gradual"]
    # ERK: the smaller the layer, the denser.
    first, second, head = (f"{name}/kernel" for name in ("dense1", "dense2", "head"))
    static = density["static"]
    assert static[first] < static[second] < static[head]


def test_methods_move_masks_or_keep_them(zoo):
    drawn = kernel_masks(zoo("static")[1].state)
    for name in ("rigl", "sparse_momentum"):
        masks = kernel_masks(zoo(name)[1].state)
        assert any(np.any(mask != drawn[path]) for path, mask in masks.items())


def test_the_cost_of_a_static_mask_is_that_of_its_leaves(zoo):
    network = plan_of("static").training.network
    mask = get_masks(zoo("static")[1].state.opt_state)
    share = float(macs.masked_macs(network.macs, mask)) / network.dense_macs
    np.testing.assert_allclose(zoo("static")[0]["relative_macs"], share, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "pattern", "group", "holds"),
    [
        ("gradual", "n_of_m", 2, lambda m: m.reshape(-1, 2, m.shape[1]).sum(1) == 1),
        pytest.param(
            *("rigl", "channels", 4, lambda m: m.all(0) | ~m.any(0)),
            marks=pytest.mark.slow,
        ),
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
    saved_ticket(tmp_path / "ticket", models.make_model("lenet_300_100", 10, 0.1))
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


BODY = {"layers": 3, "prunable": "body", "sparsity": 0.5}


def assert_body(masks):
    density = {path: mask.mean() for path, mask in masks.items()}
    assert density == {"dense1/kernel": 1, "dense2/kernel": 0.5, "head/kernel": 1}


@pytest.mark.parametrize("name", ["static", "top_kast", "sr_ste", "wanda"])
def test_no_method_prunes_the_ends_of_a_body(name):
    plan = plan_of(name, **BODY, **({"group": 2} if name == "sr_ste" else {}))
    assert_body(live(plan, entered(plan)))


@pytest.mark.slow
def test_pruning_in_training_spares_the_ends_of_a_body():
    plan, _, end = learned("gradual", **BODY)
    assert_body(live(plan, end))


def test_a_pattern_that_fits_the_body_alone_says_so():
    flags = {
        "layers": 3,
        "pattern": "n_of_m",
        "model": "convnet_s",
        "width": 8,
        "sparsity": 0.5,
    }
    with pytest.raises(ValueError, match=r"'conv1/kernel'.*choose --prunable=body"):
        plan_of("gradual", **flags)
    plan_of("gradual", prunable="body", **flags)


@pytest.mark.parametrize("name", ["snip", "grasp", "fisher", "synflow", "wanda"])
def test_a_score_on_data_that_is_nan_is_named(name, monkeypatch):
    def broken(*_):
        return lambda params, grads, key: tree.map_with_path(
            lambda path, leaf: leaf * (jnp.nan if path == "head/kernel" else 1),
            params,
        )

    monkeypatch.setattr(scores, name, broken)
    with pytest.raises(ValueError, match="got NaN at 'head/kernel'"):
        entered(plan_of(name, sparsity=0.5))


def test_the_forward_set_of_top_kast_is_part_of_what_is_trained(zoo):
    states, left, plan = [], [], zoo("top_kast")[1].plan

    def report(progress, logs):
        del logs
        state = progress.state
        states.append((live(plan, state), kernels(state.params)))

    watch = train.Watch(every=1, report=report)
    settings = {"learning_rate": 1.0}
    begin = plan.program.init(jax.random.key(0), examples(), settings)
    train.fit(plan.program, begin, examples(), watch)
    for (used, before), (_, after) in itertools.pairwise(states):
        changed = {path: before[path] != after[path] for path in used}
        assert not any(np.any(used[path] & ~changed[path]) for path in used)
        assert sum(mask.sum() for mask in changed.values()) <= KERNELS // 2
        left.append(any(np.any(used[p] & ~states[0][0][p]) for p in used))
    assert any(left)  # Otherwise a set that never changes would do.


def test_skipped_updates_do_not_hide_a_network_that_has_diverged(tmp_path):
    config = prune.Config(
        methods=("wanda",),
        seeds=1,
        steps=12,
        report_every=5,
        axes={"learning_rate": (3e38,)},
        on_nonfinite="skip",
        workdir=str(tmp_path / "run"),
        progress=False,
    )
    layers = models.from_linen(MLP((4,), 10))
    with runs.blank_figures(), pytest.raises(FloatingPointError, match="all 1 runs"):
        study.compare(config, study.Experiment("prune"), model=layers)
    ((name, why),) = read(tmp_path / "run" / "summary.json")["failed"].items()
    # Predictions that are not finite: see tests/test_lottery_experiment.py.
    assert re.match(r"its activations are not finite after \d+ skipped updates", why)
    table = (tmp_path / "run" / "table.md").read_text()
    assert f"{name} failed and is not counted" in table
    assert len(unit_files(tmp_path / "run")) == 1


# Resumption


# Those that have phases, a state or a loss of their own.
RESUMED = {
    *("imp", "soup", "str"),
    *("self_distilled", "d2_merged"),
}


def saved_and_end(end):
    """Where the training of a run is saved on the way; it ends as the run did."""
    program, saved = end.plan.program, []

    def save(progress, pending):
        saved.append((jax.tree.map(jnp.copy, progress), dict(pending)))

    watch = train.Watch(
        every=5, save_every=2, save=save, begun=lambda progress: save(progress, {})
    )
    again = train.fit(program, begun(end.plan), examples(), watch)
    assert same(again.state, end.progress.state)
    return saved, again


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        np.array_equal(numbers(x), numbers(y), equal_nan=True) for x, y in leaves
    )


def numbers(x):
    is_key = jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in RESUMED else pytest.mark.slow)
        for name in ZOO
    ],
)
def test_a_method_resumes_to_the_bit(name, zoo):
    saved, end = saved_and_end(zoo(name)[1])
    assert len(saved) >= 6
    for progress, logs in saved[:: max(len(saved) // 3, 1)]:
        copied = jax.tree.map(jnp.copy, progress)
        watch = train.Watch(every=5, logs=logs)
        assert same(
            train.fit(zoo(name)[1].plan.program, copied, examples(), watch), end
        )


@pytest.mark.parametrize(
    "name",
    [
        *("self_distilled", "d2_merged"),
        pytest.param("d2_distilled", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_has_the_form_of_its_phase(name, zoo, tmp_path, caplog):
    program = zoo(name)[1].plan.program
    saved, end = saved_and_end(zoo(name)[1])
    number = [int(progress.phase) for progress, _ in saved]
    handed_over = number.index(1)  # The last of the teacher, the first of the student.
    for place in (2, handed_over - 1, handed_over, handed_over + 1):
        progress, logs = saved[place]
        with Checkpoints(tmp_path / str(place)) as checkpoints:
            checkpoints.save(place, progress, {"phase": number[place]})
            found = checkpoints.restore(
                form=lambda notes: program.form(notes["phase"], examples())
            )
        with jax.log_compiles(), caplog.at_level("WARNING"):
            watch = train.Watch(every=5, save_every=2, logs=logs)
            again = train.fit(program, found.state, examples(), watch)
        assert same(again, end)
        assert "ompil" not in caplog.text
