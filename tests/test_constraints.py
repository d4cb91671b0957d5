"""Every method trains, resumes to the bit from any phase, and counts its cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import data, models, train
from d2sparse.constraints import METHODS, Options
from d2sparse.train import Recipe, Watch, constrain, make_program, plain

STEPS = 24
OPTIONS = Options(
    sparsity=0.5,
    refresh_interval=4,
    growth_samples=16,
    score_samples=8,
    rounds=2,
    horizon=6,
)


@functools.cache
def digits():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (32, 4, 4, 1)).astype(np.uint8)
    labels = np.arange(32, dtype=np.int32) % 4
    return train.to_device(data.Split(images, labels))


@functools.cache
def program(name):
    """One compiled program a method, shared by the tests."""
    method = METHODS[name]
    recipe = {k: v for k, v in method.sets.items() if k in Recipe._fields}
    own = {k: v for k, v in method.sets.items() if k not in Recipe._fields}
    options = Options(**{**vars(OPTIONS), **own})
    model = models.make_model("lenet_300_100", 4, 0.04)
    start = plain(model, digits(), Recipe(steps=STEPS, batch_size=8, **recipe))
    return make_program(constrain(start, *method.constraints(options)))


def begin(name, seed=0):
    return program(name).init(jax.random.key(seed), digits())


@functools.cache
def trained(name):
    """The end of a training, and the places where it was saved on the way."""
    saved, logs = [], []

    def save(progress, pending):
        saved.append((jax.tree.map(jnp.copy, progress), dict(pending)))

    def report(progress, means):
        logs.append(means)

    watch = Watch(every=5, report=report, save_every=4, save=save)
    end = train.fit_phases(program(name), begin(name), digits(), watch)
    return end, saved, logs


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        np.array_equal(np.asarray(_plain(x)), np.asarray(_plain(y)), equal_nan=True)
        for x, y in leaves
    )


def _plain(x):
    is_key = jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_predicts_and_counts_its_cost(name):
    own, (end, _, logs) = program(name), trained(name)
    state = own.training.finish(end, digits(), own)
    outputs = own.predict(state, digits())
    for probabilities in outputs.values():
        assert probabilities.shape == (32, 4)
        assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert all(np.isfinite(means["loss"]) and means["macs"] > 0 for means in logs)
    masks = own.training.masks(state)
    sizes = jax.tree.map(jnp.shape, own.training.network.params)
    for live in (*masks.used, *masks.trained, *masks.stored):
        assert jax.tree.map(jnp.shape, live) == sizes


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_to_the_bit(name):
    own, (end, saved, _) = program(name), trained(name)
    assert len(saved) >= 5
    for progress, logs in saved[:: max(len(saved) // 3, 1)]:
        copied = jax.tree.map(jnp.copy, progress)
        again = train.fit_phases(own, copied, digits(), Watch(every=5, logs=logs))
        assert same(again, end)
