"""Whole training runs against plain loops in numpy, written from the papers.

A twin has a network, gradients, momentum and masks of its own, in double precision. It
takes two things from the library: the masks to start from, and the random salts by
which ties are broken, as nobody can draw them without the same generator.

In one thing twins and library differ from the paper of RigL (arXiv 1911.11134,
algorithm 1): there a step either refreshes or descends, here a refresh descends too.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2sparse import rules, schedules
from d2sparse.masks import apply_masks
from d2sparse.transforms import get_masks, sparsify

SHAPES = {"bias1": (16,), "bias2": (8,), "kernel1": (20, 16), "kernel2": (16, 8)}
KERNELS = ("kernel1", "kernel2")
STEPS, INTERVAL, RATE, MOMENTUM, SEED = 60, 10, 0.1, 0.9, 3
DROP = 0.3
END, BEGIN, RAMP = 0.9, 10, 30  # Gradual pruning: to 90 % zeros in steps 10 to 40.


def begin():
    rng = np.random.default_rng(0)
    return {p: rng.normal(size=s) / np.sqrt(s[0]) for p, s in SHAPES.items()}


def data():
    rng = np.random.default_rng(1)
    return rng.normal(size=(64, 20)), rng.integers(8, size=64)


# The twin.


def gradients(params, images, labels):
    """Of the mean cross-entropy of a perceptron with one hidden layer, all dense."""
    hidden = np.maximum(images @ params["kernel1"] + params["bias1"], 0)
    logits = hidden @ params["kernel2"] + params["bias2"]
    error = np.exp(logits - logits.max(axis=1, keepdims=True))
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(labels)), labels] -= 1
    error /= len(labels)
    hidden_error = (error @ params["kernel2"].T) * (hidden > 0)
    return {
        "bias1": hidden_error.sum(axis=0),
        "bias2": error.sum(axis=0),
        "kernel1": images.T @ hidden_error,
        "kernel2": hidden.T @ error,
    }


def trained_by_twin(live, refresh):
    """Momentum descent on live weights; a pruned one is 0 and so is its velocity."""
    params = {path: live[path] * value for path, value in begin().items()}
    velocity = {path: np.zeros(shape) for path, shape in SHAPES.items()}
    for step in range(STEPS):
        slope = gradients(params, *data())
        if step > 0 and step % INTERVAL == 0:
            live = {**live, **refresh(step, live, params, slope)}
        for path, mask in live.items():
            velocity[path] = mask * (MOMENTUM * velocity[path] + slope[path])
            params[path] = mask * (params[path] - RATE * velocity[path])
        yield live, dict(params), dict(velocity)


def largest(score, positions, count, rank):
    """The positions of the largest scores; of equal scores that of the largest rank."""
    ordered = sorted(positions, key=lambda i: (score[i], rank[i]), reverse=True)
    if 0 < count < len(ordered):
        last, next_one = score[ordered[count - 1]], score[ordered[count]]
        # Else it would be chance whether single precision comes to the same choice.
        assert last == 0 or last - next_one > 1e-4 * last
    return ordered[:count]


def moved(live, weight, growth, rank, fraction):
    """Drop the smallest live weights, grow as many outside of those that are kept."""
    falls = math.floor(fraction * live.sum())
    earlier = -np.arange(live.size)
    kept = largest(
        abs(weight.ravel()), np.flatnonzero(live), live.sum() - falls, earlier
    )
    outside = [i for i in range(live.size) if i not in kept]
    grown = largest(growth.ravel(), outside, falls, rank)
    return np.isin(np.arange(live.size), kept + grown).reshape(live.shape)


def tie_ranks(step):
    """Ranks of the entries of every kernel: the index, salted and hashed."""
    key = jax.random.fold_in(jax.random.key(SEED), step)
    _, tie_key = jax.random.split(key)
    salts = jax.random.bits(tie_key, (len(KERNELS),)).tolist()
    return {
        path: [murmur(i ^ salt) for i in range(math.prod(SHAPES[path]))]
        for path, salt in zip(KERNELS, salts, strict=True)
    }


def murmur(x):
    """The 32-bit finaliser of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


def prune_and_grow_refresh(growth):
    def refresh(step, live, params, slope):
        fraction = DROP / 2 * (1 + math.cos(math.pi * step / STEPS))
        ranks = tie_ranks(step)
        return {
            path: moved(
                *(live[path], params[path], growth(slope[path]), ranks[path], fraction)
            )
            for path in KERNELS
        }

    return refresh


def gradual_refresh(step, live, params, slope):
    """The smallest weights of both kernels together go, by the cubic schedule."""
    del slope
    progress = min(max((step - BEGIN) / RAMP, 0), 1)
    sparsity = END + (0 - END) * (1 - progress) ** 3
    total = sum(live[path].size for path in KERNELS)
    weights = np.concatenate([abs(params[path].ravel()) for path in KERNELS])
    alive = np.flatnonzero(np.concatenate([live[path].ravel() for path in KERNELS]))
    kept = largest(weights, alive, round((1 - sparsity) * total), -np.arange(total))
    chosen = np.split(np.isin(np.arange(total), kept), [live["kernel1"].size])
    return {
        path: mask.reshape(SHAPES[path])
        for path, mask in zip(KERNELS, chosen, strict=True)
    }


