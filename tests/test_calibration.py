"""Calibration against loops in numpy, scikit-learn, scipy and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats

from d2sparse import metrics

MEASURES = {
    "accuracy": metrics.accuracy,
    "nll": metrics.nll,
    "brier": metrics.brier,
    "width": metrics.ece,
    "mass": lambda p, y, **given: metrics.ece(p, y, scheme="mass", **given),
    "signed_gap": metrics.signed_gap,
    "right": lambda *given, **by: metrics.confidence_split(*given, **by)[0],
    "wrong": lambda *given, **by: metrics.confidence_split(*given, **by)[1],
    "kl": lambda p, y, **given: metrics.kl_to_uniform(p, **given),
}
SIZE, MANY, CLASSES = 1003, 12_800, 5


@jax.jit
def measure(probabilities, labels, where):
    """All measures in one program."""
    return {f: m(probabilities, labels, where=where) for f, m in MEASURES.items()}


@functools.partial(jax.jit, static_argnames=("bins", "scheme"))
def bins_of(probabilities, labels, bins=15, scheme="width", where=None):
    given = {"bins": bins, "scheme": scheme, "where": where}
    return metrics.calibration(probabilities, labels, **given)


@jax.jit
def fit(logits, labels, where):
    return metrics.fit_temperature(logits, labels, where=where)


def predictions(seed=0, scale=1.0, size=SIZE):
    """Logits of a network, and labels drawn from its probabilities at scale 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (size, CLASSES)).astype(np.float32)
    draws = rng.random((size, 1))
    labels = (special.softmax(logits, 1).cumsum(1) < draws).sum(1)
    return np.float32(scale) * logits, np.minimum(labels, CLASSES - 1)


def everything(size=SIZE):
    return np.ones(size, bool)


def expected_measures(p, y):
    """The definitions, one example or bin after another, in float64."""
    p = p.astype(np.float64)
    confidence, right = p.max(1), p.argmax(1) == y
    own = np.array([row[label] for row, label in zip(p, y, strict=True)])
    surplus = right - confidence
    edges = np.sort(confidence)[[b * len(y) // 15 for b in range(1, 15)]]
    mass = [sum(c >= edge for edge in edges) for c in confidence]
    width = [min(int(np.ceil(c * 15)), 15) - 1 for c in confidence]
    gaps = {
        name: sum(
            abs(sum(s for s, own in zip(surplus, bins, strict=True) if own == b))
            for b in range(15)
        )
        for name, bins in (("width", width), ("mass", mass))
    }
    return {
        "accuracy": right.mean(),
        "nll": -np.log(own).mean(),
        "brier": ((p - np.eye(CLASSES)[y]) ** 2).sum(1).mean(),
        "width": gaps["width"] / len(y),
        "mass": gaps["mass"] / len(y),
        "signed_gap": -surplus.mean(),
        "right": own[right].mean(),
        "wrong": own[~right].mean(),
        "kl": np.mean([stats.entropy(row, np.full(CLASSES, 1 / CLASSES)) for row in p]),
    }


# Measures of a set.


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_measures_are_those_of_loops(scale):
    logits, labels = predictions(scale=scale)
    p = special.softmax(logits, 1)
    found = measure(p, labels, everything())
    for name, value in expected_measures(p, labels).items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


def test_padding_does_not_count_whatever_it_holds():
    logits, labels = predictions(1)
    where = np.random.default_rng(2).random(SIZE) < 0.7
    p = special.softmax(logits, 1)
    found = measure(np.where(where[:, None], p, np.nan), labels, where)
    for name, value in expected_measures(p[where], labels[where]).items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)
    temperature = fit(np.where(where[:, None], logits, np.nan), labels, where)
    alone = fit(logits, labels, where)
    assert temperature == alone


def test_nothing_that_counts_gives_nan():
    logits, labels = predictions(1)
    found = measure(special.softmax(logits, 1), labels, ~everything())
    assert all(np.isnan(value) for value in found.values())


def test_bins_of_equal_mass_hold_equal_numbers():
    logits, labels = predictions(2)
    p = special.softmax(logits, 1)
    sums = bins_of(p, labels, scheme="mass")
    ranked = np.argsort(p.max(1))
    starts = [b * SIZE // 15 for b in range(16)]
    for b, own in enumerate(np.split(ranked, starts[1:-1])):
        assert sums["count"][b] == len(own)
        assert sums["correct"][b] == (p[own].argmax(1) == labels[own]).sum()
        np.testing.assert_allclose(
            sums["confidence"][b], p[own].max(1).sum(), rtol=1e-6
        )
    assert set(np.diff(starts)) == {66, 67}


def test_equal_confidences_share_a_bin_of_equal_mass_in_any_order():
    confidence = np.repeat(np.float32([0.6, 0.7, 0.8, 1.0]), [10, 50, 30, 60])
    p = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.random.default_rng(0).integers(2, size=150)
    # Ranks 0, 50 and 100 are 10 of .6, then .7, then 1; .8 joins .7.
    counts = [10, 80, 60]
    for order in (np.arange(150), np.arange(150)[::-1]):
        sums = bins_of(p[order], labels[order], bins=3, scheme="mass")
        assert sums["count"].tolist() == counts
    groups = [confidence == 0.6, (confidence == 0.7) | (confidence == 0.8)]
    groups.append(confidence == 1)
    right = labels == 0
    gaps = [abs((right - p[:, 0])[own].sum()) for own in np.array(groups)]
    found = np.abs(sums["correct"] - np.asarray(sums["confidence"]))
    np.testing.assert_allclose(found, gaps, rtol=1e-5, atol=1e-5)


def test_fewer_examples_than_bins_of_equal_mass():
    p = np.float32([[0.9, 0.1], [0.6, 0.4]])
    sums = bins_of(p, np.array([0, 1]), scheme="mass")
    gaps = np.abs(sums["correct"] - np.asarray(sums["confidence"]))
    np.testing.assert_allclose(gaps[gaps > 0], [0.6, 0.1], rtol=1e-6)


def test_bins_of_equal_width_add_up_over_batches():
    logits, labels = predictions(3)
    p = special.softmax(logits, 1)
    whole = bins_of(p, labels, where=everything())
    added = dict.fromkeys(whole, 0.0)
    for start in range(0, SIZE, 512):
        some = everything()
        some[:start] = some[start + 512 :] = False
        part = bins_of(p, labels, where=some)
        added = {name: added[name] + np.asarray(part[name]) for name in part}
    for name, values in whole.items():
        np.testing.assert_allclose(added[name], values, rtol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "named"), [("width", "uniform"), ("mass", "quantile")]
)
def test_bins_are_those_of_scikit_learn(scheme, named):
    from sklearn.calibration import calibration_curve  # It takes seconds to import.

    # Scikit-learn bins the probability of class 1. Of a network that always predicts
    # it, that is the confidence; its bins hold their lower edges, ours the upper.
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 600).astype(np.float32)
    labels = (rng.random(600) < confidence).astype(int)
    p = np.stack([1 - confidence, confidence], axis=1)
    sums = bins_of(p, labels, bins=10, scheme=scheme)
    full = sums["count"] > 0
    fractions, means = calibration_curve(labels, confidence, n_bins=10, strategy=named)
    np.testing.assert_allclose((sums["correct"] / sums["count"])[full], fractions, 1e-5)
    np.testing.assert_allclose((sums["confidence"] / sums["count"])[full], means, 1e-5)


