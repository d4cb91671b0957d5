"""Budgets: exact totals, and shares against loops and the published algorithms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import distributions
from d2sparse.distributions import er, erk, global_, uniform

LAYERED = [uniform, er, erk]
SPARSITIES = [0.0, 0.1, 0.5, 0.731, 0.9, 0.98, 0.999]
LENET = {"dense1": (784, 300), "dense2": (300, 100), "head": (100, 10)}
# A parameter tree of a convolutional network, with leaves that saturate.
CONVNET = {
    "stem": (3, 3, 1, 16),
    "conv1": (3, 3, 16, 32),
    "conv2": (3, 3, 32, 64),
    "mix": (1, 1, 64, 8),
    "head": (64, 10),
}


def random_shapes(seed):
    rng = np.random.default_rng(seed)
    ranks = rng.integers(1, 5, size=rng.integers(1, 8))
    return {
        f"leaf{i}": tuple(int(n) for n in rng.integers(1, 14, size=rank))
        for i, rank in enumerate(ranks)
    }


SHAPES = [LENET, CONVNET, *(random_shapes(seed) for seed in range(25))]


def sizes(shapes):
    return {path: math.prod(shape) for path, shape in shapes.items()}


def densities_of_rigl(shapes, sparsity, axes_that_count):
    """RigL's published algorithm: while a density exceeds 1, keep that leaf dense."""
    raw = {}
    for path, shape in shapes.items():
        axes = axes_that_count(shape)
        raw[path] = sum(axes) / math.prod(axes)
    dense = set()
    while len(dense) < len(shapes):
        budget, divisor = 0.0, 0.0
        for path, size in sizes(shapes).items():
            if path in dense:
                budget -= size * sparsity
            else:
                budget += size * (1 - sparsity)
                divisor += raw[path] * size
        scale = budget / divisor
        largest = max(raw[path] for path in shapes if path not in dense)
        if scale * largest <= 1:
            break
        dense |= {path for path in shapes if raw[path] == largest}
    return {path: 1.0 if path in dense else scale * raw[path] for path in shapes}


def expected_densities(distribution, shapes, sparsity):
    if distribution is uniform:
        return dict.fromkeys(shapes, 1 - sparsity)
    axes = {er: lambda shape: shape[-2:], erk: lambda shape: shape}[distribution]
    return densities_of_rigl(shapes, sparsity, axes)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("distribution", LAYERED)
def test_totals_are_exact_and_each_leaf_is_within_one_of_its_share(
    distribution, sparsity
):
    for shapes in SHAPES:
        counts = distribution(shapes, sparsity)
        n = sum(sizes(shapes).values())
        total = round((1 - sparsity) * n)
        assert list(counts) == list(shapes)
        assert sum(counts.values()) == total
        density = expected_densities(distribution, shapes, 1 - total / n)
        for path, size in sizes(shapes).items():
            assert 0 <= counts[path] <= size
            assert abs(counts[path] - density[path] * size) < 1 + 1e-6


@functools.cache
def compiled(distribution, case):
    """Counts of one case for many sparsities, which are traced."""
    return jax.jit(jax.vmap(lambda sparsity: distribution(SHAPES[case], sparsity)))


@pytest.mark.parametrize("distribution", LAYERED)
def test_traced_sparsities_keep_the_total(distribution):
    sparsities = np.float32(SPARSITIES)
    for case in range(6):
        shapes = SHAPES[case]
        counts = compiled(distribution, case)(sparsities)
        n = sum(sizes(shapes).values())
        totals = np.round((1 - sparsities) * np.float32(n))
        np.testing.assert_array_equal(sum(counts.values()), totals)
        for row, sparsity in enumerate(SPARSITIES):
            known = distribution(shapes, sparsity)
            for path, size in sizes(shapes).items():
                assert 0 <= counts[path][row] <= size
                assert abs(counts[path][row] - known[path]) <= 1


def test_the_global_budget_is_one_number():
    for shapes in SHAPES:
        n = sum(sizes(shapes).values())
        for sparsity in SPARSITIES:
            assert global_(shapes, sparsity) == round((1 - sparsity) * n)
    kept = jax.jit(lambda sparsity: global_(LENET, sparsity))(0.75)
    assert kept.dtype == jnp.int32
    assert kept == 66550


