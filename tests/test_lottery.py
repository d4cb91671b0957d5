"""Iterative magnitude pruning against a loop in numpy, with real and with fake runs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2sparse import scores, train
from d2sparse.data import Split
from d2sparse.lottery import (
    find_ticket,
    prune_live,
    rewind,
    round_sparsities,
    start_from,
)
from d2sparse.masks import dense_masks
from d2sparse.models import Model
from d2sparse.rules import fixed
from d2sparse.schedules import at
from d2sparse.train import TrainState
from d2sparse.transforms import (
    average_weights,
    freeze,
    get_average,
    get_masks,
    sparsify,
)

SPARSITIES = (0.5, 0.75, 0.9)
KERNELS = ("first", "head")
NO_FAULTS = train.Faults(jnp.int32(0), jnp.int32(0), jnp.array(False))


def perceptron():
    """One hidden layer; its state counts the training passes."""

    def init(key, x):
        first, head = jax.random.split(key)
        params = {"first": jax.random.normal(first, (x[0].size, 6)) / 8}
        params |= {"bias": jnp.zeros(6), "head": jax.random.normal(head, (6, 10))}
        return params, {"passes": jnp.zeros((), jnp.int32)}

    def apply(params, model_state, x, *, train):
        hidden = x.reshape(len(x), -1) @ params["first"] + params["bias"].reshape(1, -1)
        passes = model_state["passes"] + train
        return jax.nn.relu(hidden) @ params["head"], {"passes": passes}

    return Model(init, apply)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(24, 4, 4, 1)).astype(np.uint8)
    return train.to_device(Split(images, rng.integers(10, size=24).astype(np.int32)))


def make_run(data, wrap):
    """A first state, `(state, step) -> state` that uses it up, and its traces."""
    model, traces = perceptron(), []
    params, _ = model.init(jax.random.key(0), train.inputs(data))
    masks = fixed(dense_masks(params))
    tx = wrap(train.make_optimizer("sgd", 0.1, 5e-4), masks, at([]))
    step = train.make_train_step(train.make_loss(model), tx)

    def traced(*args):
        traces.append(1)
        return step(*args)

    run = train.make_runner(traced)

    def fit(state, stop):
        return train.fit(run, state, data, stop, batch_size=8)

    return train.init_state(model, tx, data, jax.random.key(0)), fit, traces


@pytest.fixture(scope="module")
def dense_run(data):
    return make_run(data, sparsify)


@pytest.fixture(scope="module")
def frozen_run(data):
    return make_run(data, freeze)


def copy(state):
    return jax.tree.map(jnp.copy, state)


def host(tree):
    """A copy on the host, random keys as their numbers."""

    def leaf(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(leaf, tree)


def assert_same_bits(state, expected):
    jax.tree.map(np.testing.assert_array_equal, host(state), host(expected))


def largest_live(params, masks, sparsity):
    """One weight at a time: the largest of those that are live."""
    order = []
    for leaf, name in enumerate(KERNELS):
        for index in np.argwhere(masks[name]):
            size = abs(float(params[name][tuple(index)]))
            order.append((-size, leaf, tuple(index)))
    total = sum(params[name].size for name in KERNELS)
    kept = {name: np.zeros(params[name].shape, bool) for name in KERNELS}
    for _, leaf, index in sorted(order)[: round((1 - sparsity) * total)]:
        kept[KERNELS[leaf]][index] = True
    return {**kept, "bias": np.ones(masks["bias"].shape, bool)}


def random_tree(seed, shape=(16, 6)):
    rng = np.random.default_rng(seed)
    leaves = {"first": shape, "bias": shape[1:], "head": (shape[1], 10)}
    return {
        name: rng.normal(size=leaf).astype(np.float32) for name, leaf in leaves.items()
    }


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.9, 4), (0.0, 3), (0.5, 1)])
def test_every_round_removes_the_same_share(sparsity, rounds):
    sparsities = round_sparsities(sparsity, rounds)
    assert len(sparsities) == rounds
    assert sparsities[-1] == sparsity
    share = 1 - (1 - sparsity) ** (1 / rounds)
    density = 1.0
    for after in sparsities:
        density -= share * density
        np.testing.assert_allclose(1 - after, density, rtol=1e-12)


@pytest.mark.parametrize(("sparsity", "rounds"), [(1.0, 2), (-0.1, 2), (0.5, 0)])
def test_round_sparsities_refuses(sparsity, rounds):
    with pytest.raises(ValueError, match=f"sparsity={sparsity}, rounds={rounds}"):
        round_sparsities(sparsity, rounds)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_pruning_keeps_the_largest_live_weights(sparsity):
    params, rng = random_tree(0), np.random.default_rng(1)
    masks = {name: rng.random(w.shape) < 0.6 for name, w in params.items()}
    masks["bias"] = np.ones(6, bool)
    actual = prune_live(params, masks, sparsity)
    expected = largest_live(params, masks, sparsity)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_pruning_to_less_than_there_is_keeps_all_and_revives_nothing():
    params, rng = random_tree(0), np.random.default_rng(1)
    masks = {name: rng.random(w.shape) < 0.3 for name, w in params.items()}
    masks["bias"] = np.ones(6, bool)
    jax.tree.map(np.testing.assert_array_equal, prune_live(params, masks, 0.5), masks)


def test_pruning_spares_what_is_not_prunable():
    params = random_tree(0)
    masks = prune_live(
        params, dense_masks(params), 0.5, prunable=lambda path, leaf: path == "head"
    )
    assert masks["first"].all()
    assert masks["bias"].all()
    assert masks["head"].sum() == 30


def test_rewinding_restores_the_early_state_under_the_masks(dense_run):
    first, fit, _ = dense_run
    early = fit(copy(first), 3)
    before = host(early)
    masks = prune_live(early.params, get_masks(early.opt_state), 0.75)
    state = rewind(early, masks)
    expected = before._replace(
        params={name: w * np.array(masks[name]) for name, w in before.params.items()},
        opt_state=before.opt_state._replace(masks=masks),
    )
    assert_same_bits(state, expected)
    assert int(state.step) == 3
    assert int(state.model_state["passes"]) == 3
    assert any(np.any(m) for m in jax.tree.leaves(host(state.opt_state.inner)))
    # A copy: training the rewound state leaves the early one as it was.
    fit(state, 6)
    assert_same_bits(early, before)


def test_a_rewound_run_never_moves_a_pruned_weight(dense_run):
    first, fit, _ = dense_run
    early = fit(copy(first), 3)
    pruned = prune_live(early.params, get_masks(early.opt_state), 0.9)
    masks = host(pruned)
    after = fit(rewind(early, pruned), 6)
    for tree in (after.params, after.opt_state.inner[1].trace):
        for name in KERNELS:
            assert not np.any(np.array(tree[name])[~masks[name]])


def test_frozen_weights_beside_pruned_ones_are_not_set_to_zero(data):
    def wrap(inner, rule, when):
        parts = {"zero": sparsify(inner, rule, when), "hold": freeze(inner, rule, when)}
        labels = {"first": "zero", "bias": "zero", "head": "hold"}
        return average_weights(optax.partition(parts, labels))

    first, _, _ = make_run(data, wrap)
    drawn, _ = perceptron().init(
        jax.random.split(jax.random.key(0))[0], train.inputs(data)
    )
    half = {
        name: jnp.arange(x.size).reshape(x.shape) % 2 > 0 for name, x in drawn.items()
    }
    expected = drawn | {"first": drawn["first"] * half["first"]}
    expected["bias"] = drawn["bias"] * half["bias"]
    state = rewind(first, half)
    assert_same_bits(state.params, expected)
    assert_same_bits(get_masks(state.opt_state), half)
    # Rules that have these masks from the start.
    tx = wrap(optax.sgd(0.1), fixed(half), at([]))
    state = train.init_state(perceptron(), tx, data, jax.random.key(0))
    assert_same_bits(state.params, expected)
    assert_same_bits(get_average(state.opt_state), expected)


def test_one_round_equals_the_steps_by_hand(dense_run):
    first, fit, _ = dense_run
    early = fit(copy(first), 2)
    trained = fit(copy(early), 8)
    masks = largest_live(host(trained.params), host(get_masks(trained.opt_state)), 0.75)
    opt_state = early.opt_state._replace(masks=jax.tree.map(jnp.asarray, masks))
    params = {name: jnp.where(masks[name], w, 0) for name, w in early.params.items()}
    expected = fit(early._replace(params=params, opt_state=opt_state), 8)
    ticket = find_ticket(fit, copy(first), 8, 2, [0.75])
    assert_same_bits(ticket, expected)


@pytest.mark.parametrize("rewind_step", [0, 3])
def test_masks_shrink_to_the_exact_sparsities(dense_run, rewind_step):
    first, fit, traces = dense_run
    rounds, states = [], []

    def on_round(number, state, ticket):
        rounds.append((number, int(state.step), host(get_masks(state.opt_state))))
        states.append(state)

    final = find_ticket(fit, copy(first), 8, rewind_step, SPARSITIES, on_round)
    assert [(number, step) for number, step, _ in rounds] == [(n, 8) for n in range(4)]
    sizes = sum(first.params[name].size for name in KERNELS)
    for (_, _, masks), sparsity in zip(rounds, (0.0, *SPARSITIES), strict=True):
        live = sum(masks[name].sum() for name in KERNELS)
        assert live == round((1 - sparsity) * sizes)
        assert masks["bias"].all()
    for (_, _, before), (_, _, after) in itertools.pairwise(rounds):
        assert all(np.all(before[name] | ~after[name]) for name in KERNELS)
    for name in KERNELS:
        np.testing.assert_array_equal(final.params[name] != 0, rounds[-1][2][name])
    assert len(traces) == 1
    # What a caller keeps of a round is not used up by the next.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states))


def test_the_order_of_training_pruning_and_rewinding():
    params = random_tree(0)
    tx = sparsify(train.make_optimizer("sgd", 0.1), fixed(dense_masks(params)), at([]))
    first = TrainState(
        jnp.int32(0),
        params,
        {"statistics": jnp.float32(0)},
        tx.init(params),
        jax.random.key(0),
        NO_FAULTS,
        {},
    )
    events = []

    def fit(state, stop):
        """Every step adds a random tree; the state that came in is used up."""
        events.append(("fit", host(state), stop))
        masks, weights = host(get_masks(state.opt_state)), host(state.params)
        for step in range(int(state.step), stop):
            change = random_tree((step, len(events)))
            weights = {n: (w + change[n]) * masks[n] for n, w in weights.items()}
        state = state._replace(
            step=jnp.int32(stop),
            params=jax.tree.map(jnp.asarray, weights),
            model_state={"statistics": jnp.float32(stop)},
        )
        events.append(("trained", host(state), stop))
        return state

    def on_round(number, state, ticket):
        events.append(("round", host(state), number))

    final = find_ticket(fit, first, 5, 2, SPARSITIES[:2], on_round)
    whole = ["fit", "trained", "round"]
    assert [event[0] for event in events] == [*whole[:2], *whole, *whole, *whole]
    calls = [(int(s.step), stop) for kind, s, stop in events if kind == "fit"]
    assert calls == [(0, 2), (2, 5), (2, 5), (2, 5)]
    rounds = [(number, s) for kind, s, number in events if kind == "round"]
    assert [number for number, _ in rounds] == [0, 1, 2]
    assert_same_bits(final, rounds[-1][1])

    early = events[1][1]
    starts = [state for kind, state, _ in events if kind == "fit"][2:]
    masks = host(dense_masks(params))
    for sparsity, start, (_, trained) in zip(
        SPARSITIES[:2], starts, rounds, strict=False
    ):
        masks = largest_live(trained.params, masks, sparsity)
        expected = early._replace(
            params={name: w * masks[name] for name, w in early.params.items()},
            opt_state=early.opt_state._replace(masks=masks),
        )
        assert_same_bits(start, expected)


def test_without_sparsities_a_ticket_is_the_dense_run(dense_run):
    first, fit, _ = dense_run
    rounds = []
    ticket = find_ticket(
        fit, copy(first), 6, 3, [], lambda number, state, ticket: rounds.append(number)
    )
    assert_same_bits(ticket, fit(copy(first), 6))
    assert rounds == [0]


@pytest.mark.parametrize("rewind_step", [-1, 5, 6])
def test_a_rewind_step_outside_of_the_run_is_refused(rewind_step):
    begin = TrainState(jnp.int32(0), {}, {}, (), jax.random.key(0), NO_FAULTS, {})
    with pytest.raises(ValueError, match=f"from 0, .* to 4, got {rewind_step}"):
        find_ticket(lambda state, step: state, begin, 5, rewind_step, [0.5])


def test_only_the_learning_rate_is_rewound_on_request(dense_run):
    first, fit, _ = dense_run
    early = fit(copy(first), 3)
    trained = fit(copy(early), 8)
    masks = prune_live(trained.params, get_masks(trained.opt_state), 0.75)
    expected = host(early)._replace(
        params={n: w * np.array(masks[n]) for n, w in host(trained.params).items()},
        model_state=host(trained.model_state),
        opt_state=host(early.opt_state)._replace(masks=host(masks)),
    )
    assert_same_bits(rewind(early, masks, trained), expected)
    found = find_ticket(fit, copy(first), 8, 3, [0.75], rewinding="learning_rate")
    assert_same_bits(found, fit(rewind(early, masks, trained), 8))


def test_frozen_losers_keep_the_weights_they_are_rewound_to(frozen_run):
    first, fit, traces = frozen_run
    early = host(fit(copy(first), 3))
    found = find_ticket(fit, copy(first), 8, 3, [0.75, 0.9])
    masks = host(get_masks(found.opt_state))
    assert sum(masks[name].sum() for name in KERNELS) == round(0.1 * (96 + 60))
    for name, weights in host(found.params).items():
        frozen = weights == early.params[name]
        np.testing.assert_array_equal(frozen, ~masks[name])
    assert len(traces) == 1


def test_a_ticket_is_what_its_round_was_trained_from(dense_run):
    first, fit, _ = dense_run
    rounds = []

    def on_round(number, state, ticket):
        rounds.append((host(state), ticket))

    find_ticket(fit, copy(first), 8, 3, SPARSITIES, on_round)
    early = host(fit(copy(first), 3))
    for state, ticket in rounds:
        masks = host(ticket.masks)
        assert_same_bits(state.opt_state.masks, masks)
        expected = {n: w * masks[n] for n, w in early.params.items()}
        assert_same_bits(ticket.params, expected)
        assert_same_bits(ticket.model_state, early.model_state)


def test_a_new_run_starts_from_a_ticket(dense_run):
    first, fit, _ = dense_run
    tickets = []
    find_ticket(fit, copy(first), 8, 3, [0.9], lambda n, s, t: tickets.append(t))
    state = start_from(tickets[-1], copy(first))
    assert int(state.step) == 0
    assert_same_bits(state.params, tickets[-1].params)
    assert_same_bits(get_masks(state.opt_state), tickets[-1].masks)
    masks, after = host(tickets[-1].masks), host(fit(state, 4))
    for name in KERNELS:
        assert not after.params[name][~masks[name]].any()
    # The ticket is not used up.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(tickets))


def test_random_pruning_is_the_control(dense_run):
    first, fit, _ = dense_run
    masks = []
    for seed in (0, 0, 1):
        state = copy(first)._replace(key=jax.random.key(seed))
        found = find_ticket(fit, state, 4, 1, [0.5, 0.75], score=scores.random)
        masks.append(host(get_masks(found.opt_state)))
        live = sum(masks[-1][name].sum() for name in KERNELS)
        assert live == round(0.25 * (96 + 60))
    assert_same_bits(masks[0], masks[1])
    assert (masks[0]["first"] != masks[2]["first"]).any()


def test_an_unknown_rewinding_is_refused(dense_run):
    first, fit, _ = dense_run
    with pytest.raises(ValueError, match="'weights' or 'learning_rate', got 'both'"):
        find_ticket(fit, copy(first), 5, 2, [0.5], rewinding="both")


def test_a_round_prunes_by_the_average_of_the_weights_where_one_is_kept():
    first = {"kernel": jnp.ones((2, 2))}
    last, average = ({"kernel": jnp.array([row, [3, 2.0]])} for row in ([9, 1], [1, 8]))
    inner = sparsify(optax.sgd(0.1), fixed(dense_masks(first)))
    tx = average_weights(inner)
    step, key = jnp.zeros((), jnp.int32), jax.random.key(0)
    state = TrainState(step, first, {}, tx.init(first), key, NO_FAULTS, {})

    def fit(state, stop):
        opt_state = state.opt_state._replace(average=average)
        return state._replace(step=jnp.int32(stop), params=last, opt_state=opt_state)

    end = find_ticket(fit, state, 2, 0, [0.75])
    live = get_masks(end.opt_state)["kernel"]
    assert live.tolist() == [[False, True], [False, False]]
