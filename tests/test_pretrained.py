"""Trained networks against forward passes in numpy, their scores, and broken files."""

import collections
import functools
import io
import pickle
import re
import subprocess
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prepared import PREPARED, prepared_version, shortened, trained_network

from d2sparse import macs, tree
from d2sparse.data import load, standardize
from d2sparse.models import pretrained, taps
from d2sparse.models.pretrained import into, torch_name

RNG = np.random.default_rng(0)
STATISTICS = ("weight", "bias", "running_mean", "running_var")


# --- References in numpy, on the arrays of the files ------------------------------


def conv(x, kernel, stride, padding):
    """Cross-correlation of float[height, width, in] with float[h, w, in, out]."""
    x = np.pad(x, (padding, padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (0, 1))
    windows = windows[::stride, ::stride]
    return np.einsum("yxihw,hwio->yxo", windows, kernel, optimize=True)


def same(size, kernel, stride):
    """Padding in TensorFlow: what is needed, its larger half behind."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def norm(x, scale, bias, mean, var, epsilon):
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def torch_norm(x, arrays, name, epsilon=1e-5):
    return norm(x, *(arrays[f"{name}.{key}"] for key in STATISTICS), epsilon)


def by_torch_names(arrays, x):
    """Logits of a CIFAR ResNet with shortcuts of option A."""

    def conv_norm(x, number, prefix="", stride=1):
        kernel = arrays[f"{prefix}conv{number}.weight"].transpose(2, 3, 1, 0)
        return torch_norm(
            conv(x, kernel, stride, (1, 1)), arrays, f"{prefix}bn{number}"
        )

    x = np.maximum(conv_norm(x, 1), 0)
    for stage in (1, 2, 3):
        index = 0
        while f"layer{stage}.{index}.conv1.weight" in arrays:
            prefix = f"layer{stage}.{index}."
            stride = 2 if stage > 1 and index == 0 else 1
            y = np.maximum(conv_norm(x, 1, prefix, stride), 0)
            y = conv_norm(y, 2, prefix)
            quarter = (y.shape[-1] - x.shape[-1]) // 2
            short = np.pad(x[::stride, ::stride], ((0, 0), (0, 0), (quarter, quarter)))
            x, index = np.maximum(y + short, 0), index + 1
    return arrays["linear.weight"] @ x.mean(axis=(0, 1)) + arrays["linear.bias"]


def by_keras_names(arrays, x):
    """Logits of the ResNet-8 of MLPerf Tiny, layer by layer as its graph has them."""

    def convolution(x, number, stride=1):
        name = f"conv2d_{number}" if number else "conv2d"
        kernel = arrays[f"{name}/kernel"]
        padding = same(len(x), len(kernel), stride)
        return conv(x, kernel, stride, padding) + arrays[f"{name}/bias"]

    def normalised(x, number):
        name = f"batch_normalization_{number}" if number else "batch_normalization"
        keys = ("gamma", "beta", "moving_mean", "moving_variance")
        return norm(x, *(arrays[f"{name}/{key}"] for key in keys), 1e-3)

    def relu(x):
        return np.maximum(x, 0)

    x = relu(normalised(convolution(x, 0), 0))
    y = relu(normalised(convolution(x, 1), 1))
    x = relu(x + normalised(convolution(y, 2), 2))
    for first, norms in ((3, 3), (6, 5)):
        y = relu(normalised(convolution(x, first, 2), norms))
        y = normalised(convolution(y, first + 1), norms + 1)
        x = relu(convolution(x, first + 2, 2) + y)
    return x.mean(axis=(0, 1)) @ arrays["dense/kernel"] + arrays["dense/bias"]


def by_efficientnet_names(arrays, x):
    """Logits of EfficientNet-Lite0, block by block; a block with stride 2 halves."""

    def layer(x, name, bn, stride=1):
        kernel = arrays[f"{name}.weight"].transpose(2, 3, 1, 0)
        padding = same(len(x), len(kernel), stride)
        if kernel.shape[2] == 1 < x.shape[2]:  # Depthwise.
            padded = np.pad(x, (padding, padding, (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(
                padded, kernel.shape[:2], (0, 1)
            )[::stride, ::stride]
            y = np.einsum("yxihw,hwi->yxi", windows, kernel[:, :, 0])
        else:
            y = conv(x, kernel, stride, padding)
        return torch_norm(y, arrays, bn, 1e-3)

    def relu6(x):
        return np.clip(x, 0, 6)

    x = relu6(layer(x, "_conv_stem", "_bn0", 2))
    for block in range(16):
        prefix, y = f"_blocks.{block}.", x
        if block:
            y = relu6(layer(y, f"{prefix}_expand_conv", f"{prefix}_bn0"))
        stride = 2 if block in (1, 3, 5, 11) else 1
        y = relu6(layer(y, f"{prefix}_depthwise_conv", f"{prefix}_bn1", stride))
        y = layer(y, f"{prefix}_project_conv", f"{prefix}_bn2")
        x = x + y if x.shape == y.shape else y
    x = relu6(layer(x, "_conv_head", "_bn1"))
    return arrays["_fc.weight"] @ x.mean(axis=(0, 1)) + arrays["_fc.bias"]


# --- Files of networks that nobody has trained ------------------------------------


def drawn(shapes):
    """Random arrays by name, variances positive and kernels of the usual size."""

    def draw(name, shape):
        if re.search("var|bn.*weight|gamma", name):
            return RNG.uniform(0.5, 1.5, shape)
        return RNG.normal(size=shape) * (2 / np.prod(shape)) ** (0.25 if shape else 0)

    return {name: draw(name, s).astype(np.float32) for name, s in shapes.items()}


def torch_norms(name, size):
    return {f"{name}.{key}": (size,) for key in STATISTICS}


def cifar_arrays(depth=1, width=4, classes=5):
    shapes = {"conv1.weight": (width, 3, 3, 3), **torch_norms("bn1", width)}
    inputs = width
    for stage in (1, 2, 3):
        size = width * 2 ** (stage - 1)
        for index in range(depth):
            prefix = f"layer{stage}.{index}."
            for number in (1, 2):
                shapes[f"{prefix}conv{number}.weight"] = (size, inputs, 3, 3)
                shapes |= torch_norms(f"{prefix}bn{number}", size)
                inputs = size
    shapes |= {"linear.weight": (classes, inputs), "linear.bias": (classes,)}
    return drawn(shapes)


def keras_arrays():
    shapes = {"dense/kernel": (64, 10), "dense/bias": (10,)}
    convs = [(3, 3, 3, 16), (3, 3, 16, 16), (3, 3, 16, 16)]
    convs += [(3, 3, 16, 32), (3, 3, 32, 32), (1, 1, 16, 32)]
    convs += [(3, 3, 32, 64), (3, 3, 64, 64), (1, 1, 32, 64)]
    for number, shape in enumerate(convs):
        name = f"conv2d_{number}" if number else "conv2d"
        shapes |= {f"{name}/kernel": shape, f"{name}/bias": shape[-1:]}
    for number, size in enumerate((16, 16, 16, 32, 32, 64, 64)):
        name = f"batch_normalization_{number}" if number else "batch_normalization"
        for key in ("gamma", "beta", "moving_mean", "moving_variance"):
            shapes[f"{name}/{key}"] = (size,)
    return drawn(shapes)


def efficientnet_arrays(classes=7):
    shapes = {"_conv_stem.weight": (32, 3, 3, 3), **torch_norms("_bn0", 32)}
    outputs = [16, 24, 24, 40, 40, *[80] * 3, *[112] * 3, *[192] * 4, 320]
    sizes = [3, 3, 3, 5, 5, *[3] * 3, *[5] * 3, *[5] * 4, 3]
    channels = 32
    for block, (output, size) in enumerate(zip(outputs, sizes, strict=True)):
        prefix, inner = f"_blocks.{block}.", channels * (6 if block else 1)
        if block:
            shapes[f"{prefix}_expand_conv.weight"] = (inner, channels, 1, 1)
            shapes |= torch_norms(f"{prefix}_bn0", inner)
        shapes[f"{prefix}_depthwise_conv.weight"] = (inner, 1, size, size)
        shapes[f"{prefix}_project_conv.weight"] = (output, inner, 1, 1)
        shapes |= torch_norms(f"{prefix}_bn1", inner)
        shapes |= torch_norms(f"{prefix}_bn2", output)
        channels = output
    shapes |= {"_conv_head.weight": (1280, 320, 1, 1), **torch_norms("_bn1", 1280)}
    return drawn({**shapes, "_fc.weight": (classes, 1280), "_fc.bias": (classes,)})


def logits(network, x):
    apply = jax.jit(functools.partial(network.model.apply, train=False))
    return apply(network.params, network.model_state, x)[0]


def assert_logits(found, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_cifar_resnet_is_the_forward_pass_in_numpy():
    arrays = cifar_arrays(depth=2)
    network = pretrained.cifar_resnet(arrays)
    assert list(network.params["stage3_block2"]) == ["conv1", "conv2", "norm1", "norm2"]
    x = RNG.normal(size=(2, 12, 12, 3)).astype(np.float32)
    assert_logits(logits(network, x), [by_torch_names(arrays, image) for image in x])


def test_the_resnet_of_mlperf_is_the_forward_pass_in_numpy():
    arrays = keras_arrays()
    network = pretrained.mlperf_resnet8(arrays)
    x = RNG.normal(size=(2, 12, 12, 3)).astype(np.float32)
    assert_logits(logits(network, x), [by_keras_names(arrays, image) for image in x])
    images = RNG.integers(0, 256, (2, 4, 4, 3), np.uint8)
    raw = standardize(images, network.mean, network.std)
    np.testing.assert_allclose(raw, images.astype(np.float32), rtol=1e-6)


@pytest.mark.slow
def test_efficientnet_is_the_forward_pass_in_numpy():
    arrays = efficientnet_arrays()
    network = pretrained.efficientnet_lite0(arrays)
    x = RNG.normal(size=(1, 40, 40, 3)).astype(np.float32)
    assert_logits(logits(network, x), [by_efficientnet_names(arrays, x[0])])


def test_efficientnet_has_its_published_size_and_cost():
    arrays = efficientnet_arrays(classes=1000)
    counters = {"_bn0.num_batches_tracked": np.zeros((), np.int64)}
    network = pretrained.efficientnet_lite0(arrays | counters)
    assert tree.size(network.params) == 4_652_008
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    assert round(sum(costs(network, x).values()) / 1e6) == 385
    np.testing.assert_allclose(
        network.mean * 255 + network.std * 255 * 0.5, 191, rtol=1e-6
    )


def costs(network, x):
    def apply(params, x):
        return network.model.apply(params, network.model_state, x, train=False)[0]

    return macs.forward_macs(apply, network.params, x)


# --- The files themselves -----------------------------------------------------------

FILES = {
    "resnet20-12fca82f.npz": (pretrained.cifar_resnet, 0.9173),
    "resnet56-4bfd9763.npz": (pretrained.cifar_resnet, 0.9339),
    "pretrainedResnet.h5": (pretrained.mlperf_resnet8, 0.8719),
}


@functools.cache
def trained(name):
    build, _ = FILES[name]
    return build(pretrained.load_arrays(trained_network(name)))


def accuracy(network, split, batch=250):
    @jax.jit
    def right(images, labels):
        x = standardize(images, network.mean, network.std)
        found = network.model.apply(
            network.params, network.model_state, x, train=False
        )[0]
        return jnp.sum(found.argmax(-1) == labels)

    starts = range(0, len(split.labels), batch)
    batches = [slice(start, start + batch) for start in starts]
    total = sum(int(right(split.images[b], split.labels[b])) for b in batches)
    return total / len(split.labels)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet20-12fca82f.npz", 0.924), ("pretrainedResnet.h5", 0.88)],
)
def test_the_first_500_test_images(name, expected, tmp_path):
    network = trained(name)
    data = load("cifar10", shortened("cifar10", tmp_path, train=10, test=500))
    # A logit that is another in its last bits may turn an image over.
    assert abs(accuracy(network, data.test) - expected) <= 0.002


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_published_accuracy_on_the_whole_test_split(name):
    network = trained(name)
    prepared_version("cifar10")
    found = accuracy(network, load("cifar10", PREPARED).test)
    assert abs(found - FILES[name][1]) <= 0.0002


def test_features_of_the_penultimate_layer_and_costs():
    network = trained("resnet20-12fca82f.npz")
    arrays = pretrained.load_arrays(trained_network("resnet20-12fca82f.npz"))
    x = RNG.normal(size=(2, 32, 32, 3)).astype(np.float32)
    read = jax.jit(
        functools.partial(taps.read(network.model.apply, ["head"]), train=False)
    )
    (found, _), tapped = read(network.params, network.model_state, x)
    features = np.asarray(tapped["head"].input)
    assert features.shape == (2, 64)
    head = arrays["linear.weight"], arrays["linear.bias"]
    np.testing.assert_allclose(features @ head[0].T + head[1], found, atol=1e-4)
    assert_logits(found[0], by_torch_names(arrays, x[0]))
    assert sum(costs(network, x[:1]).values()) == 40_551_040
    assert tree.size(network.params) == 269_722


def test_costs_of_the_other_networks():
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert sum(costs(pretrained.mlperf_resnet8(keras_arrays()), x).values()) == (
        12_501_632
    )
    network = trained("resnet56-4bfd9763.npz")
    assert len(network.params) == 2 + 27 + 1
    assert sum(costs(network, x).values()) == 40_551_040 + 36 * 2_359_296


# --- Arrays into a tree ---------------------------------------------------------------

TREE = {
    "params": {
        "conv1": {"kernel": np.zeros((3, 3, 2, 4), np.float32)},
        "head": {"kernel": np.zeros((4, 4), np.float32), "bias": jnp.zeros(4)},
    },
    "batch_stats": {"bn1": {"mean": jax.ShapeDtypeStruct((4,), jnp.float32)}},
}
ARRAYS = {
    "conv1.weight": RNG.normal(size=(4, 2, 3, 3)).astype(np.float32),
    "bn1.running_mean": np.arange(4, dtype=np.float32),
    "head.weight": RNG.normal(size=(4, 4)).astype(np.float32),
    "head.bias": np.ones(4, np.float16),
}


def test_every_leaf_takes_its_array():
    filled = into(TREE, ARRAYS, torch_name, layout="torch")
    np.testing.assert_array_equal(
        filled["params"]["conv1"]["kernel"],
        ARRAYS["conv1.weight"].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(
        filled["params"]["head"]["kernel"], ARRAYS["head.weight"].T
    )
    assert filled["params"]["head"]["bias"].dtype == jnp.float32
    np.testing.assert_array_equal(filled["batch_stats"]["bn1"]["mean"], np.arange(4))
    again = into(
        filled, {path: np.asarray(x) for path, x in tree.flatten(filled).items()}
    )
    jax.tree.map(np.testing.assert_array_equal, again, filled)


def without(name):
    return {other: array for other, array in ARRAYS.items() if other != name}


def changed(name, array):
    return ARRAYS | {name: array}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            without("head.bias") | {"head.biases": ARRAYS["head.bias"]},
            "an array 'head.bias' for the leaf 'params/head/bias', got none, nearest "
            "is 'head.biases'; let `rename`",
        ),
        (without("head.bias"), "got none; the file has fewer arrays than the network"),
        (
            {f"module.{name}": array for name, array in ARRAYS.items()},
            "nearest is 'module.bn1.running_mean'; take the prefix off all names with "
            "`strip_prefix(arrays, 'module.')`",
        ),
        (
            changed("head.bias2", ARRAYS["head.bias"]) | {"other": np.ones(1)},
            "a leaf for every array, got none for 'head.bias2' and 1 more, nearest is "
            "'head.bias' of the leaf 'params/head/bias'",
        ),
        (
            changed("conv1.weight", np.zeros((3, 3, 2, 4), np.float32)),
            "'params/conv1/kernel', got (2, 4, 3, 3) from 'conv1.weight', outputs "
            'last; it looks transposed: give layout="same"',
        ),
        (
            changed("conv1.weight", np.zeros((2, 4, 3, 3), np.float32)),
            "its axes look permuted: transpose the array",
        ),
        (
            changed("head.bias", np.zeros(5, np.float32)),
            "expected shape (4,) for the leaf 'params/head/bias', got (5,) from "
            "'head.bias'; build the network with the sizes of the file",
        ),
        (changed("head.bias", np.zeros(4)), "expected float32 for the leaf 'params/h"),
        (changed("head.bias", np.zeros(4, np.int8)), "got int8 from 'head.bias'"),
    ],
)
def test_what_does_not_agree_is_named(arrays, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        into(TREE, arrays, torch_name, layout="torch")


def test_a_layout_is_never_guessed():
    with pytest.raises(ValueError, match='transposed: give layout="torch"'):
        into(TREE, ARRAYS, torch_name)
    turned = changed("conv1.weight", ARRAYS["conv1.weight"].transpose(2, 3, 1, 0))
    with pytest.raises(ValueError, match=r"'head\.weight' to be known, got shape"):
        into(TREE, turned, torch_name)
    filled = into(TREE, turned, torch_name, layout="same")
    np.testing.assert_array_equal(
        filled["params"]["head"]["kernel"], ARRAYS["head.weight"]
    )
    with pytest.raises(ValueError, match="expected layout of same, torch, got 'OIHW'"):
        into(TREE, ARRAYS, torch_name, layout="OIHW")


def test_names_are_unique_prefixes_shared_and_counters_ignored():
    with pytest.raises(ValueError, match=r"an array of its own .* 'x' for 'a' and 'b'"):
        into({"a": np.ones(1), "b": np.ones(1)}, {"x": np.ones(1)}, lambda path: "x")
    with pytest.raises(ValueError, match=r"start with 'm\.', got 'head\.bias'"):
        pretrained.strip_prefix({"m.head.weight": 1, "head.bias": 2}, "m.")
    with pytest.raises(
        ValueError, match="'bias'; let `rename` return names without 'm"
    ):
        into({"m": {"bias": np.ones(1)}}, {"bias": np.ones(1)}, torch_name)
    counted = changed("bn1.num_batches_tracked", np.zeros((), np.int64))
    into(TREE, counted, torch_name, layout="torch", ignore=["*num_batches_tracked"])


def test_a_network_of_another_file_is_refused():
    arrays = cifar_arrays()
    with pytest.raises(
        ValueError, match=r"an array 'layer1\.0\.bn1\.running_mean' for"
    ):
        pretrained.cifar_resnet({n: a for n, a in arrays.items() if "layer" not in n})
    saved = {f"module.{name}": array for name, array in arrays.items()}
    with pytest.raises(ValueError, match=r"strip_prefix\(arrays, 'module.'\)"):
        pretrained.cifar_resnet(saved)
    pretrained.cifar_resnet(pretrained.strip_prefix(saved, "module."))
    for build in pretrained.mlperf_resnet8, pretrained.efficientnet_lite0:
        with pytest.raises(ValueError, match=r"expected an array '.*', got none"):
            build(arrays)
    shortcut = {"layer2.0.shortcut.0.weight": np.zeros((8, 4, 1, 1), np.float32)}
    with pytest.raises(ValueError, match=r"got none for 'layer2\.0\.shortcut"):
        pretrained.cifar_resnet(arrays | shortcut)


# --- Files ----------------------------------------------------------------------------


def assert_same_arrays(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_arrays_of_numpy_and_safetensors(tmp_path):
    from safetensors.numpy import save_file

    np.savez(tmp_path / "a.npz", **ARRAYS)
    assert_same_arrays(pretrained.load_arrays(tmp_path / "a.npz"), ARRAYS)
    half = dict(sorted(ARRAYS.items())) | {"z": np.ones(3, jnp.bfloat16)}
    save_file(half, tmp_path / "a.safetensors")
    found = pretrained.load_arrays(str(tmp_path / "a.safetensors"))
    assert_same_arrays({name: found[name] for name in half}, half)


def test_weights_of_keras(tmp_path):
    import h5py

    arrays = keras_arrays()
    layers = list(dict.fromkeys(name.partition("/")[0] for name in arrays))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = [b"input_1", *map(str.encode, layers)]
        weights.create_group("input_1").attrs["weight_names"] = np.zeros(0)
        for layer in layers:
            names = [f"{name}:0" for name in arrays if name.startswith(f"{layer}/")]
            weights.create_group(layer).attrs["weight_names"] = names
            for name in names:
                weights[layer][name] = arrays[name.removesuffix(":0")]
        file["optimizer_weights/iter:0"] = 3
    found = pretrained.load_arrays(tmp_path / "a.h5")
    assert_same_arrays({name: found[name] for name in arrays}, arrays)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match=r"weights of Keras in .*, got groups \['x'\]"):
        pretrained.load_keras(tmp_path / "b.h5")


TORCH_TYPES = {"float32": "FloatStorage", "int64": "LongStorage"}


def pickled(monkeypatch, found, storages):
    """A pickle as PyTorch writes it, of (storage, offset, shape, strides) by name."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch._utils = utils
    for name in TORCH_TYPES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def rebuild(*args):
        raise AssertionError

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    class Storage:
        def __init__(self, key):
            self.key = key

    class Tensor:
        def __init__(self, key, *view):
            self.key, self.view = key, view

        def __reduce__(self):
            end = (False, collections.OrderedDict())
            return rebuild, (Storage(self.key), *self.view, *end)

    class Pickler(pickle.Pickler):
        def persistent_id(self, x):
            if not isinstance(x, Storage):
                return None
            array = storages[x.key]
            kind = getattr(torch, TORCH_TYPES[str(array.dtype)])
            return ("storage", kind, x.key, "cpu", array.size)

    def replaced(x):
        if isinstance(x, dict):
            return collections.OrderedDict((n, replaced(v)) for n, v in x.items())
        return Tensor(*x) if isinstance(x, tuple) else x

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(replaced(found))
    return stream.getvalue()


def zipped(path, pickled, storages, byte_order=b"little"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", pickled)
        archive.writestr("net/byteorder", byte_order)
        for key, array in storages.items():
            archive.writestr(f"net/data/{key}", array.tobytes())


def in_old_format(path, pickled, storages):
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    with path.open("wb") as file:
        for part in head:
            pickle.dump(part, file, protocol=2)
        file.write(pickled)
        pickle.dump(sorted(storages), file, protocol=2)
        for key in sorted(storages):
            file.write(storages[key].size.to_bytes(8, "little"))
            file.write(storages[key].tobytes())


STORAGES = {"0": np.arange(12, dtype=np.float32), "1": np.array([5], np.int64)}
VIEWS = {
    "w": ("0", 0, (2, 3), (3, 1)),
    "turned": ("0", 2, (3, 2), (1, 3)),
    "count": ("1", 0, (), ()),
    "none": ("0", 0, (0, 3), (3, 1)),
}


@pytest.mark.parametrize("write", [zipped, in_old_format])
def test_checkpoints_of_pytorch_without_pytorch(write, monkeypatch, tmp_path):
    path, flat = tmp_path / "a.pth", STORAGES["0"]
    expected = {
        "w": flat[:6].reshape(2, 3),
        "turned": flat[2:8].reshape(2, 3).T,
        "count": np.array(5),
        "none": np.zeros((0, 3), np.float32),
    }
    write(path, pickled(monkeypatch, VIEWS, STORAGES), STORAGES)
    assert_same_arrays(pretrained.load_arrays(path), expected)
    whole = {"epoch": 3, "state_dict": VIEWS}
    write(path, pickled(monkeypatch, whole, STORAGES), STORAGES)
    assert_same_arrays(pretrained.load_torch(path, key="state_dict"), expected)
    with pytest.raises(
        ValueError, match=r"'epoch', which is no tensor, among \['epo.*"
    ):
        pretrained.load_torch(path)
    with pytest.raises(ValueError, match=r"no 'model' among \['epoch', 'state_dict'\]"):
        pretrained.load_torch(path, key="model")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="expected tensors saved by PyTorch in"):
        pretrained.load_torch(path, key="state_dict")


@pytest.mark.parametrize(
    "view", [("0", 8, (2, 3), (3, 1)), ("0", -1, (2,), (1,)), ("0", 9, (2,), (-3,))]
)
def test_a_tensor_outside_of_its_storage_is_refused(view, monkeypatch, tmp_path):
    zipped(tmp_path / "a.pt", pickled(monkeypatch, {"w": view}, STORAGES), STORAGES)
    with pytest.raises(ValueError, match="a tensor outside of its storage"):
        pretrained.load_torch(tmp_path / "a.pt")


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("write", [zipped, in_old_format])
def test_nothing_in_a_checkpoint_is_run(write, tmp_path, capsys):
    write(tmp_path / "a.pth", pickle.dumps({"w": Evil()}), STORAGES)
    with pytest.raises(ValueError, match=r"a call of `builtins\.print`, which is not"):
        pretrained.load_torch(tmp_path / "a.pth")
    assert not capsys.readouterr().out


def test_other_files_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"path of a file, got '.*a\.npz', where there"
    ):
        pretrained.load_arrays(tmp_path / "a.npz")
    np.savez(tmp_path / "objects.npz", x=np.array([None]))
    np.save(tmp_path / "single.npy", np.ones(2))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"w": 1}))
    for suffix in ("npz", "safetensors", "h5", "pth"):
        (tmp_path / f"text.{suffix}").write_text("no arrays")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=rf"expected .*{path.name}.*, got .*"):
            pretrained.load_arrays(path)
    zipped(tmp_path / "big.pt", pickle.dumps({}), {}, byte_order=b"big")
    with pytest.raises(ValueError, match="numbers that are big-endian"):
        pretrained.load_arrays(tmp_path / "big.pt")


def test_absent_packages_are_named(tmp_path):
    (tmp_path / "a").touch()
    program = (
        "import sys; from d2sparse.models import pretrained\n"
        "sys.modules.update(dict.fromkeys(['h5py', 'safetensors']))\n"
        "for load in pretrained.load_keras, pretrained.load_safetensors:\n"
        f"  try: load({str(tmp_path / 'a')!r})\n"
        "  except ModuleNotFoundError as error: print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for line, package in zip(said, ("h5py", "safetensors"), strict=True):
        assert f'needs {package}, which is not installed; pip install "d2sp' in line
