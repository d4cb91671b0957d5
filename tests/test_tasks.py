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


def test_further_labels_stay_beside_their_examples():
    groups = np.arange(8)
    boxes = RNG.normal(size=(8, 2)).astype(np.float32)
    source = data.from_arrays(
        *(IMAGES, LABELS, IMAGES[:4], LABELS[:4]),
        further={"group": (groups, groups[:4]), "box": (boxes, boxes[:4])},
    )
    kept = data.only_classes(source, "3-3").train
    assert kept.further["group"].tolist() == [3, 7]
    assert kept.labels.tolist() == [0, 0]
    turned = data.with_rotations(source).train.further
    np.testing.assert_array_equal(turned["group"], np.concatenate([groups] * 4))
    np.testing.assert_array_equal(turned["box"], np.concatenate([boxes] * 4))
    np.testing.assert_array_equal(
        data.enlarged(source, 5).train.further["box"], source.train.further["box"]
    )


def test_all_classes_are_all_examples():
    task = data.only_classes(SOURCE, "0-3")
    np.testing.assert_array_equal(task.train.images, SOURCE.train.images)
    np.testing.assert_array_equal(task.train.labels, SOURCE.train.labels)


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


@pytest.mark.parametrize("side", [4, 7])
def test_enlarged_images_are_those_of_a_loop(side):
    """Bilinear between the centres of pixels, clamped at the sides."""
    task = data.enlarged(SOURCE, side)
    places = (np.arange(side) + 0.5) * 4 / side - 0.5
    weights = np.zeros((side, 4))
    for row, place in enumerate(np.clip(places, 0, 3)):
        low = int(place)
        weights[row, low] += 1 - (place - low)
        weights[row, min(low + 1, 3)] += place - low
    pixels = IMAGES[..., 0].astype(np.float64)
    expected = weights @ pixels @ weights.T
    assert task.train.images.shape == (8, side, side, 1)
    # Rounded to the nearest; float32 may fall to the other side of a half.
    away = np.abs(task.train.images[..., 0] - expected)
    assert away.max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(task.train.labels, LABELS)
    assert (task.name, task.num_classes) == (f"squares-{side}", 4)
