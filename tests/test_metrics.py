"""Metrics against loops over examples, scikit-learn, and costs counted by hand."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from d2sparse import masks as masks_lib
from d2sparse import metrics

SCORED = [metrics.accuracy, metrics.nll, metrics.brier, metrics.ece]
ON_PROBABILITIES = SCORED[1:]


def predictions(seed=0, n=103, classes=4):
    """Probabilities and labels of a set whose size no batch size divides."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.4), size=n).astype(np.float32)
    return jnp.asarray(probabilities), jnp.asarray(rng.integers(classes, size=n))


def random_masks(seed, density=0.4):
    rng = np.random.default_rng(seed)
    shapes = {"a/kernel": (7, 9), "b/kernel": (3, 3, 5), "b/bias": (5,)}
    draws = {path: rng.random(shape) < density for path, shape in shapes.items()}
    draws["b/bias"][:] = True
    return {
        "a": {"kernel": jnp.asarray(draws["a/kernel"])},
        "b": {p: jnp.asarray(draws[f"b/{p}"]) for p in ("kernel", "bias")},
    }


def kernels(masks):
    return [np.asarray(masks[layer]["kernel"]) for layer in ("a", "b")]


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


# Predictions.


def test_scores_agree_with_scikit_learn():
    probabilities, labels = predictions()
    hits = np.argmax(probabilities, axis=-1)
    np.testing.assert_allclose(
        metrics.accuracy(probabilities, labels),
        sklearn.metrics.accuracy_score(labels, hits),
        rtol=1e-6,
    )
    exact = np.asarray(probabilities, np.float64)
    exact /= exact.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        metrics.nll(probabilities, labels),
        sklearn.metrics.log_loss(labels, exact),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        metrics.brier(probabilities, labels),
        sklearn.metrics.brier_score_loss(labels, exact, scale_by_half=False),
        rtol=1e-5,
    )


def loop_ece(probabilities, labels, bins):
    """The definition, one bin after another."""
    total = 0.0
    for b in range(bins):
        inside = []
        for p, y in zip(np.asarray(probabilities), np.asarray(labels), strict=True):
            above = p.max() > np.float32(b) / bins or b == 0
            if above and p.max() <= np.float32(b + 1) / bins:
                inside.append((float(p.argmax() == y), float(p.max())))
        if inside:
            correct, confidence = np.mean(inside, axis=0)
            total += len(inside) / len(labels) * abs(correct - confidence)
    return total


@pytest.mark.parametrize("bins", [1, 15])
def test_ece_is_the_sum_over_bins(bins):
    probabilities, labels = predictions(1)
    np.testing.assert_allclose(
        metrics.ece(probabilities, labels, bins),
        loop_ece(probabilities, labels, bins),
        rtol=1e-5,
    )


def test_ece_of_one_bin_is_accuracy_minus_mean_confidence():
    probabilities, labels = predictions(2)
    confidence = np.max(probabilities, axis=-1).mean()
    expected = abs(metrics.accuracy(probabilities, labels) - confidence)
    np.testing.assert_allclose(
        metrics.ece(probabilities, labels, bins=1), expected, rtol=1e-5
    )


def test_confidence_one_shares_the_last_bin():
    probabilities = jnp.array([[1.0, 0.0], [0.95, 0.05]])
    # Apart, the gaps would be 1 / 2 and .05 / 2; in one bin they are |.5 - .975|.
    np.testing.assert_allclose(
        metrics.ece(probabilities, jnp.array([1, 0]), bins=10), 0.475, rtol=1e-6
    )


def test_a_bin_holds_its_upper_edge():
    probabilities = jnp.array([[0.75, 0.25], [0.625, 0.375]])
    # Both lie in (.5, .75]: one right answer of two at mean confidence .6875.
    np.testing.assert_allclose(
        metrics.ece(probabilities, jnp.array([0, 1]), bins=4), 0.1875, rtol=1e-6
    )


def test_perfect_prediction():
    labels = jnp.array([2, 0, 1])
    onehot = jax.nn.one_hot(labels, 3)
    assert [float(score(onehot, labels)) for score in SCORED] == [1, 0, 0, 0]


def test_certain_errors_stay_finite():
    labels = jnp.array([2, 0, 1])
    onehot = jax.nn.one_hot((labels + 1) % 3, 3)
    actual = [float(score(onehot, labels)) for score in SCORED]
    np.testing.assert_allclose(actual, [0, -np.log(2.0**-126), 2, 1], rtol=1e-6)


def test_one_class_and_one_sample():
    one_class = jnp.ones((4, 1))
    zeros = jnp.zeros(4, int)
    assert [float(score(one_class, zeros)) for score in SCORED] == [1, 0, 0, 0]
    one_sample, label = jnp.array([[0.25, 0.75]]), jnp.array([0])
    actual = [float(score(one_sample, label)) for score in SCORED]
    np.testing.assert_allclose(actual, [0, np.log(4), 1.125, 0.75], rtol=1e-6)


