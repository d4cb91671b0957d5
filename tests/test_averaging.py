"""Averages of weights against numpy, under masks, and beside any optimiser."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import SIZE, images, perceptron, start

from d2sparse import rules, train
from d2sparse.data import Split
from d2sparse.masks import apply_masks
from d2sparse.models import resnet8
from d2sparse.schedules import constant, every
from d2sparse.transforms import (
    average_weights,
    get_average,
    get_masks,
    set_masks,
    sparsify,
)

STEPS = 12


def walk(tx, params, average=get_average, **extra):
    """The parameters and the average after every update, from random gradients."""
    state, rng = tx.init(params), np.random.default_rng(0)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), average(state), state

    seen = []
    for _ in range(STEPS):
        grads = {p: np.float32(rng.normal(size=x.shape)) for p, x in params.items()}
        seen.append(step(params, state, grads))
        params, _, state = seen[-1]
    return seen


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32),
        "bias": jnp.zeros(5),
    }


CASES = list(itertools.product([0, 4, STEPS + 1], [None, 1.0, 3.0]))


@functools.cache
def averages():
    """All cases in one program: parameters and averages after every update."""
    plain = optax.sgd(0.1)
    each = [average_weights(plain, *case) for case in CASES]

    def update(grads, states, params):
        updates, after = zip(
            *(tx.update(grads, s, params) for tx, s in zip(each, states, strict=True)),
            strict=True,
        )
        return updates[0], after

    together = optax.GradientTransformation(
        lambda params: tuple(tx.init(params) for tx in each), update
    )
    return walk(together, weights(), lambda states: [*map(get_average, states)])


@pytest.mark.parametrize(("begin", "horizon"), CASES)
def test_the_average_is_that_of_numpy(begin, horizon):
    number = CASES.index((begin, horizon))
    seen = [(params, found[number], state) for params, found, state in averages()]
    trail = [np.asarray(params["kernel"], float) for params, _, _ in seen]
    expected = trail[0]
    for number, (_, average, _) in enumerate(seen):
        tail = number - begin + 1
        if tail <= 1:
            expected = trail[number]
        else:
            decay = 1 - 1 / tail
            decay = decay if horizon is None else min(decay, 1 - 1 / horizon)
            expected = decay * expected + (1 - decay) * trail[number]
        np.testing.assert_allclose(average["kernel"], expected, atol=1e-6)


def test_the_plain_average_is_the_mean_of_the_tail():
    tail = np.mean([params["bias"] for params, _, _ in averages()[4:]], axis=0)
    found = averages()[-1][1][CASES.index((4, None))]
    np.testing.assert_allclose(found["bias"], tail, atol=1e-6)


def test_the_training_is_left_as_it_is():
    plain = optax.adam(0.1)
    seen = walk(average_weights(plain, begin=2), weights())
    expected = walk(plain, weights(), lambda state: None)
    for (params, _, _), (alone, _, _) in zip(seen, expected, strict=True):
        for path in params:
            np.testing.assert_allclose(params[path], alone[path], atol=1e-6)


def test_under_moving_masks_the_average_is_zero_where_the_weights_are():
    rule = rules.set_(0.5, constant(0.5))
    tx = average_weights(sparsify(optax.sgd(0.1), rule, every(3)))
    seen = walk(tx, weights())
    masks = [np.asarray(get_masks(state)["kernel"]) for _, _, state in seen]
    assert (masks[0] != masks[-1]).any()
    for (_, average, _), mask in zip(seen, masks, strict=True):
        np.testing.assert_array_equal(np.asarray(average["kernel"]) != 0, mask)


def test_masks_are_found_and_set_through_the_average():
    tx = average_weights(sparsify(optax.sgd(0.1), rules.static(0.5)))
    state = tx.init(weights())
    masks = jax.tree.map(lambda mask: ~mask, get_masks(state)) | {
        "bias": jnp.ones(5, bool)
    }
    state = set_masks(state, masks)
    params = apply_masks(weights(), masks)
    _, state = tx.update(params, state, params)
    np.testing.assert_array_equal(get_average(state)["kernel"] != 0, masks["kernel"])


def test_further_arguments_reach_the_inner_optimiser():
    rule = rules.set_(0.5, constant(0.5))
    tx = average_weights(sparsify(optax.sgd(0.1), rule, every(1)))
    (_, _, before), *_, (_, _, after) = walk(tx, weights(), refresh=False)
    np.testing.assert_array_equal(
        get_masks(before)["kernel"], get_masks(after)["kernel"]
    )


def test_the_state_shares_no_buffer_with_the_parameters():
    params = weights()
    state = average_weights(optax.sgd(0.1)).init(params)
    assert state.average["kernel"] is not params["kernel"]
    jax.jit(lambda p, s: (p, s), donate_argnums=(0, 1))(params, state)


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)]
)
def test_half_precision_is_averaged_in_float32_and_returned_as_it_is(dtype):
    params = {"w": jnp.ones(3, dtype), "x": jnp.ones(2)}
    tx = average_weights(optax.sgd(1.0))
    state, update = tx.init(params), jax.jit(tx.update)
    zero = jax.tree.map(jnp.zeros_like, params)
    # Of 600 times 1 and 600 times 2: steps of 1 / n are lost in half precision.
    for value in (1.0, 2.0):
        params = jax.tree.map(lambda x, v=value: jnp.full_like(x, v), params)
        for _ in range(600):
            _, state = update(zero, state, params)
    assert state.average["w"].dtype == jnp.float32
    average = get_average(state)
    assert (average["w"].dtype, average["x"].dtype) == (dtype, jnp.float32)
    assert average["w"].tolist() == [1.5] * 3
    np.testing.assert_allclose(average["x"], 1.5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"begin": -1}, {"horizon": 0.5}])
def test_what_is_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="begin of at least 0 and a horizon of at"):
        average_weights(optax.sgd(0.1), **options)


def test_the_parameters_are_needed():
    tx = average_weights(optax.sgd(0.1))
    with pytest.raises(ValueError, match="average_weights needs the parameters"):
        tx.update(weights(), tx.init(weights()))


def test_there_has_to_be_one_average():
    with pytest.raises(ValueError, match=r"one optimiser .*got 0 of them"):
        get_average(optax.sgd(0.1).init(weights()))
    state = average_weights(optax.sgd(0.1)).init(weights())
    with pytest.raises(ValueError, match="got 2 of them; take that of each network"):
        get_average((state, state))


# Sharpness


def quadratic(params):
    return jnp.sum(jnp.array([[1.0, 4.0, 9.0]]) * params["w"] ** 2) / 2


def test_a_sharpness_aware_step_is_that_of_numpy():
    tx = train.make_optimizer("sgd", 0.1, weight_decay=0.0, sharpness=0.5)
    params = {"w": jnp.array([[1.0, -1.0, 0.5]])}
    grad = jax.grad(quadratic)
    updates, _ = tx.update(
        grad(params), tx.init(params), params, grad_fn=lambda p, _: grad(p)
    )
    scale, w = np.array([[1.0, 4.0, 9.0]]), np.asarray(params["w"], float)
    uphill = w + 0.5 * scale * w / np.linalg.norm(scale * w)
    np.testing.assert_allclose(updates["w"], -0.1 * scale * uphill, rtol=1e-5)


def test_uphill_is_along_live_weights_alone():
    masks = {"w": jnp.array([[True, False, True]])}
    tx = sparsify(
        train.make_optimizer("sgd", 0.1, sharpness=0.5), rules.fixed(masks), every(9)
    )
    params, places = {"w": jnp.array([[1.0, 0.0, 0.5]])}, []

    def grad_fn(params, _):
        places.append(np.asarray(params["w"]).ravel())
        return {"w": 2 * params["w"] + 1}

    updates, _ = tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn)
    gradient = np.array([3.0, 0.0, 2.0])
    uphill = [1.0, 0.0, 0.5] + 0.5 * gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(places[1], uphill, rtol=1e-5)
    expected = -0.1 * np.array([1, 0, 1]) * (2 * uphill + 1)
    np.testing.assert_allclose(updates["w"].ravel(), expected, rtol=1e-5)


def test_without_a_gradient_there_is_no_uphill():
    tx = train.make_optimizer("sgd", 0.1, sharpness=0.5)
    params = {"w": jnp.zeros((1, 3))}
    grad = jax.grad(quadratic)
    updates, _ = tx.update(
        grad(params), tx.init(params), params, grad_fn=lambda p, _: grad(p)
    )
    assert (np.asarray(updates["w"]) == 0).all()


# Statistics


def test_statistics_are_taken_from_the_data_and_not_from_the_past():
    program = train.make_program(start(batch_size=SIZE))
    x, key = train.inputs(images()), jax.random.key(1)
    params, fresh = perceptron().init(jax.random.key(0), x)
    spoilt = {"mean": fresh["mean"] + 5}
    kernel = np.asarray(params["first"]["kernel"])
    expected = (np.asarray(x).reshape(SIZE, -1) @ kernel).mean(axis=0)
    for state in (fresh, spoilt):
        found = program.statistics(params, state, images(), key)["mean"]
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_means_and_variances_of_a_residual_network_are_taken_from_the_data():
    model, rng = resnet8(width=2), np.random.default_rng(0)
    pixels = rng.integers(256, size=(20, 8, 8, 1)).astype(np.uint8)
    data = train.to_device(Split(pixels, np.zeros(20, np.int32)))
    params, fresh = model.init(jax.random.key(0), train.inputs(data))
    spoilt = jax.tree.map(lambda x: x + 5.0, fresh)
    statistics = train.make_program(train.plain(model, data)).statistics
    first, second = (
        statistics(params, state, data, jax.random.key(1)) for state in (fresh, spoilt)
    )
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-3, err_msg=str(path))
    x = jax.lax.conv_general_dilated(
        train.inputs(data),
        params["stem_conv"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    found = first["batch_stats"]["stem_norm"]["mean"]
    np.testing.assert_allclose(found, x.mean((0, 1, 2)), rtol=1e-2, atol=1e-3)


def test_a_network_without_statistics_needs_none():
    program = train.make_program(start())
    assert program.statistics(None, {}, None, None) == {}
