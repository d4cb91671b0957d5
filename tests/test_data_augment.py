"""Augmentations against crops, mirrors and squares computed in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse.data import (
    channel_statistics,
    color_jitter,
    cutout,
    flip,
    load,
    make_augment,
    shift,
    standardize,
)


def random_images(batch=400, channels=3):
    shape = (batch, 6, 5, channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def which(image, candidates):
    """The only candidate that equals the image."""
    equal = [name for name, c in candidates.items() if np.array_equal(image, c)]
    assert len(equal) == 1, equal
    return equal[0]


def crops(image, padding):
    """All crops of the zero-padded image, by the place of their corner."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    offsets = range(2 * padding + 1)
    return {
        (i, j): padded[i : i + height, j : j + width] for i in offsets for j in offsets
    }


def squares(image, size):
    """The image with every possible hidden square, by the centre of the square."""
    height, width, _ = image.shape
    hidden = {}
    for row in range(height):
        for column in range(width):
            copy = image.copy()
            for i in range(row - size // 2, row - size // 2 + size):
                for j in range(column - size // 2, column - size // 2 + size):
                    if 0 <= i < height and 0 <= j < width:
                        copy[i, j] = 0
            hidden[row, column] = copy
    return hidden


def mirrors(image):
    return {False: image, True: np.stack([row[::-1] for row in image])}


@pytest.mark.parametrize("padding", [1, 2])
def test_a_shifted_image_is_a_crop_and_every_crop_occurs(padding):
    images = random_images()
    shifted = np.asarray(shift(jax.random.key(1), images, padding))
    places = [
        which(out, crops(image, padding))
        for out, image in zip(shifted, images, strict=True)
    ]
    assert len(set(places)) == (2 * padding + 1) ** 2


def test_shifting_by_nothing_is_the_identity():
    images = random_images()
    np.testing.assert_array_equal(shift(jax.random.key(0), images, 0), images)


def test_rows_and_columns_are_shifted_independently_and_evenly():
    image = np.zeros((9, 9, 1), np.float32)
    image[4, 4] = 1
    shifted = shift(jax.random.key(0), np.stack([image] * 2500), 2)
    _, rows, columns, _ = np.nonzero(np.asarray(shifted))
    counts = np.histogram2d(rows, columns, bins=[np.arange(2, 8) - 0.5] * 2)[0]
    # 25 places, each expected 100 times with a deviation of about 10.
    assert counts.sum() == 2500
    assert 55 < counts.min() <= counts.max() < 145


def test_flip_mirrors_about_half_of_the_images():
    images = random_images()
    flipped = np.asarray(flip(jax.random.key(0), images))
    mirrored = [
        which(out, mirrors(image)) for out, image in zip(flipped, images, strict=True)
    ]
    # Expected 200 with a deviation of 10.
    assert 150 < sum(mirrored) < 250


@pytest.mark.parametrize("size", [2, 5])
def test_cutout_hides_one_square_clipped_at_the_border(size):
    images = random_images()
    hidden = np.asarray(cutout(jax.random.key(0), images, size))
    extents = set()
    for out, image in zip(hidden, images, strict=True):
        assert any(np.array_equal(out, c) for c in squares(image, size).values())
        extents.add((out == 0).sum().item())
    assert max(extents) == 3 * size * size
    assert len(extents) > 1


def test_every_centre_of_the_cutout_occurs():
    # On a square image: rows and columns drawn by one key would stay on its diagonal.
    ones = np.ones((400, 5, 5, 1), np.float32)
    hidden = np.asarray(cutout(jax.random.key(0), ones, 1))
    assert (hidden.sum(axis=(1, 2, 3)) == 24).all()
    assert len({tuple(np.argwhere(image == 0)[0]) for image in hidden}) == 25


def test_cutout_of_size_zero_is_the_identity():
    images = random_images()
    np.testing.assert_array_equal(cutout(jax.random.key(0), images, 0), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_is_its_equation(channels):
    images = random_images(16, channels)
    key, strength = jax.random.key(0), 0.7
    draws = np.asarray(
        jax.random.uniform(key, (3, 16), minval=-strength, maxval=strength)
    )
    expected = []
    for i, image in enumerate(images.astype(np.float64)):
        bright = image + draws[0, i]
        contrast = bright.mean() + (1 + draws[1, i]) * (bright - bright.mean())
        grey = contrast.mean(axis=-1, keepdims=True)
        expected.append(grey + (1 + draws[2, i]) * (contrast - grey))
    actual = color_jitter(key, images, strength)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_color_jitter_draws_for_each_image_within_its_strength():
    images = jnp.zeros((500, 2, 2, 1))
    brightness = np.asarray(color_jitter(jax.random.key(0), images, 0.4))[:, 0, 0, 0]
    assert len(set(brightness.tolist())) > 490
    assert np.abs(brightness).max() <= 0.4
    assert np.abs(brightness).max() > 0.38


def test_color_jitter_of_strength_zero_is_the_identity():
    images = random_images()
    np.testing.assert_array_equal(color_jitter(jax.random.key(0), images, 0.0), images)


AUGMENTATIONS = {
    "shift": functools.partial(shift, padding=2),
    "flip": flip,
    "cutout": functools.partial(cutout, size=2),
    "color_jitter": functools.partial(color_jitter, strength=0.5),
    "all": make_augment(padding=1, flip=True, cutout=2, jitter=0.3),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "all" else pytest.mark.slow)
        for name in AUGMENTATIONS
    ],
)
def test_augmentations_jit_and_vmap_over_keys(name):
    augment, images = AUGMENTATIONS[name], random_images()
    keys = jax.random.split(jax.random.key(0), 3)
    batches = jax.jit(jax.vmap(augment, in_axes=(0, None)))(keys, images)
    assert batches.shape == (3, *images.shape)
    for key, batch in zip(keys, batches, strict=True):
        np.testing.assert_allclose(batch, augment(key, images), rtol=1e-6, atol=1e-6)
    assert not np.array_equal(batches[0], batches[1])


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_augmentations_keep_shape_and_dtype(name, dtype):
    images = jax.ShapeDtypeStruct((4, 8, 8, 3), dtype)
    out = jax.eval_shape(AUGMENTATIONS[name], jax.random.key(0), images)
    assert (out.shape, out.dtype) == (images.shape, dtype)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_refuse_what_is_not_a_float_batch(name):
    augment = AUGMENTATIONS[name]
    for images in jnp.zeros((4, 8, 8, 3), jnp.uint8), jnp.zeros((8, 8, 3)):
        with pytest.raises(ValueError, match="standardize them first"):
            augment(jax.random.key(0), images)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (functools.partial(shift, padding=-1), "padding from 0 to 4 .* got -1"),
        (functools.partial(shift, padding=5), "padding from 0 to 4 .* got 5"),
        (functools.partial(cutout, size=-1), "size from 0 to 5 .* got -1"),
        (functools.partial(cutout, size=6), "size from 0 to 5 .* 6 x 5, got 6"),
        (functools.partial(color_jitter, strength=-0.1), "from 0 to 1, got -0.1"),
        (functools.partial(color_jitter, strength=1.5), "from 0 to 1, got 1.5"),
        (make_augment(padding=-1), "padding from 0 to 4 .* got -1"),
        (make_augment(cutout=6), "size from 0 to 5 .* got 6"),
    ],
)
def test_settings_out_of_range_are_refused_when_traced(augment, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(augment, jax.random.key(0), random_images())


def test_make_augment_with_nothing_enabled_is_the_identity():
    images = random_images()
    assert make_augment()(jax.random.key(0), images) is images


def test_make_augment_composes_shift_flip_jitter_and_cutout_in_this_order():
    images, key = random_images(), jax.random.key(5)
    keys = [jax.random.fold_in(key, i) for i in range(4)]
    expected = shift(keys[0], images, 1)
    expected = flip(keys[1], expected)
    expected = color_jitter(keys[2], expected, 0.3)
    expected = cutout(keys[3], expected, 2)
    augment = make_augment(padding=1, flip=True, cutout=2, jitter=0.3)
    np.testing.assert_array_equal(augment(key, images), expected)


def test_enabling_one_augmentation_leaves_the_draws_of_the_others():
    images, key = random_images(), jax.random.key(5)
    alone = make_augment(cutout=2)(key, images)
    both = make_augment(flip=True, cutout=2)(key, images)
    np.testing.assert_array_equal(alone == 0, both == 0)


def test_channel_statistics_are_those_of_numpy_in_double_precision():
    images = np.random.default_rng(0).integers(0, 256, (50, 7, 6, 3), np.uint8)
    mean, std = channel_statistics(images)
    scaled = images.reshape(-1, 3).astype(np.float64) / 255
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, scaled.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, scaled.std(axis=0), rtol=1e-6)


