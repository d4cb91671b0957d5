"""Costs against loops over outputs and counts by hand."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from d2sparse import macs as macs_lib
from d2sparse import models
from d2sparse.masks import dense_masks


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def test_lenet_300_100_costs_its_weights():
    sizes = (784, 300, 100, 10)
    params = [{"kernel": struct(n, m), "bias": struct(m)} for n, m in pairwise(sizes)]

    def mlp(params, x):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
        return x @ params[-1]["kernel"] + params[-1]["bias"][None]

    macs = macs_lib.forward_macs(mlp, params, struct(64, 784))
    assert sum(macs.values()) == 266_200
    assert macs["0/kernel"] == 235_200
    assert macs["1/bias"] == 0


def loop_conv_macs(size, kernel, channels, stride, padding, groups, dilation):
    """Multiplications of one example, counted one by one."""
    macs = 0
    reach = dilation * (kernel - 1) + 1
    starts = range(-padding, size + padding - reach + 1, stride)
    for _row in starts:
        for _column in starts:
            for _output in range(channels[1]):
                macs += kernel * kernel * channels[0] // groups
    return macs


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups", "dilation"),
    [
        (3, 1, 1, 1, 1),
        (3, 2, 1, 1, 1),
        (1, 2, 0, 1, 1),
        (3, 1, 0, 1, 2),
        (3, 1, 1, 2, 1),
        (3, 2, 1, 4, 1),
    ],
)
@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
def test_convolutions(kernel, stride, padding, groups, dilation, layout):
    def conv(params, x):
        return lax.conv_general_dilated(
            x,
            params["kernel"],
            (stride, stride),
            [(padding, padding)] * 2,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    def arrange(template, **sizes):
        return struct(*(sizes[axis] for axis in template))

    weights = arrange(layout[1], H=kernel, W=kernel, I=4 // groups, O=8)
    x = arrange(layout[0], N=5, H=9, W=9, C=4)
    expected = loop_conv_macs(9, kernel, (4, 8), stride, padding, groups, dilation)
    assert macs_lib.forward_macs(conv, {"kernel": weights}, x) == {"kernel": expected}


def literal_macs(x, kernel, out, strides, padding, spread, dilation, features, batches):
    """Multiplications of a convolution (NHWC, HWIO), counted one by one.

    An element that is no inserted zero counts, in the data or where they would go on.
    """
    macs = 0
    for n, row, column, o in np.ndindex(*out):
        for tap in np.ndindex(*kernel[:3]):
            at = [
                place * strides[i] + tap[i] * dilation[i] - padding[i][0]
                for i, place in enumerate((row, column))
            ]
            channel = tap[2] + o // (kernel[3] // features) * kernel[2]
            example = n + o // (kernel[3] // batches) * out[0] if batches > 1 else n
            assert 0 <= channel < x[3]
            assert 0 <= example < x[0]
            macs += all(a % d == 0 for a, d in zip(at, spread, strict=True))
    return macs


@pytest.mark.parametrize(
    ("strides", "padding", "spread", "dilation", "features", "batches"),
    [
        ((1, 1), ((2, 1), (2, 2)), (2, 3), (1, 1), 1, 1),
        ((2, 1), ((3, 2), (0, 4)), (3, 2), (2, 3), 1, 1),
        ((3, 2), ((-1, 2), (5, -2)), (2, 4), (1, 2), 1, 1),
        ((1, 2), ((1, 1), (0, 0)), (2, 1), (2, 1), 2, 1),
        ((1, 1), ((2, 2), (1, 1)), (2, 2), (1, 1), 4, 1),
        ((1, 1), ((1, 0), (0, 1)), (1, 2), (1, 1), 1, 3),
    ],
)
def test_dilated_transposed_and_grouped_convolutions(
    strides, padding, spread, dilation, features, batches
):
    x, kernel = (3, 4, 5, 4), (3, 2, 4 // features, 12)

    def conv(w, x):
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            spread,
            dilation,
            ("NHWC", "HWIO", "NHWC"),
            feature_group_count=features,
            batch_group_count=batches,
        )

    out = jax.eval_shape(conv, struct(*kernel), struct(*x)).shape
    counted = literal_macs(
        x, kernel, out, strides, padding, spread, dilation, features, batches
    )
    total = macs_lib.forward_macs(lambda w, x: conv(w, x[0]), struct(*kernel), one(*x))
    assert total == {"": counted}


def one(*shape):
    """A batch of one example, which is a batch itself."""
    return struct(1, *shape)


def test_a_transposed_convolution_costs_its_kernel_at_every_input():
    def up(w, x):
        return lax.conv_transpose(x, w, (2, 2), "SAME")

    # As many as the convolution the other way, whose gradient it is.
    def down(w, x):
        return lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    cost = 8 * 8 * 3 * 3 * 4 * 6
    kernel = struct(3, 3, 4, 6)
    assert macs_lib.forward_macs(up, kernel, struct(5, 8, 8, 4)) == {"": cost}
    assert macs_lib.forward_macs(down, kernel, struct(5, 16, 16, 4)) == {"": cost}


@pytest.mark.parametrize("share_kernel", [True, False])
def test_a_mapped_convolution_is_many_convolutions(share_kernel):
    def conv(w, x):
        return lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def many(w, x):
        y = jax.vmap(conv, (None if share_kernel else 0, 0))(w, x.swapaxes(0, 1))
        return y.swapaxes(0, 1)

    kernel = (3, 3, 4, 6) if share_kernel else (2, 3, 3, 4, 6)
    found = macs_lib.forward_macs(many, struct(*kernel), struct(5, 2, 8, 8, 4))
    assert found == {"": 2 * 6 * 6 * 9 * 4 * 6}


def test_in_a_ragged_product_a_row_meets_one_matrix():
    sizes = jnp.array([3, 0, 9], jnp.int32)

    def experts(w, x):
        return lax.ragged_dot(x, w, sizes)

    def mapped(w, x):
        rows = jnp.stack([sizes, sizes])
        return jax.vmap(lax.ragged_dot)(x, jnp.stack([w, w]), rows)

    kernels = struct(3, 8, 5)
    assert macs_lib.forward_macs(experts, kernels, struct(12, 8)) == {"": 8 * 5}
    found = macs_lib.forward_macs(mapped, kernels, struct(2, 12, 8))
    assert found == {"": 12 * 8 * 5}


def test_a_ragged_sum_is_shared_out():
    numbers = lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])
    sizes = jnp.array([3, 0, 9], jnp.int32)

    def sums(w, x):
        return lax.ragged_dot_general(x[0], w, sizes, numbers)

    found = macs_lib.forward_macs(sums, struct(12, 5), one(12, 8))
    assert found == {"": 12 * 8 * 5}


def test_products_with_batch_axes():
    def heads(w, x):
        return jnp.einsum("bthi,hij->bthj", x, w)

    found = macs_lib.forward_macs(heads, struct(3, 4, 7), struct(2, 6, 3, 4))
    assert found == {"": 6 * 3 * 4 * 7}


def test_what_a_batch_shares_has_no_cost_per_example():
    def pooled(w, x):
        return x.mean(0, keepdims=True) @ w

    assert macs_lib.forward_macs(pooled, struct(8, 3), struct(1, 8)) == {"": 24}
    with pytest.raises(ValueError, match="every one of 5 examples, got 24 multiply"):
        macs_lib.forward_macs(pooled, struct(8, 3), struct(5, 8))
    for shape in ((), (0, 8)):
        with pytest.raises(ValueError, match="batch of at least one example, got"):
            macs_lib.forward_macs(lambda w, x: x, struct(8, 3), struct(*shape))


def bare(w, x):
    return x @ w["w"]


def casted(w, x):
    return x.astype("bfloat16") @ w["w"].astype("bfloat16").T


def reshaped(w, x):
    return jnp.einsum("bi,ijk->bjk", x, w["w"].reshape(8, 2, 4))


def from_the_left(w, x):
    return (w["w"] @ x.T).T


def standardised(w, x):
    w = w["w"] - jnp.mean(w["w"], axis=0, keepdims=True)
    return x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True))


def masked(w, x):
    return x @ jnp.where(jnp.abs(w["w"]) > 0.5, w["w"], 0)


def rematerialised(w, x):
    return jax.checkpoint(jax.jit(bare))(w, x)


def with_custom_gradient(w, x):
    f = jax.custom_vjp(bare)
    f.defvjp(lambda w, x: (bare(w, x), None), lambda _, g: (None, g))
    return f(w, x)


def with_custom_tangent(w, x):
    f = jax.custom_jvp(bare)
    f.defjvp(lambda primals, tangents: (bare(*primals), bare(*primals)))
    return f(w, x)


def vmapped(w, x):
    return jax.vmap(bare, in_axes=(None, 0))(w, x)


def per_example_map(w, x):
    return lax.map(lambda row: row @ w["w"], x)


def used_in_a_branch_free_of_products(w, x):
    kernel = lax.cond(jnp.sum(w["w"]) > 0, lambda k: k, lambda k: -k, w["w"])
    return x @ kernel


def behind_a_barrier(w, x):
    return bare(*lax.optimization_barrier((w, x)))


def kept_through_a_branch(w, x):
    return bare(*lax.cond(jnp.sum(x) > 0, lambda *own: own, lambda w, x: (w, -x), w, x))


def the_same_in_both_branches(w, x):
    return lax.cond(jnp.sum(x) > 0, bare, lambda w, x: -bare(w, x), w, x)


@pytest.mark.parametrize(
    "apply_fn",
    [
        bare,
        behind_a_barrier,
        kept_through_a_branch,
        the_same_in_both_branches,
        casted,
        reshaped,
        from_the_left,
        standardised,
        masked,
        rematerialised,
        with_custom_gradient,
        with_custom_tangent,
        vmapped,
        per_example_map,
        used_in_a_branch_free_of_products,
    ],
)
@pytest.mark.parametrize("batch", [1, 6])
def test_a_product_is_found_wherever_the_weight_goes(apply_fn, batch):
    params = {"w": struct(8, 8), "unused": struct(8, 8)}
    macs = macs_lib.forward_macs(apply_fn, params, struct(batch, 8))
    assert macs == {"w": 64, "unused": 0}


def test_uses_of_a_shared_weight_add_up():
    macs = macs_lib.forward_macs(lambda w, x: x @ w @ w.T, struct(8, 3), struct(6, 8))
    assert macs == {"": 48}


def test_a_scan_counts_its_length():
    def stacked(params, x):
        layers = params["layers"]
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)
        # The carry starts as a constant and is data from the second step on.
        rest, _ = lax.scan(
            lambda h, _: (h @ params["loop"] + x, h), jnp.zeros_like(x), length=5
        )
        return rest

    params = {"layers": struct(3, 8, 8), "loop": struct(8, 8)}
    macs = macs_lib.forward_macs(stacked, params, struct(6, 8))
    assert macs == {"layers": 3 * 64, "loop": 5 * 64}


def test_only_products_of_data_with_parameters_count():
    def low_rank_attention(params, x):
        queries = x @ (params["w"] + params["a"] @ params["b"])
        scores = jax.nn.softmax(queries @ x.mT)
        return scores @ x * params["scale"][None, None]

    params = {
        "w": struct(8, 8),
        "a": struct(8, 2),
        "b": struct(2, 8),
        "scale": struct(8),
    }
    macs = macs_lib.forward_macs(low_rank_attention, params, struct(6, 10, 8))
    assert macs == {"w": 10 * 64, "a": 0, "b": 0, "scale": 0}


def branch(w, x):
    return lax.cond(jnp.sum(x) > 0, lambda x: x @ w, lambda x: x, x)


def loop(w, x):
    return lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ w, x)


def sharded(w, x):
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("data",), (auto,), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec
    return jax.shard_map(
        lambda w, x: x @ w,
        mesh=mesh,
        in_specs=(spec(), spec("data")),
        out_specs=spec("data"),
    )(w, x)


@pytest.mark.parametrize(
    ("apply_fn", "name"), [(branch, "cond"), (loop, "while"), (sharded, "shard_map")]
)
def test_products_that_cannot_be_counted_are_refused(apply_fn, name):
    with pytest.raises(ValueError, match=f"inside `{name}`"):
        macs_lib.forward_macs(apply_fn, struct(8, 8), struct(6, 8))


@pytest.mark.parametrize(
    ("model", "shape", "millions"),
    [
        (models.lenet_300_100(), (28, 28, 1), 0.2662),
        (models.resnet18(), (32, 32, 3), 555.4),
        (models.resnet34(), (32, 32, 3), 1159.0),
    ],
)
def test_known_costs_of_shipped_models(model, shape, millions):
    x = struct(2, *shape)
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), state)
    macs = macs_lib.forward_macs(
        lambda params, x: model.apply(params, state, x, train=False), params, x
    )
    assert f"{sum(macs.values()) / 1e6:.4g}" == f"{millions:.4g}"
    assert all(("kernel" in path) == (cost > 0) for path, cost in macs.items())


def test_masked_macs_weigh_densities_by_cost():
    rng = np.random.default_rng(3)
    a, b = rng.random((7, 9)) < 0.4, rng.random((3, 3, 5)) < 0.4
    masks = {"a/kernel": a, "b/kernel": b, "b/bias": np.ones(5, bool)}
    masks = jax.tree.map(jnp.asarray, masks)
    macs = {"a/kernel": 1000, "b/kernel": 30_000_000_000, "b/bias": 7}
    expected = 1000 * a.mean() + 3e10 * b.mean() + 7
    np.testing.assert_allclose(macs_lib.masked_macs(macs, masks), expected, rtol=1e-6)
    traced = jax.jit(lambda masks: macs_lib.masked_macs(macs, masks))
    np.testing.assert_allclose(traced(masks), expected, rtol=1e-6)
    dense = dense_masks(masks)
    np.testing.assert_allclose(
        macs_lib.masked_macs(macs, dense), sum(macs.values()), rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"none for \['c'\]"):
        macs_lib.masked_macs({"c": 1}, masks)


def test_training_macs_step_by_step():
    sparse, dense, interval = 20.0, 100.0, 4
    steps = [3 * sparse] * interval + [2 * sparse + dense]
    assert macs_lib.training_macs(sparse, dense) == 60
    assert macs_lib.training_macs(dense, dense) == 300
    actual = macs_lib.training_macs(sparse, dense, interval=interval)
    np.testing.assert_allclose(actual, np.mean(steps))


def test_training_macs_with_a_growth_batch():
    sparse, dense, interval, batch, samples = 20.0, 100.0, 4, 32, 1024
    run = interval * batch * 3 * sparse + samples * (2 * sparse + dense)
    actual = macs_lib.training_macs(
        sparse, dense, interval=interval, growth_samples=samples, batch_size=batch
    )
    np.testing.assert_allclose(actual, run / (interval * batch))


@pytest.mark.parametrize("given", [{}, {"interval": 4}, {"batch_size": 32}])
def test_a_growth_batch_needs_interval_and_batch_size(given):
    with pytest.raises(ValueError, match="beside growth_samples"):
        macs_lib.training_macs(20.0, 100.0, growth_samples=1024, **given)
