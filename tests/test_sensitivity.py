"""Sensitivities against networks whose derivatives are written out, and by taps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2sparse import models, scores
from d2sparse.models import taps
from d2sparse.transforms import sensitivity_decay
from d2sparse.tree import flatten

BATCH, INPUTS, HIDDEN, CLASSES = 5, 4, 6, 3


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, LABELS = draw(0, BATCH, INPUTS), np.array([0, 2, 2, 1, 0])
ZEROS = {"first": np.zeros((BATCH, HIDDEN), np.float32)}
PARAMS = {"first": draw(1, INPUTS, HIDDEN), "head": draw(2, HIDDEN, CLASSES)}
TWICE = np.concatenate([X, X]), np.concatenate([LABELS, LABELS])


def network(params, x, offset=0.0):
    return jax.nn.relu(x @ params["first"] + offset) @ params["head"]


def jacobians():
    """dy_k / dw of every example, float64[batch, classes, *shape], and dy_k / dz."""
    z = X.astype(float) @ PARAMS["first"]
    head = PARAMS["head"].astype(float)
    of_neurons = np.einsum("bn,nk->bkn", z > 0, head)
    of_first = np.einsum("bi,bkn->bkin", X, of_neurons)
    of_head = np.einsum("bn,kl->bknl", np.maximum(z, 0), np.eye(CLASSES))
    return {"first": of_first, "head": of_head}, of_neurons


@functools.cache
def found():
    """All sensitivities, of the batch and of twice the same batch, in one program."""

    def of(x, labels):
        zeros = {"first": jnp.zeros((len(x), HIDDEN))}

        def outputs(offsets):
            return network(PARAMS, x, offsets["first"])

        def loss(offsets):
            losses = optax.softmax_cross_entropy_with_integer_labels
            return jnp.mean(losses(outputs(offsets), labels))

        def of_weights(*args, **options):
            return scores.output_sensitivity(
                lambda p: network(p, x), PARAMS, *args, **options
            )

        sensitivity = functools.partial(scores.neuron_sensitivity, outputs, zeros)
        z = {"first": x @ PARAMS["first"]}
        return {
            "unspecific": of_weights(),
            **{f"chunks of {n}": of_weights(chunk=n) for n in (1, 2)},
            "specific": of_weights(labels),
            "exact": sensitivity(),
            "exact in chunks": sensitivity(chunk=2),
            "lower": sensitivity("lower"),
            "indicator": scores.local_sensitivity(z),
            "fraction": scores.local_sensitivity(z, "fraction"),
            "gradients": scores.neuron_gradients(loss, zeros),
            "exact, released": sensitivity(released=True),
            "gradients, released": scores.neuron_gradients(loss, zeros, released=True),
        }

    return jax.jit(lambda: (of(X, LABELS), of(*TWICE)))()


def check(name, expected):
    assert set(found()[0][name]) == set(expected)
    for path, score in found()[0][name].items():
        assert score.dtype == jnp.float32
        np.testing.assert_allclose(score, expected[path], rtol=1e-4, atol=1e-6)


def test_unspecific_sensitivity_averages_outputs_before_the_derivative():
    each, _ = jacobians()
    expected = {p: np.abs(j.mean(axis=0)).mean(axis=0) for p, j in each.items()}
    check("unspecific", expected)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("chunks of 1", "unspecific"),
        ("chunks of 2", "unspecific"),
        ("exact in chunks", "exact"),
    ],
)
def test_chunks_of_classes_change_nothing(one, other):
    check(one, found()[0][other])


def test_specific_sensitivity_is_that_of_the_class_of_every_example():
    each, _ = jacobians()
    check(
        "specific",
        {p: np.abs(j[np.arange(BATCH), LABELS].mean(axis=0)) for p, j in each.items()},
    )


def test_exact_sensitivity_of_neurons_takes_absolute_values_per_example():
    check("exact", {"first": np.abs(jacobians()[1]).mean(axis=(0, 1))})


def test_the_lower_bound_sums_classes_first():
    _, slopes = jacobians()
    expected = np.abs(slopes.sum(axis=1)).mean(axis=0) / CLASSES
    check("lower", {"first": expected})
    assert (expected < np.abs(slopes).mean(axis=(0, 1))).any()
    assert (found()[0]["lower"]["first"] <= found()[0]["exact"]["first"] + 1e-6).all()


def test_local_sensitivity_is_the_state_of_the_rectifier():
    z = X.astype(float) @ PARAMS["first"]
    check("indicator", {"first": z.mean(axis=0) > 0})
    check("fraction", {"first": (z > 0).mean(axis=0)})


def gradients_of_neurons():
    """d loss_i / dz_n of every example."""
    logits = np.maximum(X.astype(float) @ PARAMS["first"], 0) @ PARAMS["head"]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    slopes = odds / odds.sum(axis=1, keepdims=True) - np.eye(CLASSES)[LABELS]
    return np.einsum("bk,bkn->bn", slopes, jacobians()[1])


def test_gradients_of_neurons_cancel_before_their_absolute_value():
    each = gradients_of_neurons()
    check("gradients", {"first": each.mean(axis=0)})
    assert (np.abs(each).mean(axis=0) > 1.5 * np.abs(each.mean(axis=0))).any()


@pytest.mark.parametrize(
    "name",
    ["unspecific", "specific", "exact", "lower", "indicator", "fraction", "gradients"],
)
def test_twice_the_same_batch_has_the_same_sensitivity(name):
    one, two = found()
    for path, score in one[name].items():
        np.testing.assert_allclose(score, two[name][path], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["exact", "gradients"])
def test_as_released_sensitivity_is_too_small_by_the_size_of_the_batch(name):
    for each, size in zip(found(), (BATCH, 2 * BATCH), strict=True):
        np.testing.assert_allclose(
            each[f"{name}, released"]["first"] * size, each[name]["first"], rtol=1e-5
        )


def test_momentum_of_neuron_lobster_is_a_trace():
    # b <- 0.9 b + m, which begins with m: scores for the decay, with signs.
    trace = optax.trace(0.9)
    m = {"first": np.float32([1.0, -2.0])}
    first, state = trace.update(m, trace.init(m))
    second, _ = trace.update({"first": np.float32([-1.0, -1.0])}, state)
    np.testing.assert_array_equal(first["first"], m["first"])
    np.testing.assert_allclose(second["first"], [-0.1, -2.8], rtol=1e-6)
    params = {"first": {"kernel": np.ones((1, 2), np.float32)}}
    decay = sensitivity_decay(optax.sgd(0.0), 0.5, "given")
    updates, _ = decay.update(params, decay.init(params), params, scores=second)
    expected = [[-0.5 * (1 - 0.1 / 2.8), 0.0]]
    np.testing.assert_allclose(updates["first"]["kernel"], expected, rtol=1e-5)


def test_half_precision_is_scored_in_float32():
    def both(dtype):
        params = jax.tree.map(lambda w: jnp.asarray(w, dtype), PARAMS)
        offsets = jnp.zeros((BATCH, HIDDEN), dtype)
        x = X.astype(dtype)
        return (
            scores.output_sensitivity(lambda p: network(p, X), params),
            scores.neuron_sensitivity(lambda z: network(params, x, z), offsets),
        )

    half, single = jax.jit(lambda: (both(jnp.bfloat16), both(jnp.float32)))()
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(single), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0.1, atol=0.02)


def test_several_networks_at_once():
    def of(params):
        return (
            scores.output_sensitivity(lambda p: network(p, X), params, chunk=2),
            scores.neuron_sensitivity(lambda z: network(params, X, z), ZEROS["first"]),
        )

    other = jax.tree.map(lambda w: np.float32(2) * w, PARAMS)
    both = jax.tree.map(lambda *leaves: np.stack(leaves), PARAMS, other)
    weights, neurons = jax.jit(jax.vmap(of))(both)
    # Kernels twice as large make the outputs four times as large.
    np.testing.assert_allclose(weights["first"][1], 2 * weights["first"][0], rtol=1e-5)
    np.testing.assert_allclose(neurons[0], found()[0]["exact"]["first"], rtol=1e-5)
    np.testing.assert_allclose(neurons[1], 2 * neurons[0], rtol=1e-5)


# By taps


def by_taps(model, params, state, x, layers):
    """Logits as a function of offsets of pre-activations, zeros, pre-activations."""

    def outputs(offsets):
        each = {layer: taps.Tap(None, z) for layer, z in offsets.items()}
        return taps.offset(model.apply)(each, params, state, x, train=False)[0]

    _, met = taps.read(model.apply, layers)(params, state, x, train=False)
    z = {layer: tap.output for layer, tap in met.items()}
    return outputs, jax.tree.map(jnp.zeros_like, z), z


def test_a_network_of_convolutions_and_norms_by_taps():
    model, x = models.convnet_s(num_classes=3, width=2), draw(3, 2, 8, 8, 1)

    @jax.jit
    def run():
        params, state = model.init(jax.random.key(0), x)
        outputs, zeros, z = by_taps(model, params, state, x, ("conv1", "conv3"))
        found = {m: scores.neuron_sensitivity(outputs, zeros, m) for m in MODES}
        local = scores.local_sensitivity(z, "fraction")
        jacobian = jax.vmap(lambda k: jax.grad(lambda o: outputs(o)[:, k].sum())(zeros))
        return found, local, jacobian(jnp.arange(3)), z

    found, local, jacobian, z = run()
    for layer, slopes in jacobian.items():
        spatial = (0, 1, 2, 3)  # Classes, examples, positions.
        exact, lower = (found[mode][layer] for mode in MODES)
        slopes = np.asarray(slopes, float)
        np.testing.assert_allclose(exact, np.abs(slopes).mean(spatial), rtol=1e-4)
        bound = np.abs(slopes.mean(axis=0)).mean((0, 1, 2))
        np.testing.assert_allclose(lower, bound, rtol=1e-3, atol=1e-7)
        assert (lower <= exact).all()
        assert (np.asarray(lower) < np.asarray(exact)).any()
        positive = (np.asarray(z[layer]) > 0).mean(axis=(0, 1, 2))
        np.testing.assert_allclose(local[layer], positive, rtol=1e-6)


MODES = ("exact", "lower")


def test_serene_trains_a_lenet_whose_output_layer_does_not_decay():
    model, x = models.lenet_300_100(num_classes=3, width=0.02), X
    decay = sensitivity_decay(optax.sgd(0.0), 0.5, "given")

    @jax.jit
    def step():
        params, state = model.init(jax.random.key(0), x)
        outputs, zeros, _ = by_taps(model, params, state, x, ("dense1", "dense2"))
        found = scores.neuron_sensitivity(outputs, zeros)
        grads = jax.tree.map(jnp.zeros_like, params)
        updates, _ = decay.update(grads, decay.init(params), params, scores=found)
        return params, found, updates

    params, found, updates = step()
    for layer in ("dense1", "dense2"):
        score = np.asarray(found[layer])
        factor = -0.5 * (1 - score / (score.max() or 1))
        expected = factor * np.asarray(params[layer]["kernel"])
        np.testing.assert_allclose(updates[layer]["kernel"], expected, atol=1e-6)
    for path, update in flatten(updates).items():
        if "bias" in path or "head" in path:
            assert (np.asarray(update) == 0).all()


# Refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: scores.output_sensitivity(lambda p: p["first"].sum(), PARAMS),
            r"outputs float\[batch, classes\], got \(\); return the logits alone",
        ),
        (
            lambda: scores.output_sensitivity(
                lambda p: network(p, X), PARAMS, np.eye(CLASSES)[LABELS]
            ),
            r"expected labels int\[5\], one of every example, got shape \(5, 3\)",
        ),
        (
            lambda: scores.output_sensitivity("net", PARAMS),
            "expected a function as `outputs`",
        ),
        (
            lambda: scores.output_sensitivity(lambda p: network(p, X), PARAMS, chunk=0),
            "a whole number of at least 1 as `chunk`, got 0",
        ),
        (
            lambda: scores.neuron_sensitivity(
                lambda z: network(PARAMS, X, z["first"]), {"first": np.zeros((1, 6))}
            ),
            r"offsets float\[5, ..., neurons\], one of every example, got shape \(1, 6",
        ),
        (
            lambda: scores.neuron_sensitivity(
                lambda z: network(PARAMS, X, z["first"]), ZEROS, "bound"
            ),
            "mode of exact, lower, got 'bound'",
        ),
        (
            lambda: scores.neuron_sensitivity(
                lambda z: network(PARAMS, X, z["first"]), ZEROS, "lower", released=True
            ),
            "mode \"exact\" where `released` is True, got 'lower'",
        ),
        (
            lambda: scores.local_sensitivity(ZEROS, "exact"),
            "mode of indicator, fraction, got 'exact'",
        ),
        (
            lambda: scores.neuron_gradients("loss", ZEROS),
            "expected a function as `loss`",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call)
