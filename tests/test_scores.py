"""Scores against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import scores

SCORES = [scores.magnitude, scores.random, scores.gradient, scores.saliency]


def tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    kernel, bias = rng.normal(size=(3, 4)).astype(dtype), rng.normal(size=5)
    return {"kernel": kernel, "layers": [bias.astype(dtype)]}


def assert_leaves_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_scores_equal_their_definitions(dtype):
    params, grads = tree(0, dtype), tree(1, dtype)
    magnitude = jax.tree.map(np.abs, params)
    gradient = jax.tree.map(np.abs, grads)
    saliency = jax.tree.map(lambda w, g: np.abs(w * g), params, grads)
    assert_leaves_equal(scores.magnitude(params), magnitude)
    assert_leaves_equal(scores.gradient(params, grads), gradient)
    assert_leaves_equal(scores.saliency(params, grads), saliency)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_has_the_same_signature_and_structure(score):
    params, grads, key = tree(0), tree(1), jax.random.key(2)
    ranks = jax.jit(score)(params, grads, key)
    assert jax.tree.map(jnp.shape, ranks) == jax.tree.map(jnp.shape, params)
    assert all(jnp.all(leaf >= 0) for leaf in jax.tree.leaves(ranks))
    swept = jax.vmap(score, in_axes=(None, None, 0))(
        params, grads, jnp.stack([key] * 2)
    )
    assert swept["kernel"].shape[-2:] == (3, 4)


def test_random_scores_are_uniform_and_differ_between_leaves_and_keys():
    params = [jnp.zeros((200, 100)), jnp.zeros((200, 100))]
    draws = [scores.random(params, None, jax.random.key(seed)) for seed in (0, 1)]
    leaves = [np.asarray(leaf) for draw in draws for leaf in draw]
    for i, leaf in enumerate(leaves):
        assert leaf.min() >= 0
        assert leaf.max() < 1
        counts, _ = np.histogram(leaf, bins=10, range=(0, 1))
        # The deviation of a count is sqrt(20000 * 0.1 * 0.9) = 42.
        assert np.all(np.abs(counts - 2000) < 5 * 42)
        for other in leaves[:i]:
            assert abs(np.corrcoef(leaf.ravel(), other.ravel())[0, 1]) < 0.05


def test_random_scores_repeat_with_their_key():
    params, key = tree(0), jax.random.key(7)
    assert_leaves_equal(
        scores.random(params, None, key), jax.jit(scores.random)(params, None, key)
    )


def test_random_scores_without_a_key_are_refused():
    with pytest.raises(ValueError, match="random scores need a key; pass"):
        scores.random(tree(0))


def test_random_scores_of_an_empty_tree():
    assert scores.random({}, None, jax.random.key(0)) == {}
