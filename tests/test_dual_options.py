"""What a pair can be told besides: whom to trust, to merge, to look for flatness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from d2sparse import distributions, dual, masks, models, rules, train
from d2sparse.data import Split
from d2sparse.dual import Coupling, Dual
from d2sparse.models import lenet_300_100
from d2sparse.schedules import at
from d2sparse.transforms import average_weights, get_average, sparsify

SIZE, CLASSES = 12, 4
MODELS = Dual(lenet_300_100(CLASSES, 0.05), lenet_300_100(CLASSES, 0.05))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(SIZE, 8, 8, 1)).astype(np.uint8)
    return train.to_device(Split(images, rng.integers(CLASSES, size=SIZE)))


def descent(wrap=lambda tx: tx, **options):
    """Gradient descent at rate 1: the update is the gradient, its sign turned."""
    plain = train.make_optimizer("sgd", 1.0, momentum=0.0, **options)
    tx = wrap(sparsify(plain, rules.static(0.0), at([])))
    return Dual(tx, tx)


def gradients(data, coupling, tx=None, scale=1.2):
    """What one step takes from the parameters, and the logits of both before."""
    tx = tx or descent()
    state = dual.init_pair(MODELS, tx, data, jax.random.key(0), coupling)
    # Larger heads, so that the networks are not equally sure of everything.
    params = jax.tree.map(lambda w: scale * w, state.params)
    state = state._replace(params=params)
    step = jax.jit(dual.make_dual_step(MODELS, tx, coupling))
    after, _ = step(state, data, jnp.arange(SIZE))
    taken = jax.tree.map(lambda a, b: np.asarray(a - b), params, after.params)
    x = train.inputs(data)
    logits = Dual(
        *(m.apply(p, {}, x, train=True)[0] for m, p in zip(MODELS, params, strict=True))
    )
    return taken, logits, params


def head_bias_by_hand(data, logits, peer, trust, weight=1.0):
    """Gradient of the head's bias: the mean error of the outputs."""
    p, q = scipy.special.softmax(logits, -1), scipy.special.softmax(peer, -1)
    own = p - np.eye(CLASSES)[data.labels]
    return (own + weight * trust[:, None] * (p - q)).mean(axis=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.999])
def test_teaching_counts_as_much_as_the_peer_is_trusted(data, weighted, threshold):
    coupling = Coupling(masks=0.0, weighted=weighted, threshold=threshold)
    taken, logits, _ = gradients(data, coupling)
    for learner in (0, 1):
        peer = logits[1 - learner]
        sure = scipy.special.softmax(peer, -1).max(-1)
        trust = np.where(sure >= threshold, sure if weighted else 1.0, 0.0)
        if threshold == 0.6:
            assert 0 < (trust > 0).mean() < 1
        expected = head_bias_by_hand(data, logits[learner], peer, trust)
        np.testing.assert_allclose(
            taken[learner]["head"]["bias"], expected, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold of confidence in \[0, 1\), got"):
        Coupling(threshold=threshold)


def test_both_learners_together_are_judged_in_float32():
    def looking_at(columns):
        def apply(params, model_state, x, *, train):
            seen = x.reshape(len(x), -1)[:, columns] + 0 * params["kernel"][:1]
            return (seen / 100).astype(jnp.bfloat16), model_state

        return models.Model(lambda key, x: ({"kernel": jnp.ones((4, 3))}, {}), apply)

    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(512, 6, 1, 1)).astype(np.uint8)
    labels = rng.integers(3, size=512).astype(np.int32)
    data = train.to_device(Split(images, labels))
    both = Dual(looking_at(slice(3)), looking_at(slice(3, 6)))
    tx = Dual(*[sparsify(optax.sgd(0.1), rules.static(0.5))] * 2)
    coupling = Coupling()
    state = dual.init_pair(both, tx, data, jax.random.key(0), coupling)
    step = dual.make_dual_step(both, tx, coupling, growth_samples=0)
    _, logs = jax.jit(step)(state, data, jnp.arange(512))
    x, params = train.inputs(data), {"kernel": jnp.ones((4, 3))}
    sides = [model.apply(params, {}, x, train=False)[0] for model in both]
    together = sum(scipy.special.softmax(np.float64(side), -1) for side in sides)
    right = np.mean(together.argmax(axis=1) == labels)
    np.testing.assert_allclose(logs["train_accuracy"], right, rtol=1e-6)


