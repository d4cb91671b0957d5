"""Models against parameter counts of the literature and forward passes in numpy."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from d2sparse import models
from d2sparse.models import layers
from d2sparse.models.mlp import MLP
from d2sparse.models.resnet import BasicBlock, Bottleneck, ResNet

NAMES = (
    "lenet_300_100",
    "lenet5",
    "convnet_s",
    "resnet8",
    "resnet8s",
    "resnet20",
    "resnet32",
    "resnet18",
    "resnet34",
    "resnet50",
    "vgg11",
    "vgg16",
)
WITHOUT_STATE = ("lenet_300_100", "lenet5", "convnet_s")


@functools.cache
def default_model(name):
    """The model of a name with 10 classes, made once so that its traces are shared."""
    return models.make_model(name, 10)


def abstract_init(model, shape):
    """Shapes of (params, model_state) for a batch of this shape, without running."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)


def random_init(model, shape, seed=0):
    """Parameters, state and batch in numpy: no random kernel has to be compiled.

    Every leaf is away from its initial value (biases not 0, scales not 1), so that a
    layer which ignores one of its leaves is noticed.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        deviation = 0.3 if name in ("bias", "mean") else leaf.size**-0.25
        return (deviation * rng.standard_normal(leaf.shape)).astype(np.float32)

    params, state = jax.tree_util.tree_map_with_path(draw, abstract_init(model, shape))
    return params, state, rng.standard_normal(shape).astype(np.float32)


def forward(model, *arguments, train):
    return jax.jit(model.apply, static_argnames="train")(*arguments, train=train)


def leaf_paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return ["/".join(key.key for key in path) for path, _ in leaves]


def count(tree, name=""):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(leaf.size for path, leaf in leaves if path[-1].key.startswith(name))


# --- References in numpy ---------------------------------------------------------


def np_conv(x, layer, stride=1, padding=None):
    """Convolution as a loop over output pixels."""
    kernel = layer["kernel"]
    side = kernel.shape[0]
    pad = side // 2 if padding is None else padding
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height = (x.shape[1] - side) // stride + 1
    width = (x.shape[2] - side) // stride + 1
    out = np.zeros((x.shape[0], height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            top, left = i * stride, j * stride
            patch = x[:, top : top + side, left : left + side]
            out[:, i, j] = np.tensordot(patch, kernel, axes=3)
    return out + layer.get("bias", 0.0)


def np_pool(x):
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def np_norm(x, layer, statistics):
    deviation = np.sqrt(statistics["var"] + 1e-5)
    return (x - statistics["mean"]) / deviation * layer["scale"] + layer["bias"]


def np_dense(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def np_relu(x):
    return np.maximum(x, 0.0)


def np_basic_block(x, params, statistics, stride):
    def conv_norm(x, suffix, prefix="", stride=1):
        conv, norm = f"{prefix}conv{suffix}", f"{prefix}norm{suffix}"
        return np_norm(np_conv(x, params[conv], stride), params[norm], statistics[norm])

    y = np_relu(conv_norm(x, "1", stride=stride))
    y = conv_norm(y, "2")
    if "shortcut_conv" in params:
        x = conv_norm(x, "", prefix="shortcut_", stride=stride)
    return np_relu(x + y)


# --- Sizes and names -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", 272_474),
        ("resnet32", 466_906),
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("vgg11", 9_228_362),
        ("vgg16", 14_724_042),
    ],
)
def test_parameter_count_on_cifar(name, expected):
    params, _ = abstract_init(default_model(name), (1, 32, 32, 3))
    assert count(params) == expected


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (models.lenet_300_100(), (1, 28, 28, 1), 266_610),
        (models.lenet5(), (1, 28, 28, 1), 431_080),
        (models.resnet18(1000, stem="imagenet"), (1, 224, 224, 3), 11_689_512),
        (models.resnet34(1000, stem="imagenet"), (1, 224, 224, 3), 21_797_672),
        (models.resnet50(1000, stem="imagenet"), (1, 224, 224, 3), 25_557_032),
    ],
)
def test_parameter_count(model, shape, expected):
    params, _ = abstract_init(model, shape)
    assert count(params) == expected


@pytest.mark.parametrize(
    ("model", "channels", "expected"),
    [
        (models.convnet_s(), 1, 9 * (16 + 16 * 32 + 32 * 64) + 640),
        (models.resnet8(), 1, 77_072),
        (models.resnet8(), 3, 77_360),
    ],
)
def test_kernel_weight_count(model, channels, expected):
    params, _ = abstract_init(model, (1, 8, 8, channels))
    assert count(params, "kernel") == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_an_explicit_name(name):
    params, state = abstract_init(default_model(name), (1, 32, 32, 3))
    paths = leaf_paths(params) + leaf_paths(state)
    assert [path for path in paths if re.search("[A-Z]", path)] == []
    assert set(params["head"]) == {"kernel", "bias"}


def test_paths_of_resnet8():
    params, state = abstract_init(models.resnet8(), (1, 8, 8, 1))
    kernels = [path for path in leaf_paths(params) if path.endswith("kernel")]
    assert kernels == [
        "head/kernel",
        "stage1_block1/conv1/kernel",
        "stage1_block1/conv2/kernel",
        "stage2_block1/conv1/kernel",
        "stage2_block1/conv2/kernel",
        "stage2_block1/shortcut_conv/kernel",
        "stage3_block1/conv1/kernel",
        "stage3_block1/conv2/kernel",
        "stage3_block1/shortcut_conv/kernel",
        "stem_conv/kernel",
    ]
    assert "batch_stats/stage2_block1/shortcut_norm/var" in leaf_paths(state)


@pytest.mark.parametrize("name", NAMES)
def test_only_layers_without_a_norm_have_a_bias(name):
    params, _ = abstract_init(default_model(name), (1, 32, 32, 3))
    layers_of = {path.rsplit("/", 1)[0] for path in leaf_paths(params)}
    for path in leaf_paths(params):
        layer, leaf = path.rsplit("/", 1)
        if leaf == "kernel":
            normed = layer.replace("conv", "norm") in layers_of - {layer}
            assert (f"{layer}/bias" in leaf_paths(params)) != normed


@pytest.mark.parametrize("name", NAMES)
def test_state_is_batch_statistics_or_empty(name):
    _, state = abstract_init(default_model(name), (1, 32, 32, 3))
    assert list(state) == ([] if name in WITHOUT_STATE else ["batch_stats"])
    assert isinstance(state, dict)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet_300_100", (3, 8, 12, 3)),
        ("lenet5", (3, 16, 17, 3)),
        ("convnet_s", (3, 8, 12, 3)),
        ("resnet8s", (3, 8, 12, 3)),
        ("resnet18", (3, 8, 12, 3)),
        ("vgg11", (3, 8, 12, 3)),
        ("vgg11", (2, 28, 28, 1)),
    ],
)
def test_logits_and_state_at_small_image_sizes(name, shape):
    model = default_model(name)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params, state = abstract_init(model, shape)
    apply = functools.partial(model.apply, train=True)
    jaxpr, (logits, new_state) = jax.make_jaxpr(apply, return_shape=True)(
        params, state, x
    )
    assert logits.shape == (shape[0], 10)
    assert logits.dtype == jnp.float32
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    # An empty feature map would still give logits, the mean of nothing.
    assert all(out.aval.size > 0 for eqn in jaxpr.eqns for out in eqn.outvars)


# --- Feature maps ----------------------------------------------------------------


def stage_shapes(module, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def intermediates(x):
        variables = module.init(jax.random.key(0), x, train=False)
        _, captured = module.apply(
            variables, x, train=False, capture_intermediates=True, mutable=True
        )
        return captured["intermediates"]

    maps = jax.eval_shape(intermediates, x)
    return {
        name: out["__call__"][0].shape
        for name, out in maps.items()
        if name != "__call__"
    }


@pytest.mark.parametrize(
    ("block", "stem", "side", "sides", "expansion"),
    [
        (BasicBlock, "cifar", 32, (32, 16, 8, 4), 1),
        (BasicBlock, "imagenet", 224, (56, 28, 14, 7), 1),
        (Bottleneck, "imagenet", 224, (56, 28, 14, 7), 4),
    ],
)
def test_feature_maps_halve_and_channels_double(block, stem, side, sides, expansion):
    module = ResNet(block, (2, 2, 2, 2), width=64, num_classes=10, stem=stem)
    captured = stage_shapes(module, (1, side, side, 3))
    for stage, expected in enumerate(sides, start=1):
        channels = 64 * 2 ** (stage - 1) * expansion
        for index in (1, 2):
            shape = captured[f"stage{stage}_block{index}"]
            assert shape == (1, expected, expected, channels)


@pytest.mark.parametrize(("stride", "sides"), [(1, (8, 8, 4, 2)), (2, (4, 4, 2, 1))])
def test_stem_stride(stride, sides):
    module = ResNet(BasicBlock, (1, 1, 1), 16, 10, stem_stride=stride)
    captured = stage_shapes(module, (1, 8, 8, 1))
    names = ("stem_conv", "stage1_block1", "stage2_block1", "stage3_block1")
    assert tuple(captured[name][1] for name in names) == sides


def multiply_accumulates(model, shape):
    """Multiply-accumulates of the convolutions and dense layers, from the jaxpr."""
    params, state = abstract_init(model, shape)

    def logits(params, state, x):
        return model.apply(params, state, x, train=False)[0]

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    total = 0
    for equation in jax.make_jaxpr(logits)(params, state, x).eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            kernel = equation.invars[1].aval.shape
            total += int(np.prod(equation.outvars[0].aval.shape)) * int(
                np.prod(kernel[:-1])
            )
    return total


@pytest.mark.parametrize(
    ("model", "side", "expected"),
    [
        # The ImageNet figures are those of the common implementations.
        (models.resnet18(1000, stem="imagenet"), 224, 1_814_073_344),
        (models.resnet50(1000, stem="imagenet"), 224, 4_089_184_256),
        (models.vgg16(10), 32, 313_201_664),
        # Stem, first stage, three equal stages of half the side and twice the
        # channels, head.
        (
            models.resnet18(10),
            32,
            32**2 * 9 * (3 * 64 + 4 * 64**2)
            + 3 * 16**2 * (9 * (64 * 128 + 3 * 128**2) + 64 * 128)
            + 512 * 10,
        ),
    ],
)
def test_multiply_accumulates(model, side, expected):
    assert multiply_accumulates(model, (1, side, side, 3)) == expected


def test_resnet8s_is_resnet8_with_a_stride_2_stem():
    costs = [
        multiply_accumulates(model, (1, 32, 32, 3))
        for model in (
            models.make_model("resnet8s", 10),
            models.resnet8(10, stem_stride=2),
            models.resnet8(10),
        )
    ]
    assert costs[0] == costs[1]
    assert costs[2] - 640 == 4 * (costs[0] - 640)


# --- Forward passes against numpy ------------------------------------------------


def test_lenet_300_100_forward():
    model = models.lenet_300_100(num_classes=4, width=0.05)
    params, state, x = random_init(model, (3, 5, 4, 2))
    y = x.reshape(3, 40)
    for name in ("dense1", "dense2"):
        y = np_relu(np_dense(y, params[name]))
    logits, new_state = forward(model, params, state, x, train=True)
    np.testing.assert_allclose(logits, np_dense(y, params["head"]), rtol=1e-4)
    assert new_state == {}
    flat, _ = forward(model, params, state, x.reshape(3, 40), train=False)
    np.testing.assert_array_equal(flat, logits)


def test_lenet5_forward():
    model = models.lenet5(num_classes=4, width=0.1)
    params, state, x = random_init(model, (2, 17, 16, 1))
    y = x
    for name in ("conv1", "conv2"):
        y = np_pool(np_relu(np_conv(y, params[name], padding=0)))
    y = np_relu(np_dense(y.reshape(2, -1), params["dense1"]))
    logits, _ = forward(model, params, state, x, train=False)
    expected = np_dense(y, params["head"])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_convnet_s_forward():
    model = models.convnet_s(num_classes=4, width=4)
    params, state, x = random_init(model, (2, 9, 8, 1))
    y = x
    for index in (1, 2, 3):
        y = np_conv(y, params[f"conv{index}"], stride=2)
        batch, height, width, channels = y.shape
        groups = y.reshape(batch, height, width, 4, channels // 4)
        mean = groups.mean(axis=(1, 2, 4), keepdims=True)
        deviation = np.sqrt(groups.var(axis=(1, 2, 4), keepdims=True) + 1e-5)
        y = ((groups - mean) / deviation).reshape(y.shape)
        norm = params[f"norm{index}"]
        y = np_relu(y * norm["scale"] + norm["bias"])
    logits, _ = forward(model, params, state, x, train=True)
    expected = np_dense(y.mean(axis=(1, 2)), params["head"])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stem_stride", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resnet8_forward_on_running_statistics(stem_stride):
    model = models.resnet8(num_classes=4, width=3, stem_stride=stem_stride)
    params, state, x = random_init(model, (2, 8, 9, 2))
    statistics = state["batch_stats"]
    y = np_conv(x, params["stem_conv"], stride=stem_stride)
    y = np_relu(np_norm(y, params["stem_norm"], statistics["stem_norm"]))
    for name, stride in (
        ("stage1_block1", 1),
        ("stage2_block1", 2),
        ("stage3_block1", 2),
    ):
        y = np_basic_block(y, params[name], statistics[name], stride)
    logits, _ = forward(model, params, state, x, train=False)
    expected = np_dense(y.mean(axis=(1, 2)), params["head"])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_bottleneck_forward():
    model = models.from_linen(Bottleneck(channels=2, stride=2))
    params, state, x = random_init(model, (2, 5, 4, 3))
    statistics = state["batch_stats"]

    def conv_norm(x, index, stride=1):
        norm = f"norm{index}"
        y = np_conv(x, params[f"conv{index}"], stride)
        return np_norm(y, params[norm], statistics[norm])

    y = np_relu(conv_norm(np_relu(conv_norm(x, 1)), 2, stride=2))
    shortcut = np_norm(
        np_conv(x, params["shortcut_conv"], 2),
        params["shortcut_norm"],
        statistics["shortcut_norm"],
    )
    features, _ = forward(model, params, state, x, train=False)
    expected = np_relu(conv_norm(y, 3) + shortcut)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (1, 2), (7, 2)])
def test_conv_layer(kernel_size, stride):
    layer = layers.conv(4, kernel_size, stride=stride, name="conv", bias=True)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 6, 3)).astype(np.float32)
    kernel = rng.standard_normal((kernel_size, kernel_size, 3, 4)).astype(np.float32)
    params = {"kernel": kernel, "bias": rng.standard_normal(4).astype(np.float32)}
    y = layer.apply({"params": params}, x)
    assert y.shape == (2, -(-7 // stride), -(-6 // stride), 4)
    np.testing.assert_allclose(y, np_conv(x, params, stride), rtol=1e-4, atol=1e-4)


# --- BatchNorm -------------------------------------------------------------------


class NormOnly(nn.Module):
    """A single BatchNorm as a model."""

    @nn.compact
    def __call__(self, x, *, train):
        return layers.batch_norm(train=train, name="norm")(x)


def test_batch_norm_in_training_uses_and_records_the_batch():
    model = models.from_linen(NormOnly())
    params, state, x = random_init(model, (4, 3, 2, 5))
    y, new_state = forward(model, params, state, x, train=True)
    batch = {"mean": x.mean(axis=(0, 1, 2)), "var": x.var(axis=(0, 1, 2))}
    expected = np_norm(x, params["norm"], batch)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for name, old in state["batch_stats"]["norm"].items():
        new = new_state["batch_stats"]["norm"][name]
        np.testing.assert_allclose(new, 0.9 * old + 0.1 * batch[name], rtol=1e-5)


def test_evaluation_leaves_the_state_and_ignores_the_rest_of_the_batch():
    model = models.from_linen(NormOnly())
    params, state, x = random_init(model, (3, 2, 2, 1))
    apply = jax.jit(functools.partial(model.apply, train=False))
    logits, new_state = apply(params, state, x)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)
    other = np.concatenate([x[:1], 10.0 * x[1:] + 3.0])
    np.testing.assert_allclose(apply(params, state, other)[0][0], logits[0], rtol=1e-5)


def test_initial_norms_are_the_identity():
    model = models.from_linen(NormOnly())
    params, state = model.init(jax.random.key(0), jnp.ones((2, 3, 3, 4)))
    np.testing.assert_array_equal(params["norm"]["scale"], np.ones(4))
    np.testing.assert_array_equal(params["norm"]["bias"], np.zeros(4))
    np.testing.assert_array_equal(state["batch_stats"]["norm"]["mean"], np.zeros(4))
    np.testing.assert_array_equal(state["batch_stats"]["norm"]["var"], np.ones(4))


# --- Initialisation --------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "variance"),
    [
        (layers.conv(64, 3, name="conv"), (3, 3, 16, 64), 2 / (9 * 64)),
        (layers.dense(64, name="dense"), (256, 64), 2 / 256),
    ],
)
def test_kernels_are_kaiming_normal(layer, shape, variance):
    kernel = layer.kernel_init(jax.random.key(0), shape)
    values = np.asarray(kernel).ravel() / np.sqrt(variance)
    assert abs(values.mean()) < 5 / np.sqrt(values.size)
    assert abs(values.var() - 1.0) < 5 * np.sqrt(2 / values.size)
    # A truncated normal would have nothing out here; a normal has 0.27 %.
    assert np.mean(np.abs(values) > 3.0) > 0.001


def test_init_is_a_function_of_key_and_shape_alone():
    model = models.from_linen(MLP(hidden=(), num_classes=3))
    x = np.ones((2, 2, 2, 1), np.float32)
    init = jax.vmap(model.init, in_axes=(0, None))
    keys = jax.random.split(jax.random.key(0), 2)
    first, state = init(keys, x)
    again, _ = init(keys, np.nan * x)
    assert state == {}
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernel = first["head"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).min() > 0


# --- Transformations -------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(models.convnet_s(num_classes=3, width=2), marks=pytest.mark.slow),
        models.resnet8(num_classes=3, width=2, stem_stride=2),
    ],
    ids=["convnet_s", "resnet8"],
)
def test_jitted_gradient_is_finite_and_reaches_every_kernel(model):
    params, state, x = random_init(model, (4, 8, 8, 1))

    @jax.jit
    def gradient(params, state, x):
        def loss(params):
            logits, new_state = model.apply(params, state, x, train=True)
            return (logits**2).sum(), new_state

        return jax.grad(loss, has_aux=True)(params)

    grads, new_state = gradient(params, state, x)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for path, leaf in zip(leaf_paths(grads), jax.tree.leaves(grads), strict=True):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(
            models.lenet_300_100(num_classes=3, width=0.02),
            (4, 4, 4, 1),
            marks=pytest.mark.slow,
        ),
        (models.convnet_s(num_classes=3, width=2), (4, 8, 8, 1)),
        pytest.param(
            models.resnet8(num_classes=3, width=2, stem_stride=2),
            (4, 8, 8, 1),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["lenet_300_100", "convnet_s", "resnet8"],
)
def test_vmap_over_parameter_sets_equals_a_loop(model, shape):
    runs = [random_init(model, shape, seed)[:2] for seed in range(3)]
    x = random_init(model, shape)[2]

    def apply(params, state, x):
        return model.apply(params, state, x, train=True)

    params, state = jax.tree.map(lambda *leaves: np.stack(leaves), *runs)
    together = jax.jit(jax.vmap(apply, in_axes=(0, 0, None)))(params, state, x)
    one = jax.jit(apply)
    looped = jax.tree.map(lambda *a: np.stack(a), *(one(p, s, x) for p, s in runs))

    def assert_close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    jax.tree.map(assert_close, together, looped)


# --- Widths ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "layer", "expected"),
    [
        ("lenet_300_100", 0.5, "dense2", (150, 50)),
        ("lenet_300_100", 1e-6, "dense2", (1, 1)),
        ("lenet5", 0.5, "conv2", (5, 5, 10, 25)),
        ("lenet5", 2, "dense1", (1600, 1000)),
        ("convnet_s", 5, "conv3", (3, 3, 10, 20)),
        ("resnet8", 4.0, "stem_conv", (3, 3, 3, 4)),
        ("resnet50", 8, "head", (8 * 8 * 4, 10)),
        ("vgg11", 4, "stage5_conv2", (3, 3, 32, 32)),
    ],
)
def test_width(name, width, layer, expected):
    params, _ = abstract_init(models.make_model(name, 10, width), (1, 28, 28, 3))
    assert params[layer]["kernel"].shape == expected


@pytest.mark.parametrize("width", [1, 2])
def test_convnet_s_is_alive_at_every_width(width):
    model = models.convnet_s(num_classes=3, width=width)
    params, state, x = random_init(model, (4, 8, 8, 1), seed=1)
    # With a single value per group every example would have the same logits.
    logits, _ = forward(model, params, state, x, train=False)
    assert np.asarray(logits).std(axis=0).max() > 1e-3


def test_scaled_size_rounds_and_keeps_one():
    assert [layers.scaled_size(100, w) for w in (0.004, 0.016, 1, 2.5)] == [
        1,
        2,
        100,
        250,
    ]


# --- Errors ----------------------------------------------------------------------


def test_unknown_name_lists_all_and_suggests_the_closest():
    with pytest.raises(ValueError, match="did you mean 'resnet18'") as error:
        models.make_model("resnet_18", 10)
    assert all(name in str(error.value) for name in NAMES)
    with pytest.raises(ValueError, match="unknown model 'transformer'; known"):
        models.make_model("transformer", 10)


def test_every_exported_builder_has_a_flag_name():
    builders = {
        name
        for name in models.__all__
        if inspect.isfunction(getattr(models, name))
        and "num_classes" in inspect.signature(getattr(models, name)).parameters
    } - {"make_model"}
    assert builders | {"resnet8s"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf")])
def test_width_out_of_range(name, width):
    with pytest.raises(ValueError, match=r"width .*must be .*, got"):
        models.make_model(name, 10, width)


def test_fractional_channels_and_classes():
    with pytest.raises(ValueError, match=r"width must be a whole number >= 1, got 1.5"):
        models.convnet_s(width=1.5)
    for name in NAMES:
        with pytest.raises(ValueError, match="num_classes must be a whole number"):
            models.make_model(name, 0)


def test_unknown_stem():
    with pytest.raises(ValueError, match='stem must be "cifar" or "imagenet"'):
        models.resnet18(stem="mnist")
    with pytest.raises(ValueError, match="stem_stride must be 1 or 2, got 3"):
        models.resnet8(stem_stride=3)


@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (1, 15, 28, 1), (1, 28, 15, 1)])
def test_lenet5_refuses_small_images(shape):
    with pytest.raises(ValueError, match="at least 16x16 pixels, got shape"):
        abstract_init(models.lenet5(), shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_image_is_refused(name):
    shape = (28,) if name == "lenet_300_100" else (28, 28, 1)
    with pytest.raises(ValueError, match=r"expected .*, got shape"):
        abstract_init(models.make_model(name, 10), shape)
