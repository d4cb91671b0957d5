"""Proximal steps and the budget of groups against numpy, and in other optimisers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2sparse import regularizers, rules
from d2sparse.transforms import group_budget, proximal, sparsify
from d2sparse.tree import flatten, is_kernel

RATE = 0.1
SHAPES = {
    "conv": {"kernel": (2, 2, 1, 4), "bias": (4,)},
    "dense": {"kernel": (3, 5), "bias": (5,)},
    "head": {"kernel": (5, 2)},
}
SETS = {
    "conv": {"conv/kernel": -1, "conv/bias": 0},
    "dense": {"dense/kernel": -1, "dense/bias": 0},
}
TOTAL = 9


def normals(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(scale * rng.normal(size=shape)),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


PARAMS, GRADS = normals(0), normals(1)
PLAIN = jax.tree.map(lambda g: np.float32(-RATE) * g, GRADS)


def unlearned(path, leaf):
    return is_kernel(path, leaf) and "head" not in path


# One operator


@functools.cache
def steps():
    """Parameters and updates of every operator, in one program."""
    operators = {
        "soft": regularizers.soft_threshold,
        "groups": functools.partial(regularizers.group_soft_threshold, groups=SETS),
        "singular": regularizers.singular_value_threshold,
        "shrink": regularizers.shrink,
    }
    made = {n: proximal(optax.sgd(RATE), prox, 0.3) for n, prox in operators.items()}

    @jax.jit
    def run(params, grads):
        def of(tx):
            updates, _ = tx.update(grads, tx.init(params), params)
            return optax.apply_updates(params, updates), updates

        before = optax.apply_updates(params, PLAIN)
        by_hand = {name: prox(before, 0.3) for name, prox in operators.items()}
        return {name: of(tx) for name, tx in made.items()}, by_hand

    return jax.device_get(run(PARAMS, GRADS))


@pytest.mark.parametrize("name", ["soft", "groups", "singular", "shrink"])
def test_the_operator_comes_after_the_update(name):
    each, by_hand = steps()
    for path, w in flatten(each[name][0]).items():
        expected = flatten(by_hand[name])[path]
        np.testing.assert_allclose(w, expected, atol=1e-6)
        assert (w[expected == 0] == 0).all()
        if path.endswith("bias") and name != "groups":
            np.testing.assert_array_equal(
                flatten(each[name][1])[path], flatten(PLAIN)[path]
            )


def test_a_soft_threshold_is_that_of_numpy():
    w = PARAMS["head"]["kernel"] + PLAIN["head"]["kernel"]
    expected = np.sign(w) * np.maximum(np.abs(w) - 0.3, 0)
    found = steps()[0]["soft"][0]["head"]["kernel"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0 < (expected == 0).sum() < w.size


def test_proximal_gradient_descent_solves_the_lasso():
    # min |x w - y|^2 / 2 + c |w|_1 with an orthonormal x has a closed form.
    rng, c = np.random.default_rng(0), 0.5
    x = np.linalg.qr(rng.normal(size=(8, 5)))[0].astype(np.float32)
    y = np.float32(x @ [[2.0], [0.2], [-1.0], [0.0], [0.6]])
    rate = optax.cosine_decay_schedule(0.5, 100)
    tx = proximal(
        optax.sgd(rate), regularizers.soft_threshold, lambda step: c * rate(step)
    )

    def step(carry, _):
        params, state = carry
        grads = {"kernel": x.T @ (x @ params["kernel"] - y)}
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run():
        params = {"kernel": jnp.ones((5, 1))}
        return jax.lax.scan(step, (params, tx.init(params)), length=100)[0][0]

    found = run()["kernel"].ravel()
    np.testing.assert_allclose(found, [1.5, 0, -0.5, 0, 0.1], atol=1e-5)
    assert (np.asarray(found)[[1, 3]] == 0).all()


# A budget of groups


def groups_of(params):
    """The weights of every group by (layer, index), in numpy."""
    return {
        (layer, j): np.append(
            np.asarray(params[layer]["kernel"], float)[..., j].ravel(),
            params[layer]["bias"][j],
        )
        for layer in SETS
        for j in range(SHAPES[layer]["bias"][0])
    }


def budget_by_hand(params, kept, strength):
    """Every group after the operator, and how many are left."""
    found = groups_of(params)
    means = {g: np.sqrt((v**2).mean()) for g, v in found.items()}
    largest = [
        max((g for g in found if g[0] == layer), key=means.get) for layer in SETS
    ]
    rest = sorted((means[g] for g in found if g not in largest), reverse=True)
    outside = rest[kept - 2 :][:1] or [0.0]
    threshold = min(strength, outside[0])
    return {
        g: v if g in largest else v * max(0.0, 1 - threshold / means[g])
        for g, v in found.items()
    }


BUDGETS = [(kept, s) for kept in (2, 5, TOTAL, 20) for s in (math.inf, 0.5, 0.0)]


@functools.cache
def budgets():
    """Parameters after an update under every budget, in one program."""

    @jax.jit
    @jax.vmap
    def run(kept, strength):
        tx = group_budget(optax.sgd(RATE), kept, strength, SETS)
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        return optax.apply_updates(PARAMS, updates), updates

    kept, strengths = zip(*BUDGETS, strict=True)
    return jax.device_get(run(np.int32(kept), np.float32(strengths)))


@pytest.mark.parametrize("number", range(len(BUDGETS)))
def test_a_budget_is_that_of_numpy(number):
    kept, strength = BUDGETS[number]
    params, updates = jax.tree.map(lambda x: x[number], budgets())
    before = jax.tree.map(np.add, PARAMS, PLAIN)
    found, expected = groups_of(params), budget_by_hand(before, kept, strength)
    for group, weights in expected.items():
        np.testing.assert_allclose(found[group], weights, atol=1e-6)
        assert found[group].any() == weights.any()
    alive = {group for group, weights in found.items() if weights.any()}
    assert {layer for layer, _ in alive} == set(SETS)
    if strength == math.inf:
        assert len(alive) == min(kept, TOTAL)
    if strength == 0 or kept >= TOTAL:
        for path, update in flatten(updates).items():
            np.testing.assert_array_equal(update, flatten(PLAIN)[path])
    head = PLAIN["head"]["kernel"]
    np.testing.assert_array_equal(updates["head"]["kernel"], head)


def test_a_budget_is_met_and_then_nothing_shrinks():
    tx = group_budget(optax.sgd(0.0), 4, 0.05, SETS)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(GRADS, state, params)
        return (optax.apply_updates(params, updates), state), params

    run = jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=60)[1])
    seen = jax.device_get(run())
    alive = [
        sum(
            v.any() for v in groups_of(jax.tree.map(lambda x, i=i: x[i], seen)).values()
        )
        for i in range(60)
    ]
    assert alive[0] == TOTAL
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] == 4
    met = alive.index(4) + 1
    kernels = seen["conv"]["kernel"]
    np.testing.assert_array_equal(kernels[met], kernels[-1])


def test_the_number_of_groups_may_follow_a_schedule():
    tx = group_budget(
        optax.sgd(0.0),
        lambda step: jnp.array([7, 5, 3])[step],
        math.inf,
        functools.partial(regularizers.neurons, bias=True, prunable=unlearned),
    )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=3)[1])
    seen = jax.device_get(run())
    for i, kept in enumerate([7, 5, 3]):
        groups = groups_of(jax.tree.map(lambda x, i=i: x[i], seen))
        assert sum(weights.any() for weights in groups.values()) == kept


# In other optimisers


MADE = {
    "proximal": lambda inner: proximal(inner, regularizers.soft_threshold, 0.1),
    "budget": lambda inner: group_budget(inner, 5, 10.0, SETS),
}


MASKS = jax.tree.map(lambda w: w > -0.5, normals(3))


@pytest.mark.parametrize("name", MADE)
def test_under_masks_and_around_them_pruned_weights_stay_zero(name):
    sgd, rule = optax.sgd(RATE, momentum=0.9), rules.fixed(MASKS)
    orders = sparsify(MADE[name](sgd), rule), MADE[name](sparsify(sgd, rule))
    begin = jax.tree.map(np.multiply, PARAMS, MASKS)

    def step(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(GRADS, state, params, refresh=False)
            return (optax.apply_updates(params, updates), state), None

        return step

    @jax.jit
    def run():
        each = [
            jax.lax.scan(step(tx), (begin, tx.init(begin)), length=2) for tx in orders
        ]
        return [params for (params, _), _ in each]

    for params in jax.device_get(run()):
        for path, w in flatten(params).items():
            assert (w[~flatten(MASKS)[path]] == 0).all()
        kernel, mask = params["dense"]["kernel"], MASKS["dense"]["kernel"]
        assert (kernel[mask] == 0).any()  # Those that the operator makes 0.
        assert (kernel[mask] != 0).any()


@pytest.mark.parametrize("name", MADE)
def test_beside_other_optimisers_and_in_several_steps(name):
    labels = {"conv": "near", "dense": "near", "head": "rest"}
    tx = optax.MultiSteps(
        optax.partition(
            {"near": MADE[name](optax.adam(RATE)), "rest": optax.sgd(1.0)}, labels
        ),
        2,
    )

    @jax.jit
    def run():
        state, params, seen = tx.init(PARAMS), PARAMS, []
        for seed in (1, 1):
            updates, state = tx.update(normals(seed), state, params)
            params = optax.apply_updates(params, updates)
            seen.append(params)
        return seen

    one, two = jax.device_get(run())
    np.testing.assert_array_equal(one["dense"]["kernel"], PARAMS["dense"]["kernel"])
    expected = PARAMS["head"]["kernel"] - GRADS["head"]["kernel"]
    np.testing.assert_allclose(two["head"]["kernel"], expected, atol=1e-6)
    if name == "proximal":
        moved = PARAMS["dense"]["kernel"] - RATE * np.sign(GRADS["dense"]["kernel"])
        expected = np.sign(moved) * np.maximum(np.abs(moved) - 0.1, 0)
        np.testing.assert_allclose(two["dense"]["kernel"], expected, atol=1e-4)


@pytest.mark.parametrize("name", MADE)
def test_the_state_is_known_from_shapes_alone(name):
    tx, shapes = MADE[name](optax.adam(RATE)), jax.eval_shape(lambda: PARAMS)
    found, made = tx.init(shapes), jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, made)


@pytest.mark.parametrize("name", MADE)
def test_further_arguments_reach_the_inner_optimiser(name):
    seen = []

    def update(updates, state, params=None, *, mark, **extra):
        seen.append(mark)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = MADE[name](inner)
    jax.eval_shape(lambda: tx.update(GRADS, tx.init(PARAMS), PARAMS, mark=7))
    assert seen == [7]


def test_zeros_are_exact_where_updates_are_less_precise_than_parameters():
    tx = proximal(optax.sgd(RATE), regularizers.soft_threshold, 100.0)
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), GRADS)
    run = jax.jit(lambda: tx.update(grads, tx.init(PARAMS), PARAMS)[0])
    after = jax.tree.map(np.add, PARAMS, jax.device_get(run()))
    assert not after["conv"]["kernel"].any()


@pytest.mark.parametrize("name", MADE)
def test_a_gradient_that_is_not_a_number_shows_in_the_update(name):
    grads = jax.tree.map(np.copy, GRADS)
    grads["dense"]["kernel"][1, 2] = np.nan
    tx = MADE[name](optax.sgd(RATE))
    updates = jax.jit(lambda: tx.update(grads, tx.init(PARAMS), PARAMS)[0])()
    assert np.isnan(updates["dense"]["kernel"]).any()


# Refused


def updated(tx):
    return jax.eval_shape(lambda: tx.update(GRADS, tx.init(PARAMS), PARAMS))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: proximal(optax.sgd(RATE), regularizers.soft_threshold, -0.1),
            r"expected a number in \[0, inf\] as `strength`, got -0.1",
        ),
        (
            lambda: proximal(optax.sgd(RATE), "soft", 0.1),
            "a function as `prox`, params, strength -> ..., such as `regularizers.soft",
        ),
        (
            lambda: group_budget(optax.sgd(RATE), 3, -1.0),
            r"expected a number in \[0, inf\] as `strength`, got -1.0",
        ),
        (
            lambda: updated(group_budget(optax.sgd(RATE), 1, 0.1, SETS)),
            r"a budget of at least 2 groups, one for every layer of \['conv', 'den",
        ),
        (
            lambda: updated(group_budget(optax.sgd(RATE), 2.5, 0.1, SETS)),
            "a whole number of at least 1 as `groups_kept`, got 2.5",
        ),
        (
            lambda: updated(group_budget(optax.sgd(RATE), 4, 0.1, {"a": {"b": 0}})),
            r"expected the parameters with the paths of the parameters, got none for",
        ),
        (
            lambda: MADE["budget"](optax.sgd(RATE)).update(GRADS, None),
            "group_budget needs the parameters: call",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