def test_each_learner_looks_for_flatness_with_its_peer_held_fixed(data):
    coupling, radius = Coupling(masks=0.0), 0.3
    sharp, _, params = gradients(data, coupling, descent(sharpness=radius))
    plain, _, _ = gradients(data, coupling)
    for learner in (0, 1):
        norm = optax.tree.norm(plain[learner])
        uphill = jax.tree.map(
            lambda w, g, norm=norm: w + radius * g / norm,
            params[learner],
            plain[learner],
        )
        moved = list(params)
        moved[learner] = uphill
        x = train.inputs(data)
        logits = [
            m.apply(p, {}, x, train=True)[0] for m, p in zip(MODELS, moved, strict=True)
        ]
        own, peer = logits[learner], logits[1 - learner]
        expected = head_bias_by_hand(data, own, peer, np.ones(SIZE))
        np.testing.assert_allclose(
            sharp[learner]["head"]["bias"], expected, rtol=1e-3, atol=1e-5
        )


def test_the_average_of_each_learner_is_kept_beside_it(data):
    tx, coupling = descent(average_weights), Coupling(masks=0.0)
    state = dual.init_pair(MODELS, tx, data, jax.random.key(0), coupling)
    step = jax.jit(dual.make_dual_step(MODELS, tx, coupling))
    trail = []
    for _ in range(3):
        state, _ = step(state, data, jnp.arange(SIZE))
        trail.append(state.params)
    for learner in (0, 1):
        mean = np.mean([p[learner]["head"]["bias"] for p in trail], axis=0)
        average = get_average(state.opt_state[learner])
        np.testing.assert_allclose(average["head"]["bias"], mean, atol=1e-6)


def test_at_a_constant_rate_both_move_as_in_the_symmetric_preset():
    constant, symmetric = (
        dual.make_plans(preset, 0.1, steps=100, interval=10)
        for preset in ("constant", "symmetric")
    )
    for plan, other in zip(constant, symmetric, strict=True):
        for step in (0, 10, 50, 99):
            assert float(plan.learning_rate(step)) == pytest.approx(0.1)
            assert float(plan.drop_fraction(step)) == float(other.drop_fraction(step))
            assert bool(plan.when(step)) == bool(other.when(step))


def test_the_averaged_preset_averages_the_tail_in_which_masks_rest(data):
    steps, interval = 16, 2
    plans = dual.make_plans("averaged", 0.05, steps, interval)
    constant = dual.make_plans("constant", 0.05, steps, interval)
    assert plans.fast.average_from == plans.slow.average_from == 12
    assert constant.fast.average_from is None
    assert not any(bool(plans.fast.when(step)) for step in range(12, steps))
    for step in (0, 6, 15):
        for name in ("learning_rate", "drop_fraction"):
            own, other = (getattr(p.fast, name)(step) for p in (plans, constant))
            assert float(own) == float(other)
    state, trail = _train_pair(data, plans, steps)
    for learner in (0, 1):
        mean = np.mean([p[learner]["head"]["kernel"] for p in trail[12:]], axis=0)
        average = get_average(state.opt_state[learner])["head"]["kernel"]
        np.testing.assert_allclose(average, mean, atol=1e-6)
        masks = dual.get_pair_masks(state)[learner]["head"]["kernel"]
        np.testing.assert_array_equal(average != 0, masks)


