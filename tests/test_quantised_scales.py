"""Scales of inputs that are found once, or trained: networks as data, and trainings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from d2sparse import data, models, prompts, quantisation, train, tree
from d2sparse.constraints import (
    Learners,
    Moves,
    Options,
    StreamOptions,
    from_ticket,
    kept,
    paired,
    prompted,
    rigl,
    stream,
    stream_steps,
)
from d2sparse.constraints import quantised as in_few_bits
from d2sparse.lottery import Ticket
from d2sparse.models import quantised, taps
from d2sparse.models.mlp import MLP
from d2sparse.train import (
    Recipe,
    constrain,
    fit,
    lasting,
    make_program,
    make_step,
    plain,
)
from d2sparse.transforms import get_masks


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


MODEL = models.lenet_300_100(num_classes=4, width=0.3)
X = np.random.default_rng(0).normal(size=(16, 6, 6, 1)).astype(np.float32)


@functools.cache
def start(seed):
    """A network of which every second weight is pruned."""
    params, state = MODEL.init(jax.random.key(seed), X)
    rng = np.random.default_rng(seed)

    def half(path, leaf):
        live = rng.random(leaf.shape) < 0.5 if leaf.ndim == 2 else True
        return jnp.asarray(np.where(live, leaf, 0))

    return jax.tree_util.tree_map_with_path(half, params), state


@functools.cache
def in_4_bits():
    return quantised.post_training(MODEL, *start(0), [X], 4, 4)


def by_hand(x, scale, bits, signed):
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return scale * np.rint(np.clip(x / scale, -high if signed else 0, high))


def cosine(a, b):
    a, b = np.ravel(a), np.ravel(b)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_a_network_in_few_bits_is_that_of_loops():
    params, _ = start(0)
    coarse, rounded, own = in_4_bits()
    x = X.reshape(16, -1)
    for name, bits, signed in (
        ("dense1", 8, True),
        ("dense2", 4, False),
        ("head", 8, False),
    ):
        kernel, bias = (np.asarray(rounded[name][k]) for k in ("kernel", "bias"))
        before = np.asarray(params[name]["kernel"])
        assert (kernel[before == 0] == 0).all()
        assert len(np.unique(kernel[:, 0])) <= 2**bits - 1
        assert bool(own.signed[name]) == signed
        x = by_hand(x, float(own.scales[name]), bits, signed) @ kernel + bias
        x = np.maximum(x, 0) if name != "head" else x
    found, after = coarse.apply(rounded, own, X, train=True)
    np.testing.assert_allclose(found, x, atol=1e-4)
    assert after == own


def test_scales_of_weights_are_those_of_survivors_and_again_the_same():
    params, state = start(0)
    _, rounded, _ = in_4_bits()
    table = {"dense1/*": 8, "head/*": 8, "*": 4}
    alone = params["dense2"]["kernel"][:, 3]
    alone = alone[alone != 0]
    scale = quantisation.make_scale("mse")(alone[:, None], 4)[0, 0]
    found = np.asarray(rounded["dense2"]["kernel"][:, 3])
    codes = found / float(scale)
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert 5 < len(np.unique(np.rint(codes))) <= 15
    top = quantised.post_training(MODEL, params, state, [X], 4, scale="absmax")
    assert top[0] is MODEL
    assert top[2] is state
    again = quantised.post_training(MODEL, top[1], state, [X], table, scale="absmax")
    for one, other in zip(*map(jax.tree.leaves, (top[1], again[1])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_batches_apart_give_the_scales_of_all():
    *_, own = in_4_bits()
    *_, apart = quantised.post_training(MODEL, *start(0), [X[:8], X[8:]], 4, 4)
    for name, scale in own.scales.items():
        np.testing.assert_allclose(apart.scales[name], scale, rtol=1e-6)
        assert apart.signed[name] == own.signed[name]


def test_networks_of_other_weights_and_scales_share_a_program():
    coarse, *first = in_4_bits()
    traced = []

    def apply(params, state, x):
        traced.append(1)
        return coarse.apply(params, state, x, train=False)[0]

    program = jax.jit(apply)
    one = program(*first, X)
    *_, params, own = quantised.post_training(MODEL, *start(1), [3 * X], 4, 4)
    other = program(params, own, 3 * X)
    flipped = own._replace(signed=jax.tree.map(jnp.logical_not, own.signed))
    program(params, flipped, X)
    assert len(traced) == 1
    assert (one != other).any()
    wide = jax.tree.map(lambda *pair: jnp.stack(pair), tuple(first), (params, own))
    both = jax.jit(jax.vmap(lambda p: coarse.apply(*p, X, train=False)[0]))(wide)
    np.testing.assert_allclose(both[0], one, atol=1e-5)


def test_gradients_of_the_input_are_those_of_the_surrogate():
    fine, rounded, own = quantised.post_training(MODEL, *start(0), [X], 8, 8)

    def loss(apply, *args):
        def value(x):
            logits, _ = apply(*args, x, train=False)
            return -jax.nn.log_softmax(logits)[:, 1].mean()

        return value

    found = jax.jit(jax.grad(loss(fine.apply, rounded, own)))(X)
    dense = jax.jit(jax.grad(loss(MODEL.apply, *start(0))))(X)
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
        quantised.post_training(MODEL, *start(0), [], 4, 4)
    with pytest.raises(ValueError, match="expected 2 to 8 bits, got 9"):
        quantised.post_training(MODEL, *start(0), [X], 4, 9)
    with pytest.raises(ValueError, match="expected 2 to 8 bits, got 1"):
        quantised.post_training(MODEL, *start(0), [X], {"head/*": 1})
    with pytest.raises(ValueError, match="expected 2 to 8 bits, got 0"):
        quantised.calibrated(MODEL, 4, edges=0)
    plain = runs.linear(4)
    params, state = plain.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="expected layers of Linen"):
        quantised.post_training(plain, params, state, [X], 4, 4)


# Trainings, of a network of one layer, which compiles in a moment.

ONE_LAYER = models.from_linen(MLP((), 10))
LEARNED = in_few_bits(3, 3, scale="lsq", edges=3, inputs="learned")
CALIBRATED = in_few_bits(3, 3, scale="mse", edges=3, inputs="calibrated")
RIGL = rigl(0.5, Moves(3, growth_samples=0))


@functools.cache
def digits(size=600):
    images, labels, *_ = data.load("digits").train
    return train.to_device(data.Split(images[:size], labels[:size]))


def one_layer(steps=12):
    return plain(ONE_LAYER, digits(), Recipe(steps=steps, batch_size=32))


@functools.cache
def begun(*constraints):
    program = make_program(constrain(one_layer(), *constraints))
    return program, jax.jit(program.init)(jax.random.key(0), digits())


def seen(state):
    """What the network is shown of the examples that scales are found on."""
    key = jax.random.fold_in(state.key, 1)
    rows = np.asarray(jax.random.permutation(key, 600))[:512]
    pixels = np.asarray(digits().images)[rows].reshape(512, -1) / np.float64(255)
    return (pixels - float(digits().mean[0])) / float(digits().std[0])


def error(x, scale, bits=3):
    return np.sum((x - by_hand(x, scale, bits, True)) ** 2)


def test_scales_are_found_when_the_training_begins():
    state = begun(LEARNED, RIGL)[1].state
    kernel, found = np.asarray(state.params["head"]["kernel"]), state.model_state
    assert (kernel == 0).mean() == 0.5
    x = seen(state)
    assert found.signed["head"]
    start = 2 * np.abs(x).mean() / np.sqrt(3)
    np.testing.assert_allclose(found.scales["head"], start, rtol=1e-4)
    live = (kernel != 0).sum(axis=0)
    starts = 2 * np.abs(kernel).sum(axis=0) / live / np.sqrt(3)
    np.testing.assert_allclose(found.kernels["head/kernel"][0], starts, rtol=1e-5)


def test_calibrated_inputs_have_the_least_error_and_add_no_parameters():
    state = begun(CALIBRATED)[1].state
    x, scale = seen(state), float(state.model_state.scales["head"])
    tried = np.linspace(0.1, 1, 100) * np.abs(x).max() / 3
    assert error(x, scale) <= 1.05 * min(error(x, s) for s in tried)
    assert state.model_state.kernels == {}
    assert set(state.params["head"]) == {"bias", "kernel"}


def test_trained_scales_are_beside_their_kernels():
    params = begun(LEARNED, RIGL)[1].state.params["head"]
    assert set(params) == {"bias", "kernel", "kernel_scale", "input_scale"}


def test_factors_have_the_steps_of_learned_scales():
    training = constrain(one_layer(), LEARNED)
    state = begun(LEARNED, RIGL)[1].state
    x, target = seen(state)[:16].astype(np.float32), np.float32(SOME)

    @jax.jit
    @jax.value_and_grad
    def gradient(params):
        logits, _ = training.model.apply(params, state.model_state, x, train=True)
        return jnp.sum(logits * target)

    def at(factor):
        factor = {"head/input_scale": jnp.asarray(factor, "float32")}
        return gradient(tree.replace(state.params, factor))

    found = gradient(state.params)[1]["head"]
    kernel = np.float64(state.params["head"]["kernel"])
    own, of_input = state.model_state.kernels["head/kernel"], state.model_state.scales
    s_w, s_x = np.float64(own), float(of_input["head"])
    coarse, shown = by_hand(kernel, s_w, 3, True), by_hand(x, s_x, 3, True)
    live = (kernel != 0).sum(axis=0)

    def slope(x, s):
        units = x / s
        inside = np.abs(units) <= 3
        return np.where(inside, np.rint(units) - units, 3 * np.sign(units))

    of_w = (slope(kernel, s_w) * (shown.T @ target)).sum(axis=0) / np.sqrt(live * 3)
    np.testing.assert_allclose(found["kernel_scale"], of_w / s_w[0], rtol=1e-3)
    of_x = (slope(x, s_x) * (target @ coarse.T)).sum() / np.sqrt(64 * 3)
    np.testing.assert_allclose(found["input_scale"], of_x / s_x, rtol=1e-3)
    # A factor that training drove below 0 counts as one that is small, and returns.
    (low, of_low), (small, of_small) = at(-0.5), at(1 / 64)
    assert low == small
    assert of_low["head"]["input_scale"] == of_small["head"]["input_scale"] != 0
    # No decay, no pruning.
    assert list(tree.prunable_leaves(state.params)) == ["head/kernel"]
    assert training.network.weights == 640
    assert training.network.macs.keys() == tree.flatten(state.params).keys()


SOME = np.random.default_rng(1).normal(size=(16, 10))


def test_learned_scales_resume_to_the_bit_and_learn():
    program, progress = begun(LEARNED, RIGL)
    saved = []
    watch = train.Watch(
        save_every=5,
        save=lambda own, logs: saved.append((jax.tree.map(jnp.copy, own), dict(logs))),
    )
    last = fit(program, jax.tree.map(jnp.copy, progress), digits(), watch)
    middle, logs = saved[0]
    assert int(middle.state.step) == 5
    again = fit(program, middle, digits(), train.Watch(save_every=5, logs=logs))
    for one, other in zip(
        *map(jax.tree.leaves, (last.state, again.state)), strict=True
    ):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = map(jax.random.key_data, (one, other))
        np.testing.assert_array_equal(one, other)
    head, masks = last.state.params["head"], get_masks(last.state.opt_state)["head"]
    assert (head["kernel_scale"] != 1).all()
    assert head["input_scale"] != 1
    assert masks["kernel_scale"].all()
    before = np.asarray(progress.state.params["head"]["kernel"]) != 0
    assert (before != masks["kernel"]).any()
    assert (np.asarray(head["kernel"])[~np.asarray(masks["kernel"])] == 0).all()
    (chances,) = program.predict(last.state, digits()).values()
    assert (chances.argmax(-1) == np.asarray(digits().labels)).mean() > 0.5


def test_every_network_of_a_pair_has_scales_of_its_own():
    learners = Learners(interval=3, rule="set", preset="constant")
    program, progress = begun(LEARNED, paired(0.8, learners))
    fast, slow = (own.kernels["head/kernel"] for own in progress.state.model_state)
    assert (fast != slow).any()
    assert (fast != 1).all()
    rows = jnp.arange(32)
    after, _ = jax.eval_shape(
        make_step(program.training), progress.state, digits(), rows
    )
    assert after.params.slow["head"]["kernel_scale"].shape == (10,)


def test_prompts_may_come_first():
    prompt = prompts.border(canvas=12, inner=8, channels=1)
    first = prompted(prompt)
    program, progress = begun(first, LEARNED)
    state = progress.state
    assert list(state.model_state.scales) == ["network/head"]
    assert state.model_state.scales["network/head"] != 1
    x = program.training.inputs(train.take(digits(), jnp.arange(4)), None)
    dynamic = constrain(one_layer(), first, in_few_bits(3, 3, edges=3)).model

    @jax.jit
    @jax.grad
    def slope(params, apply=program.training.model.apply, own=state.model_state):
        return jnp.sum(apply(params, own, x, train=True)[0][:, 0])

    assert (slope(state.params)["prompt"] != 0).any()
    head = {k: state.params["network"]["head"][k] for k in ("kernel", "bias")}
    params = {"prompt": state.params["prompt"], "network": {"head": head}}
    (logits, _), tapped = jax.eval_shape(
        lambda params: taps.read(dynamic.apply)(params, {}, x, train=False), params
    )
    assert logits.shape == tapped["head"].output.shape == (4, 10)


def test_tickets_have_no_trained_scales_yet():
    params, own = ONE_LAYER.init(jax.random.key(5), jnp.ones((1, 8, 8, 1)))
    masks = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape) % 3 > 0, params)
    state = begun(from_ticket(Ticket(params, own, masks)), LEARNED, kept())[1].state
    assert (
        get_masks(state.opt_state)["head"]["kernel"] == masks["head"]["kernel"]
    ).all()
    live = np.where(masks["head"]["kernel"], params["head"]["kernel"], 0)
    starts = 2 * np.abs(live).sum(axis=0) / (live != 0).sum(axis=0) / np.sqrt(3)
    np.testing.assert_allclose(
        state.model_state.kernels["head/kernel"][0], starts, rtol=1e-5
    )


def test_trainings_refuse():
    with pytest.raises(ValueError, match="expected inputs of dynamic, calibrated"):
        in_few_bits(4, inputs="static")
    with pytest.raises(ValueError, match="expected activation_scale of dynamic"):
        Options(activation_scale="fixed")
    nobody = train.take(digits(), jnp.arange(0))
    with pytest.raises(ValueError, match="expected training images to calibrate"):
        jax.eval_shape(begun(CALIBRATED)[0].init, jax.random.key(0), nobody)
    options = StreamOptions(megabatches=2, epochs=1, stream_validation=0.25)
    labels = np.asarray(digits().labels)
    length = lasting(stream_steps(options, labels, 32))
    with pytest.raises(ValueError, match="take --activation_scale=dynamic"):
        constrain(one_layer(), length, LEARNED, stream(options, labels))
    constrain(one_layer(), length, in_few_bits(4, 8), stream(options, labels))
