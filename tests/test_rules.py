"""Rules against plain loops, and what must hold at every refresh of a run."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from d2sparse import distributions, masks, rules, schedules, scores, tree
from d2sparse.distributions import erk, global_, uniform

SHAPES = {"conv": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "head": {"kernel": (8, 5)}}
SIZES = {"conv/kernel": 72, "head/kernel": 40}
KEY = jax.random.key(0)
RULES = {
    "static": rules.static(0.6),
    "one_shot": rules.one_shot(0.6),
    "gradual": rules.gradual(schedules.cubic(0.6, 10)),
    "set": rules.set_(0.6),
    "rigl": rules.rigl(0.6),
    "sparse_momentum": rules.sparse_momentum(0.6),
    "granet": rules.granet(schedules.cubic(0.6, 10, start=0.3)),
    "movement": rules.movement(schedules.cubic(0.6, 10)),
    "largest": rules.largest(0.6),
    "ac_dc": rules.ac_dc(0.6, schedules.alternating(3, stop=9)),
}


# Without optimisation XLA compiles in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normals(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)

    def draw(shape):
        return rng.normal(size=shape).astype(np.float32)

    return jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))


def live_counts(tree_of_masks):
    return {path: int(n) for path, n in masks.count(tree_of_masks).items()}


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# Every rule.


@functools.cache
def begun_and_updated(name):
    """The first masks of a rule and those after an update."""

    @jax.jit
    def both(params):
        begin = RULES[name].init(params, KEY)
        return begin, RULES[name].update(begin, params, params, 9, KEY)

    return both(normals(0))


@pytest.mark.parametrize("name", RULES)
def test_masks_are_bool_on_every_leaf_and_true_where_never_pruned(name):
    params = normals(0)
    for tree_of_masks in begun_and_updated(name):
        assert jax.tree.structure(tree_of_masks) == jax.tree.structure(params)
        for mask, param in zip(
            jax.tree.leaves(tree_of_masks), jax.tree.leaves(params), strict=True
        ):
            assert mask.dtype == bool
            assert mask.shape == param.shape
        assert tree_of_masks["conv"]["bias"].all()


@pytest.mark.parametrize("name", RULES)
def test_a_tree_without_prunable_leaf_is_refused(name):
    with pytest.raises(ValueError, match="expected at least one prunable leaf"):
        RULES[name].init({"bias": jnp.zeros(3)}, KEY)


@pytest.mark.parametrize(
    "rule", [rules.static, rules.one_shot, rules.set_, rules.rigl, rules.largest]
)
@pytest.mark.parametrize("sparsity", [1.0, -0.5, 90])
def test_sparsities_outside_of_0_to_1_are_refused(rule, sparsity):
    with pytest.raises(ValueError, match=r"sparsity in \[0, 1\)"):
        rule(sparsity)


def test_large_models_are_only_traced():
    params = {f"layer{i}": jax.ShapeDtypeStruct((4096, 8192), "bfloat16") for i in "ab"}
    for rule in RULES.values():
        begin = jax.eval_shape(rule.init, params, KEY)
        after = jax.eval_shape(rule.update, begin, params, params, 0, KEY)
        assert {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(after)} == {
            ((4096, 8192), "bool")
        }


# Given masks.


def test_fixed_masks_are_copies_and_never_change():
    given = {"w": np.array([True, False]), "b": jnp.array([True])}
    params = {"w": jnp.ones(2), "b": jnp.ones(1)}
    rule = rules.fixed(given)
    begin = rule.init(params, KEY)
    assert_same(begin, given)
    assert begin["b"] is not given["b"]
    assert rule.update(begin, params, params, 3, KEY) is begin


@pytest.mark.parametrize(
    "given", [{"w": np.ones(3, bool)}, {"v": np.ones(2, bool)}, {}]
)
def test_fixed_masks_that_do_not_fit_are_refused(given):
    with pytest.raises(ValueError, match=r"shape|none for \['w'\]"):
        rules.fixed(given).init({"w": jnp.ones(2)}, KEY)


def test_what_is_not_zero_at_the_start_stays_live():
    kernel = np.array([[0.0, -1.0], [2.0, 0.0]], np.float32)
    params = {"kernel": kernel, "bias": np.zeros(2, np.float32)}
    rule = rules.nonzero()
    begin = jax.jit(rule.init)(params, KEY)
    assert_same(begin, {"kernel": kernel != 0, "bias": np.ones(2, bool)})
    assert rule.update(begin, params, params, 3, KEY) is begin
    biases = rules.nonzero(lambda path, leaf: path == "bias").init(params, KEY)
    assert_same(biases, {"kernel": np.ones((2, 2), bool), "bias": np.zeros(2, bool)})


# Random patterns.


@pytest.mark.parametrize("distribution", [erk, uniform])
def test_static_patterns_have_the_counts_of_the_distribution(distribution):
    rule = rules.static(0.7, distribution)
    assert live_counts(rule.init(normals(0), KEY)) == distribution(
        tree.shapes(normals(0)), 0.7
    )


def test_static_patterns_share_a_global_budget_and_obey_a_predicate():
    rule = rules.static(0.7, global_)
    assert sum(live_counts(rule.init(normals(0), KEY)).values()) == 34
    rule = rules.static(0.7, prunable=lambda path, leaf: path == "head/kernel")
    assert live_counts(rule.init(normals(0), KEY)) == {
        "conv/kernel": 72,
        "head/kernel": 12,
    }


RUNS = 200


@jit
def runs(sparsities, keys, params, grads):
    """First masks of many runs, and those that a refresh makes of them."""

    def run(sparsity, key):
        rule = rules.rigl(sparsity, 0.5, uniform)
        begin = rule.init(params, key)
        return begin, rule.update(begin, params, grads, 0, key)

    return jax.vmap(run)(sparsities, keys)


def swept(params, grads, sparsities=(0.75,)):
    """Masks by path, of sparsities in turn and every key."""
    keys = jax.random.split(KEY, RUNS)
    both = runs(np.resize(np.float32(sparsities), RUNS), keys, params, grads)
    return [
        {path: np.asarray(tree.flatten(live)[path]) for path in SIZES} for live in both
    ]


def test_static_patterns_are_random():
    drawn, _ = swept(normals(0), normals(1))
    for path, count in uniform(tree.shapes(normals(0)), 0.75).items():
        # The deviation of a frequency is sqrt(0.25 * 0.75 / 200) = 0.031.
        expected = count / SIZES[path]
        np.testing.assert_allclose(drawn[path].mean(axis=0), expected, atol=4 * 0.031)
    conv, head = (mask.reshape(RUNS, -1)[:, :40] for mask in drawn.values())
    # Two leaves agree as often as chance has it: 1/16 of all places are live in both.
    np.testing.assert_allclose((conv & head).mean(), 1 / 16, atol=0.01)


def test_sparsities_and_keys_may_be_swept_in_one_program():
    params, grads, sparsities = normals(1), normals(2), (0.25, 0.75, 0.9375)
    together = swept(params, grads, sparsities)
    for i, key in enumerate(jax.random.split(KEY, RUNS)[:3]):
        rule = rules.rigl(sparsities[i], 0.5, uniform)
        begin = rule.init(params, key)
        after = rule.update(begin, params, grads, 0, key)
        for live, one in zip(together, (begin, after), strict=True):
            for path in SIZES:
                np.testing.assert_array_equal(live[path][i], tree.flatten(one)[path])
        assert live_counts(after) == uniform(tree.shapes(params), sparsities[i])


# Prune and grow.


def moved_by_loop(live, weight, growth, fraction):
    """One refresh of one leaf, position after position."""
    count = int(np.sum(live))
    falls = math.floor(fraction * count)
    weight, growth = np.ravel(weight), np.ravel(growth)
    by_weight = sorted(np.flatnonzero(live), key=lambda i: -abs(weight[i]))
    kept = by_weight[: count - falls]
    outside = [i for i in range(weight.size) if i not in kept]
    grown = sorted(outside, key=lambda i: -growth[i])[:falls]
    return np.isin(np.arange(weight.size), kept + grown).reshape(np.shape(live))


@pytest.mark.parametrize(
    ("rule", "growth"),
    [
        (rules.rigl, lambda w, g: abs(g)),
        (
            lambda sparsity, fraction: rules.prune_and_grow(
                sparsity,
                lambda params, grads, key: jax.tree.map(jnp.exp, grads),
                fraction,
            ),
            lambda w, g: np.exp(g),
        ),
    ],
)
def test_prune_and_grow_equals_the_loop(rule, growth):
    moving = rule(0.6, lambda step: step / 8)
    update = moving.update
    for seed in range(12):
        params, grads, step = normals(seed), normals(seed + 100), seed % 9
        before = moving.init(params, jax.random.key(seed))
        after = update(before, params, grads, step, KEY)
        for name in ("conv", "head"):
            live, weight, grad = (t[name]["kernel"] for t in (before, params, grads))
            expected = moved_by_loop(live, weight, growth(weight, grad), step / 8)
            np.testing.assert_array_equal(after[name]["kernel"], expected)


@pytest.mark.parametrize("fraction", [-0.5, 1.0, 1.5, 30.0, math.nan])
def test_no_schedule_of_drop_fractions_changes_the_density(fraction):
    rule = rules.rigl(0.6, lambda step: fraction)
    begin = rule.init(normals(0), KEY)
    after = rule.update(begin, normals(0), normals(1), 0, KEY)
    assert live_counts(after) == live_counts(begin)


TWO_OF_THREE = jit(rules.rigl(0.5, drop_fraction=0.67).update)


def one_leaf(live, weight, grad):
    """A refresh of a row of six weights, half of the three live ones falling."""
    rows = [{"w": np.array([row])} for row in (live, weight, grad)]
    rows[1:] = [{"w": row["w"].astype(np.float32)} for row in rows[1:]]
    return TWO_OF_THREE(*rows, 0, KEY)["w"][0].tolist()


LIVE = [True, True, True, False, False, False]


def test_a_weight_that_falls_may_grow_at_once():
    mask = one_leaf(LIVE, [3.0, 1.0, 2.0, 0.0, 0.0, 0.0], [0, 9.0, 0, 1.0, 8.0, 2.0])
    assert mask == [True, True, False, False, True, False]


def test_the_weight_that_stays_is_not_grown_again():
    mask = one_leaf(LIVE, [3.0, 1.0, 2.0, 0.0, 0.0, 0.0], [9.0, 0, 0, 1.0, 8.0, 2.0])
    assert mask == [True, False, False, False, True, True]


def test_numbers_that_are_not_finite_keep_the_density():
    nan, inf = math.nan, math.inf
    assert one_leaf(LIVE, [nan, 1.0, nan, nan, 0.0, 0.0], [0, 0, 0, 1, nan, inf]) == [
        *[False, True, False],
        *[True, False, True],
    ]
    for weight, grad in [(nan, nan), (inf, inf), (nan, inf), (0.0, nan), (-inf, -inf)]:
        assert sum(one_leaf(LIVE, [weight] * 6, [grad] * 6)) == 3


@pytest.mark.parametrize("name", [n for n in RULES if n not in {"static", "movement"}])
def test_nan_is_refused_outside_of_compiled_functions_and_the_leaf_named(name):
    params, rule = normals(0), RULES[name]
    begin, _ = begun_and_updated(name)
    broken = tree.map_with_path(
        lambda path, x: x * (math.nan if path == "head/kernel" else 1.0), params
    )
    with pytest.raises(ValueError, match="without NaN, got NaN at 'head/kernel'"):
        rule.update(begin, broken, params, 9, KEY)


@pytest.mark.parametrize("rule", [rules.rigl(0.6), rules.movement(lambda step: 0.6)])
def test_a_gradient_of_nan_is_refused_where_it_is_looked_at(rule):
    params = normals(0)
    nan = jax.tree.map(lambda x: x * math.nan, params)
    with pytest.raises(ValueError, match="without NaN, got NaN at 'conv/kernel'"):
        rule.update(rule.init(params, KEY), params, nan, 9, KEY)
    biases = tree.map_with_path(
        lambda path, x: x * (1.0 if "kernel" in path else math.nan), params
    )
    rule.update(rule.init(params, KEY), params, biases, 9, KEY)


def grown_where(grads):
    """Where weights may grow and where they do, bool[runs, positions] by path.

    All weights are equal: of the live ones the first half by index stays.
    """
    before, after = swept(jax.tree.map(np.ones_like, normals(0)), grads)
    outside, grown = {}, {}
    for path, mask in before.items():
        live, now = mask.reshape(RUNS, -1), after[path].reshape(RUNS, -1)
        stays = live & (np.cumsum(live, axis=1) <= -(-live[0].sum() // 2))
        assert np.all(now[stays])
        assert np.all(now.sum(axis=1) == live.sum(axis=1))
        outside[path], grown[path] = ~stays, now & ~stays
    return outside, grown


def no_gradients():
    return jax.tree.map(np.zeros_like, normals(0))


def test_growth_without_gradient_goes_to_random_places_and_not_by_index():
    outside, grown = grown_where(no_gradients())
    for path in SIZES:
        # 9 of 63 and 5 of 35 grow; a deviation is sqrt(1/7 * 6/7 / 140) = 0.03.
        frequency = grown[path].sum(axis=0) / outside[path].sum(axis=0)
        np.testing.assert_allclose(frequency, 1 / 7, atol=4 * 0.03)
    # Two leaves agree as often as chance has it.
    conv, head = (grown[path][:, :40] for path in SIZES)
    both = np.logical_and(*(outside[path][:, :40] for path in SIZES))
    np.testing.assert_allclose((conv & head)[both].mean(), 1 / 49, atol=0.01)


def test_sets_growth_is_that_without_gradients():
    params, grads, zeros = normals(4), normals(5), no_gradients()
    begin = RULES["set"].init(params, KEY)
    expected = RULES["rigl"].update(begin, params, zeros, 0, KEY)
    assert_same(RULES["set"].update(begin, params, grads, 0, KEY), expected)
    moved = RULES["rigl"].update(begin, params, grads, 0, KEY)
    assert np.any(moved["conv"]["kernel"] != expected["conv"]["kernel"])


def test_random_growth_comes_after_every_weight_with_a_gradient():
    grads = no_gradients()
    grads["head"]["kernel"][-1, -2:] = -1e-30
    outside, grown = (found["head/kernel"] for found in grown_where(grads))
    assert grown[:, -2:].all()
    frequency = grown[:, :-2].sum(axis=0) / outside[:, :-2].sum(axis=0)
    np.testing.assert_allclose(frequency, 3 / 33, atol=4 * 0.025)


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_density_is_exact_over_many_refreshes(name):
    rule, state = RULES[name], RULES[name].init(normals(0), KEY)
    counts = erk(tree.shapes(normals(0)), 0.6)
    for step in range(20):
        params, grads = normals(step), normals(step + 100)
        key = jax.random.key(step)
        before, state = state, rule.update(state, params, grads, step, key)
        assert live_counts(state) == counts
        assert np.any(state["head"]["kernel"] != before["head"]["kernel"])


def test_drop_fractions_follow_their_schedule():
    rule = rules.rigl(0.5, schedules.cosine(0.5, 10), uniform)
    update, params, grads = rule.update, normals(4), normals(5)
    begin = rule.init(params, KEY)
    outside = jax.tree.map(lambda mask, g: g * ~mask, begin, grads)
    for step, moved in [(0, 10), (2, 9), (6, 3), (10, 0), (99, 0)]:
        after = update(begin, params, outside, step, KEY)
        left = begin["head"]["kernel"] & ~after["head"]["kernel"]
        assert int(left.sum()) == moved


# Pruning.


def pruned_by_loop(live, score, counts):
    """The largest scores that are live: of each leaf, or of all leaves together."""
    positions = [(path, i) for path in live for i in np.ndindex(live[path].shape)]
    ranked = sorted(
        ((path, i) for path, i in positions if live[path][i]),
        key=lambda position: -score[position[0]][position[1]],
    )
    if isinstance(counts, dict):
        own = {path: [x for x in ranked if x[0] == path] for path in live}
        kept = {x for path in live for x in own[path][: counts[path]]}
    else:
        kept = set(ranked[:counts])
    masks_of = {path: np.zeros(mask.shape, bool) for path, mask in live.items()}
    for path, i in kept:
        masks_of[path][i] = True
    return masks_of


@pytest.mark.parametrize("distribution", [global_, erk])
@pytest.mark.parametrize(
    ("score", "of"),
    [
        (scores.magnitude, lambda w, g: abs(w)),
        (scores.saliency, lambda w, g: abs(w * g)),
    ],
)
def test_gradual_pruning_equals_the_loop_at_every_refresh(distribution, score, of):
    sparsity = schedules.cubic(0.9, 8)
    rule = rules.gradual(sparsity, score, distribution)
    update, state = rule.update, rule.init(normals(0), KEY)
    assert live_counts(state) == SIZES
    for step in (0, 1, 3, 6, 8, 11):
        params, grads = normals(step), normals(step + 50)
        kernels = tree.shapes(params)
        live = {path: np.asarray(tree.flatten(state)[path]) for path in kernels}
        flat = {
            path: (tree.flatten(params)[path], tree.flatten(grads)[path])
            for path in kernels
        }
        counts = distribution(kernels, float(sparsity(step)))
        expected = pruned_by_loop(live, {p: of(*x) for p, x in flat.items()}, counts)
        state = update(state, params, grads, step, KEY)
        for path in kernels:
            np.testing.assert_array_equal(tree.flatten(state)[path], expected[path])
    assert sum(live_counts(state).values()) == round(0.1 * 112)


@pytest.mark.parametrize("distribution", [global_, uniform])
def test_a_pruned_weight_never_comes_back(distribution):
    # A cycle: the sparsity falls again after step 4, and rises higher at step 8.
    rule = rules.gradual(
        lambda step: jnp.float32(0.2) * (step % 5 + step // 8),
        distribution=distribution,
    )
    update, state = rule.update, rule.init(normals(0), KEY)
    highest = 0.0
    for step in range(9):
        before, params = state, normals(step)
        state = update(state, params, params, step, KEY)
        revived = jax.tree.map(lambda new, old: bool(np.any(new & ~old)), state, before)
        assert not any(jax.tree.leaves(revived))
        highest = max(highest, 0.2 * (step % 5 + step // 8))
        assert sum(live_counts(state).values()) == round((1 - highest) * 112)


def test_a_refresh_at_the_same_sparsity_changes_nothing():
    rule = rules.one_shot(0.5)
    update = jit(rule.update)
    once = update(rule.init(normals(0), KEY), normals(0), normals(0), 0, KEY)
    zeros = jax.tree.map(np.zeros_like, normals(0))
    nans = jax.tree.map(lambda zero: zero / 1.0 + math.nan, zeros)
    for params in (normals(1), zeros, nans):
        assert_same(update(once, params, params, 1, KEY), once)


def test_live_weights_of_value_zero_are_not_taken_for_pruned_ones():
    params = {"w": np.float32([[0, 0, 0, 5], [4, 3, 2, 1]])}
    live = {"w": np.array([[False, True, True, True], [True] * 4])}
    after = rules.one_shot(1 / 4).update(live, params, params, 0, KEY)
    assert after["w"].tolist() == [[False, True, False, True], [True] * 4]


def test_pruning_at_initialisation_by_saliency():
    params = {"w": np.float32([[1, 2, 3, 4], [0, 9, 8, 7]])}
    grads = {"w": np.float32([[-9, 0, 1, 1], [9, 0, -1, 1]])}
    rule = rules.one_shot(0.5, scores.saliency)
    assert rule.init(params, KEY)["w"].all()
    after = rule.update(rule.init(params, KEY), params, grads, 0, KEY)
    assert after["w"].tolist() == [
        [True, False, False, True],
        [False, False, True, True],
    ]


def test_the_total_is_met_where_the_share_of_a_leaf_rises():
    # The paradox of largest remainders: of 9 weights the leaves get 1, 4 and 4, of 8
    # they get 2, 3 and 3. A pruned weight must not come back for that.
    shapes = {"a": (1, 2), "b": (1, 5), "c": (1, 5)}
    sparsities = [1 - total / 12 for total in (9, 8)]
    shares = [list(uniform(shapes, sparsity).values()) for sparsity in sparsities]
    assert shares == [[1, 4, 4], [2, 3, 3]]

    rule = rules.gradual(
        lambda step: jnp.float32(sparsities)[step], distribution=uniform
    )
    params, update = normals(0, shapes), jit(rule.update)
    dense = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    first = update(dense, params, params, 0, KEY)
    second = update(first, params, params, 1, KEY)
    assert live_counts(first) == {"a": 1, "b": 4, "c": 4}
    assert live_counts(second) == {"a": 1, "b": 4, "c": 3}
    assert not any(np.any(second[path] & ~first[path]) for path in shapes)


def test_final_sparsities_may_be_swept_in_one_program():
    params = normals(6)

    def final_masks(sparsity):
        rule = rules.gradual(schedules.cubic(sparsity, 4))
        return rule.update(rule.init(params, KEY), params, params, 4, KEY)

    swept = jit(jax.vmap(final_masks))(jnp.array([0.25, 0.5, 0.875]))
    counts = [
        leaf["kernel"].sum(axis=(-2, -1)) for leaf in jax.device_get(swept).values()
    ]
    np.testing.assert_array_equal(
        counts[0].reshape(3, -1).sum(1) + counts[1], [84, 56, 14]
    )


@pytest.mark.parametrize("number", [0.9, 0, np.float32(0.5)])
def test_a_number_in_place_of_a_schedule_is_refused(number):
    with pytest.raises(ValueError, match="expected a schedule, step -> sparsity, got"):
        rules.gradual(number)


SCHEDULED = [rules.gradual, rules.movement, rules.granet]


@pytest.mark.parametrize("rule", SCHEDULED)
@pytest.mark.parametrize(
    "schedule",
    [
        schedules.cubic(1.0, 3),
        schedules.constant(1.0),
        schedules.linear(0.0, 0.999, 3),  # Of 112 weights none.
        schedules.cubic(np.float32(1.0), 3, start=0.5),
    ],
)
def test_schedules_that_end_without_a_live_weight_are_refused(rule, schedule):
    for init in (rule(schedule).init, jit(rule(schedule).init)):
        with pytest.raises(
            ValueError, match=r"expected a sparsity (in \[0, 1\)|of at)"
        ):
            init(normals(0), KEY)


@pytest.mark.parametrize("rule", SCHEDULED)
def test_schedules_that_a_distribution_cannot_follow_are_refused(rule):
    half = distributions.explicit({"*": 0.5})
    rule(schedules.cubic(0.5, 3), distribution=half).init(normals(0), KEY)
    with pytest.raises(ValueError, match=r"sparsity of at most 0\.5, got 0\.9"):
        rule(schedules.cubic(0.9, 3), distribution=half).init(normals(0), KEY)


@pytest.mark.parametrize(
    "rule",
    [
        *(rules.static, rules.rigl, rules.largest, rules.one_shot),
        lambda sparsity: rules.ac_dc(sparsity, schedules.every(2)),
    ],
)
def test_a_sparsity_that_leaves_no_weight_is_refused(rule):
    message = r"at most 0\.99107\d*, at which 1 of 112 .* got 0\.999, at which none is"
    with pytest.raises(ValueError, match=message):
        rule(0.999).init(normals(0), KEY)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(rule(0.999).init, normals(0), KEY)
    rule(0.9911).init(normals(0), KEY)
    # What is traced cannot be looked at.
    jax.eval_shape(lambda sparsity: rule(sparsity).init(normals(0), KEY), 0.999)


def test_rounding_empties_no_leaf_while_there_is_a_weight_for_each():
    shapes = {"a": (2, 2), "b": (8, 8)}
    assert distributions.share_budget(uniform, shapes, 0.9) == {"a": 1, "b": 6}
    assert sum(distributions.share_budget(uniform, shapes, 0.98).values()) == 1


# Many devices.


@pytest.mark.slow
def test_sharded_parameters_get_the_same_masks_and_are_not_gathered():
    shapes = {"a": (64, 24), "b": (24, 16)}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    over = {"a": P("data", None), "b": P(None, "data")}
    put = {path: NamedSharding(mesh, spec) for path, spec in over.items()}
    rule = rules.rigl(0.8)

    def both(params, grads):
        begin = rule.init(params, KEY)
        return begin, rule.update(begin, params, grads, 0, KEY)

    params, grads = normals(7, shapes), normals(8, shapes)
    sharded = jax.device_put((params, grads), (put, put))
    compiled = jit(both).lower(*sharded).compile()
    assert_same(compiled(*sharded), both(params, grads))
    for gathering in ("all-gather", "all-to-all", "collective-permute"):
        assert gathering not in compiled.as_text()


# Rules that are made of others.


def test_pruning_in_iterations_takes_the_score_of_what_is_left():
    # A weight counts with its row: a row of many small ones leads until they are gone.
    def with_row(params, grads, key):
        row = jnp.sum(jnp.abs(params["w"]), axis=1)
        return {"w": jnp.abs(params["w"]) * row[:, None]}

    weights = np.array([[8.0, 14, 8.5, 6.5], [9.5, 14, 1, 8]], np.float32)
    expected = weights.copy()
    for kept in (6, 4, 3, 2):  # 8 * 0.25^(i / 4), rounded
        score = np.abs(expected) * np.abs(expected).sum(1)[:, None]
        expected[score < np.sort(score.ravel())[-kept]] = 0
    begin, params = {"w": np.ones((2, 4), bool)}, {"w": weights}
    got = rules.one_shot(0.75, with_row, iterations=4).update(
        begin, params, None, 0, KEY
    )
    np.testing.assert_array_equal(got["w"], expected != 0)
    at_once = rules.one_shot(0.75, with_row).update(begin, params, None, 0, KEY)
    assert (at_once["w"] != got["w"]).any()


def test_iterations_meet_the_count_and_leave_what_is_pruned():
    rule, params = rules.one_shot(0.6, iterations=7), normals(3)
    once = rules.one_shot(0.6)
    begin = rule.init(params, KEY)
    assert_same(
        jit(rule.update)(begin, params, None, 0, KEY),
        once.update(begin, params, None, 0, KEY),
    )
    half = jax.tree.map(lambda m, w: m & (w > 0), begin, params)
    after = rule.update(half, params, None, 0, KEY)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a & ~b, False), after, half)
    with pytest.raises(ValueError, match="of at least 1 as `iterations`, got 0"):
        rules.one_shot(0.6, iterations=0)


def test_iterations_outside_of_compiled_functions_are_not_compiled():
    seen = []

    def score(params, grads, key):
        seen.extend(jax.tree.leaves(params))
        return jax.tree.map(jnp.abs, params)

    params = normals(3)
    rule = rules.one_shot(0.6, score, iterations=5)
    rule.update(rule.init(params, KEY), params, None, 0, KEY)
    assert len(seen) == 5 * len(jax.tree.leaves(params))
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in seen)


def test_the_largest_are_chosen_from_all_weights_and_may_come_back():
    rule, first, later = rules.largest(0.6), normals(4), normals(5)
    masks_then = rule.init(first, KEY)
    assert_same(
        masks_then,
        rules.one_shot(0.6).update(masks.dense_masks(first), first, None, 0, KEY),
    )
    now = rule.update(masks_then, later, None, 1, KEY)
    assert_same(now, rule.init(later, KEY))
    assert any(
        (a & ~b).any()
        for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(masks_then), strict=True)
    )


def test_ac_dc_is_sparse_and_dense_by_turns():
    rule = rules.ac_dc(0.6, schedules.alternating(10, stop=50, begin=20))
    masks_now, live = rule.init(normals(0), KEY), {}
    for step in range(0, 80, 10):
        params = normals(step)
        masks_now = rule.update(masks_now, params, None, step, KEY)
        live[step] = sum(live_counts(masks_now).values())
        if live[step] < 112:
            assert_same(masks_now, rules.largest(0.6).init(params, KEY))
    sparse = round(0.4 * 112)
    assert live == {0: 112, 10: 112, 30: 112} | dict.fromkeys(
        (20, 40, 50, 60, 70), sparse
    )


def test_granet_prunes_over_all_leaves_and_moves_in_every_one():
    schedule = schedules.cubic(0.8, 10, start=0.5)
    rule, key = rules.granet(schedule, drop_fraction=0.5), jax.random.key(3)
    begin = rule.init(normals(0), KEY)
    assert live_counts(begin) == {
        path: int(n) for path, n in erk(tree.shapes(normals(0)), 0.5).items()
    }
    params = jax.tree.map(np.multiply, normals(0), begin)
    grads = normals(1)
    pruned = rules.gradual(schedule).update(begin, params, grads, 5, key)
    moved = rules.rigl(0.0, 0.5).update(pruned, params, grads, 5, key)
    got = rule.update(begin, params, grads, 5, key)
    assert_same(got, moved)
    assert live_counts(got) == live_counts(pruned)
    assert sum(live_counts(got).values()) == round(112 * (1 - float(schedule(5))))
    assert any(
        (a & ~b).any()
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(begin), strict=True)
    )


@pytest.mark.parametrize("rule", [rules.granet, rules.movement])
def test_schedules_are_asked_for(rule):
    with pytest.raises(ValueError, match="expected a schedule"):
        rule(0.9)


def test_rules_that_would_empty_a_leaf_by_their_pattern_are_refused():
    params = normals(0, {"a": (8, 16), "b": (16, 8)})
    rule = rules.one_shot(0.9, distribution=uniform, selection=masks.n_of_m(4))
    with pytest.raises(ValueError, match=r"weights at 'a'.*weights at 'b'"):
        rule.init(params, KEY)
    with pytest.raises(ValueError, match=r"weights at 'a'.*weights at 'b'"):
        jit(rule.update)(masks.dense_masks(params), params, None, 0, KEY)


@pytest.mark.parametrize("score", scores.GRADIENT_SCORES)
def test_scores_of_gradients_are_not_taken_without_them(score):
    params = normals(0)
    rule = rules.largest(0.5, score)
    with pytest.raises(ValueError, match=f"'{score.__name__}' needs gradients"):
        rule.init(params, KEY)


def test_pruning_takes_a_whole_number_of_iterations():
    with pytest.raises(ValueError, match=r"of at least 1 as `iterations`, got 2\.5"):
        rules.one_shot(0.5, iterations=2.5)


# What is not what was asked.

WIDE = {"a": (8, 16), "b": (16, 8), "head": (8, 4)}
GROUPS = {
    "n_of_m": masks.n_of_m(4),
    "blocks": masks.blocks((4, 4)),
    "channels": masks.channels(),
}
BY_RULE = {
    "static": rules.static,
    "one_shot": rules.one_shot,
    "gradual": lambda s, **kw: rules.gradual(schedules.linear(0.0, s, 2), **kw),
    "movement": lambda s, **kw: rules.movement(schedules.linear(0.0, s, 2), **kw),
    "set": rules.set_,
    "rigl": rules.rigl,
    "sparse_momentum": rules.sparse_momentum,
    "granet": lambda s, **kw: rules.granet(schedules.linear(0.0, s, 2), **kw),
    "largest": rules.largest,
    "ac_dc": lambda s, **kw: rules.ac_dc(s, schedules.every(1), **kw),
}


def refreshed(make, sparsity, **chosen):
    """Masks after a refresh; the weights of leaf "a" are far below those of others."""
    params = normals(3, WIDE)
    params["a"] = params["a"] / 1e3
    rule = make(sparsity, **chosen)
    begun = rule.init(params, KEY)
    return rule.update(begun, params, normals(4, WIDE), 3, KEY)


def cut(mask, group):
    """A mask with the entries of every group along the last axis."""
    if group == "n_of_m":
        return mask.reshape(-1, 4, mask.shape[1]).swapaxes(1, 2)
    if group == "blocks":
        parts = mask.reshape(mask.shape[0] // 4, 4, mask.shape[1] // 4, 4)
        return parts.swapaxes(1, 2).reshape(-1, 16)
    return mask.T


def some(*names, of):
    """All names; those that are not given are slow."""
    slow = pytest.mark.slow
    return [pytest.param(n, marks=() if n in names else slow) for n in of]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        # One that prunes, one that grows and one that draws; the pattern reaches the
        # others as it does these.
        *((name, "n_of_m") for name in ("one_shot", "rigl", "static")),
        ("rigl", "blocks"),
        *(
            pytest.param(name, group, marks=pytest.mark.slow)
            for name, group in itertools.product(BY_RULE, GROUPS)
            if (name, group)
            not in (
                *(("one_shot", "n_of_m"), ("rigl", "n_of_m")),
                *(("static", "n_of_m"), ("rigl", "blocks")),
            )
        ),
    ],
)
def test_groups_have_one_sparsity_in_every_leaf_unless_told_otherwise(name, group):
    live = jax.device_get(refreshed(BY_RULE[name], 0.5, selection=GROUPS[group]))
    for mask in live.values():
        kept = cut(mask, group).mean(axis=-1)
        assert mask.mean() == 0.5
        assert np.isin(kept, [0.5] if group == "n_of_m" else [0, 1]).all()


@pytest.mark.parametrize("name", some("one_shot", "rigl", of=BY_RULE))
@pytest.mark.parametrize("distribution", [global_, erk, uniform])
@pytest.mark.parametrize("group", some("n_of_m", "blocks", of=GROUPS))
def test_no_group_selection_empties_a_leaf(name, distribution, group):
    chosen = {"selection": GROUPS[group], "distribution": distribution}
    live = refreshed(BY_RULE[name], 0.7, **chosen)
    assert min(live_counts(live).values()) > 0


@pytest.mark.parametrize("name", BY_RULE)
@pytest.mark.parametrize("distribution", [None, global_, uniform])
def test_a_sparsity_that_a_pattern_cannot_have_is_refused(name, distribution):
    chosen = {"selection": masks.n_of_m(4), "distribution": distribution}
    with pytest.raises(ValueError, match=r"expected .*fewest .*; lower the sparsity"):
        refreshed(BY_RULE[name], 0.9, **chosen)


@pytest.mark.parametrize("distribution", some(None, global_, of=[None, global_, erk]))
def test_where_the_sparsity_is_traced_every_leaf_keeps_a_step(distribution):
    pattern = masks.n_of_m(4)

    @jit
    def live(sparsity):
        return refreshed(
            rules.one_shot, sparsity, selection=pattern, distribution=distribution
        )

    for path, count in live_counts(live(0.99)).items():
        assert count == pattern.step(path, WIDE[path])


WORDS = {"distribution": "erk", "selection": "2:4", "prunable": "kernel"}


@pytest.mark.parametrize("name", BY_RULE)
@pytest.mark.parametrize("argument", WORDS)
def test_words_in_the_place_of_functions_are_refused(name, argument):
    def begun():
        return BY_RULE[name](0.5, **{argument: WORDS[argument]}).init(normals(0), KEY)

    with pytest.raises(ValueError, match=f"expected a function as `{argument}`, "):
        begun()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.one_shot(0.5, score="magnitude"), "a function as `score`"),
        (lambda: rules.largest(0.5, "magnitude"), "a function as `score`"),
        (lambda: rules.prune_and_grow(0.5, None), "a function as `growth`"),
        (lambda: rules.one_shot(0.5, scores.snip), "as `score` a function of"),
        (lambda: rules.static(0.5, selection=masks.n_of_m), "`selection` a function"),
        (lambda: rules.rigl(0.5, schedules.cosine), "`drop_fraction` a function"),
        (lambda: rules.rigl(0.5, "cosine"), r"number in \[0, 1\] as `drop_fraction`"),
        (lambda: rules.rigl(0.5, 3.0), r"number in \[0, 1\] as `drop_fraction`, got 3"),
        (lambda: rules.set_(0.5, -0.1), r"number in \[0, 1\] as `drop_fraction`"),
        (lambda: rules.sparse_momentum(0.5, decay=3.0), r"\[0, 1\] as `decay`, got 3"),
        (lambda: rules.rigl(schedules.cubic(0.5, 2)), "expected one number as the spa"),
        (lambda: rules.ac_dc(0.5, 100), "expected a function as `compressed`"),
    ],
)
def test_what_is_no_choice_of_a_rule_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"score": lambda p, g, k: {"x": 1}}, "expected scores with the paths of the"),
        ({"score": lambda p, g, k: None}, "expected scores with the paths of the"),
        (
            {"score": lambda p, g, k: jax.tree.map(jnp.sum, p)},
            r"expected scores of shape \(3, 3, 2, 4\) at 'conv/kernel', got \(\)",
        ),
        ({"selection": lambda s, c, k: {"x": jnp.ones(1)}}, "return a mask of bool"),
        ({"selection": lambda s, c, k: None}, "return a mask of bool for every"),
        ({"distribution": lambda s, x: {"x": 1}}, "a number for every leaf of"),
        ({"distribution": lambda s, x: None}, "an integer, got None"),
        ({"distribution": lambda s, x: dict.fromkeys(s, 0.5)}, "an integer, got 0.5"),
        ({"distribution": lambda s, x: dict.fromkeys(s, 99)}, "from 0 to 72 weights"),
    ],
)
def test_choices_of_your_own_that_return_something_else_are_named(choice, message):
    rule = rules.one_shot(0.5, **choice)
    with pytest.raises(ValueError, match=message):
        rule.update(rule.init(normals(0), KEY), normals(0), normals(0), 0, KEY)


def test_masks_and_gradients_of_another_tree_are_refused():
    rule, params = rules.rigl(0.5), normals(0)
    begun = rule.init(params, KEY)
    with pytest.raises(ValueError, match="expected masks with the paths of the param"):
        rule.update({"x": 1}, params, params, 0, KEY)
    with pytest.raises(ValueError, match="expected gradients with the paths of the pa"):
        rule.update(begun, params, {"x": 1}, 0, KEY)
    with pytest.raises(
        ValueError, match=r"gradients of shape .* at 'conv/kernel', got"
    ):
        rule.update(begun, params, jax.tree.map(lambda x: x[:1], params), 0, KEY)


@pytest.mark.parametrize("key", [0, None, 1.5, np.int32([1, 2])])
def test_what_is_no_random_key_is_refused(key):
    with pytest.raises(ValueError, match="expected a random key, got"):
        rules.rigl(0.5).init(normals(0), key)


def test_legacy_keys_are_keys():
    for name in ("static", "rigl", "granet"):
        rule, key = RULES[name], jax.random.PRNGKey(3)
        begun = rule.init(normals(0), key)
        assert sum(live_counts(begun).values()) < 112
        rule.update(begun, normals(0), normals(1), 0, key)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda p: jax.tree.map(lambda x: np.zeros(x.shape, bool), p), "a live weight"),
        (lambda p: {"x": np.ones(2, bool)}, "unknown ones for"),
        (lambda p: p, r"a mask of bool\[4\] at 'conv/bias', got float32"),
        (lambda p: jax.tree.map(lambda x: np.ones(1, bool), p), "a mask of bool"),
    ],
)
def test_masks_of_a_rule_of_your_own_are_looked_at(made, message):
    own = rules.MaskRule(lambda p, key: made(p), lambda m, p, *rest: made(p))
    with pytest.raises(ValueError, match=message):
        rules.begin(own, normals(0), KEY)
    with pytest.raises(ValueError, match=message):
        rules.refresh(own, None, normals(0), None, 0, KEY)


# Parameters that are stacked over layers.


def by_path(masks_now, params, grads, step, key):
    """Masks that differ with the path, and a note of every leaf that is pruned."""

    def chosen(path, mask, weight, grad):
        return mask & (weight * grad > len(path) / 50) if weight.ndim > 1 else mask

    now = jax.tree_util.tree_map_with_path(
        lambda path, *leaves: chosen(tree.path_name(path), *leaves),
        *(masks_now, params, grads),
    )
    noted = {path: jnp.bool_(path.endswith("/1")) for path in tree.shapes(params)}
    return now, noted


def first_by_path(params, key):
    return tree.map_with_path(lambda path, w: w > -len(path) / 10, params)


OWN = rules.MaskRule(first_by_path, rules.Noting(by_path))


@pytest.mark.parametrize(
    "one",
    [
        OWN,
        *(
            pytest.param(RULES[name], id=name, marks=pytest.mark.slow)
            for name in ("static", "one_shot", "rigl", "granet")
        ),
    ],
)
def test_per_layer_is_the_rule_of_the_network_that_is_not_stacked(one):
    shapes = {"blocks": {"kernel": (3, 8, 6), "bias": (3, 6)}, "head": (6, 5)}
    stacked, grads = normals(0, shapes), normals(1, shapes)

    def apart(parts):
        blocks = jax.tree.map(lambda leaf: list(np.asarray(leaf)), parts["blocks"])
        return {"blocks": blocks, "head": np.asarray(parts["head"])}

    rule = rules.per_layer(one, "blocks/*")
    begun = rule.init(stacked, KEY)
    assert_same(apart(begun), one.init(apart(stacked), KEY))
    later, nan = rules.refresh(rule, begun, stacked, grads, 9, KEY)
    expected = one.update(apart(begun), apart(stacked), apart(grads), 9, KEY)
    assert_same(apart(later), expected)
    assert not later["blocks"]["kernel"].all()
    assert later["blocks"]["bias"].shape == (3, 6)
    if one is OWN:
        # What is noted of one layer is noted of the stack.
        assert {path: bool(has) for path, has in nan.items()} == {
            "blocks/kernel": True,
            "head": False,
        }
    with pytest.raises(ValueError, match=r"expected stacked leaves at 'layers/\*'"):
        rules.per_layer(one, "layers/*").init(stacked, KEY)
