"""Thresholds by bisection, and the training that searches for them at plateaus."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from d2sparse import train
from d2sparse.constraints import (
    Search,
    bisect_threshold,
    iterative_magnitude,
    static,
    threshold_search,
    thresholded,
)
from d2sparse.constraints.held_out import split_of
from d2sparse.data import Split
from d2sparse.train import constrain
from d2sparse.transforms import get_masks

RNG = np.random.default_rng(3)
WEIGHTS = {"a": np.abs(RNG.normal(size=40)), "b": 0.4 * np.abs(RNG.normal(size=15))}
STEPS, EVERY = 24, 2
SEARCH = Search(patience=1, tolerance=0.3, validation=0.25)


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    with runs.quick_compilation():
        yield


# The search


def quadratic(threshold):
    """A loss that grows by the squares of what is pruned."""
    return 1 + sum(np.sum(w[w < threshold] ** 2) for w in WEIGHTS.values()) / 5


def twin(loss, bound, least, mean, most):
    """The search as it is written down, for a loss that is beyond the bound at most."""
    a, b, c = (mean, most, mean) if loss(mean) <= bound else (least, mean, mean)
    while a == least or abs(loss(a) - loss(b)) >= 0.05 * bound:
        before, c = c, (a + b) / 2
        if loss(c) <= bound:
            a = c
        else:
            b = c
        if abs(c - before) < 1e-10:
            break
    return a, (a + b) / 2


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_the_search_is_the_one_that_is_written_down(tolerance):
    evaluated = {}

    def loss_of(threshold):
        evaluated[threshold] = quadratic(threshold)
        return evaluated[threshold]

    least = min(w.min() for w in WEIGHTS.values())
    mean = np.mean([w.mean() for w in WEIGHTS.values()])
    most = WEIGHTS["b"].max()  # A larger one would empty it.
    assert least < mean < most
    inside, middle = twin(quadratic, 1 + tolerance, least, mean, most)
    if quadratic(most) <= 1 + tolerance:
        inside = most
    found = bisect_threshold(loss_of, WEIGHTS, 1.0, tolerance)
    assert found.value == inside
    assert found.loss <= 1 + tolerance
    assert evaluated.get(found.value, 1.0) == found.loss  # Or it prunes nothing.
    assert found.evaluations == len(evaluated)
    assert all(np.any(w >= found.value) for w in WEIGHTS.values())
    released = bisect_threshold(quadratic, WEIGHTS, 1.0, tolerance, released=True)
    if tolerance >= 0.1 and inside != most:
        assert released.value == middle
        assert math.isnan(released.loss)


def test_a_released_threshold_may_be_beyond_the_bound():
    def cliff(threshold):
        return 1.0 if threshold < 0.5 else 2.0

    weights = {"a": [0.2, 0.4, 0.6, 1.0]}
    found = bisect_threshold(cliff, weights, 1.0, 0.0)
    assert cliff(found.value) == found.loss == 1
    beyond = [
        cliff(bisect_threshold(cliff, {"a": [*own, x]}, 1.0, 0.0, released=True).value)
        for own in weights.values()
        for x in np.linspace(0.7, 3, 40)
    ]
    assert max(beyond) == 2


def test_a_layer_that_a_larger_threshold_would_empty_is_named():
    found = bisect_threshold(lambda t: 1.0, WEIGHTS, 1.0, 0.1)
    assert (found.value, found.layer) == (WEIGHTS["b"].max(), "b")
    limited = bisect_threshold(lambda t: 1.0, WEIGHTS, 1.0, 0.1, most=0.05)
    assert (limited.value, limited.layer) == (0.05, "")


def test_nothing_is_pruned_where_nothing_may_be():
    least = min(w.min() for w in WEIGHTS.values())
    found = bisect_threshold(lambda t: 9.0 if t > least else 1.0, WEIGHTS, 1.0, 0.5)
    assert (found.value, found.loss) == (least, 1.0)
    bad = bisect_threshold(lambda t: math.nan, WEIGHTS, 1.0, 0.5)
    assert (bad.value, bad.loss) == (least, 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"magnitudes": {"a": [1.0], "b": [0.0]}}, "every layer, got none in 'b'"),
        ({"base": math.nan}, "as `base`, got nan"),
        ({"tolerance": -0.1}, "as `tolerance`, got -0.1"),
    ],
)
def test_what_cannot_be_searched_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        bisect_threshold(
            quadratic, **{"magnitudes": WEIGHTS, "base": 1.0, "tolerance": 0.1, **given}
        )


# The training


@functools.cache
def images():
    """Patterns of 5 classes under noise, which a threshold can spoil."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.int32) % tiny.CLASSES
    patterns = rng.integers(256, size=(tiny.CLASSES, 4, 4, 1))
    noisy = patterns[labels] + rng.normal(scale=60, size=(40, 4, 4, 1))
    return train.to_device(Split(np.clip(noisy, 0, 255).astype(np.uint8), labels))


