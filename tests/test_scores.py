"""Scores of weights and gradients alone, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2sparse import masks, rules, scores

KEY = jax.random.key(0)
SCORES = [
    scores.magnitude,
    scores.random,
    scores.constant,
    scores.gradient,
    scores.saliency,
    scores.signed_saliency,
    scores.observed,
]


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
    for score, definition in [
        (scores.magnitude, lambda w, g: np.abs(w)),
        (scores.constant, lambda w, g: np.ones(w.shape, bool)),
        (scores.gradient, lambda w, g: np.abs(g)),
        (scores.saliency, lambda w, g: np.abs(w * g)),
        (scores.signed_saliency, lambda w, g: -g * w),
        (scores.observed, lambda w, g: g),
    ]:
        expected = jax.tree.map(definition, params, grads)
        assert_leaves_equal(score(params, grads, KEY), expected)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_has_the_same_signature_and_structure(score):
    params, grads = tree(0), tree(1)
    ranks = jax.jit(score)(params, grads, KEY)
    assert jax.tree.map(jnp.shape, ranks) == jax.tree.map(jnp.shape, params)
    swept = jax.vmap(score, in_axes=(None, 0, None))(
        params, jax.tree.map(lambda *g: np.stack(g), grads, tree(2)), KEY
    )
    assert swept["kernel"].shape[-2:] == (3, 4)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_prunes(score):
    rule, params = rules.one_shot(0.5, score=score), tree(0)
    kept = rule.update(rule.init(params, KEY), params, tree(1), 0, KEY)
    assert masks.count(kept)["kernel"] == 6
    ranks = np.asarray(score(params, tree(1), KEY)["kernel"])
    assert ranks[kept["kernel"]].min() >= ranks[~kept["kernel"]].max()


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


def test_signed_saliency_is_the_rise_of_a_loss_that_is_linear_in_the_weight():
    params, slope = tree(0), tree(1)

    def loss(params):
        return jnp.vdot(params["kernel"], slope["kernel"])

    ranks = scores.signed_saliency(params, jax.grad(loss)(params))
    for i in np.ndindex(3, 4):
        without = params["kernel"].copy()
        without[i] = 0
        rise = loss({"kernel": without}) - loss(params)
        np.testing.assert_allclose(ranks["kernel"][i], rise, rtol=1e-4, atol=1e-5)
    assert np.any(ranks["kernel"] < 0)


# Movement.


def test_movement_is_the_sum_of_signed_saliencies():
    tx = scores.movement()
    state = tx.init(tree(0))
    update = jax.jit(tx.update)
    expected = jax.tree.map(np.zeros_like, tree(0))
    for step in range(4):
        params, grads = tree(step), tree(step + 10)
        moved, state = update(grads, state, params)
        term = scores.signed_saliency(params, grads)
        expected = jax.tree.map(np.add, expected, term)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moved, expected
        )
        assert_leaves_equal(state.total, moved)


def test_movement_is_high_where_weights_leave_zero_and_low_where_they_approach_it():
    # Descent towards 2 from 1 and from 3, and away from 0 on the other side.
    target = {"w": jnp.array([2.0, 2.0, -2.0, -2.0])}
    params = {"w": jnp.array([1.0, 3.0, -1.0, -3.0])}
    tx = scores.movement()
    state = tx.init(params)
    for _ in range(20):
        grads = jax.tree.map(jnp.subtract, params, target)
        moved, state = tx.update(grads, state, params)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    assert (np.asarray(moved["w"]) > 0).tolist() == [True, False, True, False]


def test_movement_ranks_what_a_rule_is_shown():
    tx, params = scores.movement(), {"w": jnp.array([[1.0, 9.0, 2.0, 8.0]])}
    grads = {"w": jnp.array([[-1.0, 1.0, -1.0, 1.0]])}
    moved, _ = tx.update(grads, tx.init(params), params)
    rule = rules.one_shot(0.5, scores.observed)
    kept = rule.update(rule.init(params, KEY), params, moved, 0, KEY)
    assert kept["w"].tolist() == [[True, False, True, False]]


def test_movement_of_half_precision_is_summed_in_single():
    params = {"w": jnp.ones(1, jnp.bfloat16)}
    tx = scores.movement()
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(300):  # In bfloat16, 256 + 1 = 256.
        moved, state = update({"w": -params["w"]}, state, params)
    assert moved["w"].dtype == jnp.float32
    assert moved["w"].tolist() == [300.0]


def test_the_state_of_movement_is_seen_by_the_tools_of_optax():
    params = tree(0)
    state = scores.movement().init(params)
    ones = optax.tree.map_params(scores.movement(), lambda leaf: leaf + 1, state)
    assert_leaves_equal(ones.total, jax.tree.map(np.ones_like, params))


def test_movement_without_parameters_is_refused():
    tx = scores.movement()
    with pytest.raises(ValueError, match="movement needs the parameters: call"):
        tx.update(tree(1), tx.init(tree(0)))


@pytest.mark.parametrize("score", scores.GRADIENT_SCORES)
def test_gradients_are_asked_for_where_there_are_none(score):
    with pytest.raises(ValueError, match=f"'{score.__name__}' needs gradients"):
        score({"w": jnp.ones(2)}, None)
