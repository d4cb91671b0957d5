"""Entropies of ON/OFF states, and budgets, against loops over units, in NumPy."""

import math

import jax
import numpy as np
import pytest

from d2sparse import metrics
from d2sparse.metrics import StateCounts

ZEROS = ("off", "on", "ignored")
BATCH, CLASSES = 8, 3


def preactivations(seed=0, examples=3 * BATCH):
    """Of a dense and a convolutional layer, on a grid that holds zeros."""
    rng = np.random.default_rng(seed)
    shapes = {"dense1": (examples, 5), "conv1": (examples, 2, 3, 5)}
    return {
        layer: np.float32(rng.integers(-3 + np.arange(5) % 3, 3, size=shape))
        for layer, shape in shapes.items()
    }


def labels_of(examples=3 * BATCH):
    return np.random.default_rng(1).integers(CLASSES, size=examples).astype(np.int32)


def batches(z, size=BATCH):
    for start in range(0, len(z["dense1"]), size):
        yield {layer: own[start : start + size] for layer, own in z.items()}


def counted(z, size=BATCH, **options):
    counts = None
    for batch in batches(z, size):
        counts = metrics.count_states(counts, batch, **options)
    return counts


def entropy(z, zero):
    """The definition, of the pre-activations of one unit."""
    z = np.ravel(z).astype(np.float64)
    if zero == "ignored":
        z = z[z != 0]
    if not z.size:
        return 0.0
    p = np.mean(z >= 0 if zero == "on" else z > 0)
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q)


@pytest.mark.parametrize("zero", ZEROS)
def test_entropies_of_channels_are_those_of_their_pooled_states(zero):
    z = preactivations()
    z["dense1"][:, 1], z["conv1"][..., 2], z["conv1"][..., 3] = 0, 1, -1
    actual = metrics.unit_entropies(counted(z), zero=zero)
    layers = metrics.layer_entropy(counted(z), zero=zero)
    everything = metrics.layer_entropy(counted(z), zero=zero, varying_only=False)
    for layer, own in z.items():
        expected = np.array([entropy(own[..., i], zero) for i in range(5)])
        np.testing.assert_allclose(actual[layer], expected, atol=1e-6)
        varying = expected[expected > 0]
        np.testing.assert_allclose(layers[layer], varying.mean(), rtol=1e-6)
        np.testing.assert_allclose(everything[layer], expected.mean(), rtol=1e-6)


def test_every_position_can_be_a_unit_of_its_own():
    z = preactivations(1)
    actual = metrics.unit_entropies(counted(z, pool="unit"))["conv1"]
    expected = np.apply_along_axis(entropy, 0, z["conv1"], "off")
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("zero", ZEROS)
def test_a_layer_of_units_that_never_change_has_entropy_zero(zero):
    z = {"dense1": np.tile(np.float32([[-1.0, 2.0, 0.0, -3.0, 4.0]]), (BATCH, 1))}
    counts = metrics.count_states(None, z)
    for varying_only in (True, False):
        value = metrics.layer_entropy(counts, zero=zero, varying_only=varying_only)
        assert value["dense1"] == 0
        assert not np.signbit(value["dense1"])


def test_any_batches_give_the_same_counts():
    z = preactivations()
    whole = counted(z, size=3 * BATCH)
    twice = metrics.count_states(whole, z)
    for layer, own in counted(z).items():
        for a, b, c in zip(own, whole[layer], twice[layer], strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(2 * np.asarray(a), c)
    once, again = map(metrics.unit_entropies, (whole, twice))
    for layer in z:
        np.testing.assert_array_equal(once[layer], again[layer])


def test_the_mean_of_entropies_of_batches_is_too_low():
    # Units that are ON half the time: two examples show it, or seem to determine it.
    z = {"dense1": np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)}
    exact = metrics.layer_entropy(counted(z, 64))["dense1"]
    means = [
        np.mean([entropy(own[:, i], "off") for own in of_size for i in range(5)])
        for of_size in ([b["dense1"] for b in batches(z, n)] for n in (2, 8, 32))
    ]
    assert exact > 0.95
    assert means[0] < 0.6 < means[1] < means[2] < exact


