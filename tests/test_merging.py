"""Merged layers against two layers one after the other, written out in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from d2sparse import models
from d2sparse.models import gates
from d2sparse.models.mlp import MLP
from d2sparse.surgery import (
    Convolution,
    Dense,
    merge_convolutions,
    merge_dense,
    merge_perceptron,
)

rng = np.random.default_rng(0)
BIASES = list(itertools.product([False, True], repeat=2))
PADDED = ((1, 1), (1, 1))


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


def convolve(x, layer):
    """The definition, pixel by pixel, for images and numeric padding."""
    kernel = np.asarray(layer.kernel, np.float64)
    high, wide = kernel.shape[:2]
    down, right = layer.strides or (1, 1)
    padding = ((0, 0), (0, 0)) if layer.padding == "VALID" else layer.padding
    if layer.padding == "SAME":
        padding = [((k - 1) // 2, k // 2) for k in (high, wide)]
    x = np.pad(np.float64(x), [(0, 0), *padding, (0, 0)])
    rows = range(0, x.shape[1] - high + 1, down)
    columns = range(0, x.shape[2] - wide + 1, right)
    y = np.zeros((len(x), len(rows), len(columns), kernel.shape[-1]))
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        patch = x[:, row : row + high, column : column + wide]
        y[:, i, j] = np.einsum("nhwc,hwco->no", patch, kernel)
    return y if layer.bias is None else y + np.float64(layer.bias)


def of(size, ins, outs, bias=True, **how):
    size = (size, size) if isinstance(size, int) else size
    return Convolution(normal(*size, ins, outs), normal(outs) if bias else None, **how)


def assert_same(first, second, shape=(7, 8)):
    x = normal(2, *shape, 3)
    merged = merge_convolutions(first, second)
    expected = convolve(convolve(x, first), second)
    np.testing.assert_allclose(convolve(x, merged), expected, atol=2e-5)
    return merged


def test_the_reference_is_what_xla_computes():
    layer = of((2, 3), 3, 4, strides=(2, 1), padding=((1, 0), (2, 1)))
    x = normal(2, 7, 8, 3)
    y = jax.lax.conv_general_dilated(
        x,
        layer.kernel,
        layer.strides,
        layer.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(
        np.asarray(y) + layer.bias, convolve(x, layer), atol=1e-5
    )


@pytest.mark.parametrize("biases", BIASES)
def test_two_dense_layers_are_one(biases):
    first, second = (
        Dense(normal(i, o), normal(o) if bias else None)
        for i, o, bias in zip((3, 5), (5, 4), biases, strict=True)
    )
    merged = merge_dense(first, second)
    x = normal(6, 3)
    y = np.float64(x)
    for layer in (first, second):
        y = y @ layer.kernel + (0 if layer.bias is None else layer.bias)
    bias = 0 if merged.bias is None else np.asarray(merged.bias)
    np.testing.assert_allclose(x @ np.asarray(merged.kernel) + bias, y, atol=1e-5)
    assert (merged.bias is None) == (not any(biases))


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize(
    ("sizes", "paddings", "size"),
    [
        ((3, 3), ("VALID", "VALID"), (5, 5)),
        ((3, 3), ("SAME", "VALID"), (5, 5)),
        ((3, 1), ("SAME", "SAME"), (3, 3)),
        ((1, 3), ("VALID", "VALID"), (3, 3)),
        (((2, 3), (1, 2)), (((1, 0), (2, 1)), "VALID"), (2, 4)),
    ],
)
def test_a_second_convolution_that_pads_nothing(sizes, paddings, size, biases):
    first = of(sizes[0], 3, 4, biases[0], padding=paddings[0])
    second = of(sizes[1], 4, 2, biases[1], padding=paddings[1])
    merged = assert_same(first, second)
    assert merged.kernel.shape == (*size, 3, 2)
    assert (merged.bias is None) == (not any(biases))


@pytest.mark.parametrize("shape", [(7, 8), (8, 9)])
@pytest.mark.parametrize("strides", [((2, 2), None), (None, (2, 3)), ((2, 1), (1, 2))])
def test_strides_multiply_whatever_the_size_of_the_image(strides, shape):
    first = of(3, 3, 4, strides=strides[0], padding=PADDED)
    second = of(2, 4, 2, strides=strides[1])
    merged = assert_same(first, second, shape)
    products = np.multiply(*(own or (1, 1) for own in strides))
    assert merged.strides == tuple(products)


@pytest.mark.parametrize("strides", [(None, None), ((2, 2), (1, 2))])
def test_a_first_convolution_of_1x1_without_a_bias(strides):
    first = of(1, 3, 4, bias=False, strides=strides[0])
    second = of(3, 4, 2, strides=strides[1], padding=PADDED)
    for shape in ((7, 8), (8, 9)):
        assert_same(first, second, shape)
    padded = first._replace(padding=((1, 2), (0, 1)))
    assert_same(padded, second)


def test_axes_are_judged_one_by_one():
    first = of((1, 3), 3, 4, bias=False, padding=((0, 0), (1, 1)))
    second = of((3, 2), 4, 2, padding=((1, 1), (0, 0)))
    assert_same(first, second)
    with pytest.raises(ValueError, match="pads nothing"):
        merge_convolutions(first, second._replace(padding=((0, 0), (1, 0))))


def test_where_the_border_differs_the_inside_agrees():
    # What is refused, computed all the same: only pixels at the border are wrong.
    first, second = of(3, 3, 4, padding=PADDED), of(3, 4, 2, padding=PADDED)
    merged = merge_convolutions(first, second._replace(padding="VALID"))
    merged = merged._replace(padding=((2, 2), (2, 2)))
    x = normal(2, 7, 8, 3)
    error = np.abs(convolve(x, merged) - convolve(convolve(x, first), second))
    assert error[:, 1:-1, 1:-1].max() < 2e-5
    border = np.ones((7, 8), bool)
    border[1:-1, 1:-1] = False
    assert error[:, border].max(axis=(0, 2)).min() > 1e-2


def test_layers_over_one_axis_of_flax():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3,), padding="SAME", name="conv1")(x)
            return nn.Conv(2, (2,), padding="VALID", name="conv2")(x)

    x = normal(2, 6, 3)
    params = {
        "conv1": {"kernel": normal(3, 3, 4), "bias": normal(4)},
        "conv2": {"kernel": normal(2, 4, 2), "bias": normal(2)},
    }
    merged = merge_convolutions(
        Convolution(**params["conv1"], padding="SAME"), Convolution(**params["conv2"])
    )
    layer = nn.Conv(2, merged.kernel.shape[:1], padding=merged.padding)
    actual = layer.apply({"params": {"kernel": merged.kernel, "bias": merged.bias}}, x)
    np.testing.assert_allclose(actual, Two().apply({"params": params}, x), atol=1e-5)


def test_compiled_and_for_many_networks_at_once():
    first, second = of(3, 3, 4), of(2, 4, 2)

    def merge(*leaves):
        merged = merge_convolutions(Convolution(*leaves[:2]), Convolution(*leaves[2:]))
        return merged.kernel, merged.bias

    leaves = [*first[:2], *second[:2]]
    stacked = [np.stack([leaf, 2 * leaf]) for leaf in leaves]
    kernels, biases = jax.jit(jax.vmap(merge))(*stacked)
    merged = merge_convolutions(first, second)
    np.testing.assert_allclose(kernels[0], merged.kernel, atol=1e-5)
    np.testing.assert_allclose(kernels[1], 4 * merged.kernel, atol=1e-5)
    np.testing.assert_allclose(biases[0], merged.bias, atol=1e-5)


def test_layers_of_several_types_have_the_wider_one():
    first, second = of(1, 3, 4), of(1, 4, 2)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), first[:2])
    merged = merge_convolutions(Convolution(*half), second)
    assert merged.kernel.dtype == merged.bias.dtype == jnp.float32


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {},
            {"padding": "SAME"},
            r"got padding \(\(1, 1\), .*\) after a first of 3x3: at",
        ),
        ({"size": 1}, {"padding": "SAME"}, "without a bias, got one before padding"),
        ({"strides": (2, 2), "padding": "SAME"}, {}, 'got "SAME", which depends on'),
        ({"padding": "CIRCULAR"}, {}, "got 'CIRCULAR'; one convolution cannot"),
        ({"padding": ((1, 1),)}, {}, r"of the 2 axes of space, got \(\(1, 1\),\); one"),
        ({"padding": ((-1, 1), (0, 0))}, {}, "of at least 0 for each of the 2 axes"),
        ({"strides": (2,)}, {}, r"each of the 2 axes of space .*, got \(2,\)"),
        ({"outs": 5}, {}, r"got shapes \(3, 3, 3, 5\) and \(3, 3, 4, 2\); grouped and"),
        ({"size": (3,)}, {}, r"got shapes \(3, 3, 4\) and \(3, 3, 4, 2\)"),
    ],
)
def test_what_one_convolution_cannot_compute_is_refused(first, second, message):
    size, outs = first.pop("size", 3), first.pop("outs", 4)
    with pytest.raises(ValueError, match=message):
        merge_convolutions(of(size, 3, outs, **first), of(3, 4, 2, **second))


def test_dense_layers_that_do_not_follow_one_another_are_refused():
    with pytest.raises(ValueError, match=r"got shapes \(3, 5\) and \(4, 2\)"):
        merge_dense(Dense(normal(3, 5)), Dense(normal(4, 2)))
    with pytest.raises(ValueError, match=r"got shapes \(3, 5, 4\) and \(5, 4, 2\)"):
        merge_dense(Dense(normal(3, 5, 4)), Dense(normal(5, 4, 2)))


def test_a_perceptron_without_linear_activations_computes_the_same():
    model = gates.gated(models.from_linen(MLP((5, 4), 3)))
    x = normal(7, 6)
    params, state = model.init(jax.random.key(0), x)
    apply = jax.jit(model.apply, static_argnames="train")
    for linear in itertools.product([False, True], repeat=2):
        own = state.gates
        for path in itertools.compress(["relu1", "relu2"], linear):
            through = np.arange(len(own.open[path])) != 1
            own = gates.linearised(own, path, through)
        expected, _ = apply(params, state._replace(gates=own), x, train=False)
        smaller, merged = merge_perceptron(params, own)
        assert len(merged) == 3 - sum(linear)
        form = jax.eval_shape(smaller.init, jax.random.key(1), x)[0]
        assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, form)
        layers = [jax.device_get(merged[name]) for name in sorted(merged)]
        found = x
        for number, layer in enumerate(layers):
            found = np.maximum(found, 0) if number else found
            found = found @ layer["kernel"] + layer["bias"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_only_perceptrons_are_merged_as_a_whole():
    params = {"conv1": {"kernel": np.ones((3, 3, 1, 2))}, "head": {}}
    with pytest.raises(ValueError, match=r"expected .* a perceptron.* got \['conv1'"):
        merge_perceptron(params, gates.Gates({}, {}, {}))
