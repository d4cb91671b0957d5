"""Eight fake devices against one: runs side by side, batches cut up between them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from flax import linen as nn
from tiny import CLASSES, SETTINGS, centred, step_of

from d2sparse import models, train
from d2sparse.data import Split
from d2sparse.rules import rigl
from d2sparse.schedules import every
from d2sparse.train.loops import Stretch, take_steps
from d2sparse.transforms import get_masks, sparsify
from d2sparse.tree import flatten

SIZE, BATCH, STEPS = 48, 16, 6
# Sums over parts of a batch are added in another order, and BatchNorm divides by small
# numbers: measured differences are below 2e-5 of a weight of size one.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    with runs.quick_compilation():
        yield


class Normalised(nn.Module):
    """A convolution whose channels are normalised over the batch."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(x).mean(axis=(1, 2))
        return nn.Dense(CLASSES, name="head")(x)


# Both look at a whole batch.
NETWORKS = {
    "centred": centred,
    "normalised": lambda: models.from_linen(Normalised()),
}


def make_data(seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 255, (SIZE, 4, 4, 1), np.uint8)
    return train.to_device(Split(images, rng.integers(0, CLASSES, SIZE, np.int32)))


def make_run(name):
    """A step whose learning rate is a setting, and states that start from a seed."""
    model, when = NETWORKS[name](), every(2)

    def make_tx(settings, key=0):
        optimizer = train.make_optimizer("sgd", settings["learning_rate"])
        return sparsify(optimizer, rigl(0.7), when, key)

    step = step_of(model, make_data(0), make_tx, 20, when)

    @jax.jit
    def start(data, seed, rate):
        own = {**SETTINGS, "learning_rate": rate}
        tx, key = make_tx(own, jax.random.key(seed)), jax.random.key(seed)
        return train.init_state(model, tx, data, key, own)

    def init(seed, rate=0.05):
        return start(make_data(seed), seed, rate)

    return step, init


@pytest.fixture(
    scope="module",
    params=["centred", pytest.param("normalised", marks=pytest.mark.slow)],
)
def network(request):
    step, init = make_run(request.param)
    run = train.make_runner(step)
    alone = {
        seed: take_steps(run, init(seed, rate), make_data(seed), Stretch(STEPS, BATCH))
        for seed, rate in ((0, 0.05), (1, 0.02))
    }
    return step, init, alone


@pytest.fixture(
    scope="module",
    params=[(4, 2), pytest.param((8, 1), marks=pytest.mark.slow)],
    ids=["4 for each of 2 runs", "8 for a batch"],
)
def several(network, request):
    """A runner on a mesh, its traces, and how rows of a batch lie on devices."""
    step, _, _ = network
    traces, layouts = [], []

    def watched(state, data, indices):
        traces.append(None)
        jax.debug.inspect_array_sharding(indices, callback=layouts.append)
        return step(state, data, indices)

    data_parallel, many = request.param
    run = train.make_runner(watched, train.make_mesh(data_parallel, many))
    return run, data_parallel, traces, layouts


def assert_close(state, expected):
    for path, mask in flatten(get_masks(expected.opt_state)).items():
        found = flatten(get_masks(state.opt_state))[path]
        np.testing.assert_array_equal(found, mask, err_msg=path)
    for field in ("params", "model_state"):
        for path, leaf in flatten(getattr(expected, field)).items():
            found = flatten(getattr(state, field))[path]
            np.testing.assert_allclose(found, leaf, atol=TOLERANCE, err_msg=path)


def test_a_batch_on_several_devices_is_the_batch_on_one_by_one_program(
    network, several
):
    _, init, alone = network
    run, data_parallel, traces, layouts = several
    state = take_steps(run, init(0), make_data(0), Stretch(2, BATCH))
    first = jax.tree.leaves(state.params)[0]
    state = take_steps(run, state, make_data(0), Stretch(STEPS, BATCH))
    assert_close(state, alone[0])
    # Devices that share out runs are none of a single run's.
    for leaf in jax.tree.leaves(state.params):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.devices()) == data_parallel
    # The second call compiles nothing and moves nothing.
    assert len(traces) == 1
    assert first.is_deleted()
    assert layouts
    assert all(len(sharding.device_set) == data_parallel for sharding in layouts)
    assert not any(sharding.is_fully_replicated for sharding in layouts)


@pytest.mark.parametrize("data_parallel", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_runs_beside_each_other_are_the_runs_alone(network, data_parallel):
    step, init, alone = network
    mesh = train.make_mesh(data_parallel, runs=2)
    assert dict(mesh.shape) == {"run": 2, "data": data_parallel}
    run = train.make_runner(step, mesh)
    states = train.stack_runs([init(0, 0.05), init(1, 0.02)])
    both = train.stack_runs([make_data(0), make_data(1)])
    end = take_steps(run, states, both, Stretch(STEPS, BATCH))
    for number, state in enumerate(train.unstack_runs(end)):
        assert_close(state, alone[number])


@pytest.mark.slow
def test_runs_on_devices_of_their_own_do_not_speak_to_each_other():
    step, init = make_run("centred")
    mesh = train.make_mesh(runs=2)
    where = train.place(mesh, stacked=True)
    states = train.stack_runs([init(0), init(1)])
    both = train.stack_runs([make_data(0), make_data(1)])
    many = jax.vmap(
        train.guard(step), in_axes=(train.RUNS, 0, 0), out_axes=(train.RUNS, 0)
    )
    many = jax.jit(
        train.apart(many, mesh),
        in_shardings=(where.state, where.data, where.data),
        out_shardings=(where.state, None),
    )
    indices = np.zeros((2, BATCH), np.int32)
    compiled = many.lower(states, both, indices).compile()
    assert "num_partitions=2" in compiled.as_text()
    kinds = r"(?:all-[a-z-]+|reduce-scatter|collective-[a-z]+)"
    moved = re.findall(rf"= (\S+) {kinds}\(", compiled.as_text())
    assert not moved


def test_as_many_devices_as_divide_the_runs_share_them():
    assert dict(train.make_mesh(runs=6).shape) == {"run": 6, "data": 1}
    assert dict(train.make_mesh(runs=9).shape) == {"run": 3, "data": 1}
    assert dict(train.make_mesh(3, runs=5).shape) == {"run": 1, "data": 3}


@pytest.mark.parametrize("devices", [0, 9])
def test_devices_that_are_not_there_are_refused(devices):
    with pytest.raises(ValueError, match=f"from 1 to 8, .* got {devices}"):
        train.make_mesh(devices)


@pytest.mark.parametrize(
    ("size", "choice"), [(12, "8 or 16"), (5, "8"), (17, "16 or 24")]
)
def test_a_batch_that_does_not_divide_names_those_that_do(size, choice):
    with pytest.raises(ValueError, match=f"choose --batch_size={choice}, or another"):
        train.check_batch(size, train.make_mesh(8))


def test_runs_at_different_steps_are_refused():
    _, init = make_run("centred")
    ahead = init(0)._replace(step=jnp.int32(3))
    with pytest.raises(ValueError, match=r"at one step, got runs at steps \[0, 3\]"):
        train.stack_runs([init(0), ahead])
