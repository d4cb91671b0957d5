"""What `sparsify` shows its rule, how it tells of NaN, and `freeze`."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2sparse import rules, tree
from d2sparse.masks import apply_masks, dense_masks
from d2sparse.rules import MaskRule
from d2sparse.schedules import at, every
from d2sparse.transforms import (
    check_refreshes,
    freeze,
    get_masks,
    set_masks,
    sparse_states,
    sparsify,
)

SHAPES = {"conv": {"kernel": (6, 4), "bias": (4,)}, "head": {"kernel": (4, 3)}}
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normals(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def make_step(tx):
    @jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


# What a rule observes, and NaN.


def showing_rule(observe):
    """A dense rule that reports what it is shown, through its masks' signs."""

    def update(masks, params, grads, step, key):
        return jax.tree.map(lambda g: g > 0, grads)

    return MaskRule(lambda params, key: dense_masks(params), update, observe)


def test_a_rule_is_shown_what_it_observes_at_every_step():
    # A plain sum of the gradients: -3 + 1 + 1 is below 0 although the last is above.
    tx = sparsify(optax.sgd(0.1), showing_rule(optax.trace(1.0)), every(2))
    params = {"w": jnp.array([1.0, 1.0])}
    state, step = tx.init(params), make_step(tx)
    for gradient in ([-3.0, 1.0], [1.0, 1.0], [1.0, -1.0]):
        params, state = step(params, state, {"w": jnp.array(gradient)})
    assert get_masks(state)["w"].tolist() == [False, True]


def test_growth_gradients_are_for_rules_that_observe_the_gradient():
    def fail():
        raise AssertionError("not asked for")

    tx = sparsify(optax.sgd(0.1), showing_rule(optax.ema(0.9)), at([0]))
    params = {"w": jnp.array([1.0])}
    _, state = tx.update(params, tx.init(params), params, growth_fn=fail)
    assert get_masks(state)["w"].tolist() == [True]


def nan_at(path, values):
    return tree.map_with_path(lambda p, x: x * (math.nan if p == path else 1.0), values)


REFRESHED = sparsify(optax.sgd(0.1), rules.rigl(0.5), every(1))


@jit
def refreshed(params, grads, growth, state):
    """The state of RigL's optimiser after a step."""
    return REFRESHED.update(grads, state, params, growth_fn=lambda: growth)[1]


@pytest.mark.parametrize("where", ["weights", "gradients", "growth gradients"])
def test_nan_at_a_refresh_is_noted_by_compiled_steps_and_names_the_leaf(where):
    params = apply_masks(normals(0), get_masks(REFRESHED.init(normals(0))))
    broken = nan_at("head/kernel", params)
    growth = broken if where == "growth gradients" else params

    weights = broken if where == "weights" else params
    grads = broken if where == "gradients" else params
    state = refreshed(weights, grads, growth, REFRESHED.init(params))
    check_refreshes(state)  # Not yet: step 0 does not refresh.
    state = refreshed(weights, grads, growth, state)
    if where == "gradients":  # They are not what the rule is shown.
        check_refreshes(state)
        return
    with pytest.raises(ValueError, match=r"got NaN in \['head/kernel'\]; lower the"):
        check_refreshes((optax.EmptyState(), state))  # However deep.
    state = refreshed(params, params, params, state)
    with pytest.raises(ValueError, match="head/kernel"):
        check_refreshes(state)  # It is not forgotten.


def test_nan_at_a_refresh_is_raised_at_once_outside_of_compiled_functions():
    tx = sparsify(optax.sgd(0.1), rules.rigl(0.5), at([0]))
    params = normals(0)
    with pytest.raises(ValueError, match=r"got NaN in \['conv/bias'\]"):
        tx.update(nan_at("conv/bias", params), tx.init(params), params)


def test_growth_gradients_of_all_leaves_reach_one_branch_of_a_partition():
    branches = {"sparse": sparsify(optax.sgd(0.1), rules.rigl(0.5), at([0]))}
    branches["rest"] = optax.sgd(0.1)
    labels = {"conv": {"kernel": "sparse", "bias": "rest"}, "head": "rest"}
    tx, params = optax.partition(branches, labels), normals(0)
    step = jit(
        lambda state, grads, growth: tx.update(
            grads, state, params, growth_fn=lambda: growth
        )[1]
    )
    state = step(tx.init(params), params, nan_at("head/kernel", params))
    check_refreshes(state)
    state = step(tx.init(params), params, nan_at("conv/kernel", params))
    with pytest.raises(ValueError, match="conv/kernel"):
        check_refreshes(state)


