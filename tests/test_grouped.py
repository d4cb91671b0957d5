"""Group lasso as a constraint: how many neurons are left, when, and what is counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from d2sparse import models, train
from d2sparse.constraints import group_lasso, static
from d2sparse.models.mlp import MLP
from d2sparse.train import constrain

ROWS = jnp.arange(tiny.BATCH)
STEPS = 8


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


def plain(*hidden):
    recipe = train.Recipe(batch_size=tiny.BATCH, steps=STEPS, schedule="constant")
    model = models.from_linen(MLP(hidden, tiny.CLASSES))
    return train.plain(model, tiny.images(), recipe)


@functools.cache
def compiled():
    training = constrain(plain(6, 4), group_lasso(0.5, 1e-4))
    begin = jax.jit(lambda s: training.init(training, jax.random.key(0), *s))
    state = begin((tiny.images(), dict(training.settings)))
    return training, jax.jit(train.make_step(training)), state


def neurons(state):
    """Hidden neurons that have weights, after every step."""
    leaves = tiny.arrays(state.params)
    return sum(leaves[f"dense{n}/kernel"].any(axis=0).sum() for n in (1, 2))


def counted(**settings):
    _, step, state = compiled()
    given = {name: jnp.float32(value) for name, value in settings.items()}
    state, counts = state._replace(settings={**state.settings, **given}), []
    for _ in range(STEPS):
        state, _ = step(state, tiny.images(), ROWS)
        counts.append(int(neurons(state)))
    return state, counts


def test_neurons_fall_by_the_budget_in_three_quarters_of_the_training():
    state, counts = counted()
    assert counts == [10] * 6 + [5] * 2
    leaves = tiny.arrays(state.params)
    assert np.all(leaves["head/kernel"])
    assert all(leaves[f"dense{n}/kernel"].any() for n in (1, 2))


def test_a_strength_meets_the_budget_sooner_and_both_are_settings():
    _, counts = counted(group_strength=10.0, group_sparsity=0.7)
    assert counts == [3] * STEPS
    assert counted(group_sparsity=0.0)[1] == [10] * STEPS
    least = counted(group_sparsity=0.99)[1]  # A neuron of every layer.
    assert least[-1] == 2
    assert compiled()[1]._cache_size() == 1


def test_zeros_count_as_masks_and_lower_the_cost():
    training, _, begun = compiled()
    state, _ = counted(group_sparsity=0.7)
    (live,) = training.masks(state).used
    leaves, kept = tiny.arrays(state.params), tiny.arrays(live)
    for path in ("dense1/kernel", "dense2/kernel"):
        np.testing.assert_array_equal(kept[path], leaves[path] != 0)
    assert kept["dense1/bias"].all()
    cost, dense = (training.cost(training, s, 8) for s in (state, begun))
    assert float(dense) == 3 * training.network.dense_macs
    assert float(cost) < 0.6 * float(dense)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constrain(plain(), group_lasso(0.5)), "hidden neurons that may be"),
        (
            lambda: constrain(plain(4), static(0.5), group_lasso(0.5)),
            "group_lasso before what decides the masks, got it after static",
        ),
        (lambda: group_lasso(1.0), "sparsity"),
        (lambda: group_lasso(0.5, -1.0), "as `strength`, got -1.0"),
    ],
)
def test_what_has_no_neurons_to_remove_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
