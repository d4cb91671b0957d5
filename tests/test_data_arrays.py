"""Data sets of a user's own arrays: checks, parts, and a training on floats."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from d2sparse import data, models, train
from d2sparse.constraints import Moves, rigl
from d2sparse.masks import sparsity
from d2sparse.train import Recipe, Watch, constrain, make_program, plain
from d2sparse.train.loops import Stretch, take_steps

N, STEPS, BATCH = 24, 8, 8
RNG = np.random.default_rng(0)
FLOATS = RNG.normal(size=(N, 7)).astype(np.float32)
IMAGES = RNG.integers(0, 255, (N, 4, 4, 1)).astype(np.uint8)
CLASSES = np.arange(N) % 3
GROUP = np.arange(N)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    with runs.quick_compilation():
        yield


def nan(x):
    x = x.copy()
    x[5] = np.nan
    return x


GOOD = {"x_train": FLOATS, "y_train": CLASSES, "x_test": FLOATS, "y_test": CLASSES}
REFUSED = [
    ({"x_train": nan(FLOATS)}, "x_train, got NaN or infinity in 1 of 24 examples, the"),
    (
        {"x_test": np.full_like(FLOATS, np.inf)},
        "x_test, got NaN or infinity in 24 of 24",
    ),
    ({"x_train": FLOATS.astype(int)}, "images or floats as x_train, at least one, got"),
    ({"x_test": FLOATS[:0]}, "floats as x_test, at least one, got float32 of shape (0"),
    ({"x_train": IMAGES[..., 0]}, "(n, h, w, c) as x_train, got shape (24, 4, 4)"),
    (
        {"x_test": FLOATS[:, :6]},
        "x_test like x_train, float32[n, 7], got float32[n, 6]",
    ),
    ({"x_test": FLOATS.astype("float16")}, "float32[n, 7], got float16[n, 7]"),
    ({"y_train": CLASSES[1:]}, "24 examples of x_train as y_train, got int64 of shape"),
    (
        {"y_test": CLASSES.astype(float)},
        "integers of shape (n,) as y_test, got float64",
    ),
    (
        {"y_test": np.eye(3, dtype=int)[CLASSES]},
        "as y_test, got int64 of shape (24, 3)",
    ),
    ({"y_train": CLASSES + 1}, "from 0 in y_train, got 3 of them from 1 to 3"),
    ({"y_train": 2 * CLASSES}, "from 0 in y_train, got 3 of them from 0 to 4"),
    ({"y_test": CLASSES - 1}, "from 0 to 2 in y_test, as in y_train, got some from -1"),
    ({"y_test": CLASSES + 1}, "from 0 to 2 in y_test, as in y_train, got some from 1"),
    ({"further": {"group": GROUP}}, "pair of arrays as further['group'], for training"),
    ({"further": {"a": (GROUP, GROUP[1:])}}, "of x_test as further['a'] of test, got"),
    ({"further": {"a": (["x"] * N, GROUP)}}, "as further['a'] of train, got <U1 of"),
]


@pytest.mark.parametrize(("wrong", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_arrays_that_do_not_fit_are_named(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        data.from_arrays(**{**GOOD, **wrong})


@pytest.mark.parametrize("x", [FLOATS, FLOATS[:, :4].reshape(N, 2, 2), IMAGES])
def test_parts_of_a_split_carry_everything(x):
    sides = RNG.normal(size=(N, 2))
    source = data.from_arrays(
        x, CLASSES, x, CLASSES, further={"group": (GROUP, GROUP), "side": [sides] * 2}
    )
    assert source.num_classes == 3
    for chosen in data.holdout(CLASSES, np.arange(N), 0.25, seed=0):
        part = data.select(source.train, chosen)
        np.testing.assert_array_equal(part.images, x[chosen])
        np.testing.assert_array_equal(part.labels, CLASSES[chosen])
        np.testing.assert_array_equal(part.further["group"], chosen)
        np.testing.assert_array_equal(part.further["side"], sides[chosen])
        batch = train.take(train.to_device(part), jnp.array([2, 0]))
        np.testing.assert_array_equal(batch.further["group"], chosen[[2, 0]])
        np.testing.assert_array_equal(batch.images, x[chosen[[2, 0]]])


def test_floats_are_seen_as_they_are_and_images_as_ever():
    np.testing.assert_array_equal(
        train.inputs(train.to_device(data.Split(FLOATS, CLASSES))), FLOATS
    )
    like = train.to_device(data.Split(IMAGES, CLASSES))
    dark = train.to_device(data.Split(IMAGES // 2, CLASSES), like)
    expected = data.standardize(IMAGES // 2, *data.channel_statistics(IMAGES))
    np.testing.assert_array_equal(train.inputs(dark), expected)
    with pytest.raises(ValueError, match="uint8"):
        train.to_device(data.Split(FLOATS.astype(int), CLASSES))


def init(key, x):
    """A linear network that belongs to the user."""
    kernel = jax.random.normal(key, (x.shape[-1], 3)) / 3
    return {"own": {"kernel": kernel, "bias": jnp.zeros(3)}}, {}


def apply(params, model_state, x, *, train):
    own = params["own"]
    return jnp.tanh(x) @ own["kernel"] + own["bias"][None], model_state


def with_groups(training):
    """A constraint whose loss looks at a further label: only group 1 counts."""

    def loss(outputs, batch, context):
        group = batch.further["group"]
        each = -jax.nn.log_softmax(outputs)[jnp.arange(len(group)), batch.labels]
        value = jnp.mean(each * (group % 2))
        return value, {"loss": value, "group": jnp.mean(group.astype(jnp.float32))}

    return training._replace(loss=loss)


def examples(labels=CLASSES):
    return train.to_device(data.Split(FLOATS, labels, {"group": GROUP}))


@functools.cache
def program():
    """RigL on the user's network, compiled once, and its first state."""
    training = plain(models.Model(init, apply), examples(), Recipe(STEPS, BATCH))
    moves = Moves(interval=2, growth_samples=BATCH)
    made = make_program(constrain(training, rigl(0.5, moves), with_groups))
    return made, jax.jit(made.init)