def test_padding_is_not_counted():
    z = preactivations(examples=BATCH)
    where = np.arange(BATCH) < 5
    few = {layer: own[:5] for layer, own in z.items()}
    padded = metrics.count_states(None, z, where=where)
    labels = labels_of(BATCH)
    by_class = metrics.count_states_by_class(None, z, labels, CLASSES, where=where)
    for layer, own in few.items():
        np.testing.assert_array_equal(
            padded[layer].positive, (own > 0).reshape(-1, 5).sum(axis=0)
        )
        for c in range(CLASSES):
            np.testing.assert_array_equal(
                by_class[layer].zero[..., c], (own[labels[:5] == c] == 0).sum(axis=0)
            )


def test_not_a_number_is_no_state():
    z = preactivations(examples=BATCH)
    z["dense1"][:3, 0], z["dense1"][:, 1] = np.nan, np.nan
    counts = metrics.count_states(None, z)
    actual = metrics.unit_entropies(counts)["dense1"]
    np.testing.assert_allclose(actual[0], entropy(z["dense1"][3:, 0], "off"), rtol=1e-6)
    assert np.isnan(actual[1])
    assert np.isnan(metrics.layer_entropy(counts)["dense1"])


def test_counts_beyond_the_integers_of_float32():
    large = StateCounts(*np.int32([[2**25] * 5, [2**24] * 5, [1, 0, 0, 0, 0]]))
    z = preactivations(examples=BATCH)["dense1"]
    counts = metrics.count_states({"dense1": large}, {"dense1": z})["dense1"]
    np.testing.assert_array_equal(counts.zero, 2**24 + (z == 0).sum(axis=0))
    # A unit of 2**25 states of which one is the other is not determined.
    bits = metrics.unit_entropies({"dense1": large}, zero="ignored")["dense1"]
    np.testing.assert_allclose(bits[0], 2.0**-25 * (25 + 1 / math.log(2)), rtol=1e-5)
    assert not np.any(bits[1:])


def test_counts_beyond_the_integers_of_int32_are_not_a_number():
    full = StateCounts(*np.int32([[2**31 - 1] * 5, [7] * 5, [7] * 5]))
    z = {"dense1": np.tile(np.float32([[1, 1, -1, -1, -1]]), (BATCH, 1))}
    counts = {"dense1": full}
    for _ in range(3):
        counts = metrics.count_states(counts, z)
    assert counts["dense1"].positive.tolist() == [-1, -1, *[2**31 - 1] * 3]
    bits = metrics.unit_entropies(counts)["dense1"]
    np.testing.assert_array_equal(np.isnan(bits), [True, True, False, False, False])


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("pool", ["unit", "channel"])
def test_psp_entropy_is_the_entropy_within_a_class(zero, pool):
    z, labels, counts = preactivations(2), labels_of(), None
    for start, batch in zip(range(0, len(labels), BATCH), batches(z), strict=True):
        own = labels[start : start + BATCH]
        counts = metrics.count_states_by_class(counts, batch, own, CLASSES, pool=pool)
    for layer, actual in metrics.psp_entropy(counts, zero=zero).items():
        for c in range(CLASSES):
            of_class = z[layer][labels == c]
            if pool == "channel":
                of_class = of_class.reshape(-1, 5)
            expected = np.apply_along_axis(entropy, 0, of_class, zero)
            np.testing.assert_allclose(actual[..., c], expected, atol=1e-6)


def test_a_class_without_samples_has_no_psp_entropy():
    z = {"dense1": preactivations(examples=BATCH)["dense1"]}
    labels = np.where(np.arange(BATCH) < 7, 0, -1).astype(np.int32)
    counts = metrics.count_states_by_class(None, z, labels, CLASSES)
    assert counts["dense1"].positive.sum() == (z["dense1"][:7] > 0).sum()
    bits = metrics.psp_entropy(counts)["dense1"]
    np.testing.assert_array_equal(np.isnan(bits), [[False, True, True]] * 5)


