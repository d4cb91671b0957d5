"""Tasks made of a data set: some classes, turned, enlarged."""

import numpy as np
import pytest

from d2sparse import data

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (8, 4, 4, 1), np.uint8)
LABELS = np.arange(8, dtype=np.int32) % 4
SOURCE = data.from_arrays(IMAGES, LABELS, IMAGES[:4], LABELS[:4], "squares")


def test_classes_are_chosen_and_numbered_from_0():
    task = data.only_classes(SOURCE, "1-2")
    kept = np.isin(LABELS, (1, 2))
    np.testing.assert_array_equal(task.train.images, IMAGES[kept])
    np.testing.assert_array_equal(task.train.labels, LABELS[kept] - 1)
    assert (task.num_classes, task.name, len(task.test.labels)) == (2, "squares-1-2", 2)
    assert task.train.labels.dtype == np.int32


@pytest.mark.parametrize("classes", ["3-1", "0-4", "a-b", "2", "", "-1-2"])
def test_classes_that_are_none_are_refused(classes):
    with pytest.raises(ValueError, match="expected classes FIRST-LAST of 0 to 3"):
        data.only_classes(SOURCE, classes)


def test_every_class_is_turned_four_times():
    task = data.with_rotations(SOURCE)
    assert task.num_classes == 16
    for row, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        for turns in range(4):
            place = turns * len(IMAGES) + row
            assert task.train.labels[place] == 4 * label + turns
            turned = np.rot90(image, turns)
            np.testing.assert_array_equal(task.train.images[place], turned)
    flat = data.from_arrays(IMAGES[:, :2], LABELS, IMAGES[:4, :2], LABELS[:4])
    with pytest.raises(ValueError, match="expected square images"):
        data.with_rotations(flat)


def test_enlarged_images_are_interpolated():
    grey = np.full((4, 2, 2, 1), 100, np.uint8)
    grey[:, 1] = 200
    source = data.from_arrays(grey, LABELS[:4], grey, LABELS[:4])
    task = data.enlarged(source, 4)
    column = task.train.images[0, :, 0, 0]
    # Centres of pixels: a quarter of the way, and clamped at the sides.
    assert column.tolist() == [100, 125, 175, 200]
    assert task.train.images.dtype == np.uint8
    floats = data.from_arrays(
        *(grey.astype(np.float32), LABELS[:4], grey.astype(np.float32), LABELS[:4])
    )
    with pytest.raises(ValueError, match="expected uint8 images"):
        data.enlarged(floats, 4)
    with pytest.raises(ValueError, match="side"):
        data.enlarged(source, 0)