def learn(labels):
    """The state at the end, and the metrics of all steps."""
    logs = []
    watch = Watch(every=1, report=lambda progress, means: logs.append(means))
    made, init = program()
    begun = init(jax.random.key(0), examples())
    return train.fit(made, begun, examples(labels), watch).state, logs


def groups_seen(state):
    """Means of the group over the batches of a run, from the streams of indices."""
    order, _ = jax.random.split(state.key)
    rows = data.batch_indices(order, 0, STEPS, N, BATCH)
    return np.mean(GROUP[rows], axis=1)


def test_a_users_own_network_trains_on_floats_and_sees_further_labels():
    state, logs = learn(CLASSES)
    np.testing.assert_allclose([means["group"] for means in logs], groups_seen(state))
    made, _ = program()
    (masks,) = made.training.masks(state).used
    assert sparsity(masks) == pytest.approx(0.5, abs=0.05)
    probabilities = made.predict(state, examples())["network"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    # What the loss gives no weight cannot matter, and what it gives weight does.
    for chosen, same in ((GROUP % 2 == 0, True), (GROUP % 2 == 1, False)):
        wrong = np.where(chosen, (CLASSES + 1) % 3, CLASSES)
        other = learn(wrong)[0]
        kernels = (s.params["own"]["kernel"] for s in (state, other))
        assert np.array_equal(*kernels) is same


@pytest.mark.parametrize(
    "data_parallel", [*(pytest.param(n, marks=pytest.mark.slow) for n in (None, 1)), 2]
)
def test_stacked_runs_and_several_devices_carry_further_labels(data_parallel):
    def step(state, data, indices):
        seen = jnp.mean(train.take(data, indices).further["group"].astype(jnp.float32))
        after = state._replace(step=state.step + 1)
        return after, {"group": seen, "finite": jnp.bool_(True)}

    mesh = data_parallel and train.make_mesh(data_parallel, runs=2)
    model, tx, logs = models.Model(init, apply), optax.identity(), []
    states = [train.init_state(model, tx, examples(), seed) for seed in range(2)]
    expected = np.stack([groups_seen(state) for state in states], axis=1)
    take_steps(
        train.make_runner(step, mesh),
        train.stack_runs(states),
        train.stack_runs([examples()] * 2),
        Stretch(
            STEPS,
            BATCH,
            every=1,
            report=lambda step, state, means: logs.append(means["group"]),
        ),
    )
    np.testing.assert_allclose(logs, expected)