@pytest.mark.parametrize("score", SCORED)
def test_scores_under_jit_vmap_and_further_axes(score):
    sets = [predictions(seed, n=12) for seed in (3, 4)]
    expected = [score(*one) for one in sets]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sets)
    np.testing.assert_allclose(jax.jit(jax.vmap(score))(*stacked), expected, rtol=1e-5)
    probabilities, labels = sets[0]
    np.testing.assert_allclose(
        jax.jit(score)(probabilities.reshape(3, 4, 4), labels.reshape(3, 4)),
        expected[0],
        rtol=1e-5,
    )


@pytest.mark.parametrize("score", ON_PROBABILITIES)
def test_logits_are_refused(score):
    probabilities, labels = predictions()
    for logits in (
        np.log(probabilities),
        2 * np.asarray(probabilities),
        np.full_like(probabilities, np.nan),
        np.tile(np.float32([[2.0, -1.0, 0.0, 0.0]]), (103, 1)),
    ):
        with pytest.raises(ValueError, match="softmax"):
            score(logits, labels)


def test_probabilities_of_low_precision_are_accepted():
    probabilities, labels = predictions(5, classes=10)
    rounded = probabilities.astype(jnp.bfloat16)
    for score in ON_PROBABILITIES:
        assert score(rounded, labels).dtype == jnp.float32
        np.testing.assert_allclose(
            score(rounded, labels), score(probabilities, labels), atol=0.02
        )


@pytest.mark.parametrize("score", SCORED)
def test_labels_of_another_shape_and_empty_sets_are_refused(score):
    probabilities, labels = predictions()
    for wrong in (labels[:-1], labels[:, None]):
        with pytest.raises(ValueError, match="class indices"):
            score(probabilities, wrong)
    with pytest.raises(ValueError, match="at least one example"):
        score(probabilities[:0], labels[:0])


def test_disagreement_counts_different_predictions():
    a, b = predictions(6)[0], predictions(7)[0]
    pairs = zip(np.asarray(a), np.asarray(b), strict=True)
    differ = [x.argmax() != y.argmax() for x, y in pairs]
    assert 0 < np.mean(differ) < 1
    np.testing.assert_allclose(metrics.disagreement(a, b), np.mean(differ), rtol=1e-6)
    assert metrics.disagreement(a, 3 * a) == 0
    with pytest.raises(ValueError, match="same examples"):
        metrics.disagreement(a, b[:-1])


def test_generalisation_gap_is_positive_for_overfitting():
    assert metrics.generalisation_gap(jnp.float32(0.75), 0.5) == 0.25


# Masks.


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_overlap_and_its_chance_level(transform):
    a, b = random_masks(0), random_masks(1, density=0.7)
    shared = sum((x & y).sum() for x, y in zip(kernels(a), kernels(b), strict=True))
    live_a, live_b = ([x.sum() for x in kernels(m)] for m in (a, b))
    sparser = min(sum(live_a), sum(live_b))
    chance = live_a[0] * live_b[0] / 63 + live_a[1] * live_b[1] / 45
    np.testing.assert_allclose(
        transform(metrics.mask_overlap)(a, b), shared / sparser, rtol=1e-6
    )
    np.testing.assert_allclose(
        transform(metrics.chance_overlap)(a, b), chance / sparser, rtol=1e-6
    )


def all_masks(n, k):
    """Every mask of n weights of which k are live, bool[choices, n]."""
    return np.array([np.isin(np.arange(n), c) for c in combinations(range(n), k)])


def test_chance_overlap_is_the_mean_over_all_masks_of_the_same_densities():
    a = {"u": all_masks(5, 2)[3], "v": all_masks(4, 3)[1]}
    u, v = all_masks(5, 3), all_masks(4, 1)
    every_b = {"u": np.repeat(u, len(v), axis=0), "v": np.tile(v, (len(u), 1))}
    overlaps, chances = jax.vmap(
        lambda b: (
            metrics.mask_overlap(a, b, lambda path, leaf: True),
            metrics.chance_overlap(a, b, lambda path, leaf: True),
        )
    )(every_b)
    assert len(overlaps) == 40
    np.testing.assert_allclose(chances, overlaps.mean(), rtol=1e-6)


def test_overlap_of_equal_disjoint_and_empty_masks():
    a = random_masks(0)
    outside = jax.tree.map(jnp.logical_not, a)
    nothing = jax.tree.map(jnp.zeros_like, a)
    assert metrics.mask_overlap(a, a) == 1
    assert metrics.mask_overlap(a, outside) == 0
    assert metrics.mask_overlap(a, nothing) == 0
    assert metrics.chance_overlap(a, nothing) == 0


