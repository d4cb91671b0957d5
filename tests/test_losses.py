"""Losses against numpy in double precision, closed forms and finite differences."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
import scipy.special
import sklearn.metrics
from jax.test_util import check_grads

from d2sparse import losses

PAIRWISE = [
    losses.distillation,
    losses.logit_agreement,
    losses.feature_agreement,
    losses.jensen_shannon,
]
ONE_SIDED = PAIRWISE[:3]


def normal(seed, shape=(6, 5), scale=2.0):
    draw = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(scale * draw, jnp.float32)


def log_softmax(logits):
    return scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(loss, *arguments):
    """The summed loss, and its gradients with respect to both arguments."""

    def total(*args):
        return loss(*args).sum()

    return jax.value_and_grad(total, argnums=(0, 1))(*arguments)


def rows(loss, *arrays):
    """The loss of one example at a time, in a Python loop."""
    return np.array([loss(*row) for row in zip(*arrays, strict=True)])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_the_sum_over_smoothed_targets(smoothing):
    logits, labels = normal(0), np.array([0, 1, 2, 3, 4, 0])

    def loss(log_p, label):
        targets = [smoothing / 5 + (1 - smoothing) * (c == label) for c in range(5)]
        return -sum(t * lp for t, lp in zip(targets, log_p, strict=True))

    expected = rows(loss, log_softmax(logits), labels)
    actual = losses.cross_entropy(logits, jnp.asarray(labels), smoothing)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_mean_cross_entropy_is_the_log_loss_of_scikit_learn():
    logits, labels = normal(1), np.array([4, 1, 2, 0, 4, 3])
    expected = sklearn.metrics.log_loss(labels, np.exp(log_softmax(logits)))
    actual = losses.cross_entropy(logits, jnp.asarray(labels)).mean()
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_the_gradient_of_cross_entropy_is_prediction_minus_target():
    logits, labels = normal(2), jnp.array([4, 1, 2, 0, 4, 3])
    gradient = jax.grad(lambda z: losses.cross_entropy(z, labels, 0.1).sum())(logits)
    targets = 0.9 * np.eye(5)[labels] + 0.1 / 5
    np.testing.assert_allclose(
        gradient, np.exp(log_softmax(logits)) - targets, atol=1e-6
    )


def test_cross_entropy_of_extreme_logits():
    logits = jnp.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]])
    loss, gradient = jax.value_and_grad(
        lambda z: losses.cross_entropy(z, jnp.array([0, 1])).sum()
    )(logits)
    assert loss == 2e4
    np.testing.assert_array_equal(gradient, [[0, 0, 0], [1, -1, 0]])


def test_cross_entropy_refuses_onehot_labels():
    with pytest.raises(ValueError, match="class indices, not one-hot"):
        losses.cross_entropy(normal(0), jnp.eye(6, 5))


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_distillation_is_the_divergence_summed_over_classes(tau):
    student, teacher = normal(3), normal(4)

    def loss(log_q, log_p):
        return tau**2 * scipy.special.rel_entr(np.exp(log_p), np.exp(log_q)).sum()

    expected = rows(loss, log_softmax(student / tau), log_softmax(teacher / tau))
    actual = losses.distillation(student, teacher, tau)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_the_gradient_of_distillation_is_tau_times_the_difference(tau):
    student, teacher = normal(3), normal(4)
    gradient = jax.grad(lambda z: losses.distillation(z, teacher, tau).sum())(student)
    q, p = np.exp(log_softmax(student / tau)), np.exp(log_softmax(teacher / tau))
    np.testing.assert_allclose(gradient, tau * (q - p), atol=2e-6)


def test_distillation_from_a_certain_teacher_is_cross_entropy():
    student, labels = normal(5), jnp.array([4, 1, 2, 0, 4, 3])
    teacher = 1e4 * jax.nn.one_hot(labels, 5)
    np.testing.assert_allclose(
        losses.distillation(student, teacher),
        losses.cross_entropy(student, labels),
        rtol=1e-6,
    )


def test_logit_agreement_is_the_mean_squared_error_over_classes():
    ours, peers = normal(6), normal(7)
    expected = rows(sklearn.metrics.mean_squared_error, ours, peers)
    np.testing.assert_allclose(losses.logit_agreement(ours, peers), expected, rtol=1e-5)


def test_feature_agreement_is_twice_the_cosine_distance():
    ours, peers = normal(8), normal(9)
    expected = 2 * rows(scipy.spatial.distance.cosine, ours, peers)
    actual = losses.feature_agreement(ours, peers)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_feature_agreement_of_equal_and_opposite_directions():
    features = normal(8)
    np.testing.assert_allclose(
        losses.feature_agreement(features, 3 * features), 0, atol=1e-6
    )
    np.testing.assert_allclose(
        losses.feature_agreement(features, -features), 4, rtol=1e-6
    )


def test_feature_agreement_moves_directions_and_not_lengths():
    features, peers = normal(8), normal(9)
    _, (gradient, _) = value_and_gradients(losses.feature_agreement, features, peers)
    assert np.abs(gradient).max() > 0.01
    np.testing.assert_allclose(jnp.sum(gradient * features, axis=-1), 0, atol=1e-6)


@pytest.mark.parametrize(("zero", "other"), [(0, 1), (1, 0), (0, 0)])
def test_feature_agreement_of_dead_units(zero, other):
    features, peers = jnp.full((1, 4), float(zero)), jnp.full((1, 4), float(other))
    loss, (gradient, _) = value_and_gradients(losses.feature_agreement, features, peers)
    np.testing.assert_allclose(loss, max(zero, other), rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_feature_agreement_does_not_overflow_in_half_precision(scale):
    features = jnp.array([[scale, -scale, scale, scale]], jnp.float16)
    peers = jnp.ones((1, 4), jnp.float16)
    loss, (gradient, _) = value_and_gradients(losses.feature_agreement, features, peers)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.float16
    np.testing.assert_allclose(loss, 2 - 2 * 0.5, rtol=1e-3)
    assert np.isfinite(gradient).all()


PAIRS = [
    losses.distillation,
    losses.logit_agreement,
    losses.feature_agreement,
    losses.jensen_shannon,
]


def of_one(loss):
    labels = jnp.arange(4) % 3
    if loss is losses.cross_entropy:
        return lambda a, b: loss(a, labels, 0.1)
    return (lambda a, b: loss(a)) if loss is losses.confidence else loss


@pytest.mark.parametrize("loss", [*PAIRS, losses.cross_entropy, losses.confidence])
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)]
)
def test_sums_over_many_classes_are_those_of_float32(loss, dtype):
    # In half precision a sum over 1000 classes and its logarithm have three digits.
    rng = np.random.default_rng(0)
    given = [jnp.asarray(rng.normal(size=(4, 1000)), dtype) for _ in range(2)]
    found = of_one(loss)(*given)
    wide = of_one(loss)(*(x.astype(jnp.float32) for x in given))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, wide)
    assert jnp.mean(found).dtype == jnp.float32


def test_jensen_shannon_is_the_squared_distance_of_scipy():
    logits_a, logits_b = normal(10), normal(11)
    p, q = np.exp(log_softmax(logits_a)), np.exp(log_softmax(logits_b))
    expected = rows(scipy.spatial.distance.jensenshannon, p, q) ** 2
    actual = losses.jensen_shannon(logits_a, logits_b)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_jensen_shannon_is_symmetric_and_pulls_on_both_sides():
    logits_a, logits_b = normal(10), normal(11)
    np.testing.assert_allclose(
        losses.jensen_shannon(logits_a, logits_b),
        losses.jensen_shannon(logits_b, logits_a),
        rtol=1e-6,
    )
    loss = losses.jensen_shannon
    _, (of_first, of_second) = value_and_gradients(loss, logits_a, logits_b)
    _, (swapped, _) = value_and_gradients(loss, logits_b, logits_a)
    np.testing.assert_allclose(of_second, swapped, atol=1e-7)
    assert min(np.abs(of_first).max(), np.abs(of_second).max()) > 0.01


def test_jensen_shannon_is_at_most_log_two():
    logits_a, logits_b = normal(12, scale=50.0), normal(13, scale=50.0)
    loss = losses.jensen_shannon(logits_a, logits_b)
    assert loss.max() > 0.69
    assert (loss <= math.log(2) * (1 + 1e-6)).all()


@pytest.mark.parametrize("loss", PAIRWISE)
def test_gradients_agree_with_finite_differences(loss):
    peers = normal(15)
    f = jax.jit(lambda z: loss(z, peers))
    check_grads(f, (normal(14),), order=1, modes=["rev"], eps=1e-2, rtol=5e-3)


@pytest.mark.parametrize("loss", ONE_SIDED)
def test_the_peer_is_detached(loss):
    _, (of_ours, of_peer) = value_and_gradients(loss, normal(14), normal(15))
    assert np.abs(of_ours).max() > 0.01
    np.testing.assert_array_equal(of_peer, 0)


@pytest.mark.parametrize("loss", PAIRWISE)
def test_equal_arguments_are_a_minimum_of_zero(loss):
    same = normal(16)
    np.testing.assert_array_equal(loss(same, same), 0)
    value, (gradient, _) = value_and_gradients(loss, same, same)
    np.testing.assert_allclose(value, 0, atol=5e-7)
    np.testing.assert_allclose(gradient, 0, atol=5e-7)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.distillation, [2e4, 0.0]),
        (losses.jensen_shannon, [math.log(2), 0.0]),
    ],
)
def test_divergences_of_extreme_logits(loss, expected):
    ours = jnp.array([[1e4, -1e4], [1e4, -1e4]])
    peers = jnp.array([[-1e4, 1e4], [1e4, -1e4]])
    np.testing.assert_allclose(loss(ours, peers), expected, rtol=1e-6)
    _, (gradient, _) = value_and_gradients(loss, ours, peers)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", PAIRWISE)
def test_any_leading_axes_jit_and_vmap_give_one_loss_per_example(loss):
    ours, peers = normal(17), normal(18)
    expected = loss(ours, peers)
    assert expected.shape == (6,)
    for actual in [
        jax.jit(loss)(ours, peers),
        jax.jit(jax.vmap(loss))(ours, peers),
        jax.jit(loss)(ours.reshape(2, 3, 5), peers.reshape(2, 3, 5)).ravel(),
    ]:
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_hyperparameters_may_be_traced():
    ours, peers, labels = normal(17), normal(18), jnp.arange(6) % 5
    swept = jax.vmap(lambda e: losses.cross_entropy(ours, labels, e))(jnp.array([0, 1]))
    np.testing.assert_allclose(swept[0], losses.cross_entropy(ours, labels), rtol=1e-6)
    swept = jax.vmap(lambda tau: losses.distillation(ours, peers, tau))(
        jnp.array([1.0, 3.0])
    )
    np.testing.assert_allclose(
        swept[1], losses.distillation(ours, peers, 3.0), rtol=1e-5
    )


@pytest.mark.parametrize("loss", PAIRWISE)
def test_silent_broadcasting_is_refused(loss):
    with pytest.raises(ValueError, match=r"one shape.*\(6, 5\) and \(1, 5\)"):
        loss(normal(0), normal(0, (1, 5)))


def test_confidence_is_the_largest_probability_and_teaches_nothing():
    logits = jnp.array([[0.0, np.log(3.0)], [2.0, 2.0]], jnp.float32)
    np.testing.assert_allclose(losses.confidence(logits), [0.75, 0.5], rtol=1e-6)
    gradient = jax.grad(lambda z: losses.confidence(z).sum())(logits)
    assert (np.asarray(gradient) == 0).all()
