"""The pair against a step written by hand, and every invariant of its formulation."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy.special

from d2sparse import distributions, dual, train
from d2sparse.data import Split
from d2sparse.dual import Consolidation, Coupling, Dual, Trace, consolidation
from d2sparse.masks import apply_masks, dense_masks
from d2sparse.models import Model
from d2sparse.rules import MaskRule, static
from d2sparse.schedules import at, cosine, every, refresh_interval
from d2sparse.transforms import get_masks, sparsify
from d2sparse.tree import flatten, is_kernel

SIZE, BATCH, CLASSES = 24, 8, 5
# A prime stop: no drop is a whole number of weights, whose floor rounding decides.
STEPS, STOP = 24, 19
# The fast learner's first and largest move falls on a refresh of both.
INTERVALS, FRACTIONS = Dual(4, 2), Dual(0.8, 0.7)
KERNELS = ("first/kernel", "head/kernel")
RATE, DECAY, MOMENTUM = 0.2, 1e-3, 0.9
SPARSITIES = Dual(0.8, 0.7)
# Coupled as much as can be; every number differs, so that none can stand for another.
COUPLING = Coupling(fast=0.7, slow=0.4, temperature=2.0, ramp=6, masks=1.0)
SMOOTHING = 0.1


def perceptron(width=6):
    """One hidden layer, normalised by the batch and not by the running mean."""

    def init(key, x):
        first, head = jax.random.split(key)
        kernel = jax.random.normal(head, (width, CLASSES))
        params = {"first": {"kernel": jax.random.normal(first, (x[0].size, width))}}
        params["head"] = {"kernel": kernel, "bias": jnp.zeros(CLASSES)}
        return params, {"mean": jnp.zeros(width)}

    def apply(params, model_state, x, *, train):
        hidden = x.reshape(len(x), -1) @ params["first"]["kernel"]
        mean = hidden.mean(axis=0) if train else model_state["mean"]
        hidden = jax.nn.relu(hidden - mean.reshape(1, -1)) / 4
        if train:
            model_state = {"mean": 0.9 * model_state["mean"] + 0.1 * mean}
        head = params["head"]
        return hidden @ head["kernel"] + head["bias"].reshape(1, -1), model_state

    return Model(init, apply)


MODELS = Dual(perceptron(), perceptron())


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(SIZE, 4, 4, 1)).astype(np.uint8)
    labels = rng.integers(CLASSES, size=SIZE).astype(np.int32)
    return train.to_device(Split(images, labels))


def optimizer(rate):
    return train.make_optimizer("sgd", rate, DECAY, MOMENTUM)


def transforms(mode="trained", sparsities=SPARSITIES):
    """The fast learner at a constant rate, the slow one annealed; both masks move."""
    rates = dual.make_plans("fast_slow", RATE, STEPS, 1)
    plans = [
        rate._replace(drop_fraction=cosine(fraction, STOP), when=every(interval, STOP))
        for rate, fraction, interval in zip(rates, FRACTIONS, INTERVALS, strict=True)
    ]
    return dual.make_transforms(Dual(*plans), sparsities, optimizer, mode, horizon=4)


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
    return sparsify(optimizer(RATE), rule, every(interval))


def started(data, tx, coupling, seed):
    """A first state, committed to its device as what Orbax restores is."""
    state = dual.init_pair(MODELS, tx, data, jax.random.key(seed), coupling)
    return jax.device_put(state, jax.devices()[0])


class Recorded(NamedTuple):
    """A run of the pair: every state, the batches, the metrics."""

    tx: Dual
    coupling: Coupling
    run: Any
    states: list
    indices: np.ndarray
    logs: list
    traces: list


def record(data, tx, coupling, smoothing=0.0, growth_samples=1000):
    traces = []
    step = dual.make_dual_step(
        MODELS, tx, coupling, smoothing=smoothing, growth_samples=growth_samples
    )

    def traced(*args):
        traces.append(1)
        return step(*args)

    run = train.make_runner(traced)
    states, logs = [started(data, tx, coupling, 0)], []
    indices = np.asarray(train.step_indices(states[0], data, STEPS, BATCH))
    for row in indices:
        state, log = run(copy(states[-1]), data, row.reshape(1, -1))
        states.append(state)
        logs.append({name: value.item() for name, value in log.items()})
    return Recorded(tx, coupling, run, states, indices, logs, traces)


@pytest.fixture(scope="module")
def trained(data):
    return record(data, transforms(), COUPLING, SMOOTHING)


@pytest.fixture(scope="module")
def consolidated(data):
    coupling = Coupling(fast=0.7, temperature=2.0, masks=0.5)
    return record(data, transforms("consolidated"), coupling)


@pytest.fixture(params=["trained", "consolidated"])
def recorded(request):
    return request.getfixturevalue(request.param)


def copy(state):
    return jax.tree.map(jnp.copy, state)


def arrays(tree):
    """Every number of a tree by path, on the host; random keys as their numbers."""

    def leaf(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    return {path: leaf(x) for path, x in flatten(tree).items()}


def assert_close(tree, expected, atol=0.0):
    tree, expected = arrays(tree), arrays(expected)
    assert tree.keys() == expected.keys()
    for path in tree:
        np.testing.assert_allclose(
            tree[path], expected[path], rtol=0, atol=atol, err_msg=path
        )


def pair_masks(state):
    return Dual(*map(arrays, dual.get_pair_masks(state)))


def live(masks):
    return {path: int(masks[path].sum()) for path in KERNELS}


# The step written by hand.


def cross_entropy(logits, labels, smoothing):
    log_p = jax.nn.log_softmax(logits)
    targets = (1 - smoothing) * jnp.eye(CLASSES)[labels] + smoothing / CLASSES
    return -(targets * log_p).sum(axis=1).mean()


def loss_by_hand(params, model_state, data, peer_logits, weight, tau, smoothing):
    """One network's loss; the peer enters as numbers, so nothing is to be detached."""
    x = train.inputs(data)
    logits, model_state = MODELS.fast.apply(params, model_state, x, train=True)
    p, q = jax.nn.softmax(peer_logits / tau), jax.nn.softmax(logits / tau)
    divergence = (p * (jnp.log(p) - jnp.log(q))).sum(axis=1).mean()
    value = cross_entropy(logits, data.labels, smoothing)
    return value + weight * tau**2 * divergence, (logits, model_state)


