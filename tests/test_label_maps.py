"""Label maps against NumPy and SciPy: votes, choices, ties, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from d2sparse.label_maps import (
    greedy,
    hungarian,
    identity_map,
    map_logits,
    random_map,
    ties,
    unvoted,
    votes,
)

KEY = jax.random.key(0)
count = jax.jit(votes, static_argnames=("classes", "soft"))


def predictions(examples=40, sources=6, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(examples, sources)).astype(np.float32)
    return logits, rng.integers(classes, size=examples).astype(np.int32)


def by_hand(logits, labels, classes, soft=False):
    found = np.zeros((logits.shape[1], classes))
    for z, y in zip(logits, labels, strict=True):
        found[:, y] += scipy.special.softmax(z) if soft else np.eye(len(z))[z.argmax()]
    return found


def choose(found, then=None):
    """Greedy by hand, and how many choices the order alone decided."""
    found, then = found.astype(float), then if then is None else then.astype(float)
    mapping, tied = np.zeros(found.shape[1], int), 0
    rows, columns = set(range(found.shape[0])), set(range(found.shape[1]))
    while columns:
        cells = [(s, k) for s in sorted(rows) for k in sorted(columns)]
        most = max(found[cell] for cell in cells)
        cells = [cell for cell in cells if found[cell] == most]
        if then is not None:
            most = max(then[cell] for cell in cells)
            cells = [cell for cell in cells if then[cell] == most]
        tied += len(cells) > 1
        s, k = cells[0]
        mapping[k] = s
        rows.remove(s)
        columns.remove(k)
    return mapping, tied


def test_votes_are_counted():
    logits, labels = predictions()
    hard = count(logits, labels, classes=4)
    assert hard.dtype == jnp.int32
    np.testing.assert_array_equal(hard, by_hand(logits, labels, 4))
    soft = count(logits, labels, classes=4, soft=True)
    np.testing.assert_allclose(soft, by_hand(logits, labels, 4, soft=True), rtol=1e-5)
    np.testing.assert_allclose(soft.sum(0), np.bincount(labels, minlength=4), rtol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_votes_of_batches_add_up_and_those_that_fill_up_do_not_count(soft):
    logits, labels = predictions(37)
    whole = count(logits, labels, classes=4, soft=soft)
    total = np.zeros(whole.shape, whole.dtype)
    for start in range(0, 37, 10):
        rows = np.arange(start, start + 10)
        weight = rows < 37
        part = count(
            logits[rows % 37], labels[rows % 37], classes=4, soft=soft, weight=weight
        )
        total += part
    if soft:
        np.testing.assert_allclose(total, whole, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(total, whole)


def test_weights_that_are_floats_weigh():
    logits, labels = predictions(8)
    weight = np.linspace(0, 1, 8, dtype=np.float32)
    found = count(logits, labels, classes=4, weight=weight)
    expected = sum(
        w * by_hand(logits[i : i + 1], labels[i : i + 1], 4)
        for i, w in enumerate(weight)
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_half_precision_votes_in_full_and_the_first_of_equal_logits_wins():
    logits = np.zeros((5000, 3), jnp.bfloat16)
    labels = np.zeros(5000, np.int32)
    assert count(logits, labels, classes=2)[0, 0] == 5000
    soft = count(logits, labels, classes=2, soft=True)
    np.testing.assert_allclose(soft[:, 0], 5000 / 3, rtol=1e-4)


def test_labels_that_are_no_class_do_not_vote_while_tracing():
    logits, labels = predictions(6)
    odd = labels.copy()
    odd[0], odd[1] = -1, 4
    expected = by_hand(logits[2:], labels[2:], 4)
    np.testing.assert_array_equal(count(logits, odd, classes=4), expected)
    soft = count(logits, odd, classes=4, soft=True)
    np.testing.assert_allclose(
        soft, by_hand(logits[2:], labels[2:], 4, True), rtol=1e-5
    )


def test_greedy_is_the_reference_ties_included():
    rng = np.random.default_rng(0)
    many = rng.integers(0, 3, size=(60, 7, 5)).astype(np.int32)
    many[0], many[1] = 0, np.eye(7, 5)
    then = rng.integers(0, 3, size=many.shape).astype(np.float32)
    found = jax.jit(jax.vmap(lambda f: (greedy(f), ties(f))))(many)
    decided = jax.jit(jax.vmap(lambda f, t: (greedy(f, t), ties(f, t))))(many, then)
    for number, own in enumerate(many):
        mapping, tied = choose(own)
        np.testing.assert_array_equal(found[0][number], mapping)
        assert found[1][number] == tied
        mapping, tied = choose(own, then[number])
        np.testing.assert_array_equal(decided[0][number], mapping)
        assert decided[1][number] == tied
    np.testing.assert_array_equal(found[0][0], np.arange(5))  # Nobody has voted.
    np.testing.assert_array_equal(found[0][1], np.arange(5))


def test_the_ties_that_soft_votes_decide():
    """At one example a class hard votes say next to nothing about the other cells."""
    hard = np.zeros((4, 3), np.int32)
    hard[2, 0] = 1
    soft = np.full((4, 3), 0.1, np.float32)
    soft[3, 1], soft[0, 2] = 0.9, 0.8
    assert greedy(hard).tolist() == [2, 0, 1]
    assert ties(hard) == 2
    assert greedy(hard, soft).tolist() == [2, 3, 0]
    assert ties(hard, soft) == 0
    assert unvoted(hard, greedy(hard)) == 2
    assert unvoted(soft, greedy(hard, soft)) == 0


def test_the_hungarian_map_has_the_most_votes():
    rng = np.random.default_rng(1)
    many = rng.integers(0, 9, size=(40, 7, 5))
    found = np.asarray(jax.jit(jax.vmap(hungarian))(many.astype(np.int32)))
    for own, mapping in zip(many, found, strict=True):
        best = own[scipy.optimize.linear_sum_assignment(-own)].sum()
        assert own[mapping, np.arange(5)].sum() == best
        assert len(set(mapping)) == 5
        greedily = choose(own)[0]
        assert own[greedily, np.arange(5)].sum() <= best


def test_a_source_of_as_many_classes_whose_classes_are_those_of_the_target():
    logits, labels = predictions(60, 4)
    logits[np.arange(60), labels] += 20
    found = count(logits, labels, classes=4)
    for mapping in (greedy(found), hungarian(found)):
        assert mapping.tolist() == [0, 1, 2, 3]
    assert ties(found) == 0 or len(set(np.bincount(labels))) < 4


def test_random_maps_take_no_class_twice_and_all_classes_alike():
    draw = jax.jit(jax.vmap(lambda key: random_map(key, 5, 3)))
    drawn = np.asarray(draw(jax.random.split(KEY, 1000)))
    assert all(len(set(own)) == 3 for own in drawn)
    counts = np.apply_along_axis(np.bincount, 0, drawn, minlength=5)
    assert (abs(counts - 200) < 60).all()


def test_logits_are_mapped_over_seeds():
    logits, _ = predictions(10)
    stacked = logits.reshape(2, 5, 6)
    maps = np.array([[5, 0, 2], [1, 3, 4]], np.int32)
    found = jax.jit(jax.vmap(map_logits))(stacked, maps)
    expected = np.stack([z[:, m] for z, m in zip(stacked, maps, strict=True)])
    np.testing.assert_array_equal(found, expected)
    assert map_logits(logits[0], identity_map(2)).tolist() == logits[0, :2].tolist()


def test_the_map_of_another_source_is_told_or_gives_nan():
    logits, _ = predictions(2)
    for other in (np.array([0, 6]), np.array([-1, 2])):
        with pytest.raises(ValueError, match="classes 0 to 5 of the source, got one"):
            map_logits(logits, other)
        found = np.asarray(jax.jit(map_logits)(logits, other))
        assert np.isnan(found).any(axis=1).all()
    with pytest.raises(ValueError, match=r"no source class twice, got \[3\]"):
        map_logits(logits, np.array([3, 1, 3]))
    with pytest.raises(ValueError, match=r"at most 6 target classes"):
        map_logits(logits, np.arange(7))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_map(KEY, 3, 4), "at most 3 target classes, as many as the so"),
        (lambda: random_map(0, 3, 2), "expected a random key"),
        (lambda: identity_map(0), "whole number of at least 1 as `classes`"),
        (lambda: greedy(np.zeros((3, 4))), "at most 3 target classes"),
        (lambda: hungarian(np.zeros((3, 4))), "at most 3 target classes"),
        (lambda: greedy(np.zeros(3)), r"votes of shape \(source classes, target"),
        (lambda: greedy(np.full((3, 2), np.nan)), "votes that are finite"),
        (lambda: greedy(np.zeros((3, 2)), np.zeros((2, 2))), "soft votes of shape"),
        (lambda: unvoted(np.zeros((3, 2)), np.arange(3)), "a map of 2 target classes"),
        (lambda: unvoted(np.zeros((3, 2)), np.arange(2.0)), r"int\[K\], as the map"),
        (lambda: votes(np.zeros((3, 2)), np.zeros(2, int), 2), "a label for each"),
        (lambda: votes(np.zeros((2, 2)), np.array([0, 2]), 2), "labels from 0 to 1"),
        (
            lambda: votes(
                np.zeros((2, 2)), np.zeros(2, int), 2, weight=np.zeros((2, 1))
            ),
            "a weight for each of 2 examples",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