@pytest.mark.parametrize("distribution", LAYERED)
def test_a_jax_number_that_is_not_traced_will_do(distribution):
    assert sum(distribution(CONVNET, jnp.float32(0.75)).values()) == 6084
    assert sum(distribution(CONVNET, np.float64(0.75)).values()) == 6084


def test_largest_remainder_by_hand():
    # Ideals 1.5, 1.5, 2: two floors of 1 leave one weight, for the first remainder.
    shapes = {"a": (3,), "b": (3,), "c": (4,)}
    assert list(uniform(shapes, 0.5).values()) == [2, 1, 2]
    # Ideals 0.9, 2.1, 1.2, 1.8: the floors leave two, for remainders 0.9 and 0.8.
    shapes = {"a": (3,), "b": (7,), "c": (4,), "d": (6,)}
    assert list(uniform(shapes, 0.7).values()) == [1, 2, 1, 2]


def test_densities_by_hand():
    # Of (4, 4) and (16, 16) the weights are 1/2 and 1/8: 0.25 * 272 = 68 are kept, the
    # scale is 68 / (8 + 32), the densities 0.85 and 0.2125, the counts 13.6 and 54.4.
    expected = {"a": 14, "b": 54}
    assert er({"a": (4, 4), "b": (16, 16)}, 0.75) == expected
    assert erk({"a": (4, 4), "b": (16, 16)}, 0.75) == expected


def test_leaves_saturate_and_the_others_share_the_rest():
    counts = erk(CONVNET, 0.5)
    dense = {path for path, size in sizes(CONVNET).items() if counts[path] == size}
    assert dense == {"stem", "mix", "head"}
    assert sum(counts.values()) == round(0.5 * sum(sizes(CONVNET).values()))


@pytest.mark.parametrize("distribution", LAYERED)
def test_a_dense_network_stays_dense(distribution):
    for shapes in SHAPES:
        assert distribution(shapes, 0.0) == sizes(shapes)
        assert distribution(shapes, 0) == sizes(shapes)


@pytest.mark.parametrize("distribution", LAYERED)
def test_shares_fall_with_sparsity_up_to_the_rounding(distribution):
    for shapes in SHAPES[:8]:
        rows = [distribution(shapes, s) for s in np.linspace(0, 0.99, 60)]
        counts = np.array([list(row.values()) for row in rows])
        assert np.all(np.diff(counts.sum(axis=1)) <= 0)
        assert np.all(np.diff(counts, axis=0) <= 1)


@pytest.mark.parametrize("distribution", [global_, *LAYERED])
@pytest.mark.parametrize("sparsity", [1.0, -0.1, 90, math.nan, jnp.float32(1.0)])
def test_sparsities_outside_of_0_to_1_are_refused(distribution, sparsity):
    with pytest.raises(ValueError, match=r"expected a sparsity in \[0, 1\), .* got"):
        distribution(LENET, sparsity)


def test_more_weights_than_an_int32_counts():
    shapes = {"table": (50_000, 40_000), "more": (50_000, 20_000)}
    assert uniform(shapes, 0.1) == {"table": 1_800_000_000, "more": 900_000_000}
    assert global_(shapes, 0.1) == 2_700_000_000


def test_hand_out_equals_a_loop():
    rng = np.random.default_rng(0)
    jitted = jax.jit(distributions.hand_out)
    for _ in range(40):
        limits = rng.integers(0, 9, size=5)
        counts = rng.integers(0, limits + 1)
        change = int(rng.integers(-counts.sum(), (limits - counts).sum() + 1))
        expected = counts.copy()
        for _ in range(abs(change)):
            room = limits > expected if change > 0 else expected > 0
            expected[np.argmax(room)] += np.sign(change)
        np.testing.assert_array_equal(jitted(change, counts, limits), expected)
        by_numpy = distributions.hand_out(change, counts, limits, np)
        np.testing.assert_array_equal(by_numpy, expected)
