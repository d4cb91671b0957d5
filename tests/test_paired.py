"""How a pair begins, how presets train it, and what counts of it at the end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tiny import (
    KERNELS,
    SIZE,
    WIDTH,
    arrays,
    assert_close,
    begin,
    copy,
    fit,
    half_cosine,
    images,
    masks_of,
    nested,
    perceptron,
    start,
)

from d2sparse import distributions, train
from d2sparse.constraints import (
    Learners,
    Structure,
    averaged,
    consolidated,
    coupled,
    paced,
    paired,
    static,
)
from d2sparse.constraints.paired import _RULES
from d2sparse.dual import Coupling, Dual
from d2sparse.masks import n_of_m
from d2sparse.rules import MaskRule
from d2sparse.train import constrain, make_program

STEPS, STOP, RATE = 26, 19, 0.2
PLAIN = {"steps": STEPS, "learning_rate": RATE, "momentum": 0.0, "weight_decay": 0.0}


# First masks.


@functools.cache
def first_state(kappa, structure=None):
    """The state at step 0 by mask coupling."""
    coupling = Coupling(masks=kappa)
    pair = coupled((static(0.5, structure),), (static(0.4, structure),), coupling)
    training = constrain(start(), pair)
    return training.init(training, jax.random.key(0), images(), training.settings)


def test_masks_overlap_as_little_or_as_much_as_they_are_coupled():
    overlaps, chance = {}, 0
    for kappa in (1.0, 0.5, -1.0):
        fast, slow = masks_of(first_state(kappa))
        overlaps[kappa] = {path: np.sum(fast[path] & slow[path]) for path in KERNELS}
    for path in KERNELS:
        both = fast[path].sum() + slow[path].sum()
        assert overlaps[1.0][path] == max(both - fast[path].size, 0)
        assert overlaps[-1.0][path] == min(fast[path].sum(), slow[path].sum())
        chance += fast[path].mean() * slow[path].sum()
    sums = {kappa: sum(each.values()) for kappa, each in overlaps.items()}
    assert sums[1.0] < sums[0.5] < chance < sums[-1.0]


def test_every_live_weight_starts_at_the_value_of_its_network():
    for state in (first_state(1.0), first_state(0.0)):
        for params, masks in zip(state.params, masks_of(state), strict=True):
            params = arrays(params)
            for path in KERNELS:
                np.testing.assert_array_equal(params[path] != 0, masks[path])
        fast, slow = (arrays(params)[KERNELS[0]] for params in state.params)
        assert not np.any((fast == slow) & (fast != 0))


def test_masks_of_dense_networks_are_not_coupled():
    with pytest.raises(ValueError, match=r"two sparse learners.*coupling to 0"):
        begin(make_program(constrain(start(), coupled((), (), Coupling()))))


# Presets.


@pytest.mark.parametrize(
    ("preset", "rates", "drops", "intervals"),
    [
        ("averaged", (1.0, 1.0), (0.3, 0.3), (2, 2)),
        ("constant", (1.0, 1.0), (0.3, 0.3), (2, 2)),
        ("symmetric", (None, None), (0.3, 0.3), (2, 2)),
        ("fast_slow", (0.5, None), (0.5, 0.1), (2, 8)),
    ],
)
def test_presets_have_rates_drop_fractions_and_refreshes(
    monkeypatch, preset, rates, drops, intervals
):
    """`None` is a rate that falls along a cosine."""
    schedules = []

    def rule(sparsity, drop_fraction, **shared):
        del shared
        schedules.append(drop_fraction)
        return MaskRule(
            lambda params, key: jax.tree.map(lambda x: x == x, params),
            lambda masks, params, grads, step, key: masks,
        )

    monkeypatch.setitem(_RULES, "rigl", rule)
    training = constrain(
        start(**PLAIN),
        paired(0.5, Learners(preset, 2, 16), Coupling(masks=0.0)),
    )
    schedule = training.rate(RATE, STEPS)
    tx = training.transform(schedule, training.settings, jax.random.key(0))
    params = Dual({"kernel": jnp.ones((2, 2))}, {"kernel": jnp.ones((2, 2))})
    state = tx.init(params)
    for step in range(STEPS):
        updates, state = tx.update(params, state, params, refresh=Dual(False, False))
        falling = half_cosine(step, STEPS)
        for side, share in zip(updates, rates, strict=True):
            rate = RATE * (falling if share is None else share)
            np.testing.assert_allclose(-side["kernel"], rate, atol=1e-7)
        cosine_now = half_cosine(step, STOP)
        for drop, fraction in zip(schedules, drops, strict=True):
            np.testing.assert_allclose(drop(step), fraction * cosine_now, atol=1e-7)
        for due, interval in zip(training.when(step), intervals, strict=True):
            assert bool(due) == (0 < step < STOP and step % interval == 0)
    assert training.growth_samples == 16


def test_averages_of_both_learners_are_what_predicts():
    steps, tail = 8, 0.5
    own = make_program(
        constrain(
            start(steps=steps, batch_size=SIZE),
            coupled(*[(paced("constant"), averaged(tail))] * 2, Coupling(masks=0.0)),
        )
    )
    progress, trail = begin(own), []
    rows = train.step_indices(progress.state, images(), steps, SIZE)
    state = progress.state
    for row in rows:
        state, _ = own.run(state, images(), row[None])
        trail.append(copy(state.params))
    settled = own.training.finish(progress._replace(state=state), images(), own)
    outputs, x = own.predict(settled, images()), train.inputs(images())
    for learner, side in enumerate(Dual._fields):
        seen = [arrays(params[learner]) for params in trail[steps // 2 :]]
        mean = {path: np.mean([p[path] for p in seen], axis=0) for path in seen[0]}
        assert_close(settled.params[learner], mean, atol=1e-6)
        # Whole batches, so the running mean comes to that of all examples.
        hidden = x.reshape(SIZE, -1) @ mean["first/kernel"]
        whole = {"mean": hidden.mean(axis=0)}
        logits, _ = perceptron().apply(nested(mean), whole, x, train=False)
        expected = scipy.special.softmax(logits, axis=1)
        np.testing.assert_allclose(outputs[side], expected, atol=1e-4)
        last = perceptron().apply(state.params[learner], whole, x, train=False)[0]
        assert np.abs(scipy.special.softmax(last, axis=1) - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("horizon", "rule"),
    [pytest.param(None, "rigl", marks=pytest.mark.slow), (4, "set")],
)
def test_the_masks_of_a_pair_have_the_pattern_that_is_asked_for(horizon, rule):
    def prunable(path, leaf):
        del leaf
        return path == "first/kernel"

    learners = Learners("fast_slow", 1, 0, horizon=horizon, rule=rule)
    structure = Structure(distributions.uniform, n_of_m(2))
    # Two networks of half of the weights each.
    pair = paired(0.0, learners, structure=structure)
    own = make_program(constrain(start(**PLAIN, prunable=prunable), pair))
    progress = begin(own)
    for state in (progress.state, fit(own, progress.state, 6)):
        for masks in masks_of(state):
            assert masks["head/kernel"].all()
            groups = masks["first/kernel"].reshape(8, 2, WIDTH).sum(axis=1)
            np.testing.assert_array_equal(groups, 1)
    if horizon is None:  # Complementary at the start.
        fast, slow = masks_of(progress.state)
        assert not (fast["first/kernel"] & slow["first/kernel"]).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: paired(0.5, Learners("slow_fast")), "got 'slow_fast'"),
        (lambda: paired(0.5, Learners(rule="granet")), "got 'granet'"),
        (lambda: paired(0.5, Learners(horizon=4)), "no average of a pair that cons"),
        (lambda: consolidated(0.5, 0.5), "horizon of at least 1 step, got 0.5"),
        (lambda: averaged(0.0), r"a tail in \(0, 1\], got 0.0"),
        (lambda: Coupling(fast=-1.0), "got fast=-1.0"),
        (lambda: Coupling(slow=-0.5), "slow=-0.5"),
        (lambda: Coupling(ramp=-1), "ramp=-1"),
        (lambda: Coupling(temperature=0.0), "temperature above 0, got 0.0"),
        (lambda: Coupling(masks=1.5), "got 1.5; 1 makes the"),
        (lambda: Coupling(threshold=1.0), r"of confidence in \[0, 1\), got"),
    ],
)
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
