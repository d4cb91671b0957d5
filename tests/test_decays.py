"""Decay by sensitivity against numpy, under masks, and beside any optimiser."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2sparse import rules
from d2sparse.schedules import at
from d2sparse.transforms import get_masks, sensitivity_decay, sparsify
from d2sparse.tree import flatten

RATE, STRENGTH = 0.5, 0.25
SHAPES = {"conv": {"kernel": (2, 2, 1, 3), "bias": (3,)}, "head": {"kernel": (3, 2)}}
NORMS = ("tensor", "global", "none")


def everything(path, leaf):
    return True


def normals(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(scale * rng.normal(size=shape)),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


PARAMS, GRADS = normals(0), normals(1)
NEURONS = {"conv": np.float32([0.5, 2.0, 0.0]), "head": np.float32([0.1, 0.4])}


def by_hand(params, changes, scores, normalise, strength=STRENGTH, biases=False):
    """The updates of every leaf, entry by entry; scores by leaf."""
    largest = {path: score.max() for path, score in scores.items()}
    updates = {}
    for path, w in flatten(params).items():
        u = flatten(changes)[path]
        updates[path] = u.astype(float)
        if path not in scores or (w.ndim < 2 and not biases):
            continue
        norm = {
            "none": 1.0,
            "tensor": largest[path] or 1.0,
            "global": max(largest.values()) or 1.0,
        }[normalise]
        for i in np.ndindex(w.shape):
            after = float(w[i]) + float(u[i])
            decay = strength * after * max(0.0, 1 - float(scores[path][i]) / norm)
            updates[path][i] = after - decay - float(w[i])
    return updates


def assert_updates(got, expected):
    got = flatten(got)
    assert set(got) == set(expected)
    for path, update in got.items():
        np.testing.assert_allclose(update, expected[path], atol=1e-6, err_msg=path)


def of_neurons(layers):
    """Scores of layers as scores of the weights."""
    return {
        path: np.broadcast_to(layers[path.rpartition("/")[0]], w.shape)
        for path, w in flatten(PARAMS).items()
        if path.rpartition("/")[0] in layers
    }


def of_kernels(tree):
    return {p: np.abs(leaf) for p, leaf in flatten(tree).items() if leaf.ndim >= 2}


@functools.cache
def updates_of_all_cases():
    """One update of every case, in one program, by name of the case."""
    sgd = optax.sgd(RATE)
    made = {
        **{
            ("gradient", n): sensitivity_decay(sgd, STRENGTH, "gradient", n)
            for n in NORMS
        },
        **{("given", n): sensitivity_decay(sgd, STRENGTH, "given", n) for n in NORMS},
        **{("neurons", n): sensitivity_decay(sgd, STRENGTH, "given", n) for n in NORMS},
        "constant": sensitivity_decay(sgd, STRENGTH, "constant"),
        "biases": sensitivity_decay(sgd, STRENGTH, "given", where=everything),
        "one layer": sensitivity_decay(sgd, STRENGTH, "given"),
        "momentum": sensitivity_decay(optax.sgd(RATE, momentum=0.9), STRENGTH),
    }
    scores = {
        **{("given", n): normals(2) for n in NORMS},
        **{("neurons", n): NEURONS for n in NORMS},
        "biases": NEURONS,
        "one layer": {"conv": NEURONS["conv"]},
    }

    @jax.jit
    def update(grads, params):
        found = {}
        for name, tx in made.items():
            given = {"scores": scores[name]} if name in scores else {}
            state = tx.init(params)
            _, state = tx.update(grads, state, params, **given)
            found[name], _ = tx.update(grads, state, params, **given)
        return list(found.values())

    return dict(zip(made, update(GRADS, PARAMS), strict=True))


PLAIN = jax.tree.map(lambda g: np.float32(-RATE) * g, GRADS)


@pytest.mark.parametrize("normalise", NORMS)
def test_lobster_is_that_of_numpy(normalise):
    expected = by_hand(PARAMS, PLAIN, of_kernels(GRADS), normalise)
    assert_updates(updates_of_all_cases()["gradient", normalise], expected)


@pytest.mark.parametrize("normalise", NORMS)
def test_scores_of_weights_are_taken_by_their_absolute_values(normalise):
    expected = by_hand(PARAMS, PLAIN, of_kernels(normals(2)), normalise)
    assert_updates(updates_of_all_cases()["given", normalise], expected)


@pytest.mark.parametrize("normalise", NORMS)
def test_all_weights_of_a_neuron_decay_alike(normalise):
    scores = of_neurons(NEURONS)
    expected = by_hand(PARAMS, PLAIN, scores, normalise)
    assert_updates(updates_of_all_cases()["neurons", normalise], expected)


def test_biases_decay_with_their_neurons_if_they_are_chosen():
    expected = by_hand(PARAMS, PLAIN, of_neurons(NEURONS), "tensor", biases=True)
    assert_updates(updates_of_all_cases()["biases"], expected)


def test_a_layer_without_scores_does_not_decay():
    found = updates_of_all_cases()["one layer"]
    scores = of_neurons({"conv": NEURONS["conv"]})
    assert_updates(found, by_hand(PARAMS, PLAIN, scores, "tensor"))
    np.testing.assert_array_equal(found["head"]["kernel"], PLAIN["head"]["kernel"])


def test_the_control_is_decoupled_decay():
    zeros = of_kernels(jax.tree.map(np.zeros_like, PARAMS))
    expected = by_hand(PARAMS, PLAIN, zeros, "tensor")
    found = updates_of_all_cases()["constant"]
    assert_updates(found, expected)
    after = PARAMS["head"]["kernel"] + np.asarray(found["head"]["kernel"])
    plain = PARAMS["head"]["kernel"] + PLAIN["head"]["kernel"]
    np.testing.assert_allclose(after, plain * (1 - STRENGTH), atol=1e-6)


def test_the_score_is_the_raw_gradient_and_not_the_momentum():
    changes = jax.tree.map(lambda g: np.float32(-RATE * 1.9) * g, GRADS)
    expected = by_hand(PARAMS, changes, of_kernels(GRADS), "tensor")
    assert_updates(updates_of_all_cases()["momentum"], expected)


def test_small_gradients_as_published_are_plain_decay():
    # 99.99 % of the gradients of a LeNet-300-100 are below 0.03.
    small, tied = normals(1, scale=0.01), normals(0)
    made = [
        sensitivity_decay(optax.sgd(RATE), STRENGTH, score, normalise)
        for score, normalise in itertools.product(("gradient", "constant"), NORMS)
    ]
    update = jax.jit(lambda: [tx.update(small, tx.init(tied), tied)[0] for tx in made])
    kernels = [updates["conv"]["kernel"] for updates in update()]
    tensor, whole, released, *controls = kernels
    np.testing.assert_allclose(released, controls[0], rtol=0.02, atol=0.003)
    assert np.abs(tensor - controls[0]).max() > 0.1
    assert np.abs(whole - controls[0]).max() > 0.1
    for control in controls:
        np.testing.assert_array_equal(control, controls[0])


def test_scores_of_zero_are_plain_decay_and_weights_of_zero_are_not_frozen():
    params = {"kernel": np.float32([[0.0, 1.0]])}
    zero = jax.tree.map(np.zeros_like, params)
    tx = sensitivity_decay(optax.sgd(RATE), STRENGTH, normalise="global")
    step = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0]["kernel"])
    assert step(zero, params).tolist() == [[0.0, -STRENGTH]]
    moved = step({"kernel": np.float32([[1.0, 2.0]])}, params)
    # The weight that is 0 moves to -0.5 and decays as half of it is insensitive.
    assert moved.tolist() == [[-0.5 * (1 - STRENGTH / 2), -1.0]]


def test_the_strength_is_a_number_or_a_schedule_also_where_it_is_traced():
    params = {"kernel": np.ones((1, 2), np.float32)}
    zero = jax.tree.map(np.zeros_like, params)

    def walk(strength):
        tx = sensitivity_decay(optax.adam(0.0), strength, "constant")

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(zero, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params["kernel"][0, 0]

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[1]

    @jax.jit
    def both(strengths):
        return jax.vmap(walk)(strengths), walk(lambda step: strengths[step])

    each, scheduled = both(np.float32([0.0, 0.5, 1.0]))
    assert each.tolist() == [[1.0] * 3, [0.5, 0.25, 0.125], [0.0] * 3]
    assert scheduled.tolist() == [1.0, 0.5, 0.0]


# In other optimisers


def walked(tx, params, steps=4, **extra):
    """Parameters and states after every step, and how often the step was traced."""
    traces = []

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state, seen = tx.init(params), []
    for seed in range(steps):
        params, state = step(params, state, normals(seed + 5))
        seen.append((params, state))
    assert len(traces) == 1
    return seen


@pytest.mark.parametrize("score", ["gradient", "given"])
def test_inside_of_sparsify_live_weights_are_those_of_the_decay(score):
    decay = sensitivity_decay(optax.sgd(RATE, momentum=0.9), STRENGTH, score)
    extra = {"scores": NEURONS} if score == "given" else {}
    tx = sparsify(decay, rules.one_shot(0.5), at([1]))
    state = jax.jit(tx.init)(PARAMS)
    params = jax.tree.map(np.multiply, PARAMS, jax.device_get(get_masks(state)))
    alone = jax.jit(functools.partial(decay.update, **extra))
    update = jax.jit(functools.partial(tx.update, **extra))
    for seed in range(3):
        grads, before = normals(seed + 5), (params, state)
        updates, state = update(grads, state, params)
        masks = get_masks(state)
        params = optax.apply_updates(params, updates)
        for path, w in flatten(params).items():
            mask = np.asarray(flatten(masks)[path])
            assert (np.asarray(w)[~mask] == 0).all()
        if seed != 1:  # A refresh sets moments of the pruned to 0.
            live = jax.tree.map(lambda g, m: g * np.asarray(m), grads, masks)
            expected, _ = alone(live, before[1].inner, before[0])
            for path, change in flatten(expected).items():
                mask = np.asarray(flatten(masks)[path])
                found = np.asarray(flatten(updates)[path])
                np.testing.assert_array_equal(found[mask], np.asarray(change)[mask])


def test_around_sparsify_pruned_weights_stay_zero():
    masks = jax.tree.map(lambda w: w > -0.5, normals(3))
    inner = sparsify(optax.adam(0.1), rules.fixed(masks))
    tx = sensitivity_decay(inner, STRENGTH)
    for params, _ in walked(tx, PARAMS, steps=2, refresh=False):
        for path, w in flatten(params).items():
            assert (np.asarray(w)[~flatten(masks)[path]] == 0).all()


def test_beside_other_optimisers_and_in_several_steps():
    labels = {"conv": "decayed", "head": "rest"}
    decay = sensitivity_decay(optax.adam(0.1), STRENGTH, "given")
    tx = optax.MultiSteps(
        optax.partition({"decayed": decay, "rest": optax.sgd(0.1)}, labels), 2
    )
    alone = optax.MultiSteps(
        optax.partition({"decayed": optax.adam(0.1), "rest": optax.sgd(0.1)}, labels), 2
    )
    # Scores of the layers of the other branch are no mistake.
    seen, plain = walked(tx, PARAMS, scores=NEURONS), walked(alone, PARAMS)
    (one, _), (two, _), *_, (end, _) = seen
    np.testing.assert_array_equal(one["conv"]["kernel"], PARAMS["conv"]["kernel"])
    np.testing.assert_array_equal(end["head"]["kernel"], plain[-1][0]["head"]["kernel"])
    np.testing.assert_array_equal(end["conv"]["bias"], plain[-1][0]["conv"]["bias"])
    factor = 1 - STRENGTH * (1 - NEURONS["conv"] / 2)
    expected = np.asarray(plain[1][0]["conv"]["kernel"]) * factor
    np.testing.assert_allclose(two["conv"]["kernel"], expected, atol=1e-6)


def test_further_arguments_reach_the_inner_optimiser():
    inner = sparsify(optax.sgd(0.1), rules.one_shot(0.5), at([0]))
    decay = sensitivity_decay(inner, STRENGTH)
    update = jax.jit(lambda s, r: decay.update(GRADS, s, PARAMS, refresh=r)[1])
    state = jax.jit(decay.init)(PARAMS)
    for refresh, live in [(False, 18), (True, 9)]:
        masks = flatten(get_masks(update(state, refresh)))
        assert sum(np.sum(m) for p, m in masks.items() if "kernel" in p) == live


def test_one_decay_in_another_is_given_the_scores():
    inner = sensitivity_decay(optax.sgd(0.0), 0.5, "given")
    tx = sensitivity_decay(inner, 0.5, "constant")
    params = {"a": {"kernel": np.ones((1, 2), np.float32)}}
    scores = {"a": np.float32([0.0, 1.0])}
    found, _ = jax.jit(tx.update)(params, tx.init(params), params, scores=scores)
    assert found["a"]["kernel"].tolist() == [[-0.75, -0.5]]


def test_the_state_is_known_from_shapes_alone():
    tx = sensitivity_decay(optax.adam(0.1), STRENGTH)
    shapes = jax.eval_shape(lambda: PARAMS)
    found, made = tx.init(shapes), jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, made)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_updates_keep_their_type(dtype):
    params = {"kernel": jnp.ones((1, 2), dtype)}
    tx = sensitivity_decay(optax.sgd(0.5), np.float32(0.5))
    updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    assert updates["kernel"].dtype == dtype


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -0.1}, r"a number in \[0, 1\] as `strength`, got -0.1"),
        ({"strength": "1e-4"}, r"a number in \[0, 1\] as `strength`, got '1e-4'"),
        ({"score": "grad"}, "score of gradient, given, constant, got 'grad'"),
        ({"normalise": "max"}, "normalise of tensor, global, none, got 'max'"),
        ({"where": "kernel"}, "a function as `where`, path, leaf"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sensitivity_decay(optax.sgd(0.1), **{"strength": 0.1, **options})


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, 'expected scores where `score="given"`, got none; call'),
        ({"conv1": NEURONS["conv"]}, r"leaf or of a layer, got \['conv1'\]; the leav"),
        ({"conv": NEURONS["head"]}, r"of shape \(3,\) for 'conv/kernel', got \(2,\)"),
        ({"conv/kernel": NEURONS["conv"]}, r"of shape \(2, 2, 1, 3\) for 'conv/kern"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores, message):
    tx = sensitivity_decay(optax.sgd(0.1), STRENGTH, "given")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: tx.update(GRADS, tx.init(PARAMS), PARAMS, scores=scores))


def test_parameters_and_gradients_are_needed():
    tx = sensitivity_decay(optax.sgd(0.1), STRENGTH)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="sensitivity_decay needs the parameters"):
        tx.update(GRADS, state)
    with pytest.raises(ValueError, match=r"a gradient for every leaf, .*'conv/bias'"):
        tx.update({**GRADS, "conv": {}}, state, PARAMS)
    with pytest.raises(ValueError, match="expected at least one prunable leaf"):
        tx.update({"bias": np.ones(2)}, tx.init({}), {"bias": np.ones(2)})
