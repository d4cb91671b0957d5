"""Arguments of a wrong kind are refused at once, by a sentence that says what is asked.

Words in the place of functions and numbers, fractions in the place of whole numbers,
lists in the place of what is named by path: one table.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import images, perceptron

from d2sparse import masks, reparam, schedules, scores, train
from d2sparse.rules import static
from d2sparse.transforms import sparsify

PARAMS = {"kernel": jnp.ones((4, 4))}
BATCHES = [(jnp.ones((2, 4)), jnp.zeros(2, jnp.int32))]
TWO = {"a": jnp.ones(4), "b": jnp.ones(4)}
INTERVAL = "an interval of whole steps, at least 1 step, got "
OVER = "a schedule over whole steps, at least 1 step, got "
FRACTIONS = "fractions, in [0, 1], got the value "
STEPS = "whole numbers of steps, such as `at([0, 100])`, got "
COUNT = "a whole number of entries, at least 0, as "
PREDICT = "a function as `predict`, params, x -> ..."
REFUSED = [
    (lambda: schedules.every("5"), INTERVAL + "'5'"),
    (lambda: schedules.every(2.5), INTERVAL + "2.5"),
    (lambda: schedules.every([5]), INTERVAL + "[5]"),
    (lambda: schedules.every(True), INTERVAL + "True"),
    (lambda: schedules.every(5, stop="9"), "a whole step as `stop`, got '9'"),
    (lambda: schedules.alternating("5", 9), INTERVAL + "'5'"),
    (lambda: schedules.alternating(5, 9.5), "a whole step as `stop`, got 9.5"),
    (lambda: schedules.alternating(5, 9, "1"), "a whole step as `begin`, got '1'"),
    (lambda: schedules.at(5), STEPS + "5"),
    (lambda: schedules.at([1.5]), STEPS + "[1.5]"),
    (lambda: schedules.at("12"), STEPS + "'12'"),
    (lambda: schedules.at(np.array(5)), STEPS + "array(5)"),
    (lambda: schedules.cosine(3.0, 9), FRACTIONS + "3.0"),
    (lambda: schedules.cosine("0.3", 9), FRACTIONS + "'0.3'"),
    (lambda: schedules.cosine(0.3, 2.5), OVER + "2.5"),
    (lambda: schedules.linear("0", 0.5, 9), FRACTIONS + "'0'"),
    (lambda: schedules.linear(0.0, 0.5, "9"), OVER + "'9'"),
    (lambda: schedules.cubic(0.5, 9, begin="1"), "a whole step as `begin`, got '1'"),
    (lambda: schedules.constant(None), FRACTIONS + "None"),
    (lambda: scores.snip("loss", BATCHES), "a function as `loss`, params, batch -> "),
    (lambda: scores.grasp("net", BATCHES), PREDICT),
    (lambda: scores.fisher(3, BATCHES), PREDICT),
    (lambda: scores.synflow("net", (4,)), PREDICT),
    (lambda: scores.synflow(jnp.matmul, 784), "as `input_shape`, such as (28, 28, 1)"),
    (lambda: scores.wanda([jnp.ones((2, 4))]), "by path as `inputs`, {'dense/kernel'"),
    (lambda: scores.wanda({"kernel": [1.0]}), "enters 'kernel', got [1.0]"),
    (lambda: masks.top_k(jnp.ones(4), 2.5), COUNT + "`k`, got 2.5"),
    (lambda: masks.top_k(jnp.ones(4), "2"), COUNT + "`k`, got '2'"),
    (lambda: masks.top_k(jnp.ones(4), jnp.float32(2)), COUNT + "`k`"),
    (lambda: jax.jit(masks.top_k)(jnp.ones(4), 0.5), COUNT + "`k`"),
    (lambda: masks.top_k(jnp.ones(4), -1), COUNT + "`k`, got -1"),
    (lambda: masks.select(TWO, {"a": 1}), "every leaf, got none for ['b'] among ['a']"),
    (lambda: masks.select(TWO, {"a": 1, "b": 0.5}), COUNT + "the count of 'b'"),
    (lambda: masks.select(TWO, "all"), COUNT + "the count of all leaves, got 'all'"),
    (lambda: masks.select(jnp.ones(4), 2), "scores by path as `scores`"),
    (lambda: masks.n_of_m(4)(PARAMS, {}), "every leaf, got none for ['kernel']"),
    (lambda: masks.blocks((2, 2))(PARAMS, 0.5), COUNT + "the count of all leaves"),
    (lambda: masks.density(PARAMS), "masks of bool, got float32 at 'kernel'"),
    (lambda: masks.count({"kernel": np.eye(2)}), "masks of bool, got float64"),
    (lambda: masks.sparsity({"kernel": 1}), "masks of bool, got 1 at 'kernel'"),
    (lambda: reparam.powerprop(PARAMS, "2"), "alpha of at least 1, got '2'"),
    (lambda: reparam.powerprop_inverse(PARAMS, [2]), "alpha of at least 1, got [2]"),
    (lambda: reparam.sr_ste(PARAMS, PARAMS, "1"), "as `decay`, got '1'"),
    (lambda: reparam.sr_ste(PARAMS, PARAMS, -1.0), "as `decay`, got -1.0"),
    (lambda: reparam.init_thresholds(PARAMS, "-5"), "as `value`, got '-5'"),
    (lambda: reparam.soft_threshold(PARAMS, 0.1), "by path as `thresholds`"),
    (lambda: train.init_state(None, None, None, "key"), "a seed or one key such as"),
]


@pytest.mark.parametrize(("call", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_arguments_of_a_wrong_kind_are_refused(call, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        call()


def test_numbers_of_every_type_are_numbers():
    for whole in (3, 3.0, np.int64(3), np.float32(3), np.array(3), jnp.int32(3)):
        assert bool(schedules.every(whole)(6))
        assert bool(schedules.at([whole])(3))
        assert float(schedules.cosine(0.5, whole)(3)) == 0
    for k in (2, 2.0, np.int32(2), np.float64(2), jnp.uint8(2)):
        assert masks.top_k(jnp.arange(4.0), k).tolist() == [False, False, True, True]
        kept = masks.select({"a": jnp.arange(3.0)}, {"a": k})
        assert kept["a"].tolist() == [False, True, True]


@pytest.mark.parametrize("key", [7, jax.random.PRNGKey(7), np.uint32([0, 7])])
def test_seeds_and_legacy_keys_begin_the_same_run(key):
    data, model = images(), perceptron()
    tx = sparsify(optax.sgd(0.1), static(0.5))
    states = (train.init_state(model, tx, data, k) for k in (key, jax.random.key(7)))
    for found, expected in zip(*map(jax.tree.leaves, states), strict=True):
        assert found.dtype == expected.dtype
        assert bool(jnp.all(found == expected))