def test_a_constant_channel_standardises_to_zero():
    images = np.full((3, 4, 4, 2), 200, np.uint8)
    images[..., 1] = np.arange(48).reshape(3, 4, 4)
    mean, std = channel_statistics(images)
    assert std[0] == np.float32(1 / 255)
    np.testing.assert_allclose(standardize(images, mean, std)[..., 0], 0, atol=1e-4)


def test_standardised_digits_have_mean_zero_and_deviation_one():
    images = load("digits").train.images
    standard = np.asarray(standardize(images, *channel_statistics(images)), np.float64)
    assert standardize(images, *channel_statistics(images)).dtype == jnp.float32
    np.testing.assert_allclose([standard.mean(), standard.std()], [0, 1], atol=1e-5)


def test_standardize_treats_every_channel_by_itself():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.3, 0.4])
    expected = np.empty(images.shape)
    for c in range(3):
        expected[..., c] = (images[..., c] / 255 - mean[c]) / std[c]
    np.testing.assert_allclose(standardize(images, mean, std), expected, atol=1e-5)
    single = jax.vmap(standardize, in_axes=(0, None, None))(images, mean, std)
    np.testing.assert_allclose(single, expected, atol=1e-5)


def test_standardize_refuses_images_that_are_not_uint8():
    with pytest.raises(ValueError, match="expected uint8 images from 0 to 255"):
        standardize(jnp.zeros((1, 2, 2, 1)), 0.0, 1.0)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 2, 2, 1)),
        np.zeros((2, 2, 1), np.uint8),
        np.zeros((0, 2, 2, 1), np.uint8),
    ],
)
def test_channel_statistics_refuse_other_arrays(images):
    with pytest.raises(ValueError, match="expected uint8 images of shape"):
        channel_statistics(images)