# The library.


def loss(params, images, labels):
    hidden = jax.nn.relu(images @ params["kernel1"] + params["bias1"][None])
    logits = hidden @ params["kernel2"] + params["bias2"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def trained_by_library(tx):
    images, labels = data()
    images = jnp.asarray(images, jnp.float32)

    @jax.jit
    def step(params, state):
        slope = jax.grad(loss)(params, images, labels)
        updates, state = tx.update(slope, state, params)
        return optax.apply_updates(params, updates), state

    params = {path: jnp.asarray(v, jnp.float32) for path, v in begin().items()}
    state = tx.init(params)
    params = apply_masks(params, get_masks(state))
    for _ in range(STEPS):
        params, state = step(params, state)
        yield get_masks(state), params, state.inner[0].trace


TWINS = {
    "rigl": (
        rules.rigl(0.8, schedules.cosine(DROP, STEPS)),
        prune_and_grow_refresh(np.abs),
    ),
    "set": (
        rules.set_(0.8, schedules.cosine(DROP, STEPS)),
        prune_and_grow_refresh(np.zeros_like),
    ),
    "gradual": (rules.gradual(schedules.cubic(END, RAMP, BEGIN)), gradual_refresh),
}


def first_masks(tx):
    masks = get_masks(tx.init({path: jnp.asarray(v) for path, v in begin().items()}))
    return {path: np.asarray(mask) for path, mask in masks.items()}


@pytest.mark.parametrize(
    "name", ["rigl", pytest.param("set", marks=pytest.mark.slow), "gradual"]
)
def test_a_run_equals_its_twin(name):
    rule, refresh = TWINS[name]
    inner = optax.sgd(RATE, momentum=MOMENTUM)
    tx = sparsify(inner, rule, schedules.every(INTERVAL), key=SEED)
    twin = trained_by_twin(first_masks(tx), refresh)
    for run in zip(trained_by_library(tx), twin, strict=True):
        (live, params, velocity), (twin_live, twin_params, twin_velocity) = run
        for path in SHAPES:
            np.testing.assert_array_equal(live[path], twin_live[path])
            np.testing.assert_array_equal(params[path] == 0, twin_params[path] == 0)
            np.testing.assert_allclose(params[path], twin_params[path], atol=2e-5)
            np.testing.assert_allclose(velocity[path], twin_velocity[path], atol=2e-5)


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_the_twins_meet_what_is_hard(name):
    events = {"same refresh": 0, "later refresh": 0}
    fallen = {path: np.zeros(SHAPES[path], bool) for path in KERNELS}

    def refresh(step, live, params, slope):
        after = TWINS[name][1](step, live, params, slope)
        fraction = DROP / 2 * (1 + math.cos(math.pi * step / STEPS))
        for path in KERNELS:
            magnitudes = np.where(live[path], abs(params[path]), np.inf)
            falls = math.floor(fraction * live[path].sum())
            smallest = np.argsort(magnitudes, axis=None)[:falls]
            events["same refresh"] += after[path].ravel()[smallest].sum()
            events["later refresh"] += np.sum(fallen[path] & ~live[path] & after[path])
            fallen[path] |= live[path] & ~after[path]
        return after

    tx = sparsify(optax.sgd(RATE), TWINS[name][0], key=SEED)
    for _ in trained_by_twin(first_masks(tx), refresh):
        pass
    # Weights fall and grow again: at once with their value, later from 0.
    assert events["same refresh"] >= 3
    assert events["later refresh"] >= 3


# The order that decides ties.


def test_set_grows_every_weight_that_is_not_kept_as_often_as_any_other():
    live = np.arange(48).reshape(6, 8) % 3 == 0
    weights = live * np.arange(1, 49, dtype=np.float32).reshape(6, 8)
    rule, runs, grown = rules.set_(0.5, drop_fraction=0.5), 4000, 8

    def refreshed(seed):
        key = jax.random.key(seed)
        return rule.update({"w": live}, {"w": weights}, {"w": weights}, 0, key)["w"]

    after = np.asarray(jax.jit(jax.vmap(refreshed))(jnp.arange(runs)))
    kept = live & (weights > np.median(weights[live]))
    assert after[:, kept].all()
    drawn = after[:, ~kept].astype(float)
    np.testing.assert_array_equal(drawn.sum(axis=1), grown)

    # Without replacement: counts vary as binomial ones, and hang together by their sum.
    n = drawn.shape[1]
    share = grown / n
    deviations = drawn.sum(axis=0) - runs * share
    chi_square = np.sum(deviations**2) / (runs * share * (1 - share)) * (n - 1) / n
    assert abs(chi_square - (n - 1)) < 3 * math.sqrt(2 * (n - 1))

    # No two of them grow together more often than any other two.
    together = (drawn.T @ drawn)[np.triu_indices(n, 1)]
    share = grown * (grown - 1) / (n * (n - 1))
    deviation = math.sqrt(runs * share * (1 - share))
    assert np.max(abs(together - runs * share)) < 4.5 * deviation