def test_states_are_counted_in_a_scan_and_for_many_networks_at_once():
    z = preactivations()["conv1"].reshape(3, 2, BATCH // 2, 2, 3, 5)
    none = {"conv1": StateCounts(*np.zeros((3, 5), np.int32))}

    def one(z):
        def step(counts, batch):
            return metrics.count_states(counts, {"conv1": batch}), None

        return metrics.unit_entropies(jax.lax.scan(step, none, z)[0])["conv1"]

    actual = jax.jit(jax.vmap(one, in_axes=1))(z)
    for run in range(2):
        expected = [entropy(z[:, run, ..., i], "off") for i in range(5)]
        np.testing.assert_allclose(actual[run], expected, atol=1e-6)


def phi(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def test_a_normalised_unit_is_off_as_often_as_a_gaussian_is():
    scale = np.float32([1.0, -0.5, 2.0, 1e-3, 0.0, 0.0, -0.0, 1.0])
    bias = np.float32([0.3, 0.3, -1.0, -2.0, 0.0, 0.1, -0.1, -5.0])
    actual = jax.jit(metrics.gaussian_off_probability)(scale, bias)
    expected = [
        phi(-float(b) / abs(float(g))) if g else float(b <= 0)
        for g, b in zip(scale, bias, strict=True)
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
    tails = [
        (phi(-abs(float(b) / float(g))), phi(abs(float(b) / float(g))))
        for g, b in zip(scale, bias, strict=True)
        if g
    ]
    bits = -sum(p * math.log2(p) for pair in tails for p in pair if p)
    entropy = metrics.gaussian_layer_entropy(scale, bias)
    np.testing.assert_allclose(entropy, bits / len(scale), rtol=1e-5)


def test_the_gaussian_estimate_is_the_limit_of_counts():
    rng = np.random.default_rng(0)
    scale, bias = np.float32([0.5, -2.0]), np.float32([0.4, 1.0])
    z = np.float32(rng.normal(size=(100_000, 2)) * scale + bias)
    bits = metrics.layer_entropy(metrics.count_states(None, {"norm1": z}))["norm1"]
    estimate = metrics.gaussian_layer_entropy(scale, bias)
    np.testing.assert_allclose(bits, estimate, rtol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "layer"}, "expected pool of channel, unit, got 'layer'"),
        ({"counts": {}}, r"layers counted before, \[\], got \['dense1'\]; start from"),
        ({"z": np.ones(3)}, r"pre-activations of 'dense1', got shape \(3,\); give"),
        ({"where": np.ones(2, bool)}, r"`where` of shape \(4,\) for .*, got \(2,\)"),
        ({"where": np.ones(4)}, r"expected bool\[batch\] as `where`, .* float64"),
    ],
)
def test_what_cannot_be_counted_is_refused(options, message):
    z = {"dense1": options.pop("z", np.ones((4, 2), np.float32))}
    with pytest.raises(ValueError, match=message):
        metrics.count_states(options.pop("counts", None), z, **options)


def test_other_classes_and_conventions_are_refused():
    z = {"dense1": np.ones((4, 2), np.float32)}
    with pytest.raises(ValueError, match=r"`labels` of shape \(4,\) for .* \(3,\)"):
        metrics.count_states_by_class(None, z, np.zeros(3, int), CLASSES)
    with pytest.raises(ValueError, match="whole number of at least 1 as `classes`"):
        metrics.count_states_by_class(None, z, np.zeros(4, int), 0)
    with pytest.raises(ValueError, match="expected zero of off, on, ignored, got 'no'"):
        metrics.unit_entropies({}, zero="no")


# Budgets by layer.

LAYERS = ("conv1", "conv2", "dense1", "head")


def layers(seed, entropies):
    """Kernels with a third of zeros, and their entropies."""
    rng = np.random.default_rng(seed)
    kernels = {
        layer: np.float32(rng.normal(size=(4, 3 + i)) * (rng.random((4, 3 + i)) > 0.3))
        for i, layer in enumerate(LAYERS)
    }
    return dict(zip(LAYERS, entropies, strict=True)), kernels


