"""Constraints on the depth, against entropies and distances in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from flax import linen as nn

from d2sparse import (
    constraints,
    data,
    metrics,
    models,
    prompts,
    regularizers,
    train,
    tree,
)
from d2sparse.checkpoint import Checkpoints
from d2sparse.constraints import depth, easier, egp, gating, layer_collapse, tlc
from d2sparse.models import gates, taps
from d2sparse.models.gates import remaining
from d2sparse.models.layers import ReLU, batch_norm, dense
from d2sparse.models.mlp import MLP
from d2sparse.transforms import get_masks

HIDDEN = ("relu1", "relu2", "relu3")
PERCEPTRON = models.from_linen(MLP((6, 6, 6), 4))
BLOCKS = ("block1", "block2")
STEPS = 3


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        y = batch_norm(train=train, name="norm1")(dense(4, name="dense1")(x))
        y = dense(4, name="dense2")(ReLU(name="relu1")(y))
        y = batch_norm(train=train, name="norm2")(y)
        return ReLU(name="relu2")(y + x)


class Residual(nn.Module):
    """Residual blocks without images, which compile sooner."""

    @nn.compact
    def __call__(self, x, *, train):
        x = dense(4, name="stem")(x.reshape(len(x), -1))
        x = ReLU(name="stem_relu")(batch_norm(train=train, name="stem_norm")(x))
        for name in BLOCKS:
            x = Block(name=name)(x, train=train)
        return dense(4, name="head")(x)


RESIDUAL = models.from_linen(Residual())


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    with runs.quick_compilation():
        yield


@functools.cache
def digits():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (32, 6, 6, 1)).astype(np.uint8)
    labels = np.arange(32, dtype=np.int32) % 4
    return train.to_device(data.Split(images, labels))


def plainly(model):
    return train.plain(model, digits(), train.Recipe(steps=STEPS, batch_size=8))


@functools.cache
def program_of(constraint, model, *args):
    return train.make_program(constraint(*args)(plainly(model)))


def begun(program, seed=0):
    return program.init(jax.random.key(seed), digits())


def copied(values):
    """On the host, where a copy compiles nothing."""

    def copy(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jnp.copy(leaf) if is_key else np.array(leaf)

    return jax.tree.map(copy, values)


def trained(program, seed=0):
    """The progress at the end of every titled phase, by title, and at the very end."""
    ends = {}
    watch = train.Watch(ended=lambda p, title: ends.update({title: copied(p)}))
    last = train.fit(program, begun(program, seed), digits(), watch)
    return ends, last


def entered(program, progress, number=1, other=None):
    """The progress where a phase has been entered, without any step.

    A phase of another constraint may be entered: what is compiled serves both.
    """
    training = program.training if other is None else other(plainly(RESIDUAL))
    return training.phases[number].enter(progress, digits(), program)


def gates_of(progress):
    return progress.state.model_state.gates


def with_params(progress, leaves):
    state = progress.state
    params = tree.replace(
        jax.device_get(state.params),
        {path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()},
    )
    return progress._replace(state=state._replace(params=params))


def preactivations(progress):
    """What enters the rectifiers of the perceptron, in numpy."""
    params, gates = jax.device_get((progress.state.params, gates_of(progress)))
    x = np.asarray(train.inputs(digits())).reshape(32, -1)
    found = {}
    for number, path in enumerate(HIDDEN, 1):
        leaf = params[f"dense{number}"]
        z = found[path] = x @ leaf["kernel"] + leaf["bias"]
        x = np.maximum(z, 0) if gates.active[path] else z * gates.open[path]
    return found


def entropy(p):
    return sum(-q * math.log2(q) for q in (p, 1 - p) if q)


def numpy_entropies(progress):
    return {
        path: np.mean([entropy(p) for p in np.mean(z >= 0, axis=0)])
        for path, z in preactivations(progress).items()
    }


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(numbers(x), numbers(y)) for x, y in leaves)


def numbers(x):
    is_key = jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


# EASIER


@functools.cache
def easier_run():
    return trained(program_of(easier, PERCEPTRON, 3))


def test_easier_makes_the_least_undecided_activation_linear_first():
    ends, last = easier_run()
    assert list(ends) == ["0 removed", "1 removed", "2 removed"]  # One is left.
    removed = last.memory["removed"]
    for number, before in enumerate(list(ends.values())[:-1], 1):
        bits, active = numpy_entropies(before), remaining(gates_of(before).active)
        assert len(active) == 4 - number
        lowest = min(active, key=bits.__getitem__)
        assert removed[lowest] == number
    assert sorted(map(int, removed.values())) == [0, 1, 2]
    program = program_of(easier, PERCEPTRON, 3)
    measured = program.training.measure(last.state)
    assert measured == {"activations_left": 1, "blocks_left": 0}


def test_rounds_go_on_with_the_weights_and_begin_the_schedule_anew():
    program = program_of(easier, PERCEPTRON, 3)
    before = begun(program)
    first = copied(before.state)
    before = before._replace(state=easier_run()[0]["0 removed"].state)
    after = entered(program, before).state
    assert same(after.params, before.state.params)
    assert int(after.step) == 0
    assert int(before.state.step) == STEPS
    assert same(after.opt_state, first.opt_state)


def test_nothing_is_compiled_for_a_round_and_a_run_resumes_to_the_bit(caplog):
    program, (_, last) = program_of(easier, PERCEPTRON, 3), easier_run()
    saved = []

    def save(progress, logs):
        saved.append((jax.tree.map(jnp.copy, progress), dict(logs)))

    watch = train.Watch(save_every=2, save=save, begun=lambda p: save(p, {}))
    assert same(train.fit(program, begun(program), digits(), watch).state, last.state)
    assert len(saved) == 6
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for progress, logs in saved[1::2]:
            again = train.Watch(logs=logs)
            assert same(train.fit(program, progress, digits(), again), last)
    assert "ompil" not in caplog.text


def test_other_orders_are_controls(monkeypatch):
    program = program_of(easier, PERCEPTRON, 3)
    before = easier_run()[0]["0 removed"]
    bits = numpy_entropies(before)
    after = entered(program, before, other=easier(1, "highest"))
    off = set(HIDDEN) - set(remaining(gates_of(after).active))
    assert off == {max(bits, key=bits.__getitem__)}

    monkeypatch.setattr(depth, "count_states_on", None)  # It looks at nothing.

    def order(seed):
        progress = begun(program, seed)
        for number in (1, 2):
            progress = entered(program, progress, number, easier(2, "random"))
        return tuple(int(progress.memory["removed"][path]) for path in HIDDEN)

    orders = [order(seed) for seed in range(6)]
    assert orders == [order(seed) for seed in range(6)]
    assert len(set(orders)) > 2
    assert all(sorted(own) == [0, 1, 2] for own in orders)


def test_masks_stay_what_they_were():
    program = program_of(egp, PERCEPTRON, 2, 0.05)
    before = begun(program)
    pruned = entered(program, before)
    after = entered(program, pruned, other=easier(2, "random"))
    assert len(remaining(gates_of(after).active)) == 2
    assert mask_counts(after) == mask_counts(pruned) != mask_counts(before)
    assert same(after.state.params, pruned.state.params)


def test_states_are_counted_over_all_examples(monkeypatch):
    program, before = program_of(easier, PERCEPTRON, 3), easier_run()[0]["0 removed"]

    def in_passes(size):
        yield np.arange(24), np.ones(24, bool)
        yield np.arange(24, 48) % size, np.arange(24, 48) < size

    monkeypatch.setattr(gating, "passes", in_passes)
    counts = gating.count_states_on(program, before.state, digits())
    for path, z in preactivations(before).items():
        np.testing.assert_array_equal(counts[path].positive, np.sum(z > 0, axis=0))
        np.testing.assert_array_equal(counts[path].negative, np.sum(z < 0, axis=0))


def test_what_is_quantised_or_behind_a_prompt_has_gates():
    prompt = prompts.border(canvas=8, inner=6, channels=1)
    for inner in (constraints.quantised(), constraints.prompted(prompt)):
        training = train.constrain(plainly(PERCEPTRON), inner, egp(1))
        program = train.make_program(training)
        form = jax.eval_shape(program.init, jax.random.key(0), digits())
        assert list(gates_of(form).active) == list(HIDDEN)
        feeding = gating.layers_of(program, form.state, digits()).activations
        kernels = [own.kernels for own in feeding.values()]
        assert kernels == [("dense1",), ("dense2",), ("dense3",)]
        assert gates.leaf_of(form.state.params, "dense3", "kernel").endswith("kernel")


# EGP and NEPENTHE


def mask_counts(progress):
    masks = tree.flatten(jax.device_get(get_masks(progress.state.opt_state)))
    return {p: int(np.sum(m)) for p, m in masks.items() if p.endswith("kernel")}


def test_egp_prunes_the_budgets_of_layers_by_magnitude():
    program = program_of(egp, PERCEPTRON, 2, 0.05)
    before = begun(program)
    bits = {
        f"dense{path[-1]}/kernel": np.mean([h for h in units if h] or [0])
        for path, z in preactivations(before).items()
        for units in [[entropy(p) for p in np.mean(z > 0, axis=0)]]
    }
    kernels = jax.device_get(tree.pick(before.state.params, bits))
    budget = metrics.layer_budget(bits, kernels, 0.05)
    assert sum(budget.values()) == round(0.05 * (36 + 6 + 6) * 6)
    after = entered(program, before)
    masks = tree.pick(jax.device_get(get_masks(after.state.opt_state)), bits)
    for path, mask in masks.items():
        assert np.sum(~mask) == budget[path]
        if budget[path]:
            size = np.abs(kernels[path])
            assert size[~mask].max() < size[mask].min()
    assert mask_counts(after)["head/kernel"] == 24
    assert same(
        jax.tree.map(np.multiply, kernels, masks),
        tree.pick(jax.device_get(after.state.params), bits),
    )


def test_a_layer_that_all_goes_through_keeps_a_weight():
    program = program_of(egp, PERCEPTRON, 2, 0.05)
    progress = begun(program)
    for number in (1, 2):
        progress = entered(program, progress, number, egp(2, 0.6))
        if int(progress.phase) > 2:
            break
        assert min(mask_counts(progress).values()) >= 1
        (said,) = program.predict(progress.state, digits()).values()
        assert np.ptp(said, axis=0).max() > 1e-6


def test_a_block_may_lose_its_weights_and_the_stem_may_not():
    program = program_of(egp, RESIDUAL, 1, 1.0)
    after = entered(program, begun(program))
    left = mask_counts(after)
    assert left["stem/kernel"] == 1
    assert all(n == 0 for path, n in left.items() if path.startswith("block"))
    assert left["head/kernel"] == 16
    ends = entered(program, after)  # Nothing is left to be pruned.
    assert int(ends.phase) > 10


def test_units_that_never_change_their_state_become_linear_and_predict_the_same():
    program = program_of(egp, PERCEPTRON, 2, 0.05)
    always_on, half = np.full(6, 1e3), np.array([1e3, -1e3] * 3)
    leaves = {"dense1/bias": always_on, "dense2/bias": half}
    before = with_params(begun(program), {**leaves, "dense2/kernel": np.eye(6)})
    before = with_params(before, {"dense2/bias": 1e4 * half})
    counts = gating.count_states_on(program, before.state, digits())
    bits = gating.entropies_of(counts, zero="off", varying_only=True)
    gates = depth._without_constant(gates_of(before), counts, bits)
    assert remaining(gates.active) == ["relu3"]
    assert np.all(gates.open["relu1"])
    np.testing.assert_array_equal(gates.open["relu2"], half > 0)
    state = gating.changed_gates(before.state, gates)
    (said,) = program.predict(before.state, digits()).values()
    (linear,) = program.predict(state, digits()).values()
    np.testing.assert_allclose(linear, said, atol=1e-5)


def test_zero_is_no_state_in_nepenthe():
    # What enters the second layer is the output of a rectifier: positive or 0.
    leaves = {"dense2/kernel": np.eye(6), "dense2/bias": np.zeros(6)}
    active, program = {}, program_of(egp, PERCEPTRON, 2, 0.05)
    for states in ("egp", "nepenthe"):
        before = with_params(begun(program), leaves)
        after = entered(program, before, other=egp(2, 0.05, states))
        active[states] = remaining(gates_of(after).active)
    assert active == {"egp": list(HIDDEN), "nepenthe": ["relu1", "relu3"]}


# TLC


def test_tlc_goes_by_scales_and_biases_and_lets_through_what_is_on():
    program, rng = program_of(egp, RESIDUAL, 1, 1.0), np.random.default_rng(0)
    norms = {"stem_relu": "stem_norm"}
    norms |= {f"{block}/relu1": f"{block}/norm1" for block in BLOCKS}
    values = {n: (rng.normal(size=4), rng.normal(size=4)) for n in norms.values()}
    leaves = {}
    for norm, (scale, bias) in values.items():
        leaves |= {f"{norm}/scale": scale, f"{norm}/bias": bias}
    progress = with_params(begun(program), leaves)

    def off(scale, bias):
        return 0.5 * math.erfc(bias / abs(scale) / math.sqrt(2))

    bits = {
        path: np.mean([entropy(off(*own)) for own in zip(*values[norm], strict=True)])
        for path, norm in norms.items()
    }
    for number, path in enumerate(sorted(bits, key=bits.__getitem__), 1):
        progress = entered(program, progress, number, tlc(5))
        assert int(progress.memory["removed"][path]) == number
        _, bias = values[norms[path]]
        np.testing.assert_array_equal(gates_of(progress).open[path], bias >= 0)
    # The others come after the sum with a shortcut.
    assert len(remaining(gates_of(progress).active)) == 2
    assert int(entered(program, progress, 4, tlc(5)).phase) > 10


# LaCoOT


@functools.cache
def collapsed_run():
    program = program_of(layer_collapse, RESIDUAL, 2.0, 3, 5)
    logs = []
    watch = train.Watch(every=1, report=lambda progress, own: logs.append(own))
    ends = {}
    watch = watch._replace(ended=lambda p, title: ends.update({title: copied(p)}))
    train.fit(program, begun(program), digits(), watch)
    return program, ends, logs


def test_blocks_are_dropped_one_by_one_the_smallest_distance_first():
    program, ends, logs = collapsed_run()
    assert list(ends) == ["0 dropped", "1 dropped", "2 dropped"]
    masks = jax.jit(program.training.masks)
    trained_state = ends["0 dropped"].state
    distances = ends["1 dropped"].memory["distances"]
    order = sorted(BLOCKS, key=lambda block: float(distances[block]))
    for number, end in enumerate(ends.values()):
        left = set(BLOCKS) - set(order[:number])
        assert set(remaining(gates_of(end).blocks)) == left
        assert program.training.measure(end.state)["blocks_left"] == len(left)
        assert same(end.state.params, trained_state.params)
        assert int(end.state.step) == STEPS
        (used,) = jax.device_get(masks(end.state)).used
        kernels = {p: m for p, m in tree.flatten(used).items() if "kernel" in p}
        assert {p for p, m in kernels.items() if not np.any(m)} == {
            path for path in kernels if path.partition("/")[0] in order[:number]
        }
        assert all(np.all(m) or not np.any(m) for m in kernels.values())
    assert all(own["collapse"] > 0 for own in logs)


def test_gates_are_in_checkpoints(tmp_path):
    program, ends, _ = collapsed_run()
    progress = ends["1 dropped"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, progress, {})
        found = checkpoints.restore(form=lambda notes: program.form(1, digits()))
    assert same(found.state, progress)


def test_distances_are_those_of_sorted_projections():
    program, ends, _ = collapsed_run()
    state = ends["0 dropped"].state
    key = jax.random.fold_in(state.key, 0)
    x = program.training.inputs(train.growth_batch(digits(), 512, key), None)
    read = taps.read(RESIDUAL.apply, BLOCKS)
    _, found = jax.jit(functools.partial(read, train=False))(
        state.params, state.model_state.own, x
    )
    for block, own in zip(BLOCKS, jax.random.split(key, 2), strict=True):
        theta = np.asarray(regularizers.directions(own, 5, 4))
        x, y = (np.asarray(part).reshape(32, -1) @ theta.T for part in found[block])
        gap = np.sort(x, axis=0) - np.sort(y, axis=0)
        expected = np.sqrt((gap**2).mean(axis=0)).max()
        np.testing.assert_allclose(
            ends["1 dropped"].memory["distances"][block], expected, rtol=1e-4
        )


def test_the_penalty_is_added_to_the_loss():
    training, state = collapsed_run()[0].training, collapsed_run()[1]["0 dropped"].state
    pair = (np.ones((8, 3), np.float32), np.zeros((8, 3), np.float32))
    outputs = constraints.collapsed.Passed(np.zeros((8, 4), np.float32), {"b": pair})
    batch = train.take(digits(), np.arange(8))
    context = train.Context({}, {}, state.step, state.settings, None)
    value, logs = jax.jit(training.loss)(outputs, batch, context)
    assert logs["collapse"] > 0
    np.testing.assert_allclose(value, logs["loss"] + 2 * logs["collapse"], rtol=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: easier(0), "rounds"),
        (lambda: easier(1, "first"), "order"),
        (lambda: egp(1, 0.0), r"in \[1e-09, 1\] as `fraction`"),
        (lambda: egp(1, states="off"), "states"),
        (lambda: tlc(0), "rounds"),
        (lambda: layer_collapse(-1.0), "weight"),
        (lambda: layer_collapse(1.0, 0), "removed"),
        (lambda: layer_collapse(1.0, 1, 0), "directions"),
        (
            lambda: train.constrain(plainly(PERCEPTRON), easier(), tlc()),
            "decides the depth, got easier and tlc",
        ),
        (
            lambda: train.constrain(
                plainly(PERCEPTRON), constraints.distilled(), easier()
            ),
            "training of one network for easier",
        ),
        (
            lambda: train.constrain(
                plainly(PERCEPTRON), constraints.static(0.5), egp()
            ),
            "decides the masks, got static and egp",
        ),
    ],
)
def test_bad_input_is_refused_by_a_sentence(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("constraint", "model", "message"),
    [
        (easier(), runs.linear(4), "Linen modules"),
        (easier(), models.from_linen(MLP((6,), 4)), "at least 2 activation functions"),
        (tlc(), PERCEPTRON, "batch normalisation right before .* take easier"),
        (layer_collapse(), PERCEPTRON, "blocks that keep the shape .* resnet20"),
    ],
    ids=["linear", "shallow", "no_norm", "no_block"],
)
def test_a_network_that_does_not_do_is_refused_when_the_training_begins(
    constraint, model, message
):
    program = train.make_program(constraint(plainly(model)))
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(program.init, jax.random.key(0), digits())
    assert "\n" not in str(error.value)