def test_a_network_that_knows_its_doubts_is_calibrated():
    logits, labels = predictions(4, size=MANY)
    found = measure(special.softmax(logits, 1), labels, everything(MANY))
    for name in ("width", "mass"):
        assert 0 < found[name] < 0.02
    assert abs(found["signed_gap"]) < 0.01


def test_the_sign_of_the_gap_tells_confidence_from_doubt():
    gaps = []
    for scale in (0.3, 3.0):
        logits, labels = predictions(scale=scale)
        found = measure(special.softmax(logits, 1), labels, everything())
        assert abs(found["signed_gap"]) <= found["width"] + 1e-6
        gaps.append(found["signed_gap"])
    assert gaps[0] < -0.2 < 0.1 < gaps[1]


def test_certain_predictions():
    labels = np.arange(SIZE) % CLASSES
    found = measure(np.eye(CLASSES, dtype=np.float32)[labels], labels, everything())
    assert [float(found[name]) for name in ("width", "mass", "signed_gap")] == [0, 0, 0]
    assert found["right"] == 1
    assert np.isnan(found["wrong"])
    np.testing.assert_allclose(found["kl"], np.log(CLASSES), rtol=1e-6)
    wrong = np.eye(CLASSES, dtype=np.float32)[(labels + 1) % CLASSES]
    found = measure(wrong, labels, everything())
    assert [float(found[name]) for name in ("width", "mass", "signed_gap")] == [1, 1, 1]
    assert found["wrong"] == 0


# The released error.


@functools.partial(jax.jit, static_argnames="batch_size")
def released(logits, labels, batch_size=128):
    return metrics.released_ece(logits, labels, batch_size)


def test_the_released_error_is_that_of_its_loop():
    logits, labels = predictions(5)
    total = 0.0
    for start in range(0, SIZE, 128):
        z, y = logits[start : start + 128], labels[start : start + 128]
        largest, right = z.max(1), z.argmax(1) == y
        place = np.searchsorted(np.arange(1, 15) / 15, largest)
        for b in range(15):
            inside = place == b
            if inside.any():
                gap = abs(right[inside].mean() - largest[inside].mean())
                total += inside.mean() * gap
    np.testing.assert_allclose(released(logits, labels), total / SIZE, rtol=1e-5)


