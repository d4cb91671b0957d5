"""Decay by sensitivity as a constraint: its scores, its sweeps, its place, its cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from d2sparse import models, train
from d2sparse.constraints import coupled, decayed, kept, static
from d2sparse.models.mlp import MLP
from d2sparse.train import constrain
from d2sparse.transforms import get_masks

ROWS = jnp.arange(tiny.BATCH)
NEURONS = ("neurons", "neurons_lower", "neurons_local", "neuron_gradients")


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


def linen(hidden=(3,), **recipe):
    recipe = train.Recipe(batch_size=tiny.BATCH, **recipe)
    model = models.from_linen(MLP(hidden, tiny.CLASSES))
    return train.plain(model, tiny.images(), recipe)


def begin(training, **settings):
    """A state whose weights the forward pass of the tests can tell apart."""
    settings = {**training.settings, **settings}
    return training.init(training, jax.random.key(0), tiny.images(), settings)


def pixels():
    """The first batch as networks see it: float32[batch, 16]."""
    x = jax.jit(train.inputs)(tiny.images())
    return np.asarray(x).reshape(len(x), -1)[: tiny.BATCH]


def labels():
    return np.eye(tiny.CLASSES)[np.asarray(tiny.images().labels)[: tiny.BATCH]]


def stepped(step, state):
    return tiny.arrays(step(state, tiny.images(), ROWS)[0].params)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_steps_by_gradients_are_those_of_a_loop_by_hand():
    rate, strength = 0.1, 0.3
    training = constrain(
        tiny.start(schedule="constant", weight_decay=0.0), decayed(strength)
    )
    step, state = jax.jit(train.make_step(training)), begin(training)
    weights = {path: np.float64(w) for path, w in tiny.arrays(state.params).items()}
    velocity = {path: np.zeros_like(w) for path, w in weights.items()}
    x, y = pixels(), labels()
    for _ in range(3):
        state, _ = step(state, tiny.images(), ROWS)
        found = _gradients(weights, x, y)
        for path, grad in found.items():
            velocity[path] = 0.9 * velocity[path] + grad
            after = weights[path] - rate * velocity[path]
            if "kernel" in path:
                insensitive = 1 - np.abs(grad) / np.abs(grad).max()
                after -= strength * after * insensitive
            weights[path] = after
    for path, weight in tiny.arrays(state.params).items():
        np.testing.assert_allclose(weight, weights[path], rtol=2e-4, atol=1e-5)


def _gradients(weights, x, y):
    """Those of the tiny perceptron, whose hidden layer is centred over the batch."""
    z = x @ weights["first/kernel"]
    z = z - z.mean(axis=0)
    h = np.maximum(z, 0) / 4
    slope = (softmax(h @ weights["head/kernel"] + weights["head/bias"]) - y) / len(x)
    back = slope @ weights["head/kernel"].T * (z > 0) / 4
    return {
        "first/kernel": x.T @ (back - back.mean(axis=0)),
        "head/kernel": h.T @ slope,
        "head/bias": slope.sum(axis=0),
    }


def by_hand(score, params, x, y):
    """Sensitivities of the hidden neurons of a network of two layers."""
    z = x @ params["dense1/kernel"] + params["dense1/bias"]
    on, head = (z > 0)[:, :, None], params["head/kernel"][None]
    if score == "neurons":
        return np.mean(on * np.abs(head), axis=(0, 2))
    if score == "neurons_lower":
        return np.mean(np.abs(np.mean(on * head, axis=2)), axis=0)
    if score == "neurons_local":
        return (z.mean(axis=0) > 0).astype(float)
    logits = np.maximum(z, 0) @ params["head/kernel"] + params["head/bias"]
    slope = (softmax(logits) - y) @ params["head/kernel"].T * (z > 0)
    return np.abs(slope.mean(axis=0))


@functools.cache
def all_scores():
    """The scores of every kind on the first batch, in one program."""
    each = {
        score: constrain(linen(), decayed(0.5, score)) for score in (*NEURONS, "output")
    }
    state = begin(each["neurons"])

    @jax.jit
    def scored(state, batch):
        key = jax.random.key(0)
        return {name: t.scores(t, state, batch, key) for name, t in each.items()}

    batch = jax.jit(train.take)(tiny.images(), ROWS)
    return tiny.arrays(state.params), tiny.arrays(scored(state, batch))


@pytest.mark.parametrize("score", NEURONS)
def test_neurons_are_scored_as_by_hand_and_outputs_are_left_out(score):
    params, found = all_scores()
    expected = by_hand(score, params, pixels(), labels())
    np.testing.assert_allclose(
        np.abs(found[f"{score}/dense1"]), expected, rtol=1e-4, atol=1e-6
    )
    assert f"{score}/head" not in found


def test_outputs_are_scored_at_the_class_of_each_example():
    params, found = all_scores()
    x, y = pixels(), labels()
    h = np.maximum(x @ params["dense1/kernel"] + params["dense1/bias"], 0)
    expected = np.abs(h.T @ y) / len(x)
    np.testing.assert_allclose(found["output/head/kernel"], expected, rtol=1e-4)


@functools.cache
def summed():
    training = constrain(
        linen(weight_decay=0.0, learning_rate=0.0),
        decayed(0.5, "neuron_gradients", "none"),
    )
    return training, jax.jit(train.make_step(training))


def test_gradients_at_neurons_are_summed_with_momentum():
    training, step = summed()
    state, total, strength = begin(training), 0.0, 0.25
    state = state._replace(
        settings={**state.settings, "decay_strength": jnp.float32(strength)}
    )
    params = tiny.arrays(state.params)
    x, y = pixels(), labels()
    for _ in range(3):
        z = x @ params["dense1/kernel"] + params["dense1/bias"]
        h = np.maximum(z, 0)
        slope = softmax(h @ params["head/kernel"] + params["head/bias"]) - y
        total = 0.9 * total + (slope @ params["head/kernel"].T * (z > 0)).mean(axis=0)
        decay = strength * np.maximum(1 - np.abs(total), 0)
        head = params["head/kernel"]
        params = {**params, "dense1/kernel": params["dense1/kernel"] * (1 - decay)}
        state, _ = step(state, tiny.images(), ROWS)
        after = tiny.arrays(state.params)
        np.testing.assert_allclose(
            after["dense1/kernel"], params["dense1/kernel"], rtol=1e-4, atol=1e-6
        )
        np.testing.assert_array_equal(after["head/kernel"], head)


def test_strengths_are_settings_of_one_program():
    training, step = summed()
    begun = begin(training)
    changed = []
    for strength in (0.0, 0.1, 1.0):
        settings = {**begun.settings, "decay_strength": jnp.float32(strength)}
        changed.append(stepped(step, begun._replace(settings=settings)))
    assert step._cache_size() == 1
    before = tiny.arrays(begun.params)["dense1/kernel"]
    none, little, most = (each["dense1/kernel"] for each in changed)
    np.testing.assert_array_equal(none, before)
    np.testing.assert_allclose(before - little, (before - most) / 10, rtol=1e-4)


def test_a_training_without_scores_is_asked_for_none():
    for score in ("gradient", "constant"):
        training = constrain(linen(), decayed(0.1, score))
        assert training.scores is None
        state = begin(training)
        assert training.cost(training, state, 8) == linen().cost(training, state, 8)


def test_what_scores_cost_is_charged():
    state = begin(constrain(linen(), decayed(0.1)))
    dense = linen().network.dense_macs
    costs = {
        "output": 3,
        "neurons": 1 + tiny.CLASSES,
        "neurons_lower": 2,
        "neurons_local": 1,
        "neuron_gradients": 2,
    }
    for score, passes in costs.items():
        training = constrain(linen(), decayed(0.1, score))
        assert float(training.cost(training, state, 8)) == (3 + passes) * dense
    training = constrain(linen(), decayed(0.1, "output", specific=False))
    expected = 3 + 1 + 2 * tiny.CLASSES
    assert float(training.cost(training, state, 8)) == expected * dense


@pytest.mark.parametrize("score", ["gradient", "neuron_gradients", "output"])
def test_it_is_inside_of_masks(score):
    training = constrain(linen(), decayed(0.5, score), static(0.5))
    form = jax.eval_shape(lambda: begin(training))
    after, _ = jax.eval_shape(train.make_step(training), form, tiny.images(), ROWS)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), form, after
    )
    assert jax.tree.all(same)


def test_pruned_weights_stay_pruned():
    training = constrain(linen(), decayed(0.5), static(0.5))
    state = begin(training)
    after = stepped(jax.jit(train.make_step(training)), state)
    masks = tiny.arrays(get_masks(state.opt_state))
    for path in ("dense1/kernel", "head/kernel"):
        np.testing.assert_array_equal(after[path] != 0, masks[path])


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ((static(0.5), decayed(0.1)), "what decides the masks, got it after static"),
        ((kept(), decayed(0.1)), "got it after fixed; put it first"),
        ((coupled((), ()), decayed(0.1)), "before what decides the"),
        ((coupled((decayed(0.1, "output"),), ()),), "need no scores beside"),
        ((decayed(0.1), decayed(0.2, "constant")), "the decay, got gradient and const"),
    ],
)
def test_what_cannot_be_together_is_refused(constraints, message):
    with pytest.raises(ValueError, match=message):
        constrain(linen(), *constraints)


@pytest.mark.parametrize("training", [tiny.start, lambda: linen(hidden=())])
def test_a_network_without_hidden_neurons_is_named(training):
    made = constrain(training(), decayed(0.1, "neurons"))
    form = jax.eval_shape(lambda: begin(made))
    with pytest.raises(ValueError, match=r"hidden neurons .* score='neurons', got the"):
        jax.eval_shape(train.make_step(made), form, tiny.images(), ROWS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": -0.1}, r"in \[0, 1\] as `strength`, got -0.1"),
        ({"strength": 0.1, "score": "neuron"}, "expected score of gradient, constant"),
        ({"strength": 0.1, "normalise": "max"}, "expected normalise of tensor, global"),
        ({"strength": 0.1, "where": 3}, "expected a function as `where`"),
    ],
)
def test_an_option_out_of_range_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        decayed(**given)
