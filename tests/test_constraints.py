"""How constraints are put together, phases end, and growth is charged."""

import functools

import jax
import numpy as np
import pytest
import runs

from d2sparse import data, train
from d2sparse.checkpoint.leaves import layout
from d2sparse.constraints import (
    Moves,
    averaged,
    coupled,
    iterative_magnitude,
    rigl,
    static,
)
from d2sparse.dual import Coupling
from d2sparse.train import (
    Phase,
    Recipe,
    Watch,
    constrain,
    end,
    fit,
    make_program,
    plain,
)


@functools.cache
def digits():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (32, 4, 4, 1)).astype(np.uint8)
    labels = np.arange(32, dtype=np.int32) % 4
    return train.to_device(data.Split(images, labels))


def start(**recipe):
    return plain(runs.linear(4), digits(), Recipe(steps=24, batch_size=8, **recipe))


def test_the_form_of_a_phase_traces_hand_overs_alone():
    def on_the_host(progress, data, program):
        raise AssertionError("traced")

    training = start()
    phases = (Phase(8), Phase(16, on_the_host), Phase(24))
    own = make_program(training._replace(phases=phases))
    begun = own.init(jax.random.key(0), digits())
    for phase in (-1, 0, 2, 3):
        assert layout(own.form(phase, digits())) == layout(begun)


def test_two_that_decide_the_masks_are_refused_by_a_sentence_with_both_names():
    with pytest.raises(ValueError, match=r"decides the masks, got static and rigl"):
        constrain(start(), static(0.5), rigl(0.5, Moves(4)))
    with pytest.raises(ValueError, match=r"train in one phase"):
        constrain(start(), coupled((iterative_magnitude(0.5),), (), Coupling()))


def test_what_a_constraint_does_not_name_it_leaves_alone():
    training = start()
    changed = {
        name
        for name in training._fields
        if getattr(averaged()(training), name) is not getattr(training, name)
    }
    assert changed == {"transform", "finish"}


def test_a_phase_may_end_the_training():
    def enough(progress, data, program):
        return end(progress)

    phases = (Phase(8), Phase(16, enough), Phase(24))
    short = make_program(start()._replace(phases=phases))
    last = fit(short, short.init(jax.random.key(0), digits()), digits())
    assert int(last.state.step) == 8


def test_growth_is_charged_where_it_happens():
    training = constrain(start(), rigl(0.5, Moves(4, growth_samples=16)))
    own = make_program(training)
    costs = []
    watch = Watch(every=1, report=lambda progress, logs: costs.append(logs["macs"]))
    fit(own, own.init(jax.random.key(0), digits()), digits(), watch)
    plain_cost, refreshes = costs[0], [4, 8, 12, 16]  # In the first three quarters.
    dense = training.network.dense_macs
    for step, cost in enumerate(costs):
        grown = 16 / 8 * (2 * plain_cost / 3 + dense) if step in refreshes else 0
        np.testing.assert_allclose(cost, plain_cost + grown, rtol=1e-6)