def test_the_released_error_misorders_networks():
    """What it says of one network at three scales of its logits, and shifted by 10."""
    logits, labels = predictions(6, size=MANY)

    def true(z):
        return float(measure(special.softmax(z, 1), labels, everything(MANY))["width"])

    scales = (0.3, 1.0, 3.0)
    errors = [true(scale * logits) for scale in scales]
    said = [float(released(np.float32(scale) * logits, labels)) for scale in scales]
    # The truth is best in the middle; by the released error, smaller is always better.
    assert np.argmin(errors) == 1
    assert errors[0] > 20 * errors[1]
    assert said == sorted(said)
    assert said[1] > 5 * said[0]
    # A constant added to the logits changes no prediction.
    np.testing.assert_allclose(true(logits + 10), errors[1], rtol=1e-3)
    moved = float(released(logits + 10, labels))
    np.testing.assert_allclose(moved - said[1], 10 / 128, rtol=0.02)
    # Nor does the size of the batches: a probe evaluated in batches of 8 looks worse.
    small = released(logits, labels, batch_size=8)
    assert 14 < float(small) / said[1] < 18


# Temperature.


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_temperature_minimises_the_loss_and_undoes_a_scale(scale):
    logits, labels = predictions(7, scale)

    def loss(log_t):
        p = special.log_softmax(logits.astype(float) / np.exp(log_t), 1)
        return -np.take_along_axis(p, labels[:, None], 1).mean()

    best = np.exp(optimize.minimize_scalar(loss, bracket=(-1, 1), tol=1e-10).x)
    temperature = fit(logits, labels, everything())
    np.testing.assert_allclose(temperature, best, rtol=1e-4)
    np.testing.assert_allclose(temperature, scale, rtol=0.08)
    softened = np.asarray(metrics.soften(jnp.asarray(logits), temperature))
    np.testing.assert_allclose(softened, special.softmax(logits / best, 1), atol=1e-4)
    assert measure(softened, labels, everything())["width"] < 0.04


def test_the_temperature_does_not_see_shifts():
    logits, labels = predictions(8)
    shift = np.float32(np.random.default_rng(0).normal(0, 5, (SIZE, 1)))
    first, second = (fit(z, labels, everything()) for z in (logits, logits + shift))
    np.testing.assert_allclose(first, second, rtol=1e-4)


def test_temperatures_without_a_best_one_stay_in_their_range():
    logits, _ = predictions(9)
    largest, smallest = logits.argmax(1), logits.argmin(1)
    every = everything()
    np.testing.assert_allclose(fit(logits, smallest, every), 100, rtol=1e-5)
    # Colder is better until the margins are beyond float32.
    assert 0.00999 < fit(0.01 * logits, largest, every) < 0.011
    assert fit(1e6 * logits, largest, every) <= 1
    assert fit(np.zeros_like(logits), largest, every) == 1
    assert np.isnan(fit(np.full_like(logits, np.nan), largest, every))


def test_temperatures_of_several_networks_at_once():
    logits, labels = predictions(10, size=200)
    stacked = np.stack([logits, 2 * logits]).astype(jnp.bfloat16)
    found = jax.vmap(metrics.fit_temperature, (0, None))(stacked, jnp.asarray(labels))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-4)


# Resampling.


def test_the_bootstrap_finds_the_standard_error_of_a_mean():
    logits, labels = predictions(11, size=400)
    p = jnp.asarray(special.softmax(logits, 1))
    values = metrics.bootstrap(
        metrics.accuracy, jax.random.key(0), p, jnp.asarray(labels), resamples=400
    )
    right = (logits.argmax(1) == labels).astype(float)
    assert values.shape == (400,)
    assert abs(values.mean() - right.mean()) < 0.005
    np.testing.assert_allclose(values.std(), stats.sem(right), rtol=0.15)


# Refusals.


def test_what_is_refused():
    p, labels = jnp.full((4, 2), 0.5), jnp.zeros(4, int)
    with pytest.raises(ValueError, match="scheme of width, mass, got 'quantile'"):
        metrics.ece(p, labels, scheme="quantile")
    with pytest.raises(ValueError, match="at least 1 as `bins`"):
        metrics.ece(p, labels, bins=0)
    with pytest.raises(ValueError, match="at least 1 as `batch_size`"):
        metrics.released_ece(p, labels, batch_size=0)
    for wrong in (jnp.ones(3, bool), jnp.ones(4)):
        with pytest.raises(ValueError, match=r"expected bool\[4\] as `where`"):
            metrics.accuracy(p, labels, where=wrong)
    for measured in (
        metrics.confidence_split,
        metrics.signed_gap,
        lambda p, _: metrics.kl_to_uniform(p),
    ):
        with pytest.raises(ValueError, match="softmax"):
            measured(10 * p, labels)
    with pytest.raises(ValueError, match="class indices"):
        metrics.fit_temperature(p, labels[:3])
    with pytest.raises(ValueError, match="same examples"):
        metrics.bootstrap(metrics.accuracy, jax.random.key(0), p, labels[:3])
