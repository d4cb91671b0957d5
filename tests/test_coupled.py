"""Pairs against a step written by hand, and the invariants of their formulation."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tiny import (
    BATCH,
    CLASSES,
    KERNELS,
    SHAPES,
    SIZE,
    arrays,
    assert_close,
    begin,
    copy,
    fit,
    half_cosine,
    images,
    largest,
    live,
    masks_of,
    nested,
    perceptron,
    start,
)

from d2sparse import train
from d2sparse.constraints import (
    Moves,
    consolidated,
    coupled,
    paced,
    rigl,
)
from d2sparse.constraints.masked import under_masks
from d2sparse.distributions import erk
from d2sparse.dual import Coupling, Dual, Trace
from d2sparse.dual.joining import joint_state
from d2sparse.rules import MaskRule
from d2sparse.schedules import every
from d2sparse.train import Context, constrain, make_program

# A prime last refresh: no drop is a whole number of weights, whose floor rounding
# decides.
STEPS, STOP = 26, 19
# The fast learner's first and largest move falls on a refresh of both.
INTERVALS, FRACTIONS = Dual(4, 2), Dual(0.8, 0.7)
RATE, DECAY, MOMENTUM, SMOOTHING = 0.2, 1e-3, 0.9, 0.1
SPARSITIES = Dual(0.8, 0.7)
RECIPE = {
    "steps": STEPS,
    "learning_rate": RATE,
    "weight_decay": DECAY,
    "momentum": MOMENTUM,
    "label_smoothing": SMOOTHING,
}
# Coupled as much as can be; every number differs, so that none can stand for another.
COUPLING = Coupling(fast=0.7, slow=0.4, temperature=2.0, ramp=6, masks=1.0)
FOLLOWED = Coupling(fast=0.7, temperature=2.0, masks=0.5)
APART = Coupling(fast=0.0, slow=0.0, masks=0.0)


def grown(which):
    moves = Moves(getattr(INTERVALS, which), getattr(FRACTIONS, which), 1000)
    return rigl(getattr(SPARSITIES, which), moves)


@functools.cache
def program(name):
    """The fast learner at a constant rate, the slow one annealed; both masks move."""
    fast = (paced("constant", 0.5), grown("fast"))
    slow = {
        "trained": (paced("cosine"), grown("slow")),
        "consolidated": (consolidated(SPARSITIES.slow, horizon=4, interval=2),),
    }[name]
    coupling = {"trained": COUPLING, "consolidated": FOLLOWED}[name]
    return make_program(constrain(start(**RECIPE), coupled(fast, slow, coupling)))


@functools.cache
def dense(masks=0.0, **recipe):
    """Two dense networks: deep mutual learning."""
    training = start(**{**RECIPE, "schedule": "constant", **recipe})
    return make_program(constrain(training, coupled((), (), Coupling(masks=masks))))


class Recorded(NamedTuple):
    """A run of the pair: every state, the batches, the metrics."""

    program: Any
    coupling: Coupling
    states: list
    indices: np.ndarray
    logs: list


@functools.cache
def recorded(name):
    own, logs = program(name), []
    states = [jax.device_put(begin(own).state, jax.devices()[0])]
    indices = np.asarray(train.step_indices(states[0], images(), STEPS, BATCH))
    for row in indices:
        state, log = own.run(copy(states[-1]), images(), row.reshape(1, -1))
        states.append(state)
        logs.append({name: value.item() for name, value in log.items()})
    coupling = {"trained": COUPLING, "consolidated": FOLLOWED}[name]
    return Recorded(own, coupling, states, indices, logs)


both_pairs = pytest.mark.parametrize("name", ["trained", "consolidated"])


def learners(state):
    """The optimisers' states."""
    return joint_state(state.opt_state)


# The step written by hand.


def cross_entropy(logits, labels, smoothing):
    log_p = jax.nn.log_softmax(logits)
    targets = (1 - smoothing) * jnp.eye(CLASSES)[labels] + smoothing / CLASSES
    return -(targets * log_p).sum(axis=1).mean()


