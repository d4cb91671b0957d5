"""Top eigenvalues of Hessians that are known in closed form or by NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import metrics

SHAPES = {"a": (2, 3), "b": {"c": (4,), "d": ()}}
SIZE = 11


def symmetric(eigenvalues, seed=0):
    """A matrix of these eigenvalues, and the vector of the first."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    return np.float32(q @ np.diag(eigenvalues) @ q.T), q[:, 0]


def flat(params):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])


def params_of(vector):
    parts = np.split(np.float32(vector), [6, 10])
    return {
        "a": parts[0].reshape(2, 3),
        "b": {"c": parts[1], "d": parts[2].reshape(())},
    }


@jax.jit
def of_quadratic(matrix, params, key, steps=100, tolerance=1e-2):
    def loss(params):
        w = flat(params)
        return 0.5 * w @ matrix @ w + jnp.sum(w) + 3.0

    return metrics.top_hessian_eigenvalue(
        loss, params, key, steps=steps, tolerance=tolerance
    )


def at(seed=0):
    params = params_of(np.random.default_rng(seed).normal(size=SIZE))
    return params, jax.random.key(seed)


@pytest.mark.parametrize("top", [5.0, -5.0])
def test_of_a_quadratic_over_a_tree(top):
    matrix, vector = symmetric([top, 3.0, -3.0, 2.0, 1.0, *[0.1] * 5, 0.0])
    found = of_quadratic(matrix, *at())
    np.testing.assert_allclose(found.value, top, rtol=1e-3)
    assert found.residual <= 1e-2 * 5 * 1.001
    assert 1 < found.steps < 30
    actual = np.asarray(flat(found.vector))
    np.testing.assert_allclose(abs(actual @ vector), 1, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(actual), 1, rtol=1e-5)
    assert jax.tree.map(np.shape, found.vector) == jax.tree.map(
        tuple, SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def test_a_smaller_tolerance_takes_more_steps_and_steps_are_bounded():
    matrix, _ = symmetric([5.0, 4.0, *[1.0] * 9])
    rough, fine = (of_quadratic(matrix, *at(), 200, tol) for tol in (0.1, 1e-4))
    assert rough.steps < fine.steps < 200
    assert fine.residual <= 1e-4 * 5.001
    np.testing.assert_allclose(fine.value, 5.0, rtol=1e-5)
    assert of_quadratic(matrix, *at(), 7, 0.0).steps == 7


def test_equal_eigenvalues_of_opposite_sign_are_not_taken_for_one():
    matrix, _ = symmetric([4.0, -4.0, *[0.0] * 9])
    found = of_quadratic(matrix, *at())
    assert found.steps == 100
    assert found.residual > 0.1
    # A pair of equal sign has vectors in a plane, any of which will do.
    matrix, _ = symmetric([4.0, 4.0, *[0.0] * 9])
    found = of_quadratic(matrix, *at())
    assert found.residual <= 0.04
    np.testing.assert_allclose(found.value, 4.0, rtol=1e-4)


def test_a_flat_loss_has_curvature_zero():
    found = of_quadratic(np.zeros((SIZE, SIZE), np.float32), *at())
    assert (found.value, found.residual, found.steps) == (0, 0, 1)


def test_what_is_not_finite_ends_at_once():
    found = of_quadratic(np.full((SIZE, SIZE), np.nan, np.float32), *at())
    assert np.isnan(found.value)
    assert found.steps == 1


# A network of one hidden layer.


def data(examples=12):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 3)).astype(np.float32)
    return x, rng.normal(size=(examples, 2)).astype(np.float32)


def network(seed=1):
    rng = np.random.default_rng(seed)
    return {
        "first": rng.normal(size=(3, 4)).astype(np.float32),
        "second": rng.normal(size=(4, 2)).astype(np.float32),
    }


def mean_loss(params, x, y, masks=None):
    if masks is not None:
        params = jax.tree.map(lambda w, m: w * m, params, masks)
    out = jnp.tanh(x @ params["first"]) @ params["second"]
    return jnp.mean((out - y) ** 2)


@jax.jit
def hessian(params, x, y, masks):
    leaves, structure = jax.tree.flatten(params)
    places = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def loss(vector):
        parts = jnp.split(vector, places)
        parts = [p.reshape(w.shape) for p, w in zip(parts, leaves, strict=True)]
        return mean_loss(jax.tree.unflatten(structure, parts), x, y, masks)

    return jax.hessian(loss)(flat(params))


@jax.jit
def of_network(params, x, y, masks, key):
    loss = functools.partial(mean_loss, x=x, y=y, masks=masks)
    return metrics.top_hessian_eigenvalue(loss, params, key, tolerance=1e-3)


def largest(matrix):
    values = np.linalg.eigvalsh(np.float64(matrix))
    return values[np.argmax(np.abs(values))]


def test_of_a_network_dense_and_within_its_live_weights():
    params, (x, y) = network(), data()
    dense = jax.tree.map(np.ones_like, params)
    sparse = jax.tree.map(lambda w: np.float32(np.abs(w) > 0.7), params)
    for masks in (dense, sparse):
        found = of_network(params, x, y, masks, jax.random.key(0))
        expected = largest(hessian(params, x, y, masks))
        np.testing.assert_allclose(found.value, expected, rtol=1e-4)
        dead = [
            np.asarray(v)[m == 0]
            for v, m in zip(
                jax.tree.leaves(found.vector), jax.tree.leaves(masks), strict=True
            )
        ]
        assert not np.any(np.concatenate(dead))


def test_a_set_given_twice_has_the_same_curvature():
    params, (x, y) = network(), data()
    masks = jax.tree.map(np.ones_like, params)
    once = of_network(params, x, y, masks, jax.random.key(0))
    x, y = (np.concatenate([each, each]) for each in (x, y))
    twice = of_network(params, x, y, masks, jax.random.key(0))
    np.testing.assert_allclose(twice.value, once.value, rtol=1e-4)


def test_many_networks_at_once_and_half_precision():
    x, y = data()
    stacked = jax.tree.map(lambda *w: np.stack(w), network(1), network(2))
    masks = jax.tree.map(np.ones_like, network())

    def of(params, key):
        return of_network(params, x, y, masks, key).value

    many = jax.jit(jax.vmap(of))(stacked, jax.random.split(jax.random.key(0), 2))
    expected = [largest(hessian(network(s), x, y, masks)) for s in (1, 2)]
    np.testing.assert_allclose(many, expected, rtol=1e-3)
    half = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), network(1))
    found = of_network(half, x, y, masks, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    np.testing.assert_allclose(found.value, expected[0], rtol=0.03)


def test_what_has_no_curvature_is_refused():
    key = jax.random.key(0)

    def loss(params):
        return jnp.sum(params["a"] ** 2)

    with pytest.raises(ValueError, match="expected a function as `loss`"):
        metrics.top_hessian_eigenvalue(3.0, {"a": jnp.ones(2)}, key)
    with pytest.raises(ValueError, match="at least one array, got an empty tree"):
        metrics.top_hessian_eigenvalue(loss, {}, key)
    with pytest.raises(ValueError, match="of at least 1 as `steps`, got 0"):
        metrics.top_hessian_eigenvalue(loss, {"a": jnp.ones(2)}, key, steps=0)
    with pytest.raises(ValueError, match=r"in \[0, 1\] as `tolerance`, got 2"):
        metrics.top_hessian_eigenvalue(loss, {"a": jnp.ones(2)}, key, tolerance=2)
    with pytest.raises(ValueError, match="expected a random key, got 0"):
        metrics.top_hessian_eigenvalue(loss, {"a": jnp.ones(2)}, 0)