@pytest.mark.parametrize(
    "name",
    [
        "rigl",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("movement", "sparse_momentum", "granet")
        ),
    ],
)
def test_a_refresh_may_be_traced_outside_of_compiled_functions(name):
    rule = {
        "movement": rules.movement(lambda step: 0.5),
        "sparse_momentum": rules.sparse_momentum(0.5),
        "rigl": rules.rigl(0.5),
        "granet": rules.granet(lambda step: 0.5),
    }[name]
    tx, params = sparsify(optax.sgd(0.1), rule, every(1)), normals(0)
    state = tx.init(params)
    params = apply_masks(params, get_masks(state))
    for _ in range(2):
        _, state = tx.update(normals(1), state, params)
    live = sum(
        int(m.sum())
        for path, m in tree.flatten(get_masks(state)).items()
        if "kernel" in path
    )
    assert live == 18


def test_nan_is_found_in_vmapped_runs():
    tx = sparsify(optax.sgd(0.1), rules.rigl(0.5), at([0]))
    params = jax.tree.map(lambda *x: jnp.stack(x), normals(0), normals(1))
    broken = jax.tree.map(lambda x: x.at[1].multiply(math.nan), params)

    @jit
    def one(params, grads):
        return tx.update(grads, tx.init(params), params)[1]

    state = jax.vmap(one)(params, broken)
    with pytest.raises(ValueError, match=r"'conv/bias', 'conv/kernel', 'head/kernel'"):
        check_refreshes(state)


# Freezing.


def frozen_run(tx, params, steps=4):
    state, step = tx.init(params), make_step(tx)
    for number in range(steps):
        params, state = step(params, state, normals(number + 1))
    return params, state


@pytest.mark.parametrize(
    "inner",
    [optax.sgd(0.1, 0.9), pytest.param(optax.adamw(0.1), marks=pytest.mark.slow)],
)
def test_frozen_weights_hold_their_bits_and_live_ones_train_as_under_sparsify(inner):
    params = jax.tree.map(jnp.asarray, normals(0))
    rule = rules.static(0.5)
    masks = rule.init(params, jax.random.key(1))
    held, state = frozen_run(freeze(inner, rules.fixed(masks)), params)
    sparse = apply_masks(params, masks)
    moved, _ = frozen_run(sparsify(inner, rules.fixed(masks)), sparse)
    assert_same(get_masks(state), masks)
    off = jax.tree.map(jnp.logical_not, masks)
    assert_same(apply_masks(held, off), apply_masks(params, off))
    assert_same(apply_masks(held, masks), apply_masks(moved, masks))
    assert sparse_states(state) == []


def test_a_weight_may_thaw_and_starts_from_the_value_it_has():
    tx = freeze(optax.sgd(1.0, momentum=0.9), rules.largest(0.5), every(1))
    params = {"w": jnp.array([[2.0, 1.0]])}
    state, step = tx.init(params), make_step(tx)
    assert get_masks(state)["w"].tolist() == [[True, False]]
    params, state = step(params, state, {"w": jnp.array([[1.5, 9.0]])})
    assert params["w"].tolist() == [[0.5, 1.0]]
    params, state = step(params, state, {"w": jnp.array([[9.0, 0.25]])})
    assert get_masks(state)["w"].tolist() == [[False, True]]
    assert params["w"].tolist() == [[0.5, 0.75]]


def test_freezing_asks_for_the_parameters_too():
    tx = freeze(optax.sgd(0.1), rules.static(0.5))
    params = normals(0)
    with pytest.raises(ValueError, match="freeze needs the parameters"):
        tx.update(params, tx.init(params))


def test_masks_of_a_frozen_state_can_be_replaced():
    tx = freeze(optax.sgd(0.1), rules.static(0.5))
    params = normals(0)
    state = set_masks(tx.init(params), dense_masks(params))
    assert_same(get_masks(state), dense_masks(params))