def loss_by_hand(params, model_state, data, peer_logits, weight, tau):
    """One network's loss; the peer enters as numbers, so nothing is to be detached."""
    x = train.inputs(data)
    logits, model_state = perceptron().apply(params, model_state, x, train=True)
    p, q = jax.nn.softmax(peer_logits / tau), jax.nn.softmax(logits / tau)
    divergence = (p * (jnp.log(p) - jnp.log(q))).sum(axis=1).mean()
    value = cross_entropy(logits, data.labels, SMOOTHING)
    return value + weight * tau**2 * divergence, (logits, model_state)


GRADIENT = jax.jit(jax.grad(loss_by_hand, has_aux=True))


def gradients_by_hand(state, data, weights, tau):
    """Gradient, logits and model state of both networks on a batch."""
    peers = jnp.zeros((2, len(data.labels), CLASSES))
    for _ in range(2):  # The first time only the logits are of use.
        both = [
            GRADIENT(p, s, data, peer, weight, tau)
            for p, s, peer, weight in zip(*state[1:3], peers, weights, strict=True)
        ]
        peers = jnp.stack([logits for _, (logits, _) in reversed(both)])
    grads = Dual(*(arrays(gradient) for gradient, _ in both))
    return grads, peers[::-1], Dual(*(arrays(new) for _, (_, new) in both))


def refreshed(mask, weight, growth, fraction):
    """RigL for one kernel, where enough gradients are not zero."""
    falls = int(np.floor(fraction * mask.sum()))
    kept = largest(np.where(mask, np.abs(weight), -1.0), mask.sum() - falls)
    assert np.count_nonzero(growth[~kept]) >= falls
    return kept | largest(np.where(kept, -1.0, growth), falls)


def refreshed_masks(masks, params, grads, peer, kappa, fraction):
    moved = {
        path: refreshed(
            masks[path],
            params[path],
            np.abs(grads[path]) * np.maximum(1 - kappa * peer[path], 1e-6),
            fraction,
        )
        for path in KERNELS
    }
    return {**masks, **moved}


def descended(params, moments, grads, masks, rate):
    """Momentum with coupled decay of the kernels, on live weights alone."""
    new_params, new_moments = {}, {}
    for path, mask in masks.items():
        decay = DECAY * params[path] * (path in KERNELS)
        new_moments[path] = mask * (MOMENTUM * moments[path] + grads[path] + decay)
        new_params[path] = mask * (params[path] - rate * new_moments[path])
    return new_params, new_moments


def moments_of(sparsify_state):
    return arrays(sparsify_state.inner[1].trace)


def step_by_hand(pair, state, row):
    """Parameters, masks, moments (fast, and slow where trained) and model states."""
    step, coupling = int(state.step), pair.coupling
    ramp = min(1.0, step / coupling.ramp) if coupling.ramp else 1.0
    weights, tau = (ramp * coupling.fast, ramp * coupling.slow), coupling.temperature
    batch, own = train.take(images(), row), learners(state)
    grads, _, model_state = gradients_by_hand(state, batch, weights, tau)
    growth, _, _ = gradients_by_hand(state, images(), weights, tau)
    params, masks = Dual(*map(arrays, state.params)), masks_of(state)
    fast, slow = masks
    due = Dual(*(0 < step < STOP and step % n == 0 for n in INTERVALS))
    kappa, cosine_now = coupling.masks, half_cosine(step, STOP)
    if due.fast:
        fraction = FRACTIONS.fast * cosine_now
        fast = refreshed_masks(fast, params.fast, growth.fast, slow, kappa, fraction)
    moments = moments_of(own.fast)
    result = [descended(params.fast, moments, grads.fast, fast, RATE / 2)]
    if not isinstance(own.slow, Trace):
        if due.slow:
            fraction = FRACTIONS.slow * cosine_now
            slow = refreshed_masks(
                slow, params.slow, growth.slow, fast, kappa, fraction
            )
        moments = moments_of(own.slow)
        rate = RATE * half_cosine(step, STEPS)
        result.append(descended(params.slow, moments, grads.slow, slow, rate))
    return result, Dual(fast, slow), model_state


