"""Weights and activations against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import masks, rules, scores

KEY = jax.random.key(0)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    "conv": {"kernel": draw(0, 3, 3, 2, 4), "bias": draw(1, 4)},
    "dense": {"kernel": draw(2, 5, 3), "bias": draw(3, 3)},
}
INPUTS = {"conv/kernel": draw(4, 6, 7, 7, 2), "dense/kernel": draw(5, 6, 5)}


def test_wanda_equals_the_loop_over_features():
    ranks = jax.jit(scores.wanda(INPUTS))(PARAMS, None, KEY)
    assert jax.tree.structure(ranks) == jax.tree.structure(PARAMS)
    for layer in PARAMS:
        kernel, inputs = PARAMS[layer]["kernel"], INPUTS[f"{layer}/kernel"]
        for i in np.ndindex(kernel.shape):
            norm = np.sqrt(np.sum(inputs[..., i[-2]].astype(np.float64) ** 2))
            np.testing.assert_allclose(
                ranks[layer]["kernel"][i], abs(kernel[i]) * norm, rtol=1e-5
            )
        np.testing.assert_array_equal(
            ranks[layer]["bias"], np.abs(PARAMS[layer]["bias"])
        )


def test_wanda_of_a_linear_layer_is_how_far_one_weight_moves_the_output():
    kernel, x = draw(0, 5, 3), draw(1, 8, 5)
    ranks = scores.wanda({"kernel": x})({"kernel": kernel})["kernel"]
    for i in np.ndindex(5, 3):
        without = kernel.copy()
        without[i] = 0
        moved = np.linalg.norm(x @ kernel - x @ without)
        np.testing.assert_allclose(ranks[i], moved, rtol=1e-5)


def test_norms_of_half_precision_do_not_overflow():
    inputs = {"kernel": np.full((4, 2), 3e4, np.float16)}
    ranks = scores.wanda(inputs)({"kernel": jnp.ones((2, 1))})
    np.testing.assert_allclose(ranks["kernel"], 6e4)


def test_norms_beyond_the_squares_of_float32():
    x = jnp.array([[3e30, 0.0], [4e30, 0.0]], jnp.bfloat16)
    ranks = scores.wanda({"kernel": x})({"kernel": jnp.ones((2, 1))}, None, None)[
        "kernel"
    ]
    expected = np.linalg.norm(np.asarray(x, np.float64), axis=0)
    np.testing.assert_allclose(ranks[:, 0], expected, rtol=1e-6)


def test_a_rule_prunes_by_the_score():
    rule = rules.one_shot(0.5, score=scores.wanda({"w": np.float32([[4, 3, 2, 1]])}))
    params = {"w": jnp.array([[1.0], [1.0], [1.0], [7.0]])}
    kept = rule.update(rule.init(params, KEY), params, None, 0, KEY)
    assert kept["w"].ravel().tolist() == [True, False, False, True]
    assert masks.sparsity(kept) == 0.5


def test_a_kernel_without_inputs_is_refused():
    score = scores.wanda({"dense/kernel": INPUTS["dense/kernel"]})
    with pytest.raises(ValueError, match=r"got none for \['conv/kernel'\]"):
        score(PARAMS)


@pytest.mark.parametrize("path", ["dense/weight", "dense/bias"])
def test_inputs_of_what_is_no_kernel_are_refused(path):
    score = scores.wanda({**INPUTS, path: draw(0, 6, 3)})
    with pytest.raises(ValueError, match=rf"some for \['{path}'\], which are no kern"):
        score(PARAMS)


def test_inputs_of_another_width_are_refused_by_name():
    score = scores.wanda({**INPUTS, "dense/kernel": draw(0, 6, 4)})
    with pytest.raises(ValueError, match="5 features for the kernel 'dense/kernel'"):
        score(PARAMS)
