"""The pure functions of a pair: discouraged growth, following, merging, a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_close, largest

from d2sparse import distributions, dual
from d2sparse.dual import Consolidation, Dual, Trace
from d2sparse.masks import apply_masks, dense_masks
from d2sparse.schedules import every
from d2sparse.tree import is_kernel

CONSOLIDATION = Consolidation(0.75, 0.0, every(3))


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
    trace, slow = dual.begin_trace(half(ones), how, is_kernel)
    twos = half(jax.tree.map(lambda x: 2 * x, ones))
    masks, exact = dense_masks(ones), np.float64(1.0)
    for step in range(500, 800):
        slow, trace = consolidate(trace, twos, masks, step, 0.995)
        exact = 0.995 * exact + 0.005 * 2
    assert trace.average["bias"].dtype == jnp.float32
    np.testing.assert_allclose(trace.average["bias"], exact, rtol=1e-5)
    assert slow["bias"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(slow["bias"]), exact, rtol=2**-8)


def random_pair():
    both = zip(*(random_params(n, s) for n, s in ((0, 0.5), (1, 0.7))), strict=True)
    return tuple(Dual(*own) for own in both)


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_a_merger_is_the_largest_of_the_average(share):
    params, masks = random_pair()
    merged, live = dual.merge(params, masks, share)
    average = {
        path: share * np.asarray(params.fast[path])
        + (1 - share) * np.asarray(params.slow[path])
        for path in ("kernel", "bias")
    }
    number = int(masks.slow["kernel"].sum())
    chosen = largest(np.abs(average["kernel"]), number)
    np.testing.assert_array_equal(live["kernel"], chosen)
    np.testing.assert_allclose(
        merged["kernel"], average["kernel"] * chosen, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(merged["bias"], average["bias"], rtol=1e-5)
    assert live["bias"].all()


def test_merging_a_network_with_itself_changes_nothing():
    params, masks = random_pair()
    twice = Dual(params.slow, params.slow), Dual(masks.slow, masks.slow)
    merged, live = dual.merge(*twice)
    np.testing.assert_allclose(merged["kernel"], params.slow["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(live["kernel"], masks.slow["kernel"])


def test_merging_bfloat16_rounds_once():
    params, masks = random_pair()
    given = Dual(*map(half, params))
    merged, live = dual.merge(given, masks, 0.3)
    wide = Dual(*(jax.tree.map(jnp.float32, own) for own in given))
    expected, expected_live = dual.merge(wide, masks, 0.3)
    assert_close(live, expected_live)
    jax.tree.map(np.testing.assert_array_equal, merged, half(expected))


@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9])
def test_two_learners_share_the_budget_of_one_exactly(sparsity, share):
    for size in [20, 997, 4096, 23_824, 11_164_352, *range(50, 80)]:
        shapes = {"a": (size - size // 3,), "b": (size // 3,)}
        pair = dual.split_sparsity(size, sparsity, share)
        counts = [sum(distributions.uniform(shapes, s).values()) for s in pair]
        total = round((1 - sparsity) * size)
        assert sum(counts) == total
        assert counts[0] == round(share * total)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dual.merge(*random_pair(), share=1.5), r"in \[0, 1\], got 1\.5"),
        (lambda: dual.split_sparsity(100, 1.0), "sparsity=1.0, share=0.5"),
        (lambda: dual.split_sparsity(100, -0.1), "sparsity=-0.1, share=0.5"),
        (lambda: dual.split_sparsity(100, 0.5, 0.0), "sparsity=0.5, share=0.0"),
        (lambda: dual.split_sparsity(100, 0.5, 1.0), "sparsity=0.5, share=1.0"),
        (lambda: dual.split_sparsity(10, 0.95), "leaves both learners weights, got"),
    ],
)
def test_what_is_out_of_range_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