@both_pairs
def test_every_step_is_that_of_the_step_by_hand(name):
    pair, moves = recorded(name), 0
    for masks, sparsity in zip(masks_of(pair.states[0]), SPARSITIES, strict=True):
        assert live(masks) == erk(SHAPES, sparsity)
    steps = zip(itertools.pairwise(pair.states), pair.indices, strict=True)
    for (before, after), row in steps:
        trained, masks, model_state = step_by_hand(pair, before, row)
        for learner, (params, moments) in enumerate(trained):
            assert_close(after.params[learner], params, atol=1e-5)
            assert_close(masks_of(after)[learner], masks[learner])
            trace = moments_of(learners(after)[learner])
            trace = {path: trace[path] * masks[learner][path] for path in trace}
            assert_close(trace, moments, atol=1e-5)
        # A slow network that follows has statistics by its own forward pass.
        assert_close(after.model_state, Dual(*model_state), atol=1e-6)
        assert int(after.step) == int(before.step) + 1
        moves += any(
            np.any(m != masks_of(before).fast[p]) for p, m in masks.fast.items()
        )
    assert moves >= 3


def test_the_slow_learner_is_the_masked_running_average_of_the_fast():
    """It moves by no gradient: the fast learner's weights say all about it."""
    states, forgotten = recorded("consolidated").states, 0
    average, masks = arrays(states[0].params.fast), masks_of(states[0]).slow
    counts = live(masks)
    for path in KERNELS:  # It starts at the largest weights of the fast one.
        first = largest(np.abs(average[path]), counts[path])
        np.testing.assert_array_equal(masks[path], first)
    for step, state in enumerate(states[1:]):
        decay = min(0.75, 1 - 1 / (step + 1))
        fast, fast_masks = arrays(state.params.fast), masks_of(state).fast
        average = {p: decay * a + (1 - decay) * fast[p] for p, a in average.items()}
        if step in range(2, STOP, 2):
            redrawn = {p: largest(np.abs(average[p]), counts[p]) for p in KERNELS}
            masks, held = {**masks, **redrawn}, average
            average = {p: a * (fast_masks[p] | masks[p]) for p, a in average.items()}
            forgotten += sum(np.sum(held[p] != average[p]) for p in KERNELS)
        trace = learners(state).slow
        assert_close(trace.average, average, atol=1e-6)
        assert_close(trace.masks, masks)
        slow = {path: a * masks[path] for path, a in average.items()}
        assert_close(state.params.slow, slow, atol=1e-6)
    assert forgotten > 10


def test_weights_grow_from_zero_without_momentum_where_the_peer_is_not_live():
    number = 0
    for step, states in enumerate(itertools.pairwise(recorded("trained").states)):
        old, new = map(masks_of, states)
        # The slow learner looks at the mask that the fast one has just got.
        peers, after = Dual(old.slow, new.fast), states[1]
        rates = RATE / 2, RATE * half_cosine(step, STEPS)
        for learner, rate in enumerate(rates):
            params = arrays(after.params[learner])
            moments = moments_of(learners(after)[learner])
            for path in KERNELS:
                grew = new[learner][path] & ~old[learner][path]
                number += grew.sum()
                assert not np.any(grew & peers[learner][path])
                np.testing.assert_allclose(
                    params[path][grew], -rate * moments[path][grew], rtol=1e-5
                )
    assert number > 30


def test_metrics_are_those_of_the_batch_before_the_update():
    pair = recorded("trained")
    for step in (0, 7):
        batch = train.take(images(), pair.indices[step])
        _, logits, _ = gradients_by_hand(pair.states[step], batch, (0.0, 0.0), 1.0)
        fast, slow = np.asarray(logits)
        labels, logs = np.asarray(batch.labels), dict(pair.logs[step])
        together = jax.nn.softmax(fast) + jax.nn.softmax(slow)
        expected = {
            "loss": cross_entropy(fast, labels, 0.0),
            "loss_slow": cross_entropy(slow, labels, 0.0),
            "train_accuracy": np.mean(together.argmax(axis=1) == labels),
            "disagreement": np.mean(fast.argmax(axis=1) != slow.argmax(axis=1)),
            "skipped": 0.0,
        }
        assert logs.pop("macs") > 0
        assert logs.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(logs[key], value, rtol=1e-5, err_msg=key)