GRADIENT = jax.jit(jax.grad(loss_by_hand, has_aux=True))


def gradients_by_hand(state, data, weights, tau, smoothing):
    """Gradient, logits and model state of both networks on a batch."""
    peers = jnp.zeros((2, len(data.labels), CLASSES))
    for _ in range(2):  # The first time only the logits are of use.
        both = [
            GRADIENT(p, s, data, peer, weight, tau, smoothing)
            for p, s, peer, weight in zip(*state[1:3], peers, weights, strict=True)
        ]
        peers = jnp.stack([logits for _, (logits, _) in reversed(both)])
    grads = Dual(*(arrays(gradient) for gradient, _ in both))
    return grads, peers[::-1], Dual(*(arrays(new) for _, (_, new) in both))


def largest(scores, k):
    """The k largest scores, ties to the lower index."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:k]] = True
    return mask.reshape(scores.shape)


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


def half_cosine(step, steps):
    return (1 + np.cos(np.pi * min(step / steps, 1))) / 2


def step_by_hand(recorded, state, data, row, smoothing):
    """Parameters, masks, moments (fast, and slow where trained) and model states."""
    step, coupling = int(state.step), recorded.coupling
    ramp = min(1.0, step / coupling.ramp) if coupling.ramp else 1.0
    weights, tau = (ramp * coupling.fast, ramp * coupling.slow), coupling.temperature
    batch = train.take(data, row)
    grads, _, model_state = gradients_by_hand(state, batch, weights, tau, smoothing)
    dense, _, _ = gradients_by_hand(state, data, weights, tau, smoothing)
    params, masks = Dual(*map(arrays, state.params)), pair_masks(state)
    fast, slow = masks
    is_time = Dual(*(0 < step < STOP and step % n == 0 for n in INTERVALS))
    kappa, cosine_now = coupling.masks, half_cosine(step, STOP)
    if is_time.fast:
        fraction = FRACTIONS.fast * cosine_now
        fast = refreshed_masks(fast, params.fast, dense.fast, slow, kappa, fraction)
    moments = moments_of(state.opt_state.fast)
    result = [descended(params.fast, moments, grads.fast, fast, RATE / 2)]
    if not isinstance(state.opt_state.slow, Trace):
        if is_time.slow:
            fraction = FRACTIONS.slow * cosine_now
            slow = refreshed_masks(slow, params.slow, dense.slow, fast, kappa, fraction)
        moments = moments_of(state.opt_state.slow)
        rate = RATE * half_cosine(step, STEPS)
        result.append(descended(params.slow, moments, grads.slow, slow, rate))
    return result, Dual(fast, slow), model_state


def test_every_step_is_that_of_the_step_by_hand(data, trained):
    steps = zip(itertools.pairwise(trained.states), trained.indices, strict=True)
    for (before, after), row in steps:
        learners, masks, model_state = step_by_hand(
            trained, before, data, row, SMOOTHING
        )
        for learner, (params, moments) in enumerate(learners):
            assert_close(after.params[learner], params, atol=1e-5)
            assert_close(pair_masks(after)[learner], masks[learner])
            trace = moments_of(after.opt_state[learner])
            trace = {path: trace[path] * masks[learner][path] for path in trace}
            assert_close(trace, moments, atol=1e-5)
            assert_close(after.model_state[learner], model_state[learner], atol=1e-6)
        assert int(after.step) == int(before.step) + 1


def test_the_fast_learner_of_a_consolidated_pair_is_that_of_the_step_by_hand(
    data, consolidated
):
    steps = zip(
        itertools.pairwise(consolidated.states), consolidated.indices, strict=True
    )
    for (before, after), row in steps:
        (learner,), masks, model_state = step_by_hand(
            consolidated, before, data, row, smoothing=0.0
        )
        assert_close(after.params.fast, learner[0], atol=1e-5)
        assert_close(pair_masks(after).fast, masks.fast)
        # The slow network keeps statistics of its own, by its own forward pass.
        assert_close(after.model_state, Dual(*model_state), atol=1e-6)
    means = after.model_state.fast["mean"] - after.model_state.slow["mean"]
    assert np.abs(means).max() > 0.01


def test_the_slow_learner_is_the_masked_running_average_of_the_fast(consolidated):
    """It moves by no gradient: the fast learner's weights say all about it."""
    average = arrays(consolidated.states[0].params.fast)
    masks = pair_masks(consolidated.states[0]).slow
    counts = live(masks)
    for step, state in enumerate(consolidated.states[1:]):
        decay = min(0.75, 1 - 1 / (step + 1))
        fast, fast_masks = arrays(state.params.fast), pair_masks(state).fast
        average = {p: decay * a + (1 - decay) * fast[p] for p, a in average.items()}
        if step in range(2, STOP, 2):
            redrawn = {p: largest(np.abs(average[p]), counts[p]) for p in KERNELS}
            masks = {**masks, **redrawn}
            average = {p: a * (fast_masks[p] | masks[p]) for p, a in average.items()}
            total = sum(live(masks).values()) + sum(live(fast_masks).values())
            assert sum(np.count_nonzero(average[p]) for p in KERNELS) <= total
        trace = state.opt_state.slow
        assert_close(trace.average, average, atol=1e-6)
        assert_close(trace.masks, masks)
        slow = {path: a * masks[path] for path, a in average.items()}
        assert_close(state.params.slow, slow, atol=1e-6)


