"""Iterative magnitude pruning against loops in numpy, one weight at a time."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import (
    KERNELS,
    SHAPES,
    arrays,
    assert_close,
    begin,
    copy,
    fit,
    images,
    live,
    nested,
    perceptron,
    start,
)

from d2sparse import scores, train
from d2sparse.constraints import (
    Rewinds,
    averaged,
    from_ticket,
    iterative_magnitude,
    kept,
)
from d2sparse.lottery import Ticket, prune_live, rewind, round_sparsities
from d2sparse.masks import dense_masks
from d2sparse.rules import fixed
from d2sparse.schedules import at
from d2sparse.train import Watch, constrain, make_program
from d2sparse.transforms import (
    average_weights,
    freeze,
    get_average,
    get_masks,
    sparsify,
)

STEPS, SPARSITY, ROUNDS = 8, 0.9, 3
TOTAL = sum(int(np.prod(shape)) for shape in SHAPES.values())


def random_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {**SHAPES, "head/bias": SHAPES["head/kernel"][1:]}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def random_masks(density, seed=1):
    rng = np.random.default_rng(seed)
    masks = {name: rng.random(w.shape) < density for name, w in random_tree(0).items()}
    return {**masks, "head/bias": np.ones_like(masks["head/bias"])}


def largest_live(params, masks, sparsity):
    """One weight at a time: the largest of those that are live."""
    order = []
    for leaf, name in enumerate(KERNELS):
        for index in np.argwhere(masks[name]):
            size = abs(float(params[name][tuple(index)]))
            order.append((-size, leaf, tuple(index)))
    chosen = {name: np.zeros(params[name].shape, bool) for name in KERNELS}
    for _, leaf, index in sorted(order)[: round((1 - sparsity) * TOTAL)]:
        chosen[KERNELS[leaf]][index] = True
    return {**masks, **chosen}


# The pure functions.


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


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_pruning_keeps_the_largest_live_weights(sparsity):
    params, masks = random_tree(0), random_masks(0.6)
    actual = prune_live(params, masks, sparsity)
    assert_close(actual, largest_live(params, masks, sparsity))


def test_pruning_to_less_than_there_is_keeps_all_and_revives_nothing():
    masks = random_masks(0.3)
    assert_close(prune_live(random_tree(0), masks, 0.5), masks)


def test_pruning_spares_what_is_not_prunable():
    params = random_tree(0)
    masks = prune_live(
        params, dense_masks(params), 0.5, lambda path, leaf: path == "head/kernel"
    )
    assert masks["first/kernel"].all()
    assert masks["head/bias"].all()
    assert masks["head/kernel"].sum() == 15


def masked_state(wrap):
    """A state at step 0 whose optimiser keeps dense masks."""
    params, _ = perceptron().init(jax.random.key(0), train.inputs(images()))
    tx = wrap(optax.sgd(0.1, 0.9), fixed(dense_masks(params)), at([]))
    return train.init_state(perceptron(), tx, images(), jax.random.key(0))


@pytest.mark.parametrize("what", ["weights", "learning_rate"])
def test_rewinding_restores_the_early_state_under_the_masks(what):
    early = masked_state(sparsify)
    trained = early._replace(
        step=jnp.int32(7),
        params=jax.tree.map(lambda x: x + 1, early.params),
        model_state=jax.tree.map(lambda x: x + 1, early.model_state),
        opt_state=early.opt_state._replace(step=jnp.int32(7)),
    )
    masks = jax.tree.map(jnp.copy, prune_live(early.params, early.opt_state.masks, 0.7))
    state = rewind(early, masks, trained if what == "learning_rate" else None)
    source = early if what == "weights" else trained
    expected = early._replace(
        params=jax.tree.map(jnp.multiply, source.params, masks),
        model_state=source.model_state,
        opt_state=early.opt_state._replace(masks=masks),
    )
    assert_close(state, expected)
    # A copy: what uses the rewound state up leaves the others as they were.
    jax.tree.map(lambda leaf: leaf.delete(), state)
    assert not any(x.is_deleted() for x in jax.tree.leaves((early, trained, masks)))


def test_frozen_weights_beside_pruned_ones_are_not_set_to_zero():
    def wrap(inner, rule, when):
        parts = {"zero": sparsify(inner, rule, when), "hold": freeze(inner, rule, when)}
        labels = {"first": "zero", "head": "hold"}
        return average_weights(optax.partition(parts, labels))

    first = masked_state(wrap)
    half = jax.tree.map(
        lambda x: jnp.arange(x.size).reshape(x.shape) % 2 > 0, first.params
    )
    pruned = first.params["first"]["kernel"] * half["first"]["kernel"]
    expected = {**first.params, "first": {"kernel": pruned}}
    state = rewind(first, half)
    assert_close(state.params, expected)
    assert_close(get_masks(state.opt_state), half)
    # Rules that have these masks from the start.
    tx = wrap(optax.sgd(0.1), fixed(half), at([]))
    state = train.init_state(perceptron(), tx, images(), jax.random.key(0))
    assert_close(state.params, expected)
    assert_close(get_average(state.opt_state), expected)


# Whole trainings.


CASES = {
    "weights": Rewinds(0.3),
    "from the start": Rewinds(0.0),
    "learning rate": Rewinds(0.3, "learning_rate"),
    "frozen": Rewinds(0.3, frozen=True),
    "averaged": Rewinds(0.3),
    "random": Rewinds(0.3, score=scores.random),
}


@functools.cache
def program(case):
    """`ROUNDS` prunings; the case "averaged" keeps an average of the weights too."""
    mixed = (averaged(0.4),) if case == "averaged" else ()
    pruned = iterative_magnitude(SPARSITY, ROUNDS, CASES[case])
    made = make_program(constrain(start(steps=STEPS), pruned, *mixed))
    # The others differ between rounds alone: their steps are one program.
    own_steps = case in ("weights", "frozen", "averaged")
    return made if own_steps else made._replace(run=program("weights").run)


@functools.cache
def trained(case, seed=0):
    """Masks, parameters and tickets of every round, costs, the last progress."""
    own, ends, costs = program(case), [], []

    def ended(progress, title):
        state, ticket = progress.state, copy(progress.memory["ticket"])
        masks = arrays(get_masks(state.opt_state))
        ends.append((title, masks, copy(state.params), ticket))

    watch = Watch(
        every=1,
        report=lambda progress, logs: costs.append(logs["macs"]),
        ended=ended,
    )
    return ends, costs, train.fit(own, begin(own, seed), images(), watch)


def literal_rounds(case):
    """Train, keep, prune and rewind by hand: first and last state of every round."""
    own, rewinds = program(case), CASES[case]
    state, early_step = begin(own).state, int(rewinds.fraction * STEPS)

    def advanced(state, stop):
        steps = stop - int(state.step)
        return fit(own, state, steps) if steps else state

    early = advanced(state, early_step)
    state = advanced(early, STEPS)
    ends = [(early, state)]
    for number in range(1, ROUNDS + 1):
        old = arrays(get_masks(state.opt_state))
        judged = get_average(state.opt_state, state.params)
        sparsity = 1 - (1 - SPARSITY) ** (number / ROUNDS)
        masks = nested(largest_live(arrays(judged), old, sparsity))
        source = state if rewinds.what == "learning_rate" else early
        params = source.params
        if not rewinds.frozen:
            params = jax.tree.map(lambda w, m: jnp.where(m, w, 0), params, masks)
        opt_state = early.opt_state
        if case == "averaged":
            inner = opt_state.inner._replace(masks=masks)
            mean = jax.tree.map(lambda w, m: w * m, opt_state.average, masks)
            opt_state = opt_state._replace(inner=inner, average=mean)
        else:
            opt_state = opt_state._replace(masks=masks)
        begun = early._replace(
            params=params, model_state=source.model_state, opt_state=opt_state
        )
        state = advanced(begun, STEPS)
        ends.append((begun, state))
    return ends


@pytest.mark.parametrize("case", [case for case in CASES if case != "random"])
def test_every_round_is_that_of_the_loop_by_hand(case):
    rounds, costs, end = trained(case)
    by_hand = literal_rounds(case)
    assert [title for title, *_ in rounds] == [f"round {n}" for n in range(4)]
    for (_, masks, params, ticket), (first, last) in zip(rounds, by_hand, strict=True):
        assert_close(params, last.params)
        assert_close(masks, get_masks(last.opt_state))
        # What the round was trained from is what can be started from anew.
        assert_close(ticket.params, first.params)
        assert_close(ticket.model_state, first.model_state)
        assert_close(ticket.masks, masks)
    assert_close(end.state, by_hand[-1][1])
    # Every round but the first spends what its masks leave, from the early step on.
    early = int(CASES[case].fraction * STEPS)
    lengths = [STEPS, *[STEPS - early] * ROUNDS]
    expected = []
    for length, (_, masks, *_) in zip(lengths, rounds, strict=True):
        # Frozen weights are in every pass.
        spent = 3 * (TOTAL if case == "frozen" else sum(live(masks).values()))
        expected += [spent] * length
    np.testing.assert_allclose(costs, expected, rtol=1e-6)


@pytest.mark.parametrize("case", ["weights", "frozen", "random"])
def test_masks_shrink_to_the_exact_sparsities(case):
    rounds, _, _ = trained(case)
    for (_, masks, params, _), sparsity in zip(
        rounds, [0.0, *round_sparsities(SPARSITY, ROUNDS)], strict=True
    ):
        assert sum(live(masks).values()) == round((1 - sparsity) * TOTAL)
        assert masks["head/bias"].all()
        if case != "frozen":
            for name in KERNELS:
                np.testing.assert_array_equal(arrays(params)[name] != 0, masks[name])
    for (_, before, *_), (_, after, *_) in itertools.pairwise(rounds):
        assert all(np.all(before[name] | ~after[name]) for name in KERNELS)


def test_frozen_weights_hold_what_they_are_rewound_to():
    own = program("frozen")
    progress = begin(own)
    early = arrays(fit(own, progress.state, 2).params)
    _, masks, params, _ = trained("frozen")[0][-1]
    for name, weights in arrays(params).items():
        np.testing.assert_array_equal(weights == early[name], ~masks[name])


def test_random_pruning_follows_from_the_seed():
    again = trained.__wrapped__("random", 0)
    masks = [run[0][-1][1] for run in (trained("random"), again, trained("random", 1))]
    assert_close(masks[0], masks[1])
    assert (masks[0]["first/kernel"] != masks[2]["first/kernel"]).any()


def test_a_training_starts_from_a_ticket_and_does_not_use_it_up():
    params, masks = random_tree(3), random_masks(0.2)
    pruned = {name: w * masks[name] for name, w in params.items()}
    statistics = {"mean": jnp.ones(SHAPES["first/kernel"][1])}
    ticket = Ticket(nested(pruned), statistics, nested(masks))
    own = make_program(constrain(start(steps=4), from_ticket(ticket), kept()))
    progress = begin(own)
    assert_close(progress.state.params, pruned)
    assert_close(progress.state.model_state, statistics)
    assert_close(get_masks(progress.state.opt_state), masks)
    after = train.fit(own, progress, images()).state
    assert_close(get_masks(after.opt_state), masks)
    for name in KERNELS:
        assert not arrays(after.params)[name][~masks[name]].any()
        assert (arrays(after.params)[name] != pruned[name]).any()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(ticket))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: round_sparsities(1.0, 2), "sparsity=1.0, rounds=2"),
        (lambda: round_sparsities(-0.1, 2), "sparsity=-0.1, rounds=2"),
        (lambda: iterative_magnitude(0.5, 0), "sparsity=0.5, rounds=0"),
        (lambda: iterative_magnitude(0.5, 1, Rewinds(1.0)), r"\[0, 1\), got 1.0"),
        (lambda: iterative_magnitude(0.5, 1, Rewinds(-0.1)), r"\[0, 1\), got -0.1"),
        (
            lambda: iterative_magnitude(0.5, 1, Rewinds(what="both")),
            "rewinding of weights, learning_rate, got 'both'",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
