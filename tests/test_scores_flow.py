"""Synaptic flow against path products in double precision."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import masks, rules, scores, tree

KEY = jax.random.key(0)


def draw(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def stack(params, x):
    """Dense layers between rectifiers."""
    for layer in params:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x


def layers(widths, seed=0, bias=0.0):
    rng = np.random.default_rng(seed)
    return [
        {"kernel": draw(rng, a, b), "bias": np.full(b, bias, np.float32)}
        for a, b in itertools.pairwise(widths)
    ]


def expected_flow(kernels):
    """Shares of the flow through a dense stack, as float64[in, out] per kernel."""
    kernels = [np.abs(kernel).astype(np.float64) for kernel in kernels]
    before, after = [np.ones(kernels[0].shape[0])], [np.ones(kernels[-1].shape[1])]
    for kernel in kernels:
        before.append(before[-1] @ kernel)
    for kernel in kernels[::-1]:
        after.append(kernel @ after[-1])
    total = before[-1].sum()
    return [
        kernel / total * np.outer(b, a)
        for kernel, b, a in zip(kernels, before[:-1], after[-2::-1], strict=True)
    ]


@functools.cache
def compiled(predict, input_shape):
    return jax.jit(scores.synflow(predict, input_shape))


def ranked(predict, params, input_shape):
    return compiled(predict, input_shape)(params, None, KEY)


def scanned(params, x):
    """Layers stacked along the first axis; compiles in the time of one."""

    def layer(x, own):
        return jax.nn.relu(x @ own["kernel"] + own["bias"][None]), None

    return jax.lax.scan(layer, x, params)[0]


def test_two_linear_layers_in_closed_form():
    rng = np.random.default_rng(0)
    params = {"a": draw(rng, 3, 4), "b": draw(rng, 4, 2)}
    score = scores.synflow(lambda params, x: x @ params["a"] @ params["b"], (3,))
    rule = rules.one_shot(0.5, score=score)
    ranks = score(params, None, KEY)
    a, b = np.abs(params["a"]), np.abs(params["b"])
    scale = float(np.asarray(ranks["a"]).sum() / np.sum(a @ b))
    closed = {"a": a * b.sum(axis=1)[None], "b": b * a.sum(axis=0)[:, None]}
    np.testing.assert_allclose(np.log2(scale), round(np.log2(scale)), atol=1e-5)
    for leaf in params:
        np.testing.assert_allclose(ranks[leaf], scale * closed[leaf], rtol=1e-5)
    # A score needs no more than the weights, and not their signs.
    flipped = jax.tree.map(np.negative, params)
    jax.tree.map(np.testing.assert_array_equal, score(flipped), ranks)
    kept = rule.update(rule.init(params, KEY), params, None, 0, KEY)
    assert sum(masks.count(kept).values()) == (12 + 8) // 2


def test_the_flow_is_conserved_from_layer_to_layer():
    params = layers([6, 9, 5, 7, 3])
    ranks = ranked(stack, params, (6,))
    sums = np.array([layer["kernel"].sum() for layer in ranks])
    np.testing.assert_allclose(sums / sums[0], 1, rtol=1e-5)
    kernels = [layer["kernel"] for layer in params]
    for rank, share in zip(ranks, expected_flow(kernels), strict=True):
        np.testing.assert_allclose(rank["kernel"] / sums[0], share, rtol=1e-4)


@pytest.mark.parametrize("bias", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_a_deep_and_wide_stack_is_ranked_as_in_double_precision(bias):
    rng, width, depth = np.random.default_rng(0), 128, 60
    kernels = draw(rng, depth, width, width) * np.float32(np.sqrt(2 / width))
    # Some are pruned: where 0 meets an overflow, NaN spreads.
    kernels *= rng.random(kernels.shape) < 0.8
    params = {"kernel": kernels, "bias": np.full((depth, width), bias, np.float32)}
    plain = jax.jit(scanned)(jax.tree.map(np.abs, params), np.ones((1, width)))
    assert not np.isfinite(plain).any()

    ranks = ranked(scanned, params, (width,))
    assert np.all(ranks["bias"] == 0)
    assert np.all(ranks["kernel"][kernels == 0] == 0)
    flows = np.asarray(ranks["kernel"], np.float64)
    shares = np.stack(expected_flow(kernels))
    np.testing.assert_allclose(flows / flows[0].sum(), shares, rtol=1e-4)
    kept = np.asarray(masks.top_k(ranks["kernel"], kernels.size // 10))
    assert shares[kept].min() >= shares[~kept].max() * (1 - 1e-4)


@pytest.mark.parametrize("gain", [2.0**-1.8, 2.0**1.8])
def test_flows_that_vanish_or_explode_beyond_single_precision(gain):
    kernels = np.full((120, 2, 2), gain / 2, np.float32)
    kernels[:, 0, 1] *= 3 / 2
    params = {"kernel": kernels, "bias": np.zeros((120, 2), np.float32)}
    flows = np.asarray(ranked(scanned, params, (2,))["kernel"], np.float64)
    shares = np.stack(expected_flow(kernels))
    np.testing.assert_allclose(flows / flows[0].sum(), shares, rtol=1e-4)


def test_a_flow_beyond_all_scales_is_nan_and_not_a_wrong_rank():
    kernels = np.full((100, 1, 1), 8.0, np.float32)
    params = {"kernel": kernels, "bias": np.zeros((100, 1), np.float32)}
    assert np.isnan(ranked(scanned, params, (1,))["kernel"]).all()


def test_a_pruned_network_has_no_flow_and_no_nan():
    params = layers([3, 4, 2])
    params[1]["kernel"] = np.zeros_like(params[1]["kernel"])
    ranks = ranked(stack, params, (3,))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(ranks))


# Biases and normalisation.


@pytest.mark.parametrize("bias", [-0.5, 0.1, 1e30])
def test_biases_take_no_part_whatever_their_size(bias):
    widths = [5, 8, 8, 3]
    without = ranked(stack, layers(widths), (5,))
    ranks = ranked(stack, layers(widths, bias=bias), (5,))
    jax.tree.map(np.testing.assert_array_equal, ranks, without)
    assert all(np.all(layer["bias"] == 0) for layer in ranks)


def test_shifts_and_scales_are_told_apart_by_what_they_do():
    # No name and no shape says which is which.
    rng = np.random.default_rng(0)
    params = [(draw(rng, 4, 6), draw(rng, 1, 6), draw(rng, 6)), draw(rng, 6, 2)]

    def predict(params, x):
        (kernel, shift, scale), head = params
        return jax.nn.relu((x @ kernel + shift) * scale[None]) @ head

    (kernel, shift, scale), head = ranked(predict, params, (4,))
    through = np.abs(params[0][0]) * np.abs(params[0][2])[None]
    first, last = expected_flow([through, params[1]])
    total = head.sum()
    np.testing.assert_allclose(kernel / total, first, rtol=1e-4)
    np.testing.assert_allclose(scale / total, first.sum(axis=0), rtol=1e-4)
    np.testing.assert_allclose(head / total, last, rtol=1e-4)
    assert np.all(shift == 0)


def test_a_residual_convolutional_network_with_normalisation():
    rng = np.random.default_rng(0)
    params = {
        "stem": {"kernel": draw(rng, 3, 3, 2, 6)},
        "norm": {"scale": draw(rng, 6), "bias": draw(rng, 6)},
        "block": {"kernel": draw(rng, 3, 3, 6, 6), "bias": draw(rng, 6)},
        "head": {"kernel": draw(rng, 6, 3), "bias": draw(rng, 3)},
    }

    def convolved(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def row(vector):
        return vector.reshape(1, 1, 1, -1)

    def predict(params, x):
        x = convolved(x, params["stem"]["kernel"])
        norm = params["norm"]
        x = jax.nn.relu(x * row(norm["scale"]) + row(norm["bias"]))
        x += jax.nn.relu(
            convolved(x, params["block"]["kernel"]) + row(params["block"]["bias"])
        )
        return x.mean(axis=(1, 2)) @ params["head"]["kernel"]

    score = scores.synflow(predict, (5, 5, 2))
    ranks = jax.jit(score)(params, None, KEY)
    weights = jax.tree.map(np.abs, params)
    for layer, leaf in [("norm", "bias"), ("block", "bias"), ("head", "bias")]:
        weights[layer][leaf] = np.zeros_like(weights[layer][leaf])
    slopes = jax.jit(
        jax.grad(lambda weights: predict(weights, jnp.ones((1, 5, 5, 2))).sum())
    )(weights)
    expected = jax.tree.map(lambda w, slope: w * np.asarray(slope), weights, slopes)
    scale = ranks["head"]["kernel"].sum() / expected["head"]["kernel"].sum()
    for path, share in tree.flatten(expected).items():
        np.testing.assert_allclose(
            tree.flatten(ranks)[path] / scale, share, rtol=1e-4, err_msg=path
        )


def test_half_precision_is_scored_in_single():
    half = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), layers([4, 5, 2]))
    single = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    jax.tree.map(
        np.testing.assert_array_equal,
        ranked(stack, half, (4,)),
        ranked(stack, single, (4,)),
    )


def test_networks_are_scored_side_by_side():
    pair = [layers([3, 4, 2], seed) for seed in (0, 1)]
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *pair)
    swept = jax.jit(jax.vmap(scores.synflow(stack, (3,))))(together)
    for i, params in enumerate(pair):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5),
            swept,
            ranked(stack, params, (3,)),
        )
