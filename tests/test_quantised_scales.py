"""Scales of inputs that are found once, or trained: networks as data, and trainings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from d2sparse import models, quantisation
from d2sparse.models import quantised


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


MODEL = models.lenet_300_100(num_classes=4, width=0.3)
X = np.random.default_rng(0).normal(size=(16, 6, 6, 1)).astype(np.float32)


def start(seed):
    """A network of which every second weight is pruned."""
    params, state = MODEL.init(jax.random.key(seed), X)
    rng = np.random.default_rng(seed)

    def half(path, leaf):
        live = rng.random(leaf.shape) < 0.5 if leaf.ndim == 2 else True
        return jnp.asarray(np.where(live, leaf, 0))

    return jax.tree_util.tree_map_with_path(half, params), state


PARAMS, STATE = start(0)
COARSE, ROUNDED, OWN = quantised.post_training(MODEL, PARAMS, STATE, [X], 4, 4)


def by_hand(x, scale, bits, signed):
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return scale * np.rint(np.clip(x / scale, -high if signed else 0, high))


def cosine(a, b):
    a, b = np.ravel(a), np.ravel(b)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_a_network_in_few_bits_is_that_of_loops():
    x = X.reshape(16, -1)
    for name, bits, signed in (
        ("dense1", 8, True),
        ("dense2", 4, False),
        ("head", 8, False),
    ):
        kernel, bias = (np.asarray(ROUNDED[name][k]) for k in ("kernel", "bias"))
        before = np.asarray(PARAMS[name]["kernel"])
        assert (kernel[before == 0] == 0).all()
        assert len(np.unique(kernel[:, 0])) <= 2**bits - 1
        assert bool(OWN.signed[name]) == signed
        x = by_hand(x, float(OWN.scales[name]), bits, signed) @ kernel + bias
        x = np.maximum(x, 0) if name != "head" else x
    found, after = COARSE.apply(ROUNDED, OWN, X, train=True)
    np.testing.assert_allclose(found, x, atol=1e-4)
    assert after == OWN


def test_scales_of_weights_are_those_of_survivors_and_again_the_same():
    table = {"dense1/*": 8, "head/*": 8, "*": 4}
    alone = PARAMS["dense2"]["kernel"][:, 3]
    alone = alone[alone != 0]
    scale = quantisation.make_scale("mse")(alone[:, None], 4)[0, 0]
    found = np.asarray(ROUNDED["dense2"]["kernel"][:, 3])
    codes = found / float(scale)
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert 5 < len(np.unique(np.rint(codes))) <= 15
    top = quantised.post_training(MODEL, PARAMS, STATE, [X], 4, scale="absmax")
    assert top[0] is MODEL
    assert top[2] is STATE
    again = quantised.post_training(MODEL, top[1], STATE, [X], table, scale="absmax")
    for one, other in zip(*map(jax.tree.leaves, (top[1], again[1])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_batches_apart_give_the_scales_of_all():
    *_, apart = quantised.post_training(MODEL, PARAMS, STATE, [X[:8], X[8:]], 4, 4)
    for name, scale in OWN.scales.items():
        np.testing.assert_allclose(apart.scales[name], scale, rtol=1e-6)
        assert apart.signed[name] == OWN.signed[name]


def test_networks_of_other_weights_and_scales_share_a_program():
    traced = []

    def apply(params, state, x):
        traced.append(1)
        return COARSE.apply(params, state, x, train=False)[0]

    program = jax.jit(apply)
    one = program(ROUNDED, OWN, X)
    *_, params, own = quantised.post_training(MODEL, *start(1), [3 * X], 4, 4)
    other = program(params, own, 3 * X)
    flipped = own._replace(signed=jax.tree.map(jnp.logical_not, own.signed))
    program(params, flipped, X)
    assert len(traced) == 1
    assert (one != other).any()
    wide = jax.tree.map(lambda *pair: jnp.stack(pair), (ROUNDED, OWN), (params, own))
    both = jax.jit(jax.vmap(lambda p: COARSE.apply(*p, X, train=False)[0]))(wide)
    np.testing.assert_allclose(both[0], one, atol=1e-5)


def test_gradients_of_the_input_are_those_of_the_surrogate():
    fine, rounded, own = quantised.post_training(MODEL, PARAMS, STATE, [X], 8, 8)

    def loss(apply, *args):
        def value(x):
            logits, _ = apply(*args, x, train=False)
            return -jax.nn.log_softmax(logits)[:, 1].mean()

        return value

    found = jax.jit(jax.grad(loss(fine.apply, rounded, own)))(X)
    dense = jax.jit(jax.grad(loss(MODEL.apply, PARAMS, STATE)))(X)
    assert cosine(found, dense) > 0.95
    # The straight-through surrogate: rounding adds a constant, clipping is a clip.
    jumps, x = [], X.reshape(16, -1).astype(np.float64)

    def surrogate(x, constants=None):
        for number, name in enumerate(("dense1", "dense2", "head")):
            scale, signed = float(own.scales[name]), bool(own.signed[name])
            high = scale * (127 if signed else 255)
            inside = np.clip(x, -high if signed else 0, high)
            if constants is None:
                jumps.append(by_hand(x, scale, 8, signed) - inside)
            x = inside + (constants or jumps)[number]
            kernel, bias = (np.float64(rounded[name][k]) for k in ("kernel", "bias"))
            x = x @ kernel + bias
            x = np.maximum(x, 0) if name != "head" else x
        return -np.mean(x[:, 1] - np.log(np.exp(x).sum(axis=1)))

    surrogate(x)
    for row, column in ((0, 3), (5, 20), (9, 11), (15, 35)):
        step = np.zeros_like(x)
        step[row, column] = 1e-6
        slope = (surrogate(x + step, jumps) - surrogate(x - step, jumps)) / 2e-6
        expected = found.reshape(16, -1)[row, column]
        assert slope == pytest.approx(float(expected), rel=1e-3, abs=1e-7)


def test_post_training_refuses():
    with pytest.raises(ValueError, match="expected at least one batch of images"):
        quantised.post_training(MODEL, PARAMS, STATE, [], 4, 4)
    with pytest.raises(ValueError, match="expected 2 to 8 bits, got 9"):
        quantised.post_training(MODEL, PARAMS, STATE, [X], 4, 9)
    with pytest.raises(ValueError, match="expected 2 to 8 bits, got 1"):
        quantised.post_training(MODEL, PARAMS, STATE, [X], {"head/*": 1})
    with pytest.raises(ValueError, match="expected 2 to 8 bits, got 0"):
        quantised.calibrated(MODEL, 4, edges=0)
    plain = runs.linear(4)
    params, state = plain.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="expected layers of Linen"):
        quantised.post_training(plain, params, state, [X], 4, 4)