def test_the_average_forgets_what_is_live_in_neither(consolidated):
    before, after = consolidated.states[8:10]
    held = arrays(before.opt_state.slow.average), arrays(after.opt_state.slow.average)
    assert sum(np.sum((held[0][p] != 0) & (held[1][p] == 0)) for p in KERNELS) > 0
    masks = pair_masks(after)
    for path in KERNELS:
        assert not np.any(held[1][path][~masks.fast[path] & ~masks.slow[path]])


def test_the_counts_of_every_layer_never_change(recorded):
    first = Dual(*map(live, pair_masks(recorded.states[0])))
    for state in recorded.states:
        masks = pair_masks(state)
        assert Dual(*map(live, masks)) == first
        assert all(mask["head/bias"].all() for mask in masks)
    shapes = {"first/kernel": (16, 6), "head/kernel": (6, CLASSES)}
    for counts, sparsity in zip(first, (0.8, 0.7), strict=True):
        assert counts == distributions.erk(shapes, sparsity)


def test_pruned_weights_are_zero_at_every_step(recorded):
    for state in recorded.states:
        for params, masks in zip(state.params, pair_masks(state), strict=True):
            params = arrays(params)
            assert not any(np.any(params[path][~masks[path]]) for path in KERNELS)


def test_masks_move_at_their_refreshes_and_at_no_other_step(recorded):
    moved = Dual([], [])
    for step, (before, after) in enumerate(itertools.pairwise(recorded.states)):
        for steps, old, new in zip(
            moved, pair_masks(before), pair_masks(after), strict=True
        ):
            if any(np.any(old[path] != new[path]) for path in KERNELS):
                steps.append(step)
    # What has fallen may grow again, and a late drop fraction is less than one weight.
    assert {4, 8} <= set(moved.fast) <= set(range(4, STOP, 4))
    assert {4, 6} <= set(moved.slow) <= set(range(2, STOP, 2))


def test_a_grown_weight_starts_at_zero_without_momentum(trained):
    grown_weights = 0
    for step, (before, after) in enumerate(itertools.pairwise(trained.states)):
        rates = RATE / 2, RATE * half_cosine(step, STEPS)
        for learner, rate in enumerate(rates):
            old, new = pair_masks(before)[learner], pair_masks(after)[learner]
            params = arrays(after.params[learner])
            moments = moments_of(after.opt_state[learner])
            for path in KERNELS:
                grown = new[path] & ~old[path]
                grown_weights += grown.sum()
                np.testing.assert_allclose(
                    params[path][grown], -rate * moments[path][grown], rtol=1e-5
                )
    assert grown_weights > 30


