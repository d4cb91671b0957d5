"""Distances between batches against loops over directions, in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from d2sparse import regularizers
from d2sparse.regularizers import sliced_wasserstein

BATCH, FEATURES, NUMBER = 7, 6, 5
STEP = np.float32(1e-3)
distance = jax.jit(sliced_wasserstein, static_argnames=("reduce", "paired"))
gradient = jax.jit(
    jax.grad(sliced_wasserstein, argnums=(0, 1)), static_argnames=("reduce", "paired")
)


def batches(seed=0, batch=BATCH):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, 2, 3)).astype(np.float32)
    y = (2 * x + rng.normal(size=x.shape)).astype(np.float32)
    theta = rng.normal(size=(NUMBER, FEATURES))
    theta /= np.linalg.norm(theta, axis=1, keepdims=True)
    return x, y, theta.astype(np.float32)


def projections(x, theta):
    return np.float64(x).reshape(len(x), -1) @ np.float64(theta)


def loop(x, y, directions, reduce="max", paired=False):
    squares = []
    for theta in directions:
        a, b = projections(x, theta), projections(y, theta)
        if not paired:
            a, b = np.sort(a), np.sort(b)
        squares.append(np.mean((a - b) ** 2))
    return np.sqrt(max(squares) if reduce == "max" else np.mean(squares))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_distances_are_those_of_a_loop_over_directions(reduce, paired):
    how = {"reduce": reduce, "paired": paired}
    for seed in range(3):
        batch = batches(seed)
        np.testing.assert_allclose(distance(*batch, **how), loop(*batch, **how), 1e-5)


def test_sorting_is_the_cheapest_transport():
    # Of all ways to pair the examples of two batches of four.
    x, y, theta = batches(batch=4)
    cheapest = min(
        loop(x, y[list(order)], theta[:1], paired=True)
        for order in itertools.permutations(range(4))
    )
    np.testing.assert_allclose(sliced_wasserstein(x, y, theta[:1]), cheapest, 1e-5)


def test_permutations_have_no_distance_unless_paired():
    x, _, theta = batches()
    order = np.random.default_rng(3).permutation(BATCH)
    assert distance(x, x[order], theta) < 1e-6
    assert distance(x, x[order], theta, paired=True) > 0.5
    a, b = (distance(*batches(4), paired=paired) for paired in (False, True))
    assert a < b


def test_a_shift_is_its_projection_on_the_direction_that_sees_most_of_it():
    x, _, theta = batches()
    shift = np.float32([[[1, 2, 3], [4, 5, 6]]])
    for paired in (False, True):
        np.testing.assert_allclose(
            distance(x, x + shift, theta, paired=paired),
            np.abs(theta @ shift.ravel()).max(),
            rtol=1e-5,
        )


def test_a_batch_given_twice_has_the_same_distance():
    x, y, theta = batches()
    for paired in (False, True):
        once = distance(x, y, theta, paired=paired)
        twice = sliced_wasserstein(
            np.concatenate([x, x]), np.concatenate([y, y]), theta, paired=paired
        )
        np.testing.assert_allclose(twice, once, rtol=1e-5)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_gradients_where_the_distance_is_zero_are_zero(reduce, paired):
    x, _, theta = batches()
    for part in gradient(x, x, theta, reduce=reduce, paired=paired):
        np.testing.assert_array_equal(part, np.zeros_like(x))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_gradients_are_slopes(reduce, paired):
    x, y, theta = batches(5)
    how = {"reduce": reduce, "paired": paired}
    along = np.random.default_rng(6).normal(size=(2, *x.shape)).astype(np.float32)
    parts = gradient(x, y, theta, **how)
    slope = sum(np.sum(np.float64(g) * v) for g, v in zip(parts, along, strict=True))
    ends = [
        loop(x + t * along[0], y + t * along[1], theta, **how) for t in (-STEP, STEP)
    ]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / (2 * STEP), rtol=1e-3)


def test_directions_are_uniform_on_the_sphere():
    theta = np.float64(regularizers.directions(jax.random.key(0), 2000, 3))
    np.testing.assert_allclose(np.linalg.norm(theta, axis=1), 1, rtol=1e-6)
    # On the sphere in three dimensions every coordinate is uniform (Archimedes).
    for coordinate in theta.T:
        assert scipy.stats.kstest((coordinate + 1) / 2, "uniform").pvalue > 0.01


def test_what_random_directions_see_falls_with_the_root_of_the_dimension():
    key = jax.random.key(0)
    for features in (4, 400):
        x = np.zeros((1, features), np.float32)
        y = np.full_like(x, 5 / np.sqrt(features))  # At distance 5.
        theta = regularizers.directions(key, 500, features)
        seen = sliced_wasserstein(x, y, theta, reduce="mean")
        np.testing.assert_allclose(seen, 5 / np.sqrt(features), rtol=0.1)


def test_collapse_is_the_mean_over_blocks_of_directions_of_their_own():
    x, y, _ = batches()
    key = jax.random.key(1)
    collapse = jax.jit(regularizers.layer_collapse, static_argnums=2)
    pairs = {"block1": (x, y), "block2": (x, y), "block3": (x, x)}
    keys = jax.random.split(key, 3)
    draws = [regularizers.directions(k, NUMBER, FEATURES) for k in keys]
    own = [loop(*pair, t) for pair, t in zip(pairs.values(), draws, strict=True)]
    assert own[0] != own[1]
    actual = collapse(pairs, key, NUMBER)
    np.testing.assert_allclose(actual, np.mean(own), rtol=1e-5)
    assert collapse(list(pairs.values()), key, NUMBER) == actual


def test_many_networks_at_once_and_half_precision():
    stacked = [np.stack(each) for each in zip(batches(0), batches(1), strict=True)]
    actual = jax.jit(jax.vmap(sliced_wasserstein))(*stacked)
    expected = [loop(*batches(seed)) for seed in (0, 1)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    x, y, theta = batches()
    x, y = (jnp.asarray(each, jnp.bfloat16) for each in (x, y))
    half = distance(x, y, theta)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, loop(x, y, theta), rtol=1e-5)


def test_a_residual_branch_is_driven_to_nothing():
    x, _, _ = batches()
    x = x.reshape(BATCH, FEATURES)
    kernel = jax.random.normal(jax.random.key(0), (FEATURES, FEATURES))

    def loss(kernel, key):
        pairs = [(x, x + jnp.asarray(x) @ kernel)]
        return regularizers.layer_collapse(pairs, key, 20, paired=True)

    @jax.jit
    def train(kernel):
        def step(kernel, key):
            return kernel - 0.05 * jax.grad(loss)(kernel, key), None

        keys = jax.random.split(jax.random.key(1), 300)
        return jax.lax.scan(step, kernel, keys)[0]

    before, after = (np.linalg.norm(x @ np.asarray(k)) for k in (kernel, train(kernel)))
    assert after < 0.25 * before


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((3, 4), (3, 5), (2, 4)),
            r"of the same shape, got \(3, 4\) and \(3, 5\)",
        ),
        (((0, 4), (0, 4), (2, 4)), r"got \(0, 4\) and \(0, 4\)"),
        (
            ((3, 4), (3, 4), (2, 5)),
            r"of shape \[number, 4\] .*, got \(2, 5\)",
        ),
        (((3, 4), (3, 4), (4,)), r"got \(4,\)"),
    ],
)
def test_batches_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(*map(np.zeros, shapes))


def test_other_words_and_no_blocks_are_refused():
    x, y, theta = batches()
    with pytest.raises(ValueError, match="expected reduce of max, mean, got 'sum'"):
        sliced_wasserstein(x, y, theta, reduce="sum")
    with pytest.raises(ValueError, match="at least one block, got none"):
        regularizers.layer_collapse([], jax.random.key(0))
    with pytest.raises(ValueError, match="expected a random key, got 0"):
        regularizers.directions(0, 1, 2)
    with pytest.raises(ValueError, match="of at least 1 as `number`, got 0"):
        regularizers.directions(jax.random.key(0), 0, 2)
