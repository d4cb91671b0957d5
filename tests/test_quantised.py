"""Quantisation-aware training: what the network sees, and what it is mixed with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from d2sparse import data, models, quantisation, train
from d2sparse.constraints import (
    MIXES,
    Learners,
    Options,
    averaged,
    paired,
    quantised,
    static,
)
from d2sparse.models.mlp import MLP
from d2sparse.train import Recipe, constrain, fit, make_program, plain
from d2sparse.transforms import get_masks


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


@functools.cache
def digits():
    return train.to_device(data.load("digits").train)


def start(hidden=(16,)):
    model = models.from_linen(MLP(hidden, 10))
    return plain(model, digits(), Recipe(steps=60, batch_size=32))


def learned(*constraints, hidden=(16,)):
    """The training, its last state, and the accuracy of what counts."""
    training = constrain(start(hidden), *constraints)
    program = make_program(training)
    last = fit(program, program.init(jax.random.key(0), digits()), digits())
    state = training.finish(last, digits(), program)
    x = training.inputs(train.take(digits(), jnp.arange(500)), None)
    outputs = logits_of(training.model, state.params, x, state.model_state)
    (probabilities, *_) = training.probabilities(outputs).values()
    hits = np.asarray(probabilities).argmax(-1) == np.asarray(digits().labels[:500])
    return training, state, hits.mean()


def logits_of(model, params, x, model_state=None):
    return jax.jit(functools.partial(model.apply, train=False))(
        params, model_state or {}, x
    )[0]


def test_a_network_of_few_bits_learns_and_is_what_is_evaluated():
    three = (30, 10)
    training, state, accuracy = learned(quantised(3, 4, scale="mse"), hidden=three)
    assert accuracy > 0.7
    table = {"dense1/*": 8, "head/*": 8, "*": 3}
    weights = jax.jit(
        lambda params: quantisation.quantise_weights(params, table, "channel", "mse")
    )(state.params)
    assert len(np.unique(weights["dense2"]["kernel"][:, 0])) <= 7
    x = training.inputs(train.take(digits(), jnp.arange(4)), None)
    only = quantised(3, scale="mse")(start(three))
    found = logits_of(only.model, state.params, x)
    expected = logits_of(start(three).model, weights, x)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_masks_come_first_and_zeros_stay():
    training, state, accuracy = learned(quantised(4, 8), static(0.8), averaged(0.5))
    assert accuracy > 0.6
    masks = get_masks(state.opt_state)
    few_bits = jax.jit(lambda params: quantisation.quantise_weights(params, 4))
    for name in ("dense1", "head"):
        kernel, live = (np.asarray(x[name]["kernel"]) for x in (state.params, masks))
        assert (kernel[~live] == 0).all()
        coarse = few_bits({"kernel": kernel})["kernel"]
        assert (np.asarray(coarse)[~live] == 0).all()
    size = quantisation.effective_size(state.params, 4, masks)
    assert size == 4 * round(0.2 * training.network.weights)


@pytest.mark.slow
def test_pairs_are_of_networks_of_few_bits():
    learners = Learners(interval=15, growth_samples=64, rule="set")
    _, state, accuracy = learned(quantised(4, 8), paired(0.8, learners))
    assert accuracy > 0.5
    assert state.params.fast["head"]["kernel"].dtype == jnp.float32


def test_networks_without_layers_of_linen_have_quantised_weights():
    training = plain(runs.linear(10), digits(), Recipe(steps=8))
    both = [quantised(4, edges=bits)(training).model for bits in (2, 8)]
    params, state = both[0].init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    x = jnp.ones((2, 8, 8, 1))
    coarse, fine = (m.apply(params, state, x, train=False)[0] for m in both)
    assert (coarse != fine).any()
    with pytest.raises(ValueError, match="expected layers of the network"):
        quantised(4, 8)(training).model.apply(params, state, x, train=False)


def test_refusals():
    with pytest.raises(ValueError, match="expected 2 to 8 bits, got 1"):
        quantised(1)
    with pytest.raises(ValueError, match="expected 2 to 8 bits, got 9"):
        Options(activation_bits=9)
    with pytest.raises(ValueError, match="decides the precision, got quantised and"):
        constrain(start(), quantised(4), quantised(3))
    assert MIXES["quantised"].innermost
