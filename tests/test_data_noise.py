"""Wrong labels: how many, which, and how they are spread."""

import numpy as np
import pytest

from d2sparse.data import noisy_labels

LABELS = np.repeat(np.arange(10, dtype=np.int32), 1000)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.4, 1.0])
def test_as_many_labels_are_wrong_as_asked_for(fraction):
    noisy = noisy_labels(LABELS, fraction, 10, seed=0)
    assert (noisy != LABELS).sum() == round(fraction * len(LABELS))
    assert noisy.dtype == LABELS.dtype
    assert set(np.unique(noisy)) <= set(range(10))


def test_each_other_class_stands_equally_often():
    noisy = noisy_labels(LABELS, 1.0, 10, seed=1)
    counts = np.bincount(LABELS * 10 + noisy, minlength=100).reshape(10, 10)
    assert (np.diag(counts) == 0).all()
    others = counts[~np.eye(10, dtype=bool)]
    # Binomial with mean 111 and deviation 10.
    assert others.min() > 60
    assert others.max() < 162


def test_smaller_fractions_are_part_of_larger_ones():
    few, many = (noisy_labels(LABELS, f, 10, seed=2) for f in (0.2, 0.4))
    changed = few != LABELS
    np.testing.assert_array_equal(few[changed], many[changed])


def test_seeds_differ_and_repeat_and_the_input_is_kept():
    before = LABELS.copy()
    one, again, other = (noisy_labels(LABELS, 0.4, 10, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    np.testing.assert_array_equal(LABELS, before)


def test_two_classes_swap():
    labels = np.array([0, 1, 1, 0])
    np.testing.assert_array_equal(noisy_labels(labels, 1.0, 2, seed=0), 1 - labels)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction of wrong labels in \[0, 1\], got"):
        noisy_labels(LABELS, fraction, 10, seed=0)


def test_one_class_cannot_be_confused():
    with pytest.raises(ValueError, match="at least 2 classes to confuse, got 1"):
        noisy_labels(np.zeros(3, np.int32), 0.5, 1, seed=0)