def test_growth_avoids_what_is_live_in_the_peer(trained):
    for before, after in itertools.pairwise(trained.states):
        old, new = pair_masks(before), pair_masks(after)
        for path in KERNELS:
            # The slow learner looks at the mask that the fast one has just got.
            assert not np.any(new.fast[path] & ~old.fast[path] & old.slow[path])
            assert not np.any(new.slow[path] & ~old.slow[path] & new.fast[path])


def test_one_trace_serves_every_step_and_every_seed(data, recorded):
    state = started(data, recorded.tx, recorded.coupling, 1)
    recorded.run(state, data, recorded.indices[:3])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert len(recorded.traces) == 1


def test_metrics_are_those_of_the_batch_before_the_update(data, trained):
    for step in (0, 7):
        state, row = trained.states[step], trained.indices[step]
        batch = train.take(data, row)
        _, logits, _ = gradients_by_hand(state, batch, (0.0, 0.0), 1.0, 0.0)
        fast, slow = np.asarray(logits)
        labels, logs = np.asarray(batch.labels), trained.logs[step]
        together = jax.nn.softmax(fast) + jax.nn.softmax(slow)
        expected = {
            "loss": cross_entropy(fast, labels, 0.0),
            "loss_slow": cross_entropy(slow, labels, 0.0),
            "train_accuracy": np.mean(together.argmax(axis=1) == labels),
            "disagreement": np.mean(fast.argmax(axis=1) != slow.argmax(axis=1)),
            "skipped": 0.0,
        }
        assert logs.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(logs[name], value, rtol=1e-5, err_msg=name)