def _train_pair(data, plans, steps):
    """The last state of a coupled pair, and its parameters after every step."""
    halves, coupling = Dual(0.7, 0.7), Coupling()
    optimizer = functools.partial(train.make_optimizer, "sgd")
    tx = dual.make_transforms(plans, halves, optimizer, key=1)
    state = dual.init_pair(MODELS, tx, data, jax.random.key(0), coupling)
    step, trail = jax.jit(dual.make_dual_step(MODELS, tx, coupling)), []
    for _ in range(steps):
        state, _ = step(state, data, jnp.arange(SIZE))
        trail.append(state.params)
    return state, trail


@pytest.mark.parametrize(
    ("tail", "begin"), [(1.0, 0), (0.5, 50), (0.001, 99), (0.25, 75)]
)
def test_the_tail_is_that_part_of_the_run_and_at_least_a_step(tail, begin):
    plans = dual.make_plans("averaged", 0.1, steps=100, interval=10, tail=tail)
    assert plans.fast.average_from == begin


@pytest.mark.parametrize("tail", [0.0, -0.1, 1.5, float("nan")])
def test_a_tail_out_of_range_is_refused(tail):
    with pytest.raises(ValueError, match=r"expected a tail in \(0, 1\], got"):
        dual.make_plans("averaged", 0.1, steps=100, interval=10, tail=tail)


def test_learners_that_consolidate_are_not_averaged_once_more():
    plans = dual.make_plans("averaged", 0.1, steps=100, interval=10)
    optimizer = functools.partial(train.make_optimizer, "sgd")
    with pytest.raises(ValueError, match='no averages in mode "consolidated"'):
        dual.make_transforms(plans, Dual(0.8, 0.8), optimizer, "consolidated", 10)


# Merging


