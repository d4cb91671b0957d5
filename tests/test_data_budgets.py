"""Budgets and validation splits: their properties, checked by plain Python loops."""

import collections
import itertools

import numpy as np
import pytest

from d2sparse.data import budget, holdout, load, long_tailed

SEEDS = [0, 1, 7]
# Of seed 5, from 3 classes of 100, 4 of each.
PINNED = [69, 169, 296, 21, 179, 238, 92, 192, 254, 42, 124, 283]


def random_labels(seed, size=300, classes=5):
    """Labels that are not balanced, not contiguous, and in no order."""
    rng = np.random.default_rng(seed)
    values = 3 * np.arange(classes) + 2
    return np.concatenate(
        [values, rng.choice(values, size, p=[0.4, 0.2, 0.2, 0.1, 0.1])]
    )


def count(labels, indices):
    return collections.Counter(labels[i].item() for i in indices)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("samples", [1, 2, 10])
def test_a_budget_has_the_same_number_of_every_class_without_repeats(samples, seed):
    labels = random_labels(seed)
    chosen = budget(labels, samples, seed)
    assert chosen.dtype == np.int64
    assert chosen.shape == (5 * samples,)
    assert len(set(chosen.tolist())) == len(chosen)
    assert count(labels, chosen) == dict.fromkeys((2, 5, 8, 11, 14), samples)


@pytest.mark.parametrize("seed", SEEDS)
def test_budgets_of_one_seed_are_nested_prefixes(seed):
    labels = random_labels(seed)
    largest = budget(labels, 12, seed)
    for samples in range(1, 12):
        np.testing.assert_array_equal(
            budget(labels, samples, seed), largest[: 5 * samples]
        )


def test_every_row_of_a_budget_holds_every_class_in_order():
    labels = random_labels(0)
    rows = labels[budget(labels, 6, seed=3)].reshape(6, 5)
    np.testing.assert_array_equal(rows, [[2, 5, 8, 11, 14]] * 6)


def test_a_whole_class_can_be_the_budget():
    labels = np.array([1, 0, 1, 0, 0, 1])
    assert sorted(budget(labels, 3, seed=0).tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("samples", [0, None])
def test_no_budget_is_all_the_data_in_order(samples):
    chosen = budget(np.array([1, 0, 1]), samples, seed=0)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == [0, 1, 2]


def test_a_budget_is_repeatable_and_depends_on_the_seed():
    labels = random_labels(0)
    draws = [tuple(budget(labels, 4, seed)) for seed in range(20)]
    assert draws[3] == tuple(budget(labels, 4, 3))
    assert len(set(draws)) == 20


def test_the_draw_of_a_seed_never_changes():
    labels = np.repeat(np.arange(3), 100)
    words = [np.random.PCG64([5, 1, c]).random_raw(100).tolist() for c in range(3)]
    expected = [
        100 * c + sorted(range(100), key=words[c].__getitem__)[r]
        for r, c in itertools.product(range(4), range(3))
    ]
    assert budget(labels, 4, seed=5).tolist() == expected
    assert expected == PINNED


def test_examples_of_a_class_are_drawn_evenly():
    labels = np.repeat([0, 1], 8)
    drawn = collections.Counter()
    for seed in range(400):
        drawn.update(budget(labels, 2, seed).tolist())
    # Each of 16 examples is expected 100 times, with a deviation of about 9.
    assert len(drawn) == 16
    assert 55 < min(drawn.values()) <= max(drawn.values()) < 145


def test_classes_are_drawn_independently():
    labels = np.tile([0, 1], 50)
    first, second = budget(labels, 50, seed=0).reshape(50, 2).T // 2
    assert (first == second).mean() < 0.2


def test_too_few_examples_name_the_class_and_its_count():
    labels = np.array([4, 4, 4, 9, 9])
    with pytest.raises(ValueError, match=r"expected 3 .* got 2 of class 9"):
        budget(labels, 3, seed=0)


@pytest.mark.parametrize(
    "labels", [np.zeros((2, 1), int), np.zeros(2), np.zeros(0, int)]
)
def test_labels_must_be_a_list_of_integers(labels):
    with pytest.raises(ValueError, match="expected integer labels"):
        budget(labels, 1, seed=0)
    with pytest.raises(ValueError, match="expected integer labels"):
        holdout(labels, np.arange(1), 0.5, seed=0)


def test_negative_budgets_are_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        budget(np.array([0, 1]), -1, seed=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.99])
def test_validation_is_a_stratified_part_of_the_budget(fraction, seed):
    labels = random_labels(seed)
    indices = np.random.default_rng(seed).permutation(len(labels))[:200]
    train, validation = holdout(labels, indices, fraction, seed)
    assert not set(train.tolist()) & set(validation.tolist())
    assert sorted([*train, *validation]) == sorted(indices)
    total, held = count(labels, indices), count(labels, validation)
    for label, number in total.items():
        assert held[label] == min(max(round(fraction * number), 1), number - 1)