def test_exploration_rate_follows_the_union_over_time():
    history = [random_masks(seed) for seed in range(3)]
    ever = masks_lib.dense_masks(history[0])
    ever = jax.tree.map(jnp.zeros_like, ever)
    seen = [np.zeros_like(k) for k in kernels(ever)]
    rates = []
    for masks in history:
        ever = metrics.union(ever, masks)
        seen = [s | k for s, k in zip(seen, kernels(masks), strict=True)]
        rates.append(float(metrics.exploration_rate(ever)))
        np.testing.assert_allclose(rates[-1], sum(s.sum() for s in seen) / 108, 1e-6)
    assert rates[0] == masks_lib.density(history[0])
    assert rates == sorted(set(rates))


def test_density_table_and_the_predicate():
    masks = random_masks(2)
    table = jax.jit(metrics.density_table)(masks)
    assert list(table) == ["a/kernel", "b/kernel"]
    for density, mask in zip(table.values(), kernels(masks), strict=True):
        np.testing.assert_allclose(density, mask.mean(), rtol=1e-6)
    only_a = metrics.density_table(masks, lambda path, leaf: path == "a/kernel")
    assert list(only_a) == ["a/kernel"]


def test_counts_beyond_the_integers_of_float32():
    # Counting in float32 one by one would stop at 2**24, just below these counts.
    rows = np.arange(4097) % 2 == 0
    masks = {"kernel": jnp.asarray(np.tile(rows[:, None], (1, 8200)))}
    everything = {"kernel": jnp.ones((4097, 8200), bool)}
    live = metrics.density_table(masks)["kernel"]
    np.testing.assert_allclose(live, 2049 / 4097, rtol=1e-7)
    assert metrics.mask_overlap(masks, everything) == 1
    np.testing.assert_allclose(metrics.chance_overlap(masks, everything), 1, rtol=2e-7)


def test_sums_over_many_examples_of_one_bin():
    # Added one by one in float32 they are off in the fourth digit here, and what comes
    # after 2**24 of them is lost.
    rows = 1 << 20
    confidence = np.full(rows, 0.9, np.float32)
    confidence[:2048] = 0.7
    labels = np.zeros(rows, np.int32)
    labels[::16] = 1
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    right, p = labels == 0, probabilities.astype(np.float64)
    confidence = p[:, 0]
    of_label = np.where(right, confidence, p[:, 1])
    low = confidence < 0.8
    gaps = [abs((right[own] - confidence[own]).sum()) for own in (low, ~low)]
    expected = {
        "accuracy": right.mean(),
        "nll": -np.log(of_label).mean(),
        "brier": 2 * ((1 - of_label) ** 2).mean(),
        "ece": sum(gaps) / rows,
    }

    @jax.jit
    def measure(*given):
        found = {name: getattr(metrics, name)(*given) for name in expected}
        return found, metrics.calibration(*given)

    found, bins = measure(probabilities, labels)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)
    for number, own in ((10, low), (13, ~low)):
        assert bins["count"][number] == own.sum()
        assert bins["correct"][number] == right[own].sum()
        total = confidence[own].sum()
        np.testing.assert_allclose(bins["confidence"][number], total, rtol=2e-6)
    assert bins["count"].dtype == bins["correct"].dtype == jnp.int32


def test_trees_with_more_weights_than_int32_can_count(monkeypatch):
    huge = jax.ShapeDtypeStruct((1 << 15, 1 << 15), bool)
    masks = {name: {"kernel": huge} for name in "abc"}
    counts = {f"{name}/kernel": jnp.int32((1 << 30) - 5) for name in "abc"}
    monkeypatch.setattr(masks_lib.algebra, "count", lambda *_: counts)
    total = masks_lib.count_all(masks)
    np.testing.assert_allclose(total, 3 * (2.0**30 - 5), rtol=1e-7)
    np.testing.assert_allclose(masks_lib.density(masks), 1 - 5 / 2**30, rtol=1e-7)
    del masks["c"]
    counts.popitem()
    total = masks_lib.count_all(masks)
    assert total.dtype == jnp.float32
    del masks["b"]
    counts.popitem()
    assert masks_lib.count_all(masks).dtype == jnp.int32
    assert masks_lib.count_all(masks) == (1 << 30) - 5


def test_calibration_is_the_sums_over_the_bins_of_the_error():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), size=400).astype(np.float32)
    labels = rng.integers(3, size=400)
    bins = metrics.calibration(jnp.asarray(probabilities), jnp.asarray(labels), bins=7)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    for number in range(7):
        low, high = number / 7, (number + 1) / 7
        inside = (confidence > low) & (confidence <= high)
        assert bins["count"][number] == inside.sum()
        assert bins["correct"][number] == correct[inside].sum()
        np.testing.assert_allclose(
            bins["confidence"][number], confidence[inside].sum(), rtol=1e-5
        )
    gaps = np.abs(bins["correct"] - bins["confidence"]).sum() / 400
    error = metrics.ece(jnp.asarray(probabilities), jnp.asarray(labels), bins=7)
    np.testing.assert_allclose(gaps, error, rtol=1e-5)