@functools.cache
def begun(seed=0):
    return jax.jit(program().init)(jax.random.key(seed), images())


def begin(seed=0):
    return tiny.copy(begun(seed))


def searching(search=SEARCH, **recipe):
    recipe = {"learning_rate": 2.0, "schedule": "constant", "steps": STEPS, **recipe}
    plain = train.plain(
        tiny.perceptron(), images(), train.Recipe(batch_size=tiny.BATCH, **recipe)
    )
    return constrain(plain, threshold_search(EVERY, search))


@functools.cache
def program():
    return train.make_program(searching())


@functools.cache
def trained():
    """The progress where every phase has been entered, and at the end."""
    seen = []
    watch = train.Watch(begun=lambda progress: seen.append(tiny.copy(progress)))
    end = train.fit(program(), begin(), images(), watch)
    return seen, end


def held():
    state = trained()[0][0].state
    return split_of(state, images(), SEARCH.validation)


def loss_of(state):
    rows = held()[1]
    examples = train.take(images(), jnp.asarray(rows))
    probabilities = program().predict(state, examples)["network"]
    labels = np.asarray(images().labels)[rows]
    return -np.mean(np.log(probabilities[np.arange(len(rows)), labels]))


def test_a_part_of_every_class_is_held_out_of_all_batches():
    kept, out = held()
    labels = np.asarray(images().labels)
    assert sorted([*kept, *out]) == list(range(40))
    assert set(labels[out]) == set(labels)
    shown = set()
    for progress, phase in zip(trained()[0], program().training.phases, strict=True):
        if phase.batches is not None:
            shown |= set(phase.batches(progress, images(), 4).ravel().tolist())
    assert shown == set(kept.tolist())
    other = begin(seed=1).state
    assert set(split_of(other, images(), SEARCH.validation)[1]) != set(out)


def test_it_prunes_at_plateaus_within_the_tolerance():
    seen, _ = trained()
    history = np.asarray(seen[-1].memory["history"])
    least, prunings = np.inf, 0
    for number, (loss, threshold, live) in enumerate(history):
        state = seen[number + 1].state
        is_bad = loss >= np.float32(1.01) * np.float32(least)
        best, least = least, min(least, loss)
        if not is_bad or number == len(history) - 1:
            assert threshold == 0
            continue
        prunings += 1
        weights = tiny.arrays(state.params)
        masks = tiny.arrays(get_masks(state.opt_state))
        assert sum(masks[path].sum() for path in tiny.KERNELS) == live
        for path in tiny.KERNELS:
            kept = np.abs(weights[path][masks[path]])
            assert kept.size
            assert kept.min() >= np.float32(threshold)
            np.testing.assert_array_equal(weights[path][~masks[path]], 0)
        assert loss_of(state) <= (1 + SEARCH.tolerance) * best * (1 + 1e-5)
        least = np.inf  # Nothing is known of the loss any more.
    assert prunings >= 2
    assert np.all(np.diff(history[:, 2]) <= 0)
    assert history[-1, 2] < history[0, 2]


def test_the_least_loss_under_the_last_masks_counts():
    _, end = trained()
    history = np.asarray(end.memory["history"])
    pruned = np.flatnonzero(history[:, 1])
    state = program().training.finish(end, images(), program())
    np.testing.assert_allclose(
        loss_of(state), history[pruned[-1] + 1 :, 0].min(), rtol=1e-5
    )
    assert int(state.step) == STEPS
    masks = tiny.arrays(get_masks(state.opt_state))
    assert sum(masks[path].sum() for path in tiny.KERNELS) == history[-1, 2]
    size = program().training.network.weights
    measured = program().training.measure(state)
    assert measured["compression"] == size / history[-1, 2]


