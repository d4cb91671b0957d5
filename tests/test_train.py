"""The training loop against loops in numpy: one compile, exact resume, one metric."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import sklearn.metrics
from runs import linear
from tiny import SETTINGS, assert_close, perceptron, step_of

from d2sparse import train
from d2sparse.data import Split, load
from d2sparse.masks import apply_masks, dense_masks
from d2sparse.models import Model
from d2sparse.rules import MaskRule, fixed
from d2sparse.schedules import at, every
from d2sparse.train.loops import Stretch, take_steps
from d2sparse.transforms import get_masks, sparsify
from d2sparse.tree import flatten

SIZE, BATCH = 24, 8
# Examples of 70 steps of two runs.
TABLE = np.random.default_rng(0).integers(SIZE, size=(70, 2, BATCH), dtype=np.int32)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def data(digits):
    return train.to_device(
        Split(digits.train.images[:SIZE], digits.train.labels[:SIZE])
    )


def bare_state(step, seed=0):
    """Nothing but a position in the data."""
    faults = train.Faults(jnp.int32(0), jnp.int32(0), jnp.array(False))
    return train.TrainState(
        jnp.int32(step), {}, {}, (), jax.random.key(seed), faults, {}
    )


def convolution():
    """A single convolution, whose outputs are averaged to logits."""

    def init(key, x):
        return {"kernel": jax.random.normal(key, (3, 3, x.shape[-1], 10)) / 3}, {}

    def apply(params, model_state, x, *, train):
        del train
        outputs = jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return outputs.mean(axis=(1, 2)), model_state

    return Model(init, apply)


def counting(step, traces):
    """The same step; leaves a mark at every trace."""

    def traced(*args):
        traces.append(1)
        return step(*args)

    return traced


def runner(step, backend):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: backend)
        return train.make_runner(step)


def larger_half():
    """Half of every kernel is live: the larger weights, later the larger gradients."""

    def half(leaf):
        if leaf.ndim < 2:
            return jnp.ones(leaf.shape, bool)
        # Counted in pairs: sorting takes longer to compile.
        size, order = jnp.abs(leaf).ravel(), jnp.arange(leaf.size)
        smaller = size[None] < size[:, None]
        ties = (size[None] == size[:, None]) & (order[None] < order[:, None])
        ranks = jnp.sum(smaller | ties, axis=1)
        return (ranks >= leaf.size // 2).reshape(leaf.shape)

    return MaskRule(
        init=lambda params, key: jax.tree.map(half, params),
        update=lambda masks, params, grads, step, key: jax.tree.map(half, grads),
    )


def dimmed(key, x):
    """An augmentation: every image at a brightness of its own."""
    return x * jax.random.uniform(key, (len(x), 1, 1, 1))


@pytest.fixture(scope="module")
def sparse_step(data):
    """A step of a sparse network whose mask moves every third step, and its init."""
    model = linear(10)
    optimizer = train.make_optimizer("sgd", 0.02, 5e-4)
    tx = sparsify(optimizer, larger_half(), every(3))
    step = step_of(model, data, tx, 16, augment=dimmed, label_smoothing=0.1)

    @jax.jit
    def init(data, seed=0):
        return train.init_state(model, tx, data, jax.random.key(seed), SETTINGS)

    return step, init


@pytest.fixture(scope="module")
def sparse_run(sparse_step):
    """A runner of those steps as on CPU, and its traces."""
    (step, init), traces = sparse_step, []
    return runner(counting(step, traces), "cpu"), init, traces


@pytest.fixture(scope="module")
def sparse_scan(sparse_step):
    """A runner of those steps as on an accelerator, and its traces."""
    (step, init), traces = sparse_step, []
    return runner(counting(step, traces), "gpu"), init, traces


@pytest.fixture(scope="module")
def convolved(data):
    """A runner of steps of a network with a convolution, as on CPU."""
    model, tx = convolution(), train.make_optimizer("adamw", 0.01)
    step = step_of(model, data, tx)
    init = jax.jit(
        lambda data, seed=0: train.init_state(
            model, tx, data, jax.random.key(seed), SETTINGS
        )
    )
    return runner(step, "cpu"), init, step


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def arrays(state):
    """Every number of a state, on the host."""
    state = jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state)
    return {path: np.array(leaf) for path, leaf in flatten(state).items()}


def copy(state):
    return jax.tree.map(jnp.copy, state)


def assert_same_bits(state, expected):
    jax.tree.map(np.testing.assert_array_equal, arrays(state), arrays(expected))


def cross_entropy(logits, labels, smoothing=0.0):
    """Mean over the batch, in double precision."""
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    own = log_p[np.arange(len(labels)), np.asarray(labels)]
    return -np.mean((1 - smoothing) * own + smoothing * log_p.mean(axis=-1))


def test_inputs_are_the_chosen_images_with_mean_0_and_deviation_1(digits, data):
    pixels = digits.train.images[:SIZE].astype(np.float64)
    expected = (pixels - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(train.inputs(data), expected, atol=1e-5)
    chosen = train.take(data, jnp.array([5, 2]))
    np.testing.assert_allclose(train.inputs(chosen), expected[[5, 2]], atol=1e-5)
    np.testing.assert_array_equal(chosen.labels, digits.train.labels[[5, 2]])


def test_the_test_set_is_standardised_like_the_training_set(digits, data):
    dark = digits.test._replace(images=digits.test.images // 2)
    pixels = digits.train.images[:SIZE].astype(np.float64)
    expected = (dark.images - pixels.mean()) / pixels.std()
    test = train.to_device(dark, like=data)
    np.testing.assert_allclose(train.inputs(test), expected, atol=1e-5)
    alone = train.inputs(train.to_device(dark))
    np.testing.assert_allclose([alone.mean(), alone.std()], [0, 1], atol=1e-5)


def updated(name, weight, gradients, rate, decay, momentum):
    """One parameter after a step for every gradient, in double precision."""
    first = second = np.zeros_like(weight)
    for step, gradient in enumerate(gradients):
        if name == "sgd":
            first = momentum * first + gradient + decay * weight
            change = first
        elif name == "sgdw":
            first = momentum * first + gradient
            change = first + decay * weight
        else:
            first = momentum * first + (1 - momentum) * gradient
            second = 0.999 * second + 0.001 * gradient**2
            unbiased = first / (1 - momentum ** (step + 1))
            scale = np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
            change = unbiased / scale + decay * weight
        weight = weight - rate(step) * change
    return weight


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["sgd", "sgdw", "adamw"])
def test_optimizers_against_numpy(name, sparse):
    def rate(step):
        return 0.1 / (1 + step)

    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    masks = {"kernel": rng.random((3, 4)) < 0.5, "bias": np.ones(4, bool)}
    gradients = [
        {p: rng.normal(size=w.shape) for p, w in params.items()} for _ in "12345"
    ]
    if not sparse:
        masks = dense_masks(params)
    expected = {
        path: updated(
            name,
            weight * masks[path],
            [g[path] * masks[path] for g in gradients],
            rate,
            decay=0.2 if path == "kernel" else 0.0,
            momentum=0.8,
        )
        for path, weight in params.items()
    }

    tx = train.make_optimizer(name, rate, weight_decay=0.2, momentum=0.8)
    tx = sparsify(tx, fixed(masks), at([])) if sparse else tx
    params = apply_masks(jax.tree.map(jnp.float32, params), masks)
    opt_state = tx.init(params)
    for gradient in gradients:
        gradient = jax.tree.map(jnp.float32, gradient)
        updates, opt_state = tx.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    for path in expected:
        np.testing.assert_allclose(params[path], expected[path], atol=2e-6)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="'sgd', 'sgdw' or 'adamw', got 'lion'"):
        train.make_optimizer("lion", 0.1)


def plain_loss(model, like, smoothing=0.0, augment=None):
    """The loss of a plain training, of parameters: what a step differentiates."""
    recipe = train.Recipe(label_smoothing=smoothing, augment=augment)
    training = train.plain(model, like, recipe)

    def loss(params, model_state, batch, key):
        x = training.inputs(batch, key)
        logits, _ = model.apply(params, model_state, x, train=True)
        context = train.Context(params, model_state, jnp.int32(0), SETTINGS, x)
        return training.loss(logits, batch, context)

    return loss


@pytest.mark.parametrize(("smoothing", "augment"), [(0.0, None), (0.2, dimmed)])
def test_the_loss_is_the_mean_cross_entropy_of_augmented_images(
    data, smoothing, augment
):
    model, tx = linear(10), optax.sgd(0.1)
    state = train.init_state(model, tx, data, jax.random.key(1), SETTINGS)
    step = step_of(model, data, tx, label_smoothing=smoothing, augment=augment)
    after, logs = jax.jit(step)(state, data, jnp.arange(SIZE))
    key, x = train.step_keys(state)[0], train.inputs(data)
    shown = x if augment is None else augment(key, x)
    logits, _ = model.apply(state.params, {}, shown, train=True)
    expected = cross_entropy(logits, data.labels, smoothing)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    correct = np.argmax(logits, axis=1) == data.labels
    np.testing.assert_allclose(logs["train_accuracy"], correct.mean(), rtol=1e-6)
    assert after.model_state == {}
    loss = jax.jit(plain_loss(model, data, smoothing, augment))
    value, _ = loss(state.params, {}, data, key)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_first_state_is_masked(data, sparse_run):
    _, init, _ = sparse_run
    state = init(data)
    assert int(state.step) == 0
    masks, params = arrays(get_masks(state.opt_state)), arrays(state.params)
    kernel, live = params["head/kernel"], masks["head/kernel"]
    assert live.sum() == live.size / 2
    np.testing.assert_array_equal(kernel != 0, live)


def test_the_first_state_of_a_dense_optimizer_is_that_of_the_model(data):
    model = linear(10)
    state = train.init_state(model, optax.sgd(0.1), data, jax.random.key(3))
    init_key, _ = jax.random.split(jax.random.key(3))
    params, _ = model.init(init_key, train.inputs(data))
    assert_same_bits(state.params, params)


def assert_same_metrics(logs, expected):
    assert set(logs) == set(expected) == {"loss", "train_accuracy", "skipped", "macs"}
    for name in logs:
        assert logs[name].shape == expected[name].shape
        np.testing.assert_allclose(logs[name], expected[name], atol=1e-5)


@pytest.mark.parametrize(
    "network", ["linear", pytest.param("convolution", marks=pytest.mark.slow)]
)
def test_loop_and_scan_give_the_same_numbers(
    data, sparse_run, sparse_scan, convolved, network
):
    (run, init, _), scan = sparse_run, sparse_scan[0]
    if network == "convolution":
        run, init, step = convolved
        scan = runner(step, "gpu")
    state = init(data)
    indices = train.step_indices(state, data, 8, BATCH)
    looped, loop_logs = run(copy(state), data, indices)
    half, first = scan(state, data, indices[:4])
    scanned, second = scan(half, data, indices[4:])
    # Kernels inside a scan are fused differently: the last bits may differ.
    assert_close(scanned, looped, 1e-5)
    assert loop_logs["loss"].shape == (8,)
    both = {name: np.append(first[name], second[name]) for name in first}
    assert_same_metrics(both, loop_logs)


def test_one_program_serves_every_seed_and_number_of_steps(data, sparse_run):
    run, init, traces = sparse_run
    take_steps(run, init(data), data, Stretch(8, BATCH))
    first = len(traces)
    for seed, steps in [(1, 1), (2, 3), (1, 33), (0, 70)]:
        state, logs = run(init(data, seed), data, TABLE[:steps, 0])
        assert int(state.step) == len(logs["loss"]) == steps
    assert len(traces) == first


def test_one_trace_of_the_scan_serves_every_seed(data, sparse_scan):
    run, init, traces = sparse_scan
    for seed in range(3):
        take_steps(run, init(data, seed), data, Stretch(8, BATCH, every=4))
    assert len(traces) == 1


# Calls of up to 32 steps


def stacked(init, data):
    """The initial states of two runs, stacked, and data that they have in common."""
    states = train.stack_runs([init(data, seed) for seed in range(2)])
    return states, train.stack_runs([data, data])


def test_many_steps_of_a_call_are_the_steps_one_by_one(data, sparse_step, sparse_run):
    (step, _), (run, init, _) = sparse_step, sparse_run
    alone, state, logs = jax.jit(train.guard(step)), init(data), []
    indices = TABLE[:40, 0]
    several, metrics = run(copy(state), data, indices)
    for row in indices:
        state, log = alone(state, data, row)
        logs.append(log)
    # A loop is compiled differently: the last bits may differ.
    assert_close(several, state, 1e-5)
    columns = {name: np.stack([log[name] for log in logs]) for name in logs[0]}
    assert_same_metrics(metrics, columns)


def test_many_steps_of_stacked_runs_are_those_of_each_run(data, sparse_run):
    run, init, traces = sparse_run
    state, both = stacked(init, data)
    indices = TABLE[:40]
    alone = [run(init(data, seed), data, indices[:, seed]) for seed in range(2)]
    end, metrics = run(copy(state), both, indices)
    # A vmapped step is compiled differently: the last bits may differ.
    for number, own in enumerate(train.unstack_runs(end)):
        assert_close(own, alone[number][0], 1e-5)
        column = {name: values[:, number] for name, values in metrics.items()}
        assert_same_metrics(column, alone[number][1])
    first = len(traces)
    for steps in (1, 3, 33):
        run(copy(state), both, indices[:steps])
    assert len(traces) == first


@pytest.mark.parametrize("runs", [1, 2])
def test_interrupted_between_two_calls_it_goes_on_to_the_same_bits(
    data, sparse_run, runs
):
    run, init, _ = sparse_run
    begin = (init(data), data) if runs == 1 else stacked(init, data)
    table = TABLE[:, 0] if runs == 1 else TABLE

    def indices(state, steps):
        return table[int(state.step) :][:steps]

    options = {"steps": 70, "every": None, "indices": indices}
    whole, (last,), _ = recorded_fit(run, copy(begin[0]), begin[1], **options)
    for stop_after, stop in ((1, 32), (2, 64)):
        none, before, saves = recorded_fit(
            run, copy(begin[0]), begin[1], stop_after=stop_after, **options
        )
        ((state, logs),) = saves
        assert (none, before, int(state.step)) == (None, [], stop)
        assert len(logs["loss"]) == stop
        end, (again,), _ = recorded_fit(run, state, begin[1], logs=logs, **options)
        assert_same_bits(end, whole)
        assert again[0] == last[0] == 70
        jax.tree.map(np.testing.assert_array_equal, again[1], last[1])


@pytest.mark.parametrize("runs", [1, 2])
def test_a_network_with_a_convolution_is_trained_step_by_step(data, convolved, runs):
    run, init, _ = convolved
    state, given = (init(data), data) if runs == 1 else stacked(init, data)
    indices = TABLE[:8, 0] if runs == 1 else TABLE[:8]
    asked = []
    after, logs = run(state, given, indices, lambda: asked.append(1) or len(asked) > 2)
    # It is asked before every step but the first.
    assert int(after.step) == len(logs["loss"]) == len(asked) == 3


def test_the_state_is_donated_and_the_data_are_not(data, sparse_run):
    run, init, _ = sparse_run
    state = init(data)
    after = take_steps(run, state, data, Stretch(4, BATCH))
    # jax 0.11 keeps the scalar step, whose buffer it shares with other zeros.
    kept = {path for path, leaf in flatten(state).items() if not leaf.is_deleted()}
    assert kept <= {"step"}
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, data)))


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(data, sparse_run, stop):
    run, init, _ = sparse_run
    whole = take_steps(run, init(data), data, Stretch(8, BATCH))
    part = take_steps(run, init(data), data, Stretch(stop, BATCH, every=3))
    assert int(part.step) == stop
    resumed = take_steps(run, copy(part), data, Stretch(8, BATCH, every=5))
    assert int(resumed.step) == 8
    assert_same_bits(resumed, whole)


def test_the_key_decides_the_run(data, sparse_run):
    run, init, _ = sparse_run
    first = take_steps(run, init(data, 1), data, Stretch(4, BATCH))
    again = take_steps(run, init(data, 1), data, Stretch(4, BATCH))
    assert_same_bits(again, first)
    # Same weights, other run key: other batches and augmentation.
    rekeyed = init(data, 1)._replace(key=jax.random.key(2))
    other = take_steps(run, rekeyed, data, Stretch(4, BATCH))
    assert np.any(other.params["head"]["kernel"] != first.params["head"]["kernel"])


def test_masks_move_at_a_refresh_alone_and_prune_exactly(data, sparse_run):
    run, init, _ = sparse_run
    state, moved = init(data), []
    for step in range(8):
        before = arrays(get_masks(state.opt_state))
        state = take_steps(run, state, data, Stretch(step + 1, BATCH))
        after = arrays(get_masks(state.opt_state))
        if any(np.any(before[path] != after[path]) for path in before):
            moved.append(step)
        for path, weight in arrays(state.params).items():
            assert not np.any(weight[~after[path]])
            assert after[path].sum() == before[path].sum()
    assert moved == [3, 6]


@pytest.mark.parametrize(
    ("start", "steps", "interval", "stops"),
    [
        (0, 8, 4, [4, 8]),
        (1, 8, 3, [3, 6, 8]),
        (0, 3, 7, [3]),
        (4, 8, None, [8]),
        (8, 8, 3, []),
    ],
)
def test_reports_come_at_multiples_with_the_mean_since_the_last(
    data, start, steps, interval, stops
):
    batches, reports = [], []

    def run(state, data, indices, interrupted):
        numbers = np.arange(len(indices)) + int(state.step)
        batches.append(indices)
        logs = {"number": numbers, "skipped": np.zeros(len(indices))}
        return state._replace(step=state.step + len(indices)), logs

    state = bare_state(start)
    stream = train.step_indices(state._replace(step=0), data, 8, BATCH)
    state = take_steps(
        run,
        state,
        data,
        Stretch(steps, BATCH, interval, lambda *args: reports.append(args)),
    )
    assert int(state.step) == max(steps, start)
    assert [report[0] for report in reports] == stops
    for stop, report, begin in zip(stops, reports, [start, *stops], strict=False):
        assert int(report[1].step) == stop
        assert report[2] == {"number": np.mean(np.arange(begin, stop))}
        assert isinstance(report[2]["number"], float)
    if stops:
        np.testing.assert_array_equal(np.concatenate(batches), stream[start:steps])


def test_an_epoch_visits_every_example_once(data):
    state = bare_state(SIZE // BATCH)
    indices = train.step_indices(state, data, SIZE // BATCH, BATCH)
    assert sorted(np.ravel(indices).tolist()) == list(range(SIZE))


def test_the_keys_of_all_steps_differ():
    keys = []
    for seed in range(2):
        for step in range(4):
            state = bare_state(step, seed)
            keys += jax.random.key_data(train.step_keys(state)).tolist()
    assert len({tuple(key) for key in keys}) == len(keys) == 24


def test_a_growth_batch_holds_distinct_examples(data):
    marked = data._replace(labels=jnp.arange(SIZE))
    draws = [train.growth_batch(marked, 10, jax.random.key(seed)) for seed in (0, 1)]
    chosen = [draw.labels.tolist() for draw in draws]
    assert all(len(set(labels)) == 10 for labels in chosen)
    assert set(chosen[0]) != set(chosen[1])
    np.testing.assert_array_equal(draws[0].images, data.images[draws[0].labels])
    everything = train.growth_batch(marked, 1000, jax.random.key(0))
    assert sorted(everything.labels.tolist()) == list(range(SIZE))


def restless():
    """A linear network whose logits depend on a state that every step changes."""
    dense = linear(10)

    def init(key, x):
        return dense.init(key, x)[0], {"scale": jnp.float32(1)}

    def apply(params, model_state, x, *, train):
        logits, _ = dense.apply(params, {}, x, train=train)
        scale = model_state["scale"]
        return scale * logits, {"scale": 1.5 * scale}

    return Model(init, apply)


@pytest.mark.parametrize(
    "growth_samples", [0, 10, pytest.param(1000, marks=pytest.mark.slow)]
)
def test_the_rule_sees_the_gradient_of_the_growth_batch(data, growth_samples):
    model, seen = restless(), []

    def spy(masks, params, grads, step, key):
        jax.debug.callback(lambda *args: seen.append(args), step, grads)
        return masks

    loss = plain_loss(model, data)
    rule = MaskRule(lambda params, key: dense_masks(params), spy)
    tx = sparsify(optax.sgd(0.1), rule, at([1, 4]))
    state = train.init_state(model, tx, data, jax.random.key(0), SETTINGS)
    indices = train.step_indices(state, data, 8, BATCH)
    step = jax.jit(step_of(model, data, tx, growth_samples))
    gradient, expected = jax.jit(jax.grad(loss, has_aux=True)), []
    for row in indices:
        batch = {0: train.take(data, row), 1000: data}.get(growth_samples)
        if batch is None:
            batch = train.growth_batch(data, 10, train.step_keys(state)[1])
        expected.append(gradient(*state[1:3], batch, state.key)[0])
        state, _ = step(state, data, row)
    jax.effects_barrier()
    assert sorted(int(step) for step, _ in seen) == [1, 4]
    for number, grads in seen:
        jax.tree.map(
            lambda g, e: np.testing.assert_allclose(g, e, atol=1e-5),
            grads,
            expected[int(number)],
        )


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_predictions_do_not_depend_on_the_batch_size(data, batch_size, monkeypatch):
    monkeypatch.setattr("d2sparse.train.state._WIDTH", batch_size)
    model, x = perceptron(), train.inputs(data)
    params, _ = model.init(jax.random.key(0), x[:1])
    # Not the statistics of the batch, which is cut up.
    model_state = {"mean": jnp.linspace(-1, 1, 6)}
    logits, _ = model.apply(params, model_state, x, train=False)
    state = bare_state(0)._replace(params=params, model_state=model_state)
    predict = train.make_program(train.plain(model, data)).predict
    probabilities = predict(state, data)["network"]
    assert isinstance(probabilities, np.ndarray)
    assert probabilities.shape == (SIZE, 5)
    np.testing.assert_allclose(
        probabilities, scipy.special.softmax(logits, axis=1), atol=1e-6
    )
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


def test_predictions_of_half_precision_are_probabilities_in_float32(data):
    model = linear(10)
    params, _ = model.init(jax.random.key(0), train.inputs(data)[:1])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def apply(params, model_state, x, *, train):
        return model.apply(params, model_state, x.astype(jnp.bfloat16), train=train)

    state = bare_state(0)._replace(params=half)
    training = train.plain(model, data)._replace(model=Model(model.init, apply))
    predict = train.make_program(training).predict
    probabilities = predict(state, data)["network"]
    logits = np.asarray(apply(half, {}, train.inputs(data), train=False)[0], np.float64)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(
        probabilities, scipy.special.softmax(logits, axis=1), rtol=0.05, atol=1e-6
    )
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="at least one example to predict, got none"):
        predict(state, jax.tree.map(lambda x: x[:0], data))


def test_evaluation_is_over_the_whole_set():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), size=101).astype(np.float32)
    labels = rng.integers(4, size=101)
    scores = train.evaluate(probabilities, labels)
    predicted = probabilities.argmax(axis=1)
    confidence, gap = probabilities.max(axis=1), 0.0
    for lower in np.arange(15) / 15:
        inside = (confidence > lower) & (confidence <= lower + 1 / 15)
        gap += abs(np.sum((predicted == labels)[inside]) - confidence[inside].sum())
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "nll": sklearn.metrics.log_loss(labels, probabilities, labels=range(4)),
        "brier": np.sum((probabilities - np.eye(4)[labels]) ** 2) / 101,
        "ece": gap / 101,
    }
    assert scores.keys() == expected.keys()
    for name, value in scores.items():
        assert isinstance(value, float)
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)


def host_copy(state):
    return jax.tree.map(jnp.copy, state)


def recorded_fit(run, state, data, steps=9, stop_after=None, every=4, **options):
    """A training with its reports and saves; it may be stopped after some steps."""
    reports, saves, asked = [], [], []

    def interrupted():
        asked.append(None)
        return stop_after is not None and len(asked) >= stop_after

    def report(step, state, logs):
        reports.append((step, dict(logs)))

    def save(state, logs):
        saves.append((host_copy(state), {k: list(v) for k, v in logs.items()}))

    try:
        state = take_steps(
            run,
            state,
            data,
            Stretch(
                steps,
                BATCH,
                every,
                report,
                save=save,
                interrupted=interrupted,
                **options,
            ),
        )
    except KeyboardInterrupt:
        state = None
    return state, reports, saves


@pytest.mark.parametrize("stop_after", range(1, 10))
def test_interrupted_at_any_step_it_goes_on_to_the_same_bits(
    data, convolved, stop_after
):
    run, init, _ = convolved
    whole, expected, _ = recorded_fit(run, init(data), data)
    none, before, saves = recorded_fit(run, init(data), data, stop_after=stop_after)
    assert none is None
    ((state, logs),) = saves
    # It is asked before every step of a loop but the first, and after the loop.
    assert int(state.step) <= stop_after
    end, after, _ = recorded_fit(run, state, data, logs=logs)
    assert before + after == expected
    assert_same_bits(end, whole)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_save_is_a_place_to_go_on_from(data, sparse_run, number):
    run, init, _ = sparse_run
    whole, expected, saves = recorded_fit(run, init(data), data, save_every=3)
    assert [int(state.step) for state, _ in saves] == [3, 6, 9]
    assert [len(logs.get("loss", [])) for _, logs in saves] == [3, 2, 0]
    state, logs = saves[number]
    end, after, _ = recorded_fit(run, state, data, logs=logs, save_every=3)
    done = [report for report in expected if report[0] <= 3 * (number + 1)]
    assert done + after == expected
    for path, value in arrays(whole).items():
        np.testing.assert_array_equal(arrays(end)[path], value, err_msg=path)


def test_a_scan_is_not_interrupted_but_what_follows_it_is(data, sparse_scan):
    run, init, _ = sparse_scan
    _, reports, saves = recorded_fit(run, init(data), data, stop_after=1)
    assert [step for step, _ in reports] == [4]
    assert int(saves[-1][0].step) == 4