def test_a_checkpoint_of_orbax_resumes_bit_for_bit(data, recorded, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", recorded.states[7])
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", copy(recorded.states[0]))
    assert_close(restored, recorded.states[7])
    state, _ = recorded.run(restored, data, recorded.indices[7:])
    assert_close(state, recorded.states[-1])


def dimmed(key, x):
    """An augmentation: every image at a brightness of its own."""
    return x * jax.random.uniform(key, (len(x), 1, 1, 1))


@pytest.fixture(scope="module")
def separate(data):
    """Two learners that do not influence each other, and each of them trained alone."""
    tx = Dual(larger_half(3), larger_half(2))
    off = Coupling(fast=0.0, slow=0.0, masks=0.0)
    start = dual.init_pair(MODELS, tx, data, jax.random.key(1), off)
    alone = []
    for model, learner, parts in zip(
        MODELS, tx, zip(*start[1:4], strict=True), strict=True
    ):
        loss = train.make_loss(model, dimmed, SMOOTHING)
        run = train.make_runner(train.make_train_step(loss, learner, 10))
        state = copy(train.TrainState(start.step, *parts, *start[4:]))
        alone.append(train.fit(run, state, data, 8, BATCH))
    return tx, start, Dual(*alone)


@pytest.mark.parametrize("fast", [0.0, 1.0])
def test_an_untaught_learner_moves_as_if_it_were_alone(data, separate, fast):
    """The gradient of the fast loss with respect to the slow network is zero."""
    tx, start, alone = separate
    coupling = Coupling(fast=fast, slow=0.0, masks=0.0)
    step = dual.make_dual_step(MODELS, tx, coupling, dimmed, SMOOTHING, 10)
    pair = train.fit(train.make_runner(step), copy(start), data, 8, BATCH)
    # XLA fuses the two programs differently: the last bits may differ.
    for learner in (0, 1) if fast == 0 else (1,):
        for part in ("params", "model_state"):
            expected = getattr(alone[learner], part)
            assert_close(getattr(pair, part)[learner], expected, atol=1e-5)
        masks = get_masks(alone[learner].opt_state)
        assert_close(get_masks(pair.opt_state[learner]), masks)
    if fast:
        kernels = (
            pair.params.fast["head"]["kernel"],
            alone.fast.params["head"]["kernel"],
        )
        assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


@pytest.fixture(scope="module")
def mutual_learning(data):
    """Two dense networks: deep mutual learning."""
    network = sparsify(optimizer(RATE), static(0.0), at([]))
    coupling, tx = Coupling(masks=0.0), Dual(network, network)
    run = train.make_runner(dual.make_dual_step(MODELS, tx, coupling))
    return run, dual.init_pair(MODELS, tx, data, jax.random.key(2), coupling)


def learned_by_hand(state, data, weights):
    params = Dual(*map(arrays, state.params))
    dense = {path: np.ones(leaf.shape, bool) for path, leaf in params.fast.items()}
    moments = [{path: np.zeros_like(p) for path, p in params.fast.items()}] * 2
    for row in train.step_indices(state, data, 8, BATCH):
        tree = [
            {"first": {"kernel": p[KERNELS[0]]}}
            | {"head": {"kernel": p[KERNELS[1]], "bias": p["head/bias"]}}
            for p in params
        ]
        batch, now = train.take(data, row), state._replace(params=tree)
        grads, _, _ = gradients_by_hand(now, batch, weights, 1.0, 0.0)
        learned = map(descended, params, moments, grads, [dense] * 2, [RATE] * 2)
        params, moments = zip(*learned, strict=True)
    return params


def test_two_dense_networks_learn_mutually(data, mutual_learning):
    run, start = mutual_learning
    expected = learned_by_hand(start, data, weights=(1.0, 1.0))
    state = train.fit(run, copy(start), data, 8, BATCH)
    for params, by_hand in zip(state.params, expected, strict=True):
        assert_close(params, by_hand, atol=1e-5)
    assert dual.stored_numbers(state) == 2 * (16 * 6 + 6 * CLASSES + CLASSES)


def test_equal_networks_teach_each_other_nothing(data, mutual_learning):
    run, start = mutual_learning
    start = copy(
        start._replace(
            params=Dual(start.params.fast, start.params.fast),
            opt_state=Dual(start.opt_state.fast, start.opt_state.fast),
        )
    )
    expected = learned_by_hand(start, data, weights=(0.0, 0.0))
    state = train.fit(run, start, data, 8, BATCH)
    for params, by_hand in zip(state.params, expected, strict=True):
        assert_close(params, by_hand, atol=1e-5)


@pytest.mark.parametrize("independent", [False, True])
def test_views_are_shared_or_independent(data, independent):
    """The models' state is what they were given to see."""
    seeing = Model(
        init=lambda key, x: (perceptron().init(key, x)[0], {"seen": jnp.zeros(BATCH)}),
        apply=lambda params, state, x, *, train: (
            perceptron().apply(params, {"mean": jnp.zeros(6)}, x, train=train)[0],
            {"seen": x[:, 0, 0, 0]},
        ),
    )
    models, tx = Dual(seeing, seeing), Dual(larger_half(2), larger_half(2))
    coupling = Coupling(masks=0.0, independent_views=independent)
    state = dual.init_pair(models, tx, data, jax.random.key(0), coupling)
    step = jax.jit(dual.make_dual_step(models, tx, coupling, dimmed, growth_samples=0))
    state, _ = step(state, data, jnp.arange(BATCH))
    seen, pixels = state.model_state, train.inputs(data)[:BATCH, 0, 0, 0]
    for view in seen:
        shares = view["seen"] / pixels
        assert np.all((shares > 0) & (shares < 1))
    assert np.any(seen.fast["seen"] != seen.slow["seen"]) == independent


def test_networks_of_different_widths_learn_from_each_other(data):
    models = Dual(perceptron(6), perceptron(3))
    tx, coupling = Dual(larger_half(2), larger_half(2)), Coupling(masks=0.0)
    start = dual.init_pair(models, tx, data, jax.random.key(0), coupling)
    step = dual.make_dual_step(models, tx, coupling, growth_samples=0)
    state = train.fit(train.make_runner(step), copy(start), data, 4, BATCH)
    for params, before in zip(state.params, start.params, strict=True):
        assert np.abs(params["head"]["kernel"] - before["head"]["kernel"]).max() > 1e-3
    assert state.params.slow["first"]["kernel"].shape == (16, 3)
    with pytest.raises(ValueError, match="set the mask coupling to 0"):
        dual.init_pair(models, tx, data, jax.random.key(0), Coupling(masks=0.1))


@pytest.fixture(scope="module")
def starts(data):
    """First states by mask coupling."""
    tx = transforms(sparsities=Dual(0.5, 0.4))

    def start(kappa):
        coupling = Coupling(masks=kappa)
        return dual.init_pair(MODELS, tx, data, jax.random.key(0), coupling)

    return {kappa: start(kappa) for kappa in (1.0, 0.5, -1.0)}


def test_complementary_masks_overlap_as_little_as_they_can(trained, starts):
    for state in (trained.states[0], starts[1.0]):
        fast, slow = pair_masks(state)
        for path in KERNELS:
            surplus = fast[path].sum() + slow[path].sum() - fast[path].size
            assert np.sum(fast[path] & slow[path]) == max(surplus, 0)


def test_attracted_masks_overlap_as_much_as_they_can(starts):
    fast, slow = pair_masks(starts[-1.0])
    for path in KERNELS:
        smaller = min(fast[path].sum(), slow[path].sum())
        assert np.sum(fast[path] & slow[path]) == smaller


def test_masks_overlap_the_less_the_stronger_they_are_coupled(starts):
    overlaps = {}
    for kappa, state in starts.items():
        fast, slow = pair_masks(state)
        overlaps[kappa] = sum(np.sum(fast[path] & slow[path]) for path in KERNELS)
    chance = sum(fast[path].mean() * slow[path].sum() for path in KERNELS)
    assert overlaps[1.0] < overlaps[0.5] < chance < overlaps[-1.0]


def test_every_live_weight_starts_at_the_value_of_its_network(starts, separate):
    for state in (*starts.values(), separate[1]):
        for params, masks in zip(state.params, pair_masks(state), strict=True):
            params = arrays(params)
            for path in KERNELS:
                np.testing.assert_array_equal(params[path] != 0, masks[path])
        fast, slow = (arrays(params)[KERNELS[0]] for params in state.params)
        assert not np.any((fast == slow) & (fast != 0))


def test_a_consolidating_learner_starts_at_the_largest_weights_of_the_fast(
    consolidated,
):
    state = consolidated.states[0]
    fast, masks = arrays(state.params.fast), pair_masks(state).slow
    for path in KERNELS:
        expected = largest(np.abs(fast[path]), masks[path].sum())
        np.testing.assert_array_equal(masks[path], expected)
    slow = {path: weight * masks[path] for path, weight in fast.items()}
    assert_close(state.params.slow, slow)
    assert_close(state.opt_state.slow.average, fast)


def test_parts_of_the_first_state_share_no_buffer(recorded):
    def pointer(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return (jax.random.key_data(leaf) if is_key else leaf).unsafe_buffer_pointer()

    pointers = [pointer(leaf) for leaf in jax.tree.leaves(recorded.states[0])]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("kappa", [-1.0, -0.5, 0.0, 0.3, 1.0])
def test_discouraged_gradients(kappa):
    rng = np.random.default_rng(0)
    grads, peer = rng.normal(size=(3, 4)), rng.random((3, 4)) < 0.5
    actual = dual.discourage({"w": jnp.float32(grads)}, {"w": jnp.array(peer)}, kappa)
    expected = [
        [g * max(1 - kappa, 1e-6) if m else g for g, m in zip(*rows, strict=True)]
        for rows in zip(grads, peer, strict=True)
    ]
    np.testing.assert_allclose(actual["w"], expected, rtol=1e-6)


CONSOLIDATION = Consolidation(0.75, 0.0, every(3))


@jax.jit
def consolidate(trace, fast, masks, step, decay):
    how = CONSOLIDATION._replace(decay=decay)
    return dual.consolidate(trace, fast, masks, step, how)


def random_params(seed, sparsity=0.5):
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(8, 4)), "bias": rng.normal(size=4)}
    masks = {"kernel": rng.random((8, 4)) > sparsity, "bias": np.ones(4, bool)}
    params = apply_masks(jax.tree.map(jnp.float32, params), masks)
    return params, jax.tree.map(jnp.asarray, masks)


