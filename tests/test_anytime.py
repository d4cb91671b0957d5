"""Anytime learning: levels, prunings, stages, what is measured."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2sparse import anytime, rules, scores, train
from d2sparse.anytime import LEVELS, Stage, density, levels, prune
from d2sparse.masks import dense_masks
from d2sparse.rules import one_shot
from d2sparse.transforms import get_masks, set_masks, sparsify

HALF = rules.one_shot(0.5)

SHAPES = {"a": (40, 30), "b": (7, 11, 3)}
SIZE = 40 * 30 + 7 * 11 * 3


def tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    drawn = zip(keys, SHAPES.items(), strict=True)
    return {path: {"kernel": jax.random.normal(k, shape)} for k, (path, shape) in drawn}


def live(masks):
    return sum(int(mask.sum()) for mask in jax.tree.leaves(masks))


# Levels


def test_the_published_levels_and_their_densities():
    expected = [0.800, 0.716, 0.640, 0.572, 0.512, 0.458, 0.410, 0.366]
    found = [density(level) for level in levels(4.5, 8)]
    np.testing.assert_allclose(found, expected, atol=5e-4)


@pytest.mark.parametrize("schedule", LEVELS)
@pytest.mark.parametrize("megabatches", [1, 2, 9])
def test_levels_rise_to_the_target(schedule, megabatches):
    found = levels(4.5, megabatches, schedule)
    assert len(found) == megabatches
    assert found[-1] == 4.5
    assert all(a <= b for a, b in itertools.pairwise(found))
    if megabatches > 1:
        assert found[0] == pytest.approx(4.5 if schedule == "constant" else 1.0)


def test_levels_in_between():
    assert levels(5.0, 5, first=3.0) == [3.0, 3.5, 4.0, 4.5, 5.0]
    densities = [density(level) for level in levels(4.5, 4, "linear_density")]
    np.testing.assert_allclose(np.diff(densities), np.diff(densities)[0])
    low, high = density(4.5), density(1.0)
    cubic = density(levels(4.5, 3, "cubic")[1])
    assert cubic == pytest.approx(low + (high - low) / 8)
    assert levels(0.5, 3) == [0.5, 0.5, 0.5]  # Never sparser than the target.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 8), "target level above 0, got 0.*train the dense network instead"),
        ((float("nan"), 8), "target level above 0, got nan"),
        ((4.5, 0), "at least 1 megabatch and"),
        ((4.5, 8, "linear"), "levels of linear_level, .*got 'linear'"),
        ((4.5, 8, "linear_level", -1.0), "first level of at least 0, got .*first=-1"),
    ],
)
def test_levels_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        levels(*arguments)


# Prunings


def test_numbers_are_exact_and_masks_monotone():
    masks = dense_masks(tree(0))
    for stage, level in enumerate(levels(4.5, 8)):
        before, params = masks, tree(stage)
        masks = prune(masks, params, one_shot(1 - density(level)))
        assert live(masks) == round(density(level) * SIZE)
        for new, old in zip(*map(jax.tree.leaves, (masks, before)), strict=True):
            assert not (new & ~old).any()


def test_ties_change_no_number():
    zeros = jax.tree.map(jnp.zeros_like, tree(0))
    masks = dense_masks(zeros)
    for level in levels(4.5, 5):
        masks = prune(
            masks, zeros, one_shot(1 - density(level), scores.saliency), zeros
        )
        assert live(masks) == round(density(level) * SIZE)


def test_random_masks_that_are_multiplied_are_as_sparse_as_expected():
    params = {"kernel": jnp.ones((400, 500))}
    masks, expected = dense_masks(params), 1.0
    for stage, level in enumerate(levels(4.5, 8)):
        key = jax.random.key(stage)
        rule = one_shot(1 - density(level), scores.random)
        masks = prune(masks, params, rule, dead="intersect", key=key)
        expected *= density(level)
    assert expected == pytest.approx(0.0074, abs=5e-5)
    deviation = np.sqrt(200_000 * expected)
    assert abs(live(masks) - 200_000 * expected) < 4 * deviation


def test_the_revived_may_come_back():
    first = prune(dense_masks(tree(0)), tree(0), HALF)
    again = prune(first, tree(1), HALF, dead="revive")
    assert live(again) == live(first)
    assert live(jax.tree.map(lambda new, old: new & ~old, again, first)) > 100
    both = prune(first, tree(1), HALF, dead="intersect")
    joined = jax.tree.map(jnp.logical_and, again, first)
    assert live(jax.tree.map(jnp.not_equal, both, joined)) == 0


def test_a_nan_and_an_unknown_treatment_are_refused():
    params = tree(0)
    params["b"]["kernel"] = params["b"]["kernel"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="without NaN, got NaN at 'b/kernel'"):
        prune(dense_masks(params), params, HALF)
    with pytest.raises(ValueError, match=r"dead of exclude, .*got 'zombie'"):
        prune(dense_masks(tree(0)), tree(0), HALF, dead="zombie")


# Stages


def test_stages_follow_each_other():
    stages = anytime.plan_stages([10, 25, 40], batch_size=5, epochs=3)
    assert stages == [Stage(0, 2, 3), Stage(6, 5, 3), Stage(21, 8, 3)]
    assert stages[-1].end == 45
    by_steps = anytime.plan_stages([10, 25, 40], batch_size=5, epochs=3, steps=10)
    assert [stage.epochs for stage in by_steps] == [5, 2, 1]


def test_rates_within_a_stage():
    def rates(schedule):
        return [anytime.stage_rate(schedule, 0.1, epoch, 50) for epoch in range(50)]

    np.testing.assert_allclose(
        rates("step"), [0.1] * 20 + [0.01] * 20 + [0.001] * 10, rtol=1e-12
    )
    assert rates("constant") == [0.1] * 50
    cosine = rates("cosine")
    assert cosine[0] == 0.1
    assert cosine[25] == pytest.approx(0.05)
    with pytest.raises(ValueError, match=r"schedule of step, .*got 'linear'"):
        rates("linear")


def make_state(seed=0, momentum=0.9):
    params = {"kernel": jax.random.normal(jax.random.key(seed), (4, 3))}
    tx = sparsify(optax.sgd(0.1, momentum), rules.fixed(dense_masks(params)))
    faults = train.Faults(jnp.int32(0), jnp.int32(0), jnp.array(False))
    key = jax.random.key(seed)
    return train.TrainState(
        jnp.int32(0), params, {}, tx.init(params), key, faults, {}
    ), tx


def descend(state, tx, steps=1):
    for _ in range(steps):
        updates, opt_state = tx.update(state.params, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)]


def test_what_is_resumed_has_the_best_weights_and_the_latest_step():
    fresh, tx = make_state()
    masks = {"kernel": jnp.arange(12).reshape(4, 3) % 2 == 0}
    begin = fresh._replace(opt_state=set_masks(fresh.opt_state, masks))
    best = descend(begin, tx, 2)
    state = descend(best, tx, 3)
    carried = anytime.go_on_from(best, state)
    anew = anytime.go_on_from(best, state, fresh)
    for found in (carried, anew):
        assert bits(found) == bits(best)
        assert int(found.step) == int(found.opt_state.step) == 5
        np.testing.assert_array_equal(
            get_masks(found.opt_state)["kernel"], masks["kernel"]
        )
    trace = state.opt_state.inner[0].trace["kernel"]
    np.testing.assert_array_equal(carried.opt_state.inner[0].trace["kernel"], trace)
    assert not anew.opt_state.inner[0].trace["kernel"].any()


# What is measured


def test_measures_against_sums_by_hand():
    errors = [0.5, 0.3, 0.1, 0.2]
    found = anytime.anytime_measures(errors, test_size=250)
    assert found["cumulative_error"] == pytest.approx(1.1)
    assert found["mean_error"] == pytest.approx(0.275)
    assert found["error_count"] == 125 + 75 + 25 + 50
    assert found["anytime_accuracy"] == pytest.approx(0.725)
    assert found["final_accuracy"] == pytest.approx(0.8)
    assert found["error_area"] == pytest.approx((0.4 + 0.2 + 0.15) / 3)
    np.testing.assert_allclose(anytime.error_changes(errors), [-0.2, -0.2, 0.1])


def test_the_area_weighs_by_what_was_seen():
    area = anytime.area_under_errors([0.5, 0.1, 0.1], seen=[0.1, 0.2, 1.0])
    assert area == pytest.approx((0.1 * 0.3 + 0.8 * 0.1) / 0.9)
    assert anytime.area_under_errors([0.5]) == 0.5
    with pytest.raises(ValueError, match="rising parts of the data for 2 errors"):
        anytime.area_under_errors([0.5, 0.4], seen=[0.2, 0.2])


def test_a_smaller_gap_is_a_positive_change():
    assert anytime.relative_gap_change(0.2, 0.1) == -1
    assert np.isnan(anytime.relative_gap_change(0.2, 0.0))


@pytest.mark.parametrize("errors", [[], [1.2], [float("nan")], [[0.1]]])
def test_errors_that_are_none_are_refused(errors):
    with pytest.raises(ValueError, match="errors after at least one megabatch"):
        anytime.anytime_measures(errors, 10)