def random_pair(seed=0):
    rng = np.random.default_rng(seed)
    masks = Dual(*(rng.random((6, 5)) < d for d in (0.5, 0.3)))
    params = Dual(
        *(
            {
                "kernel": np.where(m, rng.normal(size=m.shape), 0),
                "bias": rng.normal(size=5),
            }
            for m in masks
        )
    )
    params = jax.tree.map(jnp.asarray, params)
    live = [{"kernel": jnp.asarray(m), "bias": jnp.ones(5, bool)} for m in masks]
    return params, Dual(*live)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_a_merger_is_the_largest_of_the_average(share):
    params, masks = random_pair()
    merged, live = dual.merge(params, masks, share)
    average = {
        path: share * np.asarray(params.fast[path])
        + (1 - share) * np.asarray(params.slow[path])
        for path in ("kernel", "bias")
    }
    number = int(masks.slow["kernel"].sum())
    smallest = np.sort(np.abs(average["kernel"]).ravel())[-number]
    expected = np.where(np.abs(average["kernel"]) >= smallest, average["kernel"], 0)
    if share < 1:  # Else ties of zeros may be kept, by index.
        np.testing.assert_allclose(merged["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(merged["bias"], average["bias"], rtol=1e-5)
    assert int(live["kernel"].sum()) == number
    assert live["bias"].all()


def test_merging_a_network_with_itself_changes_nothing():
    params, masks = random_pair()
    merged, live = dual.merge(
        Dual(params.slow, params.slow), Dual(masks.slow, masks.slow)
    )
    np.testing.assert_allclose(merged["kernel"], params.slow["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(live["kernel"], masks.slow["kernel"])


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1\.5"):
        dual.merge(*random_pair(), share=1.5)


# What counts of a pair that averages


def _normalized_pair(data):
    """A pair with normalisations after some steps, and its averages."""

    def init(key, x):
        kernel = jax.random.normal(key, (x[0].size, CLASSES)) / 8
        return {"head": {"kernel": kernel}}, {"mean": jnp.zeros(CLASSES)}

    def apply(params, model_state, x, *, train):
        logits = x.reshape(len(x), -1) @ params["head"]["kernel"]
        mean = logits.mean(axis=0) if train else model_state["mean"]
        return logits - mean.reshape(1, -1), {"mean": mean}

    model = models.Model(init, apply)
    both, tx, coupling = (
        Dual(model, model),
        descent(average_weights),
        Coupling(masks=0.0),
    )
    state = dual.init_pair(both, tx, data, jax.random.key(0), coupling)
    step = jax.jit(dual.make_dual_step(both, tx, coupling))
    for _ in range(3):
        state, _ = step(state, data, jnp.arange(SIZE))
    return model, state


def test_a_pair_that_averages_predicts_with_its_averages(data):
    tx, coupling = descent(average_weights), Coupling(masks=0.0)
    state = dual.init_pair(MODELS, tx, data, jax.random.key(0), coupling)
    step = jax.jit(dual.make_dual_step(MODELS, tx, coupling))
    for _ in range(3):
        state, _ = step(state, data, jnp.arange(SIZE))
    predict = Dual(*map(train.make_predict, MODELS))
    outputs = dual.pair_predictions(predict, state, data)
    settled = dual.settle_pair(state)
    for learner, name in enumerate(Dual._fields):
        average = get_average(state.opt_state[learner])
        expected = predict[learner](average, {}, data)
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-6)
        last = predict[learner](state.params[learner], {}, data)
        assert np.abs(last - expected).max() > 1e-4
        for one, other in zip(
            *map(jax.tree.leaves, (settled.params[learner], average)), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_averages_with_the_statistics_of_other_weights_do_not_predict(data):
    model, state = _normalized_pair(data)
    predict = Dual(*[train.make_predict(model)] * 2)
    with pytest.raises(ValueError, match=r"statistics of the averages.*settle_pair"):
        dual.pair_predictions(predict, state, data)
    statistics = Dual(*[train.make_statistics(model, batch_size=SIZE)] * 2)
    settled = dual.settle_pair(state, data, statistics)
    outputs = dual.pair_predictions(predict, settled, data)
    average = get_average(state.opt_state.slow)
    own = statistics.slow(average, state.model_state.slow, data, state.key)
    expected = predict.slow(average, own, data)
    np.testing.assert_allclose(outputs["slow"], expected, rtol=1e-5)


# Other rules, patterns and parts


@pytest.mark.parametrize("mode", ["trained", "consolidated"])
@pytest.mark.parametrize("rule", [rules.rigl, rules.set_])
def test_the_masks_of_a_pair_have_the_pattern_that_is_asked_for(data, rule, mode):
    def prunable(path, leaf):
        del leaf
        return path == "dense1/kernel"

    plans = dual.make_plans("constant", 0.05, 8, 2)
    selection, coupling = masks.n_of_m(2), Coupling()
    tx = dual.make_transforms(
        plans,
        Dual(0.5, 0.5),
        functools.partial(train.make_optimizer, "sgd"),
        mode,
        horizon=4,
        rule=rule,
        distribution=distributions.uniform,
        selection=selection,
        prunable=prunable,
    )
    state = dual.init_pair(
        MODELS, tx, data, jax.random.key(0), coupling, prunable, selection=selection
    )
    step = jax.jit(dual.make_dual_step(MODELS, tx, coupling, prunable=prunable))
    first = dual.get_pair_masks(state)
    for _ in range(4):
        state, _ = step(state, data, jnp.arange(SIZE))
    last = dual.get_pair_masks(state)
    for pair in (first, last):
        for own in pair:
            assert own["head"]["kernel"].all()
            groups = own["dense1"]["kernel"].reshape(32, 2, -1).sum(axis=1)
            np.testing.assert_array_equal(groups, 1)
    if mode == "trained":  # Complementary at the start.
        assert not (
            first.fast["dense1"]["kernel"] & first.slow["dense1"]["kernel"]
        ).any()