def macs_by_hand(weights, peer, grows):
    """One learner's step on a batch, layer by layer: a weight is one product."""
    total = 0
    for kernel in KERNELS:
        for _ in range(BATCH):
            total += 3 * weights[kernel]  # Forward, to activations, to weights.
        for _ in range(SIZE if grows else 0):
            # The gradient with respect to weights is dense; the peer's pass teaches.
            total += 2 * weights[kernel] + np.prod(SHAPES[kernel]) + peer[kernel]
    return total / BATCH


@both_pairs
def test_macs_are_counted_in_the_step_where_they_are_spent(name):
    pair = recorded(name)
    for step, (state, log) in enumerate(zip(pair.states[:-1], pair.logs, strict=True)):
        fast, slow = map(live, masks_of(state))
        due = [0 < step < STOP and step % n == 0 for n in INTERVALS]
        expected = macs_by_hand(fast, slow, due[0])
        if name == "trained":
            expected += macs_by_hand(slow, fast, due[1])
        else:
            expected += sum(slow.values())  # A forward pass to be taught by.
        np.testing.assert_allclose(log["macs"], expected, rtol=1e-6)


@both_pairs
def test_what_is_stored_and_used(name):
    for state in recorded(name).states[::5]:
        counted = program(name).training.masks(state)
        fast, slow = masks_of(state)
        kernels = sum(live(fast).values()) + sum(live(slow).values())
        used = [slow] if name == "consolidated" else [fast, slow]
        for found, expected in zip(counted.used, used, strict=True):
            assert_close(found, expected)
        if name == "consolidated":
            average = arrays(learners(state).slow.average)
            kernels = sum(live(fast).values())
            kernels += sum(np.count_nonzero(average[path]) for path in KERNELS)
        # Biases are stored whole, also where the average of one is 0.
        stored = sum(int(np.sum(m)) for m in jax.tree.leaves(counted.stored))
        assert stored == kernels + 2 * CLASSES


@both_pairs
def test_predictions_of_the_three_outputs(name):
    state = recorded(name).states[-1]
    outputs = program(name).predict(state, images())
    x, expected = train.inputs(images()), {}
    for side, params, own in zip(Dual._fields, *state[1:3], strict=True):
        logits, _ = perceptron().apply(params, own, x, train=False)
        expected[side] = scipy.special.softmax(logits, axis=1)
    expected["ensemble"] = (expected["fast"] + expected["slow"]) / 2
    assert outputs.keys() == expected.keys()
    for side, probabilities in outputs.items():
        np.testing.assert_allclose(probabilities, expected[side], atol=1e-6)
    assert next(iter(outputs)) == {"trained": "ensemble"}.get(name, "slow")


@both_pairs
def test_one_program_serves_every_seed_and_uses_the_state_up(name, caplog):
    own = recorded(name).program
    state = jax.device_put(begin(own, seed=1).state, jax.devices()[0])
    with jax.log_compiles(), caplog.at_level("WARNING"):
        own.run(state, images(), recorded(name).indices[:3])
    assert "ompil" not in caplog.text
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


# Teaching.