def test_both_sides_keep_the_order_of_the_indices():
    labels = random_labels(0)
    indices = budget(labels, 8, seed=1)
    position = {index: i for i, index in enumerate(indices.tolist())}
    for side in holdout(labels, indices, 0.3, seed=0):
        places = [position[index] for index in side.tolist()]
        assert places == sorted(places)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_two_examples_of_a_class_give_one_to_each_side(fraction):
    labels = np.array([0, 0, 1, 1])
    train, validation = holdout(labels, np.arange(4), fraction, seed=0)
    assert labels[train].tolist() == labels[validation].tolist() == [0, 1]


def test_a_single_example_of_a_class_cannot_be_split():
    labels = np.array([0, 0, 7, 0])
    with pytest.raises(ValueError, match="got 1 of class 7; raise the budget"):
        holdout(labels, np.arange(4), 0.5, seed=0)


def test_the_holdout_is_repeatable_and_depends_on_the_seed():
    labels = random_labels(0)
    indices = budget(labels, 10, seed=0)
    draws = [tuple(holdout(labels, indices, 0.3, seed)[1]) for seed in range(20)]
    assert draws[3] == tuple(holdout(labels, indices, 0.3, 3)[1])
    assert len(set(draws)) == 20


def test_one_seed_may_draw_both_a_budget_and_a_holdout():
    labels = np.repeat([0, 1], 100)
    drawn = set(budget(labels, 20, seed=0).tolist())
    _, validation = holdout(labels, np.arange(200), 0.2, seed=0)
    # Independent draws of 40 of 200 share 8, with a deviation of about 2.3.
    assert len(drawn & set(validation.tolist())) < 20


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_fractions_lie_strictly_between_0_and_1(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        holdout(np.array([0, 0]), np.arange(2), fraction, seed=0)


@pytest.mark.parametrize("indices", [[0, 0], [-1, 0], [0, 4], [0.0, 1.0], [], [[0, 1]]])
def test_indices_must_be_distinct_and_in_range(indices):
    with pytest.raises(ValueError, match=r"expected (distinct|integer) indices"):
        holdout(np.array([0, 0, 0, 0]), np.array(indices), 0.5, seed=0)


def test_budgets_of_the_digits_leave_the_test_split_alone():
    labels = load("digits").train.labels
    train, validation = holdout(labels, budget(labels, 10, seed=0), 0.2, seed=0)
    assert np.bincount(labels[train]).tolist() == [8] * 10
    assert np.bincount(labels[validation]).tolist() == [2] * 10


# Long tails


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("imbalance", [1, 2.5, 10, 50])
def test_a_long_tail_has_the_stated_sizes_in_some_order(seed, imbalance):
    labels = np.repeat(np.arange(10), 120)
    chosen = long_tailed(labels, 100, imbalance, seed)
    sizes = sorted(count(labels, chosen).values(), reverse=True)
    assert sizes == [max(1, round(100 * imbalance ** (-c / 9))) for c in range(10)]
    assert len(set(chosen.tolist())) == len(chosen)


def test_no_class_of_a_long_tail_is_empty():
    labels = np.repeat(np.arange(4), 10)
    sizes = count(labels, long_tailed(labels, 5, 1000.0, seed=0))
    assert sorted(sizes.values()) == [1, 1, 1, 5]


@pytest.mark.parametrize("seed", SEEDS)
def test_long_tails_are_parts_of_the_budget_and_of_each_other(seed):
    labels = random_labels(seed)
    balanced = budget(labels, 12, seed).tolist()
    assert long_tailed(labels, 12, 1.0, seed).tolist() == balanced
    slight = long_tailed(labels, 12, 3.0, seed).tolist()
    assert [i for i in balanced if i in slight] == slight
    assert set(long_tailed(labels, 12, 6.0, seed)) < set(slight)
    assert set(long_tailed(labels, 8, 3.0, seed)) < set(slight)


def test_the_order_of_a_tail_is_drawn_with_the_seed():
    labels = np.repeat(np.arange(6), 40)
    largest = [
        count(labels, long_tailed(labels, 40, 10.0, seed)).most_common(1)[0][0]
        for seed in range(30)
    ]
    assert set(largest) == set(range(6))


def test_a_single_class_has_no_tail():
    assert len(long_tailed(np.zeros(7, int), 5, 10.0, seed=0)) == 5


@pytest.mark.parametrize("imbalance", [0.5, 0.0, -1.0, float("nan")])
def test_an_imbalance_below_one_is_refused(imbalance):
    with pytest.raises(ValueError, match="imbalance of at least 1, got"):
        long_tailed(random_labels(0), 5, imbalance, seed=0)


@pytest.mark.parametrize("samples", [0, -3])
def test_a_long_tail_needs_a_number(samples):
    with pytest.raises(ValueError, match=r"largest class, got .*a long tail needs"):
        long_tailed(random_labels(0), samples, 10.0, seed=0)