def quarter_masks():
    return {"kernel": jnp.arange(32).reshape(8, 4) < 8, "bias": jnp.ones(4, bool)}


def test_without_memory_the_slow_learner_is_the_top_of_the_fast():
    trace = Trace(random_params(0)[0], quarter_masks())
    fast, fast_masks = random_params(1)
    slow, trace = consolidate(trace, fast, fast_masks, 3, 0.0)
    kernel = np.array(fast["kernel"])
    np.testing.assert_array_equal(trace.masks["kernel"], largest(np.abs(kernel), 8))
    np.testing.assert_array_equal(slow["kernel"], kernel * trace.masks["kernel"])
    np.testing.assert_array_equal(slow["bias"], fast["bias"])
    assert_close(trace.average, fast)


def test_the_running_average_begins_as_a_plain_mean():
    trace, seen = Trace(random_params(0)[0], quarter_masks()), []
    for step, seed in enumerate((1, 2)):
        fast, _ = random_params(seed, sparsity=0.0)
        seen.append(np.array(fast["kernel"]))
        slow, trace = consolidate(trace, fast, dense_masks(fast), step, 0.9)
        mean = np.mean(seen, axis=0)
        np.testing.assert_allclose(trace.average["kernel"], mean, atol=1e-6)
        np.testing.assert_allclose(slow["kernel"][:2], mean[:2], atol=1e-6)
        assert not np.any(slow["kernel"][2:])


def half(params):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def test_the_running_average_of_bfloat16_keeps_moving():
    # 1 + (1 - 0.995) is 1 in bfloat16.
    ones = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
    how = Consolidation(0.75, 0.995, every(3))
    trace, slow = consolidation.begin_trace(half(ones), how, is_kernel)
    twos = half(jax.tree.map(lambda x: 2 * x, ones))
    masks, exact = dense_masks(ones), np.float64(1.0)
    for step in range(500, 800):
        slow, trace = consolidate(trace, twos, masks, step, 0.995)
        exact = 0.995 * exact + 0.005 * 2
    assert trace.average["bias"].dtype == jnp.float32
    np.testing.assert_allclose(trace.average["bias"], exact, rtol=1e-5)
    assert slow["bias"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(slow["bias"]), exact, rtol=2**-8)


