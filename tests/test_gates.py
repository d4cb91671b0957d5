"""Gates against networks that are written without an activation or a block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from flax import linen as nn

from d2sparse import models, surgery
from d2sparse.models import gates
from d2sparse.models.layers import ReLU, batch_norm, conv, dense
from d2sparse.models.mlp import MLP
from d2sparse.models.resnet import BasicBlock, ResNet


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    with runs.quick_compilation():
        yield


PERCEPTRON = models.from_linen(MLP((6, 5), 3))
RESIDUAL = models.from_linen(ResNet(BasicBlock, (2, 2), 2, 3))
# One block less, for what is compiled.
SMALL = models.from_linen(ResNet(BasicBlock, (1, 2), 2, 3))
FLAT = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
IMAGES = np.random.default_rng(1).normal(size=(5, 8, 8, 1)).astype(np.float32)


@functools.cache
def begun(model, which):
    """Parameters and model state with gates, and its compiled forward pass."""
    own = gates.gated(model)
    x = {"flat": FLAT, "images": IMAGES}[which]
    params, state = jax.jit(own.init)(jax.random.key(0), x)
    forward = jax.jit(own.apply, static_argnames="train")
    return params, state, lambda s, train=False: forward(params, s, x, train=train)


def closed(state, path, channels=None):
    return state._replace(gates=gates.linearised(state.gates, path, channels))


def by_hand(params, linear=(), channels=None):
    x = FLAT.astype(np.float64)
    for number in (1, 2):
        leaf = params[f"dense{number}"]
        x = x @ np.asarray(leaf["kernel"]) + np.asarray(leaf["bias"])
        if f"relu{number}" not in linear:
            x = np.maximum(x, 0)
        elif channels is not None:
            x = x * channels
    return x @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])


def find(model, x):
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    return gates.find_layers(model.apply, params, state, x, train=False)


def test_a_closed_gate_is_the_network_without_its_activation():
    params, state, forward = begun(PERCEPTRON, "flat")
    for linear in ((), ("relu1",), ("relu2",), ("relu1", "relu2")):
        own = functools.reduce(closed, linear, state)
        np.testing.assert_allclose(
            forward(own)[0], by_hand(params, linear), atol=1e-5, err_msg=str(linear)
        )


def test_a_linear_activation_lets_some_channels_through():
    params, state, forward = begun(PERCEPTRON, "flat")
    through = np.arange(6) % 2 == 0
    logits = forward(closed(state, "relu1", through))[0]
    expected = by_hand(params, ("relu1",), through)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_dropped_block_is_the_network_without_it():
    params, state, forward = begun(SMALL, "images")
    drop = state._replace(gates=gates.dropped(state.gates, "stage2_block2"))
    shorter = ResNet(BasicBlock, (1, 1), 2, 3)
    left = {name: own for name, own in params.items() if name != "stage2_block2"}
    stats = {k: v for k, v in state.own["batch_stats"].items() if k in left}
    expected = jax.jit(functools.partial(shorter.apply, train=False))(
        {"params": left, "batch_stats": stats}, IMAGES
    )
    np.testing.assert_allclose(forward(drop)[0], expected, atol=1e-5)
    assert np.abs(forward(state)[0] - expected).max() > 1e-3


def test_two_layers_around_a_closed_gate_are_merged_exactly():
    params, state, forward = begun(PERCEPTRON, "flat")
    through = np.arange(6) > 1
    first, second = (surgery.Dense(**params[f"dense{n}"]) for n in (1, 2))
    first = jax.tree.map(
        lambda leaf: leaf * through.reshape(*[1] * (leaf.ndim - 1), -1), first
    )
    merged = surgery.merge_dense(first, second)._asdict()
    shorter = models.from_linen(MLP((5,), 3))
    logits, _ = shorter.apply(
        {"dense1": merged, "head": params["head"]}, {}, FLAT, train=False
    )
    closed_logits, _ = forward(closed(state, "relu1", through))
    np.testing.assert_allclose(logits, closed_logits, atol=1e-5)


def test_open_gates_change_nothing_and_statistics_are_recorded():
    params, state, forward = begun(SMALL, "images")
    logits, after = forward(state, train=True)
    plainly = jax.jit(functools.partial(SMALL.apply, train=True))
    expected, stats = plainly(params, state.own, IMAGES)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), after.own, stats
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, after.gates, state.gates))
    plain, _ = jax.jit(SMALL.init)(jax.random.key(0), IMAGES)
    assert jax.tree.all(jax.tree.map(np.array_equal, plain, params))


def test_another_gate_compiles_nothing(caplog):
    _, state, forward = begun(PERCEPTRON, "flat")
    states = [state, closed(state, "relu1"), closed(state, "relu2", np.ones(5, bool))]
    forward(state)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for own in states:
            forward(own)
    assert "ompil" not in caplog.text


def test_gates_of_many_networks_are_mapped_over():
    params, state, forward = begun(PERCEPTRON, "flat")
    states = [closed(state, "relu1"), state]
    stacked = jax.tree.map(lambda *own: jnp.stack(own), *states)
    apply = functools.partial(gates.gated(PERCEPTRON).apply, train=False)
    both, _ = jax.vmap(apply, (None, 0, None))(params, stacked, FLAT)
    for own, logits in zip(states, both, strict=True):
        np.testing.assert_allclose(logits, forward(own)[0], atol=1e-5)


def test_what_is_behind_a_closed_gate_learns_nothing_and_what_is_before_it_does():
    params, state, _ = begun(PERCEPTRON, "flat")
    apply, off = gates.gated(PERCEPTRON).apply, np.array([True, *[False] * 5])

    def loss(params):
        return jnp.sum(apply(params, closed(state, "relu1", off), FLAT, train=True)[0])

    slope = jax.jit(jax.grad(loss))(params)["dense1"]["kernel"]
    assert np.any(slope[:, 0])
    assert not np.any(slope[:, 1:])


def test_the_layers_of_a_residual_network_and_what_feeds_them():
    layers = find(RESIDUAL, IMAGES)
    assert layers.blocks == ("stage1_block1", "stage1_block2", "stage2_block2")
    first, second = (layers.activations[f"stage2_block1/relu{n}"] for n in (1, 2))
    where = "stage2_block1/"
    assert first == (4, f"{where}norm1", (f"{where}conv1",))
    # A sum with a shortcut enters it, of which no statistics are known.
    assert second == (4, "", (f"{where}conv2", f"{where}shortcut_conv"))
    assert list(layers.activations)[:2] == ["stem_relu", "stage1_block1/relu1"]
    assert len(layers.activations) == 1 + 2 * 4


@pytest.mark.parametrize(
    ("name", "activations", "blocks"),
    [
        *(("lenet5", 3, 0), ("convnet_s", 3, 0), ("vgg11", 8, 0)),
        pytest.param("resnet50", 49, 12, marks=pytest.mark.slow),
    ],
)
def test_shipped_networks_have_gates(name, activations, blocks):
    layers = find(models.make_model(name, 10), jnp.zeros((1, 32, 32, 3)))
    assert (len(layers.activations), len(layers.blocks)) == (activations, blocks)
    assert all(own.kernels for own in layers.activations.values())


class Odd(nn.Module):
    """Of functions, pooling, a rectifier that is applied twice and nested blocks."""

    @nn.compact
    def __call__(self, x, *, train):
        shared = ReLU(name="shared")
        x = shared(shared(nn.relu(conv(2, 3, name="conv")(x))))
        x = batch_norm(train=train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train, name="dropout")(x)
        return dense(3, name="head")(Outer(name="outer")(x).mean(axis=(1, 2)))


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + Inner(name="inner")(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return ReLU(name="relu")(dense(2, name="dense")(x))


def test_of_nested_blocks_the_inner_one_counts_and_shared_layers_do_not():
    layers = find(models.from_linen(Odd()), IMAGES)
    assert layers.blocks == ("outer/inner",)
    assert layers.activations == {"outer/inner/relu": (2, "", ("outer/inner/dense",))}


def test_a_network_without_anything_to_gate_is_refused_by_a_sentence():
    for model in (runs.linear(3), models.from_linen(MLP((), 3))):
        with pytest.raises(ValueError, match="got neither; make them modules") as error:
            jax.eval_shape(gates.gated(model).init, jax.random.key(0), FLAT)
        assert "\n" not in str(error.value)


def test_layers_may_be_refused_when_a_network_is_initialised():
    def check(layers):
        raise ValueError(f"{len(layers.activations)} activations")

    with pytest.raises(ValueError, match="2 activations"):
        gates.gated(PERCEPTRON, check).init(jax.random.key(0), FLAT)


def test_leaves_are_found_beside_other_parameters():
    inner = {"relu": {}, "head": {"kernel": 0}, "ahead": {"kernel": 0}}
    assert gates.leaf_of(inner, "head", "kernel") == "head/kernel"
    shown = {"network": inner, "prompt": 0}
    assert gates.leaf_of(shown, "ahead", "kernel") == "network/ahead/kernel"
