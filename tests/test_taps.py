"""Taps against a perceptron whose forward and backward pass are written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from flax import linen as nn

from d2sparse import models, tree
from d2sparse.models import taps


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    with runs.quick_compilation():
        yield


MODEL = models.lenet_300_100(num_classes=3, width=0.02)  # Of 6 and 2 hidden units.
X = jax.random.normal(jax.random.key(1), (5, 4))
PARAMS, STATE = MODEL.init(jax.random.key(0), X)
GIVEN = (PARAMS, STATE, X)
LAYERS = ("dense1", "relu1", "dense2", "relu2", "head")


def by_hand(change=lambda name, x, y: y):
    """Inputs and outputs of all layers, which a function may change, in numpy."""
    x, found = np.asarray(X, np.float64), {}
    for name in LAYERS:
        leaf = {k: np.asarray(v) for k, v in PARAMS.get(name, {}).items()}
        y = x @ leaf["kernel"] + leaf["bias"] if leaf else np.maximum(x, 0)
        y = change(name, x, y)
        found[name], x = (x, y), y
    return found


def assert_taps(found, expected, layers):
    assert list(found) == list(layers)
    for name, tap in found.items():
        for a, b in zip(tap, expected[name], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("layers", [None, LAYERS, ("relu1", "head")])
def test_what_is_read_went_through(layers):
    read = jax.jit(taps.read(MODEL.apply, layers), static_argnames="train")
    (logits, _), found = read(*GIVEN, train=False)
    kernels = [name for name in LAYERS if name in PARAMS]
    assert_taps(found, by_hand(), sorted(kernels if layers is None else layers))
    np.testing.assert_array_equal(logits, MODEL.apply(*GIVEN, train=False)[0])


def test_gradients_are_those_of_backpropagation():
    _, found = taps.read(MODEL.apply, LAYERS)(*GIVEN, train=False)

    def loss(offsets):
        return jnp.sum(taps.offset(MODEL.apply)(offsets, *GIVEN, train=False)[0] ** 2)

    gradients = jax.jit(jax.grad(loss))(jax.tree.map(jnp.zeros_like, found))
    expected, forward = {}, by_hand()
    slope = 2 * forward["head"][1]
    for name in reversed(LAYERS):
        x = forward[name][0]
        kernel = PARAMS[name]["kernel"] if name in PARAMS else None
        before = slope * (x > 0) if kernel is None else slope @ np.asarray(kernel).T
        expected[name], slope = (before, slope), before
    assert_taps(gradients, expected, sorted(LAYERS))
    # None is no offset.
    one = {"head": taps.Tap(None, jnp.ones((5, 3)))}
    moved, _ = taps.offset(MODEL.apply)(one, *GIVEN, train=False)
    np.testing.assert_allclose(moved, forward["head"][1] + 1, atol=1e-5)


REPLACED = {
    "an identity for an activation function": (
        {"outputs": {"relu1": lambda tap: tap.input}},
        lambda name, x, y: x if name == "relu1" else y,
    ),
    "a constant for a channel": (
        {"outputs": {"dense1": lambda tap: tap.output.at[:, 2].set(0.5)}},
        lambda name, x, y: (
            np.where(np.arange(6) == 2, 0.5, y) if name == "dense1" else y
        ),
    ),
    "an input": (
        {"inputs": {"relu2": lambda x: x - 1}},
        lambda name, x, y: np.maximum(x - 1, 0) if name == "relu2" else y,
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_is_what_goes_on(name):
    changes, by_numpy = REPLACED[name]
    logits, _ = taps.replace(MODEL.apply, **changes)(*GIVEN, train=False)
    np.testing.assert_allclose(logits, by_hand(by_numpy)["head"][1], atol=1e-5)
    assert not np.allclose(logits, by_hand()["head"][1], atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        *("lenet_300_100", "lenet5", "convnet_s", "resnet8", "vgg11"),
        pytest.param("resnet50", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_of_every_network_is_read(name):
    model, x = models.make_model(name, 10), jax.ShapeDtypeStruct((2, 32, 32, 3), "f4")
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)

    def read(*given):
        return taps.read(model.apply)(*given, train=False)[1]

    kernels = tree.prunable_leaves(params)
    assert {
        f"{path}/kernel": (tap.input.shape[-1], tap.output.shape[-1])
        for path, tap in jax.eval_shape(read, params, state, x).items()
    } == {path: leaf.shape[-2:] for path, leaf in kernels.items()}


def test_blocks_and_normalisations_are_layers():
    model, x = models.resnet8(num_classes=3, width=2), jnp.ones((2, 8, 8, 1))
    params, state = model.init(jax.random.key(0), x)
    names = ["stem_norm", "stem_relu", "stage1_block1", "stage1_block1/relu2"]
    skip = {"stage1_block1": lambda tap: tap.input}
    read = taps.read(taps.replace(model.apply, skip), [*names, "stage2_block1"])
    _, found = jax.jit(read, static_argnames="train")(params, state, x, train=True)
    stem, block = found["stem_relu"].output, found["stage1_block1"]
    np.testing.assert_array_equal(stem, jnp.maximum(found["stem_norm"].output, 0))
    np.testing.assert_array_equal(block.input, stem)
    np.testing.assert_array_equal(found["stage2_block1"].input, stem)
    assert "relu1" not in params["stage1_block1"]


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        layer = nn.Dense(4, name="layer")
        return layer(nn.tanh(layer(x)))


TWICE = models.from_linen(Twice())
REFUSED = {
    "layers that are applied once, got 'layer' twice": lambda: taps.read(TWICE.apply)(
        *TWICE.init(jax.random.key(0), X), X, train=False
    ),
    "layers of the network, got ['no']; it has ['dense1', 'dense2',": lambda: taps.read(
        MODEL.apply, ["no", "head"]
    )(*GIVEN, train=False),
    "layers of the network, got ['no'];": lambda: taps.replace(
        MODEL.apply, inputs={"no": jnp.tanh}
    )(*GIVEN, train=False),
    "layers of the network, got ['nope'];": lambda: taps.offset(MODEL.apply)(
        {"nope": taps.Tap(None, 1)}, *GIVEN, train=False
    ),
    "not compiled, got one made by `jax.jit`": lambda: taps.read(jax.jit(MODEL.apply)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_tapped_is_refused(said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        REFUSED[said]()