def test_merging_bfloat16_rounds_once():
    params, masks = zip(*(random_params(seed) for seed in (0, 1)), strict=True)
    given = Dual(*map(half, params))
    merged, live = dual.merge(given, Dual(*masks), 0.3)
    wide = Dual(*(jax.tree.map(jnp.float32, own) for own in given))
    expected, expected_live = dual.merge(wide, Dual(*masks), 0.3)
    jax.tree.map(np.testing.assert_array_equal, live, expected_live)
    jax.tree.map(np.testing.assert_array_equal, merged, half(expected))


def test_stored_numbers_by_hand(trained, consolidated):
    bias = CLASSES
    state = trained.states[5]
    masks = pair_masks(state)
    kernels = sum(live(masks.fast).values()) + sum(live(masks.slow).values())
    assert dual.stored_numbers(state) == kernels + 2 * bias
    assert kernels == round(0.2 * 126) + round(0.3 * 126)
    for step in (3, 9, 17):
        state = consolidated.states[step]
        average = arrays(state.opt_state.slow.average)
        support = sum(np.count_nonzero(average[path]) for path in KERNELS)
        fast = sum(live(pair_masks(state).fast).values())
        assert dual.stored_numbers(state) == fast + support + 2 * bias


def test_a_bias_that_is_zero_is_stored_all_the_same(consolidated):
    state = consolidated.states[0]
    assert not np.any(state.opt_state.slow.average["head"]["bias"])
    live_weights = sum(live(pair_masks(state).fast).values())
    # The average starts at the fast learner's weights.
    assert dual.stored_numbers(state) == 2 * live_weights + 2 * CLASSES


def forward(masks, cost):
    return sum(cost[path] * masks[path].mean() for path in cost)


@pytest.mark.parametrize(
    ("interval", "growth_samples"),
    [
        (Dual(4.0, 16.0), 24),
        (Dual(4.0, 16.0), 0),
        (Dual(None, 16.0), 24),
        (Dual(None, None), 24),
        (Dual(None, None), 0),
    ],
)
def test_macs_by_hand(recorded, interval, growth_samples):
    state = recorded.states[5]
    cost = {"first/kernel": 96, "head/kernel": 30, "head/bias": 0}
    other = {"first/kernel": 960, "head/kernel": 300, "head/bias": 0}
    fast, slow = (
        forward(masks, c)
        for masks, c in zip(pair_masks(state), (cost, other), strict=True)
    )

    def row(own, dense, peer, interval):
        if interval is None:
            return 3 * own
        if growth_samples == 0:
            return (3 * own * interval + 2 * own + dense) / (interval + 1)
        # The weights' gradient is dense, both passes through the network are sparse.
        growth = 2 * own + dense + peer
        return 3 * own + growth_samples * growth / (BATCH * interval)

    training = row(fast, 126, slow, interval.fast)
    if isinstance(state.opt_state.slow, Trace):
        training += slow
    else:
        training += row(slow, 1260, fast, interval.slow)
    actual = dual.pair_macs(state, Dual(cost, other), interval, growth_samples, BATCH)
    expected = {
        "training": training,
        "fast": fast,
        "slow": slow,
        "ensemble": fast + slow,
    }
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-6, err_msg=name)


def test_predictions_of_the_three_outputs(data, recorded):
    state = recorded.states[-1]
    predict = Dual(*map(train.make_predict, MODELS))
    outputs = dual.pair_predictions(predict, state, data)
    x, expected = train.inputs(data), {}
    for name, model, params, model_state in zip(
        Dual._fields, MODELS, *state[1:3], strict=True
    ):
        logits, _ = model.apply(params, model_state, x, train=False)
        expected[name] = scipy.special.softmax(logits, axis=1)
    expected["ensemble"] = (expected["fast"] + expected["slow"]) / 2
    assert outputs.keys() == expected.keys()
    for name, probabilities in outputs.items():
        np.testing.assert_allclose(probabilities, expected[name], atol=1e-6)
    headline = "slow" if isinstance(state.opt_state.slow, Trace) else "ensemble"
    assert next(iter(outputs)) == headline


SIZES = [20, 126, 997, 4096, 23_824, 11_164_352]