def shares_one_by_one(entropies, kernels, fraction, protect=()):
    """The shares before rounding, written out layer by layer."""
    live = {layer: int((kernels[layer] != 0).sum()) for layer in LAYERS}
    left = {layer for layer in LAYERS if entropies[layer] > 0}
    rest = round(fraction * sum(live[layer] for layer in left))
    own = {
        layer: entropies[layer] * np.abs(np.float64(kernels[layer])).sum() / live[layer]
        for layer in left
    }
    shares = dict.fromkeys(LAYERS, 0.0)
    while left:
        relevance = {a: sum(own[b] for b in left) / own[a] for a in left}
        total = sum(math.exp(relevance[a]) for a in left)
        share = {a: rest * math.exp(relevance[a]) / total for a in left}
        most = {a: live[a] - (a in protect) for a in left}
        full = {a for a in left if share[a] > most[a]}
        shares |= {a: most[a] if a in full else share[a] for a in left}
        left, rest = left - full, rest - sum(most[a] for a in full)
        if not full:
            break
    return shares


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("protect", [(), ("conv2", "head")])
@pytest.mark.parametrize("bits", [(0.7, 0.8, 0.9, 0.6), (0.9, 0.2, 0.0, 1.0)])
def test_budgets_are_shares_of_a_softmax_and_sum_to_the_total(fraction, protect, bits):
    for seed in range(10):
        entropies, kernels = layers(seed, bits)
        counts = metrics.layer_budget(entropies, kernels, fraction, protect=protect)
        live = {layer: int((kernels[layer] != 0).sum()) for layer in LAYERS}
        within = [layer for layer in LAYERS if entropies[layer] > 0]
        may_go = sum(live[layer] - (layer in protect) for layer in within)
        total = min(round(fraction * sum(live[layer] for layer in within)), may_go)
        assert sum(counts.values()) == total
        shares = shares_one_by_one(entropies, kernels, fraction, protect)
        for layer in LAYERS:
            assert type(counts[layer]) is int
            assert counts[layer] <= live[layer] - (layer in protect)
            if total < may_go:
                assert abs(counts[layer] - shares[layer]) < 1
        assert counts["dense1"] == 0 or bits[2] > 0


def test_the_layer_of_least_entropy_is_emptied_first():
    entropies, kernels = layers(0, (0.9, 0.1, 0.9, 0.9))
    live = {layer: int((kernel != 0).sum()) for layer, kernel in kernels.items()}
    fraction = (live["conv2"] - 1) / sum(live.values())
    counts = metrics.layer_budget(entropies, kernels, fraction)
    assert counts == dict.fromkeys(LAYERS, 0) | {"conv2": live["conv2"] - 1}


def test_where_all_layers_are_linear_no_weight_goes():
    entropies, kernels = layers(0, (0.0,) * 4)
    counts = metrics.layer_budget(entropies, kernels, 0.5)
    assert counts == dict.fromkeys(LAYERS, 0)
    kernels["conv1"][:] = 0  # Empty, whatever its entropy is said to be.
    counts = metrics.layer_budget(entropies | {"conv1": 0.5}, kernels, 0.5)
    assert counts == dict.fromkeys(LAYERS, 0)


@pytest.mark.parametrize(
    ("bits", "options", "message"),
    [
        ((0.1, 0.2, 0.3, math.nan), {}, r"at least 0, got {'head': nan}; NaN tells"),
        ((0.1, 0.2, 0.3, -0.1), {}, r"at least 0, got {'head': -0.1}"),
        (
            (0.1,) * 4,
            {"protect": ["tail"]},
            r"no kernel for \[\] and \['tail'\] to",
        ),
        ((0.1,) * 4, {"protect": "head"}, "and 'head' to protect; name layers"),
        ((0.1,) * 4, {"fraction": 1.5}, r"number in \[0, 1\] as `fraction`, got 1.5"),
    ],
)
def test_budgets_of_what_is_unknown_are_refused(bits, options, message):
    entropies, kernels = layers(0, bits)
    with pytest.raises(ValueError, match=message):
        metrics.layer_budget(entropies, kernels, **{"fraction": 0.5} | options)
    with pytest.raises(ValueError, match=r"no kernel for .*'conv1'"):
        metrics.layer_budget(entropies, {}, 0.5)
