"""Fake quantisation against numpy, closed forms, Qwix, and on networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from d2sparse import models, quantisation
from d2sparse.models import quantised
from d2sparse.quantisation import calibration, scales
from d2sparse.quantisation.uniform import fake_quantise


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 3, 4, 6)).astype(np.float32)
KERNEL[RNG.random(KERNEL.shape) < 0.5] = 0
KERNEL[..., 1] = 0  # A channel that is pruned throughout.
BITS = [2, 3, 4, 8]
ALL = [(bits, signed) for bits in BITS for signed in (True, False)]
PARAMS = {
    "conv": {"kernel": jnp.asarray(KERNEL), "bias": jnp.arange(6.0)},
    "head": {"kernel": jnp.asarray(KERNEL[0, 0]), "bias": jnp.arange(6.0)},
}


def by_hand(x, scale, bits, signed=True):
    """The quantiser as it is written, in double precision."""
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    low = -high if signed else 0
    return scale * np.rint(np.clip(np.float64(x) / scale, low, high))


def error(x, scale, bits, signed=True):
    return np.sum((x - by_hand(x, scale, bits, signed)) ** 2)


@jax.jit(static_argnames=("bits", "signed"))
def quantise(x, scale, bits, signed=True):
    return fake_quantise(x, scale, bits, signed)


@pytest.mark.parametrize(("bits", "signed"), ALL)
def test_the_quantiser_rounds_to_codes(bits, signed):
    x = np.linspace(-2, 2, 1001, dtype=np.float32)
    scale = np.float32(0.37)
    found = np.asarray(quantise(x, scale, bits, signed))
    np.testing.assert_allclose(found, by_hand(x, scale, bits, signed), rtol=1e-6)
    np.testing.assert_array_equal(quantise(found, scale, bits, signed), found)
    low, high = quantisation.code_range(bits, signed)
    inside = (x >= low * scale) & (x <= high * scale)
    assert np.abs(found - x)[inside].max() <= scale / 2 * (1 + 1e-6)
    assert len(np.unique(np.rint(found / scale))) <= high - low + 1 <= 2**bits


@pytest.mark.parametrize("bits", [1, 9, 0, True, 2.5, "8"])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match="expected 2 to 8 bits, got"):
        fake_quantise(jnp.ones(2), jnp.ones(()), bits)
    with pytest.raises(ValueError, match="expected 2 to 8 bits, got"):
        quantisation.quantise_weights(PARAMS, {"conv/*": bits})


def test_gradients_pass_the_rounding_and_not_the_clipping():
    x = jnp.array([-9.0, -1.5, -1.0, 0.0, 0.2, 1.5, 1.6, 9.0])
    scale = jnp.array(0.5)

    def gradients(signed, pass_outside):
        def total(x, scale):
            return jnp.sum(fake_quantise(x, scale, 3, signed, pass_outside))

        return jax.grad(total, (0, 1))(x, scale)

    own, of_scale = gradients(True, False)
    assert own.tolist() == [0, 1, 1, 1, 1, 1, 0, 0]  # Both ends are in the range.
    # LSQ: round(x / s) - x / s in the range, the outermost code outside of it.
    assert float(of_scale) == pytest.approx(-3 + 0 + 0 + 0 - 0.4 + 0 + 3 + 3)
    assert gradients(True, True)[0].tolist() == [1] * 8
    assert gradients(False, False)[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_the_largest_weight_of_a_channel_is_in_the_range(per):
    weights = jnp.asarray(RNG.normal(size=(40, 400)).astype(np.float32))

    def total(x):
        scale = scales.absmax(jax.lax.stop_gradient(x), 8, per)
        return jnp.sum(fake_quantise(x, scale, 8))

    assert jax.jit(jax.grad(total))(weights).min() == 1


def test_a_scale_below_0_counts_as_tiny_and_is_led_back():
    x, scale = jnp.array([1.0, -2.0, 0.0]), jnp.array(-0.1)
    np.testing.assert_allclose(fake_quantise(x, scale, 4), 0, atol=1e-30)

    def off(scale):
        return jnp.sum((fake_quantise(x, scale, 4) - x) ** 2)

    slope = jax.grad(off)(scale)
    assert slope < 0
    assert jnp.isfinite(slope)


@pytest.mark.parametrize("signed", [True, False])
def test_a_learned_scale_has_the_gradient_of_the_paper(signed):
    x = jnp.asarray(RNG.normal(size=(50, 3)).astype(np.float32))
    x = x if signed else jnp.abs(x)
    scale = jnp.array([[0.1, 0.5, 2.0]])

    def total(scale):
        size = quantisation.survivors(x)
        return jnp.sum(
            fake_quantise(x, quantisation.learned(scale, size, 3, signed), 3, signed)
        )

    low, high = quantisation.code_range(3, signed)
    units = np.float64(x) / np.asarray(scale)
    slope = np.where(
        units <= low, low, np.where(units >= high, high, np.rint(units) - units)
    )
    expected = slope.sum(axis=0) / np.sqrt(50 * high)
    np.testing.assert_allclose(jax.grad(total)(scale)[0], expected, rtol=1e-4)


def test_gradients_are_those_of_the_surrogate():
    x, s = jnp.array([0.3, -0.7, 1.1]), jnp.array(0.5)
    jump = jnp.asarray(by_hand(x, 0.5, 4) / 0.5 - np.asarray(x) / 0.5, jnp.float32)

    def surrogate(x, s):
        return s * (x / s + jump)

    both = [
        jax.grad(lambda x, s, f=f: jnp.sum(f(x, s) ** 2 + 3 * f(x, s)), (0, 1))(x, s)
        for f in (lambda x, s: fake_quantise(x, s, 4), surrogate)
    ]
    for found, expected in zip(*both, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("bits", "per"), [(2, "channel"), (4, "channel"), (3, "tensor"), (8, "tensor")]
)
def test_scales_are_those_of_loops_over_channels(bits, per):
    flat = KERNEL.reshape(-1, 6)
    columns = list(flat.T) if per == "channel" else [flat.ravel()]
    high = 2 ** (bits - 1) - 1
    shape = (1, 1, 1, 6) if per == "channel" else ()

    @jax.jit
    def make(x):
        return [
            quantisation.make_scale(name)(x, bits, per)
            for name in ("absmax", "mse", "lsq")
        ]

    found = [np.asarray(x) for x in make(jnp.asarray(KERNEL))]
    assert {x.shape for x in found} == {shape}
    own = zip(columns, *(x.ravel() for x in found), strict=True)
    for x, top, best, start in own:
        live = x[x != 0]
        if not live.size:
            assert top == best == start == 0
            continue
        assert top == pytest.approx(np.abs(live).max() / high, rel=1e-6)
        mean = sum(abs(float(v)) for v in live) / len(live)
        assert start == pytest.approx(2 * mean / np.sqrt(high), rel=1e-5)
        tried = np.linspace(0.05, 1, 1000) * top
        least = min(error(live, s, bits) for s in tried)
        assert error(live, best, bits) <= 1.02 * least + 1e-9


@pytest.mark.parametrize("scale", ["absmax", "mse", "lsq"])
@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_scales_look_at_survivors_alone(scale, per):
    make = quantisation.make_scale(scale)
    dense = RNG.normal(size=(20, 3)).astype(np.float32)
    padded = np.concatenate([dense, np.zeros((60, 3), np.float32)])
    alone, all_of_it = jax.jit(lambda *both: [make(x, 3, per) for x in both])(
        dense, padded
    )
    np.testing.assert_allclose(alone, all_of_it, rtol=1e-6)


def test_unsigned_scales_look_at_positive_entries():
    x = jnp.array([[0.5, -9.0], [3.0, 7.5]])
    found = scales.absmax(x, 4, signed=False)
    np.testing.assert_allclose(found, [[0.2, 0.5]], rtol=1e-6)
    y = np.abs(KERNEL)
    fitted = float(jax.jit(lambda y: scales.mse(y, 2, "tensor", signed=False))(y))
    least = min(error(y, s, 2, False) for s in np.linspace(0.5, 3, 500))
    assert error(y, fitted, 2, False) <= 1.02 * least


@pytest.mark.parametrize(("per", "scale"), [("channel", "mse"), ("tensor", "absmax")])
def test_weights_of_trees(per, scale):
    found = jax.jit(
        lambda p: quantisation.quantise_weights(p, {"head/*": 8, "*": 3}, per, scale)
    )(PARAMS)
    for name, bits in (("conv", 3), ("head", 8)):
        kernel = PARAMS[name]["kernel"]
        make = quantisation.make_scale(scale)
        own = np.asarray(jax.jit(lambda x, m=make, b=bits: m(x, b, per))(kernel))
        expected = by_hand(kernel, np.maximum(own, 1e-30), bits)
        np.testing.assert_allclose(found[name]["kernel"], expected, rtol=1e-5)
        assert (found[name]["kernel"][kernel == 0] == 0).all()
        np.testing.assert_array_equal(found[name]["bias"], PARAMS[name]["bias"])


def test_pruned_weights_have_the_gradient_of_the_network():
    def total(params):
        weights = quantisation.quantise_weights(params, 4)
        return jnp.sum(weights["conv"]["kernel"] ** 2 + weights["conv"]["kernel"])

    grads = jax.grad(total)(PARAMS)["conv"]["kernel"]
    assert (grads[KERNEL == 0] == 1).all()
    assert (jax.grad(total)(PARAMS)["head"]["kernel"] == 0).all()


@pytest.mark.parametrize("scale", ["absmax", "lsq"])
def test_codes_and_scales_restore_the_weights(scale):
    stored = quantisation.weight_codes(PARAMS, {"conv/*": 4}, "channel", scale)
    assert list(stored) == ["conv/kernel"]
    own = stored["conv/kernel"]
    assert own.codes.dtype == jnp.int8
    assert int(own.bits) == 4
    assert np.abs(own.codes).max() <= 7
    again = quantisation.restore_weights(PARAMS, stored)
    assert again["head"]["kernel"] is PARAMS["head"]["kernel"]
    expected = fake_quantise(PARAMS["conv"]["kernel"], own.scale, 4)
    np.testing.assert_array_equal(again["conv"]["kernel"], expected)


def test_sizes_count_survivors():
    live = [int((KERNEL != 0).sum()), int((KERNEL[0, 0] != 0).sum())]
    assert quantisation.effective_size(PARAMS, 4) == 4 * sum(live)
    assert quantisation.effective_size(PARAMS, {"head/*": 3}) == 32 * live[0] + (
        3 * live[1]
    )
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), PARAMS)
    assert quantisation.effective_size(PARAMS, 2, masks) == 2 * (216 + 24)


def test_bits_by_pattern():
    paths = ["stem/kernel", "block/kernel", "head/kernel"]
    assert quantisation.edge_bits(paths, 3) == {paths[0]: 8, paths[2]: 8, "*": 3}
    assert quantisation.edge_bits(paths[:1], 3) == {paths[0]: 8}
    table = {"head/*": 8, "*/kernel": 4, "*": 2}
    assert list(quantisation.share_bits(table, paths).values()) == [4, 4, 8]
    with pytest.raises(ValueError, match="patterns that match a leaf, got 'tail/\\*'"):
        quantisation.share_bits({"tail/*": 8}, paths)
    with pytest.raises(ValueError, match="take per='tensor'"):
        scales.absmax(jnp.ones(3), 4)
    with pytest.raises(ValueError, match="expected scale of absmax, mse, lsq"):
        quantisation.quantise_weights(PARAMS, 4, scale="max")
    with pytest.raises(ValueError, match="expected per of channel, tensor"):
        quantisation.quantise_weights(PARAMS, 4, per="row")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_precisions(dtype):
    with jax.enable_x64(dtype == "float64"):
        weights = jnp.asarray(KERNEL, dtype)
        for bits in (2, 8):
            found = quantisation.quantise_weights({"kernel": weights}, bits)["kernel"]
            assert found.dtype == dtype
            wide = np.asarray(weights, np.float64)
            own = np.asarray(scales.absmax(weights, bits), np.float64)
            expected = by_hand(wide, np.maximum(own, 1e-30), bits)
            precision = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(
                np.float64(found), expected, rtol=max(precision, 1e-12), atol=1e-12
            )
            again = fake_quantise(found, jnp.asarray(own), bits)
            np.testing.assert_array_equal(again, found)
        grads = jax.grad(lambda x: fake_quantise(x, jnp.asarray(own), 8).sum())(weights)
        assert grads.dtype == dtype
        assert (grads == 1).all()


def test_the_same_under_vmap():
    stacked = jnp.stack([PARAMS["conv"]["kernel"], 3 * PARAMS["conv"]["kernel"]])
    both = jax.jit(
        jax.vmap(lambda x: quantisation.quantise_weights({"kernel": x}, 3, scale="mse"))
    )(stacked)["kernel"]
    np.testing.assert_allclose(both[1], 3 * both[0], rtol=1e-5)


@pytest.mark.parametrize("qtype", ["int8", "int4", "int3", "int2"])
def test_codes_are_those_of_qwix_under_its_scales(qtype):
    """Qwix divides the largest by Q_P + 1/2, and has one more negative code."""
    qwix = pytest.importorskip("qwix")
    bits, kernel = int(qtype[3:]), jnp.asarray(KERNEL)
    high = 2 ** (bits - 1) - 1
    theirs = qwix.quantize(kernel, qtype, channelwise_axes=(3,))
    live = np.arange(6) != 1  # Of nothing but zeros theirs is 1 and ours is 0.
    own = scales.absmax(kernel, bits)
    np.testing.assert_allclose(
        (theirs.scale * (high + 0.5))[..., live], (own * high)[..., live], rtol=1e-6
    )
    # Under one scale the codes are equal but for the one that we have not.
    codes = np.maximum(np.asarray(theirs.qvalue, int), -high)
    np.testing.assert_array_equal(quantisation.codes(kernel, theirs.scale, bits), codes)
    if (np.asarray(theirs.qvalue, int) == codes).all():
        np.testing.assert_array_equal(
            fake_quantise(kernel, theirs.scale, bits), qwix.dequantize(theirs)
        )
    assert (np.asarray(qwix.dequantize(theirs))[KERNEL == 0] == 0).all()
    # Ours loses nothing at the largest weight of a channel, theirs half a code.
    ours = quantisation.quantise_weights({"kernel": kernel}, bits)["kernel"]
    top = np.abs(KERNEL).max(axis=(0, 1, 2))
    np.testing.assert_allclose(np.abs(ours).max(axis=(0, 1, 2)), top, rtol=1e-6)


# Activations.

ACTIVATIONS = [np.abs(RNG.normal(size=(64, 9))).astype(np.float32) for _ in range(3)]
ACTIVATIONS[1][:, 0] = 0
ACTIVATIONS[2][3, 3] = 9


def test_statistics_add_up_over_batches():
    first, second = ACTIVATIONS[0], -ACTIVATIONS[1]

    @jax.jit
    def both(one, other):
        merged = quantisation.merge(
            calibration.observe(one), calibration.observe(other)
        )
        return merged, calibration.observe(jnp.concatenate([one, other]))

    apart, together = jax.tree.map(np.asarray, both(first, second))
    for name, one, other in zip(apart._fields, apart, together, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=name)
    assert together.counts.sum() + together.zeros == first.size + second.size
    assert together.zeros == 64
    assert together.smallest == second.min()
    assert together.largest == max(np.abs(first).max(), np.abs(second).max())


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (4, False), (8, True)])
def test_calibrated_scales(bits, signed):
    x = np.concatenate(ACTIVATIONS)
    percents = (50, 99, 100)
    makers = (
        *(calibration.absmax, calibration.lsq, calibration.mse),
        *map(calibration.percentile, percents),
    )

    @jax.jit
    def make(x):
        seen = calibration.observe(x)
        return [scale(seen, bits, signed) for scale in makers]

    largest, start, fitted, *rest = map(float, make(x))
    high = quantisation.code_range(bits, signed)[1]
    assert largest == pytest.approx(9 / high)
    assert start == pytest.approx(2 * x.mean() / np.sqrt(high), rel=1e-5)
    for percent, found in zip(percents, rest, strict=True):
        exact = np.percentile(x, percent, method="inverted_cdf")
        assert exact * (1 - 1e-5) <= found * high <= exact * 2 ** (1 / 32) * (1 + 1e-5)
    least = min(error(x, s, bits, signed) for s in np.linspace(0.05, 9, 300) / high)
    assert error(x, fitted, bits, signed) <= 1.05 * least


def test_statistics_of_nothing_but_zeros_leave_zeros():
    makers = (calibration.absmax, calibration.mse, calibration.lsq)

    @jax.jit
    def rounded(x):
        seen = calibration.observe(x)
        every = (*makers, calibration.percentile(99))
        return jnp.stack([fake_quantise(x, scale(seen, 4, True), 4) for scale in every])

    assert (rounded(np.zeros((4, 3), np.float32)) == 0).all()


MODEL = models.lenet_300_100(num_classes=4, width=0.3)
X = jax.random.normal(jax.random.key(1), (16, 6, 6, 1))
WEIGHTS, STATE = MODEL.init(jax.random.key(0), X)


def input_gradient(apply, *args):
    def loss(x):
        logits, _ = apply(*args, STATE, x, train=False)
        return -jax.nn.log_softmax(logits)[:, 1].mean()

    return np.asarray(jax.jit(jax.grad(loss))(X)).ravel()


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def seen():
    return quantised.calibrate(MODEL.apply, WEIGHTS, STATE, [X[:8], X[8:]])


def test_layers_see_rounded_inputs(seen):
    assert quantised.unsigned(seen) == {"dense2", "head"}
    own = quantised.scales_of(seen, {"head/*": 8, "*": 4}, calibration.absmax)
    coarse = quantised.with_scales(
        MODEL.apply, {"head/*": 8, "*": 4}, quantised.unsigned(seen)
    )
    logits, _ = jax.jit(coarse, static_argnames="train")(
        own, WEIGHTS, STATE, X, train=False
    )
    x, signed = np.asarray(X).reshape(16, -1), True
    for name, bits in (("dense1", 4), ("dense2", 4), ("head", 8)):
        high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        assert float(own[name]) * high == pytest.approx(float(seen[name].largest))
        kernel, bias = (np.asarray(WEIGHTS[name][k]) for k in ("kernel", "bias"))
        x = by_hand(x, float(own[name]), bits, signed) @ kernel + bias
        x, signed = np.maximum(x, 0) if name != "head" else x, False
    np.testing.assert_allclose(logits, x, atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "least"),
    [
        pytest.param(8, 0.98, marks=pytest.mark.slow),
        (4, 0.78),
        pytest.param(3, 0.6, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_the_input_point_the_same_way(bits, least, seen):
    dense = input_gradient(MODEL.apply, WEIGHTS)

    def coarse(apply):
        return lambda params, *args, **kwargs: apply(
            quantisation.quantise_weights(params, bits), *args, **kwargs
        )

    fixed = quantised.with_scales(MODEL.apply, bits, quantised.unsigned(seen))
    own = quantised.scales_of(seen, bits, calibration.absmax)
    gradient = input_gradient(coarse(lambda *a, **k: fixed(own, *a, **k)), WEIGHTS)
    assert cosine(gradient, dense) > least
    free = quantised.with_dynamic_scales(MODEL.apply, bits)
    assert cosine(input_gradient(coarse(free), WEIGHTS), dense) > least


def test_dynamic_scales_look_at_one_example_alone():
    free = quantised.with_dynamic_scales(MODEL.apply, 3)

    @jax.jit
    def both(x):
        return [free(WEIGHTS, STATE, own, train=False)[0] for own in (x, x[:1])]

    together, alone = both(X[:4])
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_scales_of_activations_are_learned_with_the_parameters():
    target = jax.random.normal(jax.random.key(3), (16, 4))
    coarse = quantised.with_scales(MODEL.apply, 3)
    trained = {
        "scales": {name: jnp.array(0.05) for name in ("dense1", "dense2", "head")},
        "params": WEIGHTS,
    }

    @jax.jit
    def step(trained):
        def loss(trained):
            scales = {
                name: quantisation.learned(s, 36, 3)
                for name, s in trained["scales"].items()
            }
            out, _ = coarse(scales, trained["params"], STATE, X, train=False)
            return jnp.mean((out - target) ** 2)

        value, grads = jax.value_and_grad(loss)(trained)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, trained, grads)

    values = []
    for _ in range(30):
        value, trained = step(trained)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    moved = [abs(float(s) - 0.05) for s in trained["scales"].values()]
    assert min(moved) > 1e-4


def test_kernels_in_the_order_of_the_network():
    model, x = models.resnet8(width=4), jnp.ones((1, 8, 8, 1))
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    found = quantised.in_order(model.apply, params, state, x, train=False)
    assert sorted(found) == sorted(quantised.kernels(params))
    assert found[1:3] == [f"stage1_block1/conv{i}/kernel" for i in (1, 2)]
    with pytest.raises(ValueError, match="at least one batch"):
        quantised.calibrate(model.apply, params, state, [])
    with pytest.raises(ValueError, match="not compiled"):
        quantised.with_dynamic_scales(jax.jit(model.apply), 4)