@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9])
def test_two_learners_share_the_budget_of_one_exactly(sparsity, share):
    for size in SIZES + list(range(50, 80)):
        shapes = {"a": (size - size // 3,), "b": (size // 3,)}
        pair = dual.split_sparsity(size, sparsity, share)
        counts = [sum(distributions.uniform(shapes, s).values()) for s in pair]
        total = round((1 - sparsity) * size)
        assert sum(counts) == total
        assert counts[0] == round(share * total)


@pytest.mark.parametrize(
    ("sparsity", "share"), [(1.0, 0.5), (-0.1, 0.5), (0.5, 0.0), (0.5, 1.0)]
)
def test_a_split_out_of_range_is_refused(sparsity, share):
    with pytest.raises(ValueError, match=f"sparsity={sparsity}, share={share}"):
        dual.split_sparsity(100, sparsity, share)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fast": -1.0}, "got fast=-1.0"),
        ({"slow": -0.5}, "slow=-0.5"),
        ({"ramp": -1}, "ramp=-1"),
        ({"temperature": 0.0}, "temperature above 0, got 0.0"),
        ({"masks": 1.5}, "got 1.5; 1 makes the"),
    ],
)
def test_a_coupling_out_of_range_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Coupling(**values)


def test_the_fast_slow_plans():
    fast, slow = dual.make_plans("fast_slow", 0.1, steps=1000, interval=25)
    for step in (0, 100, 500, 999):
        np.testing.assert_allclose(fast.learning_rate(step), 0.05, rtol=1e-6)
        annealed = 0.1 * half_cosine(step, 1000)
        np.testing.assert_allclose(slow.learning_rate(step), annealed, atol=1e-8)
        cosine = half_cosine(step, 750)
        np.testing.assert_allclose(fast.drop_fraction(step), 0.5 * cosine, atol=1e-7)
        np.testing.assert_allclose(slow.drop_fraction(step), 0.1 * cosine, atol=1e-7)
    due = [
        [step for step in range(0, 1000, 25) if plan.when(step)]
        for plan in (fast, slow)
    ]
    assert due == [list(range(25, 750, 25)), list(range(100, 750, 100))]
    assert not any(fast.when(step) for step in (26, 751, 999))
    assert (fast.interval, slow.interval) == (25, 100)


def test_the_symmetric_plans():
    fast, slow = dual.make_plans("symmetric", 0.1, steps=1000, interval=25)
    assert fast == slow
    for step in (0, 100, 500, 999):
        annealed = 0.1 * half_cosine(step, 1000)
        np.testing.assert_allclose(fast.learning_rate(step), annealed, atol=1e-8)
        cosine = half_cosine(step, 750)
        np.testing.assert_allclose(fast.drop_fraction(step), 0.3 * cosine, atol=1e-7)
    due = [step for step in range(0, 1000, 25) if fast.when(step)]
    assert due == list(range(25, 750, 25))
    with pytest.raises(ValueError, match="got 'slow_fast'"):
        dual.make_plans("slow_fast", 0.1, 1000, 25)


@pytest.mark.parametrize(
    ("samples", "batch_size", "stop", "expected"),
    [
        (100, 32, 750, 25),  # 4 steps are a pass, 19 a fortieth
        (100, 32, 1500, 38),  # ceil(37.5)
        (5000, 64, 3000, 79),  # ceil(78.1)
        (24, 8, 18, 25),
    ],
)
def test_the_interval_between_refreshes(samples, batch_size, stop, expected):
    assert refresh_interval(samples, batch_size, stop) == expected


def test_transforms_have_masks_and_keys_of_their_own():
    plans = dual.make_plans("symmetric", RATE, STEPS, 2)
    sparsities, params = Dual(0.8, 0.8), {"kernel": jnp.ones((8, 4))}
    tx = dual.make_transforms(plans, sparsities, optimizer, key=jax.random.key(3))
    fast, slow = (learner.init(params) for learner in tx)
    masks = Dual(fast.masks["kernel"], slow.masks["kernel"])
    assert masks.fast.sum() == masks.slow.sum() == round(0.2 * 32)
    assert np.any(masks.fast != masks.slow)
    assert np.any(fast.key != slow.key)
    again = dual.make_transforms(plans, sparsities, optimizer, key=3)
    assert np.all(again.fast.init(params).key == fast.key)


def test_a_consolidating_learner_follows_its_plan():
    plans = dual.make_plans("fast_slow", RATE, STEPS, 2)
    how = dual.make_transforms(
        plans, Dual(0.8, 0.7), optimizer, "consolidated", horizon=10
    ).slow
    assert how == Consolidation(0.7, 0.9, plans.slow.when)


@pytest.mark.parametrize(
    ("mode", "horizon", "message"),
    [
        ("frozen", None, "got 'frozen'"),
        ("consolidated", None, "horizon of at least 1 step, got None"),
        ("consolidated", 0.5, "horizon of at least 1 step, got 0.5"),
    ],
)
def test_transforms_refuse(mode, horizon, message):
    plans = dual.make_plans("symmetric", RATE, STEPS, 2)
    with pytest.raises(ValueError, match=message):
        dual.make_transforms(plans, Dual(0.8, 0.8), optimizer, mode, horizon)
