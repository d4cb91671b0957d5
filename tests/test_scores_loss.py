"""SNIP, GraSP and Fisher information against closed forms and explicit Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from d2sparse import rules, scores

KEY = jax.random.key(0)
CLASSES = 3


def data(seed=0, examples=8):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, 4)).astype(np.float32)
    return x, rng.integers(0, CLASSES, examples)


def network():
    rng = np.random.default_rng(1)
    shapes = {"hidden": {"kernel": (4, 5), "bias": (5,)}, "head": {"kernel": (5, 3)}}
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def predict(params, x):
    hidden = params["hidden"]
    activations = jnp.tanh(x @ hidden["kernel"] + hidden["bias"][None])
    return activations @ params["head"]["kernel"]


def linear(params, x):
    return x @ params["kernel"]


def mean_loss(params, batch):
    x, labels = batch
    logits = predict(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def parts(batch, *sizes):
    """A batch cut into batches of the given sizes."""
    assert sum(sizes) == len(batch[0])
    cuts = np.cumsum(sizes)[:-1]
    return list(zip(*(np.split(a, cuts) for a in batch), strict=True))


def ranked(score, params):
    return jax.jit(score)(params, None, KEY)


def assert_close(got, expected, rtol=1e-4, atol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        got,
        expected,
    )


MADE = {
    "snip": lambda batches: scores.snip(mean_loss, batches),
    "grasp": lambda batches: scores.grasp(predict, batches, temperature=2.0),
    "fisher": lambda batches: scores.fisher(predict, batches),
    "fisher_of_model": lambda batches: scores.fisher(predict, batches, empirical=False),
}


def some(*names):
    """Those by default; the others are slow."""
    marks = {name: () if name in names else pytest.mark.slow for name in MADE}
    return [pytest.param(MADE[name], id=name, marks=marks[name]) for name in MADE]


@pytest.mark.parametrize("made", some("snip", "fisher_of_model"))
def test_one_batch_equals_its_halves_inside_jit_and_outside(made):
    batch, params = data(), network()
    whole = made([batch])(params, None, KEY)
    assert_close(ranked(made(parts(batch, 4, 4)), params), whole)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, params)
    assert np.ptp(whole["hidden"]["kernel"]) > 1e-4


@pytest.mark.parametrize(
    "name",
    ["grasp", "fisher", pytest.param("fisher_of_model", marks=pytest.mark.slow)],
)
def test_every_example_weighs_the_same_in_batches_of_two_sizes(name):
    batch, params = data(), network()
    whole = ranked(MADE[name]([batch]), params)
    assert_close(ranked(MADE[name](iter(parts(batch, 3, 5))), params), whole)


@pytest.mark.parametrize("made", some("snip", "grasp"))
def test_a_rule_prunes_by_the_score_and_asks_for_no_gradient(made):
    params, score = network(), made([data()])
    rule = rules.one_shot(0.5, score=score)
    kept = jax.jit(rule.update)(rule.init(params, KEY), params, None, 0, KEY)
    ranks = ranked(score, params)
    live, ranks = (
        np.concatenate([np.ravel(tree[layer]["kernel"]) for layer in params])
        for tree in (kept, ranks)
    )
    assert live.sum() == 18  # Of 35.
    assert ranks[live].min() >= ranks[~live].max() - 1e-6


@pytest.mark.parametrize("made", some("grasp", "fisher_of_model"))
def test_half_precision_is_scored_in_single(made):
    half = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), network())
    single = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    score = made([data()])
    assert_close(ranked(score, half), ranked(score, single), rtol=1e-6)


@pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())
def test_no_batch_is_refused(made):
    with pytest.raises(ValueError, match="expected at least one batch to score with"):
        made([])


@pytest.mark.parametrize("name", ["grasp", "fisher"])
def test_a_batch_that_is_no_pair_is_refused(name):
    x, labels = data()
    with pytest.raises(ValueError, match=r"got a batch of type ndarray; pass one"):
        MADE[name]((x, labels))
    with pytest.raises(ValueError, match=r"each a pair \(inputs, labels\)"):
        scores.grasp(predict, [(x, labels)], gradient_batches=[(x, labels, x)])


# SNIP.


def test_snip_of_least_squares_in_closed_form():
    x, _ = data()
    rng = np.random.default_rng(3)
    kernel, y = rng.normal(size=(4, 2)), rng.normal(size=(8, 2))

    def loss(params, batch):
        x, y = batch
        return jnp.mean(jnp.sum((linear(params, x) - y) ** 2, axis=1)) / 2

    score = scores.snip(loss, parts((x, y), 2, 2, 2, 2))
    ranks = ranked(score, {"kernel": kernel.astype(np.float32)})
    expected = np.abs(kernel * (x.T @ (x @ kernel - y)) / 8)
    np.testing.assert_allclose(ranks["kernel"], expected, rtol=1e-4)


def test_snip_takes_the_absolute_value_after_the_mean_over_batches():
    def loss(params, slope):
        return slope * jnp.sum(params["w"])

    score = scores.snip(loss, [np.float32(3), np.float32(-3), np.float32(6)])
    assert score({"w": jnp.array([1.0, -2.0])})["w"].tolist() == [2.0, 4.0]


def test_snip_is_saliency_on_the_gradient_of_all_data():
    params, batch = network(), data()
    grads = jax.jit(jax.grad(mean_loss))(params, batch)
    ranks = ranked(scores.snip(mean_loss, parts(batch, 4, 4)), params)
    assert_close(ranks, scores.saliency(params, grads))


# GraSP.


def flat_loss(batch, temperature):
    """Mean cross entropy as a function of one vector of all weights."""
    _, unravel = ravel_pytree(network())
    x, labels = batch

    def loss(flat):
        logits = predict(unravel(flat), x) / temperature
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(log_p[jnp.arange(len(labels)), labels])

    return loss


@pytest.mark.parametrize(
    ("temperature", "two_batches"),
    [pytest.param(1.0, False, marks=pytest.mark.slow), (20.0, True)],
)
def test_grasp_equals_the_explicit_hessian(temperature, two_batches):
    batch, params = data(), network()
    other = data(seed=5, examples=6) if two_batches else batch
    flat, unravel = ravel_pytree(params)
    hessian = np.asarray(jax.jit(jax.hessian(flat_loss(batch, temperature)))(flat))
    gradient = np.asarray(jax.jit(jax.grad(flat_loss(other, temperature)))(flat))
    expected = unravel(jnp.asarray(np.asarray(flat) * (hessian @ gradient)))
    score = scores.grasp(
        predict,
        parts(batch, 5, 3),
        temperature,
        gradient_batches=parts(other, 2, 4) if two_batches else None,
    )
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert_close(ranked(score, params), expected, rtol=1e-3, atol=1e-5 * largest)


def test_grasp_is_the_fall_of_the_squared_gradient_when_the_weight_shrinks():
    batch, params = data(), network()
    flat, _ = ravel_pytree(params)
    ranks, _ = ravel_pytree(ranked(scores.grasp(predict, [batch], 1.0), params))
    gradient = jax.jit(jax.grad(flat_loss(batch, 1.0)))

    def half_norm(flat):
        return float(np.sum(np.square(gradient(flat), dtype=np.float64)) / 2)

    step = 1e-2
    for i in range(0, flat.size, 7):
        fall = half_norm(flat.at[i].mul(1 + step)) - half_norm(flat.at[i].mul(1 - step))
        np.testing.assert_allclose(ranks[i], fall / (2 * step), rtol=0.02, atol=1e-4)


def test_the_temperature_of_grasp_may_be_traced_and_is_200_if_not_given():
    params, batches = network(), [data()]
    at = jax.jit(lambda t: scores.grasp(predict, batches, t)(params)["head"]["kernel"])
    default = ranked(scores.grasp(predict, batches), params)["head"]["kernel"]
    np.testing.assert_allclose(at(200.0), default, rtol=1e-3, atol=1e-10)
    # Where the predictions are flat, g and H fall as 1 / t in a network that is not
    # linear in its weights.
    np.testing.assert_allclose(at(4e3) / at(8e3), 4, rtol=0.2)


# Fisher information.


def softmax(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def test_fisher_of_a_linear_model_in_closed_form():
    x, labels = data()
    kernel = np.random.default_rng(2).normal(size=(4, CLASSES)).astype(np.float32)
    p = softmax(x @ kernel)
    # d log p(y | x) / dw_ij = x_i (1[y = j] - p_j)
    given = (np.eye(CLASSES)[labels] - p) ** 2
    # The variance of 1[y = j] under the model's own predictions.
    own = p * (1 - p)
    for empirical, squares in [(True, given), (False, own)]:
        score = scores.fisher(linear, parts((x, labels), 3, 5), empirical)
        information = (x**2).T @ squares / len(x)
        ranks = ranked(score, {"kernel": kernel})
        np.testing.assert_allclose(
            ranks["kernel"], kernel**2 * information / 2, rtol=1e-4
        )


@pytest.mark.parametrize("empirical", [True, False])
def test_fisher_equals_the_loop_over_examples_and_labels(empirical):
    (x, labels), params = data(), network()
    gradient = jax.jit(
        jax.grad(lambda params, x, y: jax.nn.log_softmax(predict(params, x))[0, y])
    )
    total = jax.tree.map(np.zeros_like, params)
    for i in range(len(x)):
        p = softmax(np.asarray(predict(params, x[i : i + 1])))[0]
        for label in range(CLASSES):
            share = float(label == labels[i]) if empirical else p[label]
            grads = gradient(params, x[i : i + 1], label)
            total = jax.tree.map(
                lambda t, g, share=share: t + share * np.square(g), total, grads
            )
    expected = jax.tree.map(lambda w, t: w**2 * t / len(x) / 2, params, total)
    score = scores.fisher(predict, [(x, labels)], empirical)
    assert_close(ranked(score, params), expected)


def test_fisher_of_the_model_is_the_hessian_where_the_logits_are_linear():
    # There the Hessian of the loss is the Fisher information, whatever the labels.
    x, labels = data()
    kernel = np.random.default_rng(2).normal(size=(4, CLASSES)).astype(np.float32)

    def loss(flat):
        logits = linear({"kernel": flat.reshape(4, CLASSES)}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    hessian = jax.jit(jax.hessian(loss))(kernel.ravel())
    diagonal = np.diag(hessian).reshape(4, CLASSES)
    score = scores.fisher(linear, [(x, labels)], False)
    ranks = ranked(score, {"kernel": kernel})
    np.testing.assert_allclose(ranks["kernel"], kernel**2 * diagonal / 2, rtol=1e-4)
