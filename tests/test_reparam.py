"""Reparametrisations against their closed forms in numpy, and what they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from d2sparse import reparam
from d2sparse.masks import apply_masks, n_of_m, top_k

WEIGHTS = np.float32([[1.5, -0.25, 0.0, -0.0], [-3.0, 0.75, 0.5, 2.0]])
MASK = np.array([[True, False, True, False], [False, True, True, False]])
COTANGENT = np.float32([[0.5, -2.0, 1.0, 3.0], [4.0, 0.25, -1.0, 8.0]])
PARAMS = {"kernel": jnp.asarray(WEIGHTS), "bias": jnp.array([0.0, -0.5, 2.0])}
MASKS = {"kernel": jnp.asarray(MASK), "bias": jnp.ones(3, bool)}
THRESHOLDS = {"kernel": jnp.float32(0.0)}
REPARAMS = {
    "straight_through": lambda p: reparam.straight_through(p, MASKS),
    "sr_ste": lambda p: reparam.sr_ste(p, MASKS),
    "soft_threshold": lambda p: reparam.soft_threshold(p, THRESHOLDS),
    "powerprop": lambda p: reparam.powerprop(p, 1.5),
    "powerprop_inverse": lambda p: reparam.powerprop_inverse(p, 1.5),
}


def gradient(f, *args):
    """Gradients of the kernel with the given cotangent, for every argument."""
    return jax.vjp(lambda *a: f(*a)["kernel"], *args)[1](jnp.asarray(COTANGENT))


def bits(array):
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize("f", REPARAMS.values(), ids=REPARAMS)
def test_leaves_that_are_not_prunable_pass_unchanged(f):
    assert (
        f(PARAMS)["bias"] is PARAMS["bias"]
        or (bits(f(PARAMS)["bias"]) == bits(PARAMS["bias"])).all()
    )
    (grads,) = jax.vjp(lambda p: f(p)["bias"], PARAMS)[1](jnp.arange(3.0))
    assert grads["bias"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("f", REPARAMS.values(), ids=REPARAMS)
def test_the_same_under_jit_and_vmap(f):
    expected, (slopes,) = f(PARAMS)["kernel"], gradient(f, PARAMS)
    np.testing.assert_allclose(jax.jit(f)(PARAMS)["kernel"], expected, rtol=1e-6)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    both = jax.jit(jax.vmap(f))(stacked)["kernel"]
    np.testing.assert_allclose(both[0], expected, rtol=1e-6)
    np.testing.assert_allclose(
        both[1], f({**PARAMS, "kernel": 2 * PARAMS["kernel"]})["kernel"], rtol=1e-6
    )
    (many,) = jax.vmap(lambda p: gradient(f, p))(stacked)
    np.testing.assert_allclose(many["kernel"][0], slopes["kernel"], rtol=1e-6)


@pytest.mark.parametrize("f", REPARAMS.values(), ids=REPARAMS)
def test_bfloat16_stays_bfloat16(f):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    effective, pullback = jax.vjp(f, half)
    (grads,) = pullback(effective)
    for leaf in [*jax.tree.leaves(effective), *jax.tree.leaves(grads)]:
        assert leaf.dtype == jnp.bfloat16


@pytest.mark.parametrize("f", [reparam.straight_through, reparam.sr_ste])
def test_masked_weights_are_exact(f):
    special = np.float32([[np.inf, np.nan, -0.0, 1e-40], [np.nan, -np.inf, 3e38, -1]])
    special[1, 1] = np.nan
    params = {"kernel": jnp.asarray(special), "bias": jnp.zeros(3)}
    effective = f(params, MASKS)["kernel"]
    expected = np.where(MASK, special, np.float32(0))
    np.testing.assert_array_equal(bits(effective), bits(expected))


def test_straight_through_passes_the_gradient_to_all_weights():
    (grads,) = gradient(REPARAMS["straight_through"], PARAMS)
    np.testing.assert_array_equal(grads["kernel"], COTANGENT)
    _, tangents = jax.jvp(REPARAMS["straight_through"], (PARAMS,), (PARAMS,))
    np.testing.assert_array_equal(tangents["kernel"], WEIGHTS)


@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.5])
def test_sr_ste_adds_a_pull_to_pruned_weights(decay):
    expected = COTANGENT + np.float32(decay) * (1 - MASK) * WEIGHTS

    @jax.jit
    def grads(decay):
        return gradient(lambda p: reparam.sr_ste(p, MASKS, decay), PARAMS)[0]

    np.testing.assert_allclose(grads(decay)["kernel"], expected, rtol=1e-6)
    swept = jax.vmap(grads)(jnp.array([decay, 1.0]))["kernel"]
    np.testing.assert_allclose(swept[0], expected, rtol=1e-6)
    np.testing.assert_allclose(swept[1], COTANGENT + (1 - MASK) * WEIGHTS, rtol=1e-6)


def test_sr_ste_pulls_no_live_weight_that_overflowed():
    params = {**PARAMS, "kernel": jnp.where(MASK, jnp.inf, PARAMS["kernel"])}
    (grads,) = gradient(lambda p: reparam.sr_ste(p, MASKS, 0.5), params)
    assert jnp.isfinite(grads["kernel"]).all()


@pytest.mark.parametrize("f", [reparam.straight_through, reparam.sr_ste])
def test_masks_that_do_not_fit_are_refused(f):
    with pytest.raises(ValueError, match="expected a mask of shape \\(2, 4\\) at 'ke"):
        f(PARAMS, {**MASKS, "kernel": jnp.ones((4, 2), bool)})


@pytest.mark.parametrize("s", [-30.0, -1.0, 0.0, 0.5])
def test_soft_threshold_equals_its_definition(s):
    threshold = 1 / (1 + np.exp(-np.float64(s)))
    expected = np.sign(WEIGHTS) * np.maximum(np.abs(WEIGHTS) - threshold, 0)
    effective = reparam.soft_threshold(PARAMS, {"kernel": jnp.float32(s)})["kernel"]
    np.testing.assert_allclose(effective, expected, rtol=1e-6)
    zero = np.abs(WEIGHTS) <= threshold
    np.testing.assert_array_equal(bits(effective[zero]), 0)


def test_gradients_of_soft_threshold():
    s, sigmoid = jnp.float32(0.25), 1 / (1 + np.exp(-0.25))
    live = np.abs(WEIGHTS) > sigmoid
    grads, slopes = gradient(reparam.soft_threshold, PARAMS, {"kernel": s})
    np.testing.assert_array_equal(grads["kernel"], np.where(live, COTANGENT, 0))
    expected = -sigmoid * (1 - sigmoid) * np.sum(live * np.sign(WEIGHTS) * COTANGENT)
    np.testing.assert_allclose(slopes["kernel"], expected, rtol=1e-6)


def test_soft_threshold_shows_a_weight_that_is_nan():
    params = {"kernel": jnp.array([[jnp.nan, 0.1]])}
    effective = reparam.soft_threshold(params, THRESHOLDS)["kernel"]
    assert jnp.isnan(effective).tolist() == [[True, False]]


def test_thresholds_are_made_for_prunable_leaves():
    made = reparam.init_thresholds(PARAMS, -5.0)
    assert {p: (s.shape, s.dtype, float(s)) for p, s in made.items()} == {
        "kernel": ((), jnp.float32, -5.0)
    }
    chosen = reparam.init_thresholds(PARAMS, 0.0, lambda path, leaf: path == "bias")
    effective = reparam.soft_threshold(PARAMS, chosen)
    assert effective["kernel"] is PARAMS["kernel"]
    assert effective["bias"].tolist() == [0.0, 0.0, 1.5]


def test_a_threshold_of_an_unknown_leaf_is_refused():
    with pytest.raises(
        ValueError, match="expected paths of the tree, got \\['head'\\]"
    ):
        reparam.soft_threshold(PARAMS, {"head": jnp.zeros(())})


def test_nonzero_masks_count_only_prunable_leaves():
    params = {"kernel": jnp.array([[0.0, -0.0, 1.0, jnp.nan]]), "bias": jnp.zeros(2)}
    found = reparam.nonzero_masks(params)
    assert found["kernel"].tolist() == [[False, False, True, True]]
    assert found["bias"].tolist() == [True, True]
    everywhere = reparam.nonzero_masks(params, lambda path, leaf: True)
    assert everywhere["bias"].tolist() == [False, False]


@pytest.mark.parametrize("alpha", [1.0, 1.25, 2.0, 3.0])
def test_powerprop_and_its_slope(alpha):
    theta = WEIGHTS.astype(np.float64)
    effective = reparam.powerprop(PARAMS, alpha)["kernel"]
    np.testing.assert_allclose(
        effective, np.sign(theta) * np.abs(theta) ** alpha, rtol=1e-5
    )
    (grads,) = gradient(lambda p: reparam.powerprop(p, alpha), PARAMS)
    slope = alpha * np.abs(theta) ** (alpha - 1)
    np.testing.assert_allclose(grads["kernel"], slope * COTANGENT, rtol=1e-5)
    nonzero = {"kernel": PARAMS["kernel"][1:]}
    check_grads(lambda p: reparam.powerprop(p, alpha), (nonzero,), 1, rtol=0.02)


def test_powerprop_with_alpha_1_is_the_identity():
    tiny = {"kernel": jnp.array([[0.0, -0.0, 1e-20, -3e38, jnp.inf]])}
    effective, pullback = jax.vjp(lambda p: reparam.powerprop(p, 1.0), tiny)
    np.testing.assert_array_equal(bits(effective["kernel"]), bits(tiny["kernel"]))
    assert pullback(tiny)[0]["kernel"].tolist() == tiny["kernel"].tolist()


@pytest.mark.parametrize("alpha", [1.01, 1.5, 2.0, 4.0])
def test_powerprop_has_a_gradient_of_0_at_0(alpha):
    (grads,) = gradient(lambda p: reparam.powerprop(p, alpha), PARAMS)
    assert grads["kernel"][0, 2:].tolist() == [0, 0]
    assert jnp.isfinite(grads["kernel"]).all()


def test_alpha_may_be_traced():
    alphas = jnp.array([1.0, 2.0])
    swept = jax.jit(jax.vmap(lambda a: reparam.powerprop(PARAMS, a)["kernel"]))(alphas)
    np.testing.assert_allclose(swept[0], WEIGHTS, rtol=1e-6)
    np.testing.assert_allclose(swept[1], WEIGHTS * np.abs(WEIGHTS), rtol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 3.0])
def test_powerprop_inverse_gives_back_the_weights(alpha):
    theta = reparam.powerprop_inverse(PARAMS, alpha)
    expected = np.sign(WEIGHTS) * np.abs(WEIGHTS.astype(np.float64)) ** (1 / alpha)
    np.testing.assert_allclose(theta["kernel"], expected, rtol=1e-5)
    weights = reparam.powerprop(theta, alpha)["kernel"]
    np.testing.assert_allclose(weights, WEIGHTS, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 0, -1.0, float("nan")])
@pytest.mark.parametrize("f", [reparam.powerprop, reparam.powerprop_inverse])
def test_alpha_below_1_is_refused(f, alpha):
    with pytest.raises(ValueError, match="expected alpha of at least 1, got"):
        f(PARAMS, alpha)


# What they learn: a regression on 16 features of which 4 matter.

INPUTS = np.random.default_rng(0).normal(size=(128, 16)).astype(np.float32)
TRUTH = np.zeros((16, 1), np.float32)
TRUTH[[1, 5, 10, 14], 0] = [1.5, -2.0, 1.0, -1.25]
SUPPORT = {"kernel": jnp.asarray(TRUTH != 0)}


def error(weights):
    residual = jnp.asarray(INPUTS) @ (weights["kernel"] - jnp.asarray(TRUTH))
    return jnp.mean(jnp.square(residual))


def first_weights():
    draw = np.random.default_rng(1).normal(size=TRUTH.shape, scale=0.25)
    return {"kernel": jnp.asarray(draw, jnp.float32)}


def train(loss, params, tx=None, steps=200):
    """Parameters after some steps of gradient descent."""
    tx = optax.sgd(0.05) if tx is None else tx

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    return jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0][0])(carry)


def largest(weights):
    return {"kernel": top_k(jnp.abs(weights["kernel"]), 4)}


def largest_of_four(weights):
    """1:4 masks, which the truth has room in."""
    return n_of_m(4)({"kernel": jnp.abs(weights["kernel"])}, {"kernel": 4})


@pytest.mark.parametrize(
    ("f", "select"),
    [(reparam.straight_through, largest), (reparam.sr_ste, largest_of_four)],
)
def test_masks_of_every_step_are_learned_straight_through(f, select):
    def effective(params):
        return f(params, select(params))

    start = first_weights()
    assert not jnp.array_equal(select(start)["kernel"], SUPPORT["kernel"])
    weights = effective(train(lambda p: error(effective(p)), start))
    np.testing.assert_array_equal(weights["kernel"] != 0, SUPPORT["kernel"])
    assert error(weights) < 1e-6


def test_sr_ste_leaves_smaller_weights_outside_of_the_mask():
    def size_of_pruned(decay):
        def effective(params):
            return reparam.sr_ste(params, largest(params), decay)

        dense = train(lambda p: error(effective(p)), first_weights())
        return jnp.linalg.norm(jnp.where(SUPPORT["kernel"], 0, dense["kernel"]))

    assert size_of_pruned(0.5) < 0.1 * size_of_pruned(0.0)


def test_thresholds_rise_under_weight_decay_until_the_target_sparsity():
    def trained(decay):
        params = first_weights()
        params = (params, reparam.init_thresholds(params, -6.0))
        pull = optax.add_decayed_weights(decay, mask=({"kernel": False}, True))
        tx = optax.chain(pull, optax.sgd(0.05))
        return train(lambda p: error(reparam.soft_threshold(*p)), params, tx)

    results = [trained(decay) for decay in (0.0, 0.2, 0.5)]
    reached = [float(thresholds["kernel"]) for _, thresholds in results]
    assert reached[0] < -6 < reached[1] < reached[2] < 0
    weights = reparam.soft_threshold(*results[-1])
    found = reparam.nonzero_masks(weights)
    np.testing.assert_array_equal(found["kernel"], SUPPORT["kernel"])
    assert error(weights) < 1e-3


def test_powerprop_leaves_more_weights_to_prune():
    # From the right signs: hardly a weight crosses 0, where its gradient vanishes.
    signs = jnp.where(TRUTH < 0, -1, 1)
    start = {"kernel": signs * jnp.abs(first_weights()["kernel"])}

    def pruned(alpha, steps):
        theta = reparam.powerprop_inverse(start, alpha)
        theta = train(lambda p: error(reparam.powerprop(p, alpha)), theta, steps=steps)
        weights = reparam.powerprop(theta, alpha)
        return apply_masks(weights, largest(weights))

    assert error(pruned(2.0, 20)) < 0.5 * error(pruned(1.0, 20))
    weights = pruned(2.0, 200)
    np.testing.assert_array_equal(weights["kernel"] != 0, SUPPORT["kernel"])
    assert error(weights) < 1e-3


def test_a_threshold_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"for the leaf 'w', a scalar, got .* \(3,\)"):
        reparam.soft_threshold({"w": jnp.ones((2, 3))}, {"w": jnp.zeros(3)})