def logits_of_a_batch(seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return Dual(*(scale * rng.normal(size=(2, SIZE, CLASSES))).astype(np.float32))


def loss_and_slope(coupling, logits, settings=None, step=0):
    """The joint loss of given outputs, its gradient by them, and its metrics."""
    training = constrain(start(), coupled((), (), coupling))
    own = {**training.settings, **(settings or {})}
    none = Dual({}, {})
    context = Context(none, none, jnp.int32(step), own, train.inputs(images()))
    return jax.jit(
        jax.value_and_grad(
            lambda outputs: training.loss(outputs, images(), context), has_aux=True
        )
    )(logits)


@pytest.mark.parametrize(
    ("weighted", "threshold"), [(False, 0.0), (True, 0.0), (True, 0.6), (False, 0.99)]
)
def test_teaching_counts_as_much_as_the_peer_is_trusted(weighted, threshold):
    coupling = Coupling(0.7, 0.4, masks=0.0, weighted=weighted, threshold=threshold)
    logits = logits_of_a_batch()
    _, slopes = loss_and_slope(coupling, logits)
    probabilities = [scipy.special.softmax(np.float64(z), -1) for z in logits]
    for learner, weight in enumerate((0.7, 0.4)):
        p, q = probabilities[learner], probabilities[1 - learner]
        sure = q.max(-1)
        trust = np.where(sure >= threshold, sure if weighted else 1.0, 0.0)
        if threshold == 0.6:
            assert 0 < (trust > 0).mean() < 1
        errors = p - np.eye(CLASSES)[images().labels]
        expected = (errors + weight * trust[:, None] * (p - q)) / SIZE
        np.testing.assert_allclose(slopes[learner], expected, atol=1e-6)


def test_a_setting_stands_for_both_weights_of_the_teaching():
    logits = logits_of_a_batch()
    coupling = Coupling(2.0, 2.0, masks=0.0, ramp=8)
    training = constrain(start(), coupled((), (), coupling))
    assert training.settings["coupling"] == 2.0
    given, _ = loss_and_slope(coupling, logits, {"coupling": 0.5}, step=4)
    expected, _ = loss_and_slope(Coupling(0.25, 0.25, masks=0.0), logits)
    np.testing.assert_allclose(given[0], expected[0], rtol=1e-6)


def test_both_learners_together_are_judged_in_float32():
    logits = logits_of_a_batch(scale=0.01)
    half = Dual(*(z.astype(jnp.bfloat16) for z in map(jnp.asarray, logits)))
    (_, logs), _ = loss_and_slope(APART, half)
    together = sum(scipy.special.softmax(np.float64(z), -1) for z in half)
    right = np.mean(together.argmax(axis=1) == images().labels)
    np.testing.assert_allclose(logs["train_accuracy"], right, rtol=1e-6)


def dimmed(key, x):
    """An augmentation: every image at a brightness of its own."""
    return x * jax.random.uniform(key, (len(x), 1, 1, 1))


def larger_half(interval):
    """Half of every kernel is live: the larger weights, later the larger gradients.

    Cheaper to compile than RigL, for tests of everything around the rule.
    """

    def half(leaf):
        if leaf.ndim < 2:
            return jnp.ones(leaf.shape, bool)
        ranks = jnp.argsort(jnp.argsort(jnp.abs(leaf).ravel()))
        return (ranks >= leaf.size // 2).reshape(leaf.shape)

    rule = MaskRule(
        init=lambda params, key: jax.tree.map(half, params),
        update=lambda masks, params, grads, step, key: jax.tree.map(half, grads),
    )

    def constrained(training):
        masked = under_masks(training, "half", lambda s: rule, every(interval))
        return masked._replace(growth_samples=10)

    return constrained


HALVES = Dual(larger_half(3), larger_half(2))


@functools.cache
def alone():
    """Two learners of a pair, each of them trained alone."""
    training = start(**RECIPE, augment=dimmed)
    pair = make_program(constrain(training, coupled(HALVES[:1], HALVES[1:], APART)))
    both, ends = begin(pair, seed=1).state, []
    for learner, half in enumerate(HALVES):
        state = both._replace(
            params=both.params[learner],
            model_state=both.model_state[learner],
            opt_state=learners(both)[learner],
        )
        ends.append(fit(make_program(constrain(training, half)), state, 8))
    return pair, both, Dual(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("fast", [1.0, 0.0])
def test_an_untaught_learner_moves_as_if_it_were_alone(fast):
    """The gradient of the fast loss with respect to the slow network is zero."""
    pair, both, ends = alone()
    if fast:
        teaching = coupled(HALVES[:1], HALVES[1:], Coupling(fast, 0.0, masks=0.0))
        pair = make_program(constrain(start(**RECIPE, augment=dimmed), teaching))
    state = fit(pair, both, 8)
    # XLA fuses the two programs differently: the last bits may differ.
    for learner in (0, 1) if fast == 0 else (1,):
        for part in ("params", "model_state"):
            expected = getattr(ends[learner], part)
            assert_close(getattr(state, part)[learner], expected, atol=1e-5)
        assert_close(masks_of(state)[learner], ends[learner].opt_state.masks)
    if fast:
        heads = [p["head"]["kernel"] for p in (state.params.fast, ends.fast.params)]
        assert np.abs(heads[0] - heads[1]).max() > 1e-3


def learned_by_hand(state, weights):
    params = Dual(*map(arrays, state.params))
    whole = {path: np.ones(leaf.shape, bool) for path, leaf in params.fast.items()}
    moments = [{path: np.zeros_like(p) for path, p in params.fast.items()}] * 2
    for row in train.step_indices(state, images(), 8, BATCH):
        now = state._replace(params=[nested(p) for p in params])
        grads, _, _ = gradients_by_hand(now, train.take(images(), row), weights, 1.0)
        learned = map(descended, params, moments, grads, [whole] * 2, [RATE] * 2)
        params, moments = zip(*learned, strict=True)
    return params


@pytest.mark.parametrize("equal", [False, True])
def test_two_dense_networks_learn_mutually_and_equal_ones_nothing(equal):
    own = dense()
    state = begin(own, seed=2).state
    if equal:
        first = learners(state).fast
        state = state._replace(
            params=Dual(state.params.fast, state.params.fast),
            opt_state=learners(state)._replace(fast=first, slow=first),
        )
    expected = learned_by_hand(state, (0.0, 0.0) if equal else (1.0, 1.0))
    after = fit(own, state, 8)
    for params, by_hand in zip(after.params, expected, strict=True):
        assert_close(params, by_hand, atol=1e-5)


def test_each_learner_looks_for_flatness_with_its_peer_held_fixed():
    radius = 0.3
    plain_step = {"learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    own = dense(batch_size=SIZE, sharpness=radius, **plain_step)
    state = begin(own).state
    rows = jnp.arange(SIZE)[None]
    after, _ = own.run(copy(state), images(), rows)
    grads, logits, _ = gradients_by_hand(state, images(), (1.0, 1.0), 1.0)
    for learner in (0, 1):
        slope, params = grads[learner], arrays(state.params[learner])
        norm = np.sqrt(sum(np.sum(g**2) for g in slope.values()))
        uphill = nested({p: params[p] + radius * slope[p] / norm for p in params})
        peer, statistics = logits[1 - learner], state.model_state[learner]
        expected, _ = GRADIENT(uphill, statistics, images(), peer, 1.0, 1.0)
        taken = {p: params[p] - x for p, x in arrays(after.params[learner]).items()}
        assert_close(taken, expected, atol=1e-5)


@pytest.mark.parametrize("independent", [False, True])
def test_views_are_shared_or_independent(independent):
    coupling = Coupling(masks=0.0, independent_views=independent)
    training = constrain(start(augment=dimmed), coupled((), (), coupling))
    shown = training.inputs(images(), jax.random.key(0))
    views = shown if independent else Dual(shown, shown)
    for view in views:
        shares = view / train.inputs(images())
        assert np.all((shares > 0) & (shares < 1))
    assert np.any(views.fast != views.slow) == independent
    both = [perceptron().init(jax.random.key(n), views.fast) for n in (0, 1)]
    pair = [Dual(*parts) for parts in zip(*both, strict=True)]
    outputs, _ = training.model.apply(*pair, shown, train=True)
    for logits, own, view in zip(outputs, both, views, strict=True):
        expected, _ = perceptron().apply(*own, view, train=True)
        np.testing.assert_array_equal(logits, expected)