def test_forward_passes_on_what_is_held_out_are_charged():
    seen, _ = trained()
    first, second = seen[1].memory["macs"], seen[2].memory["macs"]
    dense = program().training.network.dense_macs
    np.testing.assert_allclose(first, len(held()[1]) * dense / tiny.BATCH, rtol=1e-6)
    assert second >= 2 * first


def test_it_resumes_to_the_bit_from_every_phase():
    seen, end = trained()
    forms = {str(jax.tree.map(lambda x: (x.shape, x.dtype), p)) for p in seen}
    assert len(forms) == 1
    for progress in seen[:: len(seen) // 3]:
        again = train.fit(program(), tiny.copy(progress), images())
        tiny.assert_close(again, end)


def test_thresholds_are_arguments_of_one_program():
    seen, _ = trained()
    before = thresholded._cut._cache_size()
    assert before == 1
    again = train.fit(program(), tiny.copy(seen[0]), images())
    assert int(np.sum(np.asarray(again.memory["history"])[:, 1] > 0)) >= 2
    assert thresholded._cut._cache_size() == before


def changed(search):
    """The program of another search, whose steps are those that are compiled."""
    training = searching(search)
    return program()._replace(training=training)


def test_a_target_is_met_to_a_weight_and_ends_the_training():
    own = changed(SEARCH._replace(target=0.2))
    begun = begin()
    end = train.fit(own, begun, images())
    masks = tiny.arrays(get_masks(end.state.opt_state))
    size = own.training.network.weights
    assert sum(masks[path].sum() for path in tiny.KERNELS) == round(0.8 * size)
    assert int(end.state.step) < STEPS


def test_a_target_that_is_missed_is_said():
    own = changed(SEARCH._replace(target=0.99, tolerance=0.0))
    with pytest.warns(UserWarning, match=r"expected a sparsity of 0.99, got 0\.\d+ at"):
        train.fit(own, begin(), images())


def test_a_threshold_that_would_empty_a_layer_is_said():
    own = changed(SEARCH._replace(tolerance=1e6))
    with pytest.warns(UserWarning, match=r"all weights of '.*/kernel' would fall"):
        end = train.fit(own, begin(), images())
    masks = tiny.arrays(get_masks(end.state.opt_state))
    assert min(masks[path].sum() for path in tiny.KERNELS) == 1


def test_a_layer_that_a_decay_has_emptied_stops_the_run():
    progress = tiny.copy(trained()[0][3])
    best = progress.memory["best"]
    params = {
        **best.params,
        "first": jax.tree.map(jnp.zeros_like, best.params["first"]),
    }
    known = {"best": best._replace(params=params), "least": jnp.float32(1e-3)}
    emptied = progress._replace(memory={**progress.memory, **known})
    with pytest.raises(FloatingPointError, match=r"got none in .*first/kernel.*decay"):
        train.fit(program(), emptied, images())


def test_a_released_search_differs():
    own = changed(SEARCH._replace(released=True))
    end = train.fit(own, begin(), images())
    history = np.asarray(end.memory["history"])
    assert not np.array_equal(history, np.asarray(trained()[1].memory["history"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: threshold_search(0), "a whole number of at least 1 as `interval`"),
        (
            lambda: threshold_search(12),
            r"more than 48 steps, .* every 12 steps, got 24",
        ),
        (lambda: threshold_search(2, Search(patience=0)), "as `patience`, got 0"),
        (lambda: threshold_search(2, Search(tolerance=-1)), "as `tolerance`, got -1"),
        (lambda: threshold_search(2, Search(validation=0)), "between 0 and 1, got 0"),
        (lambda: threshold_search(2, Search(target=1.0)), r"in \[0, 1\), got 1.0"),
    ],
)
def test_a_number_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        constrain(tiny.start(steps=STEPS), make())


def test_it_decides_the_masks_of_one_phase():
    with pytest.raises(ValueError, match="the masks, got static and threshold_search"):
        constrain(tiny.start(steps=STEPS), static(0.5), threshold_search(2))
    with pytest.raises(ValueError, match="expected a training in one phase"):
        constrain(
            tiny.start(steps=STEPS), iterative_magnitude(0.5), threshold_search(2)
        )
