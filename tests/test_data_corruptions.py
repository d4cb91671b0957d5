"""Corruptions against numpy and scipy, their severities, and what they refuse."""

import functools

import jax
import numpy as np
import pytest
from scipy import ndimage

from d2sparse.data import CORRUPTIONS

KEY = jax.random.key(0)
SEVERITIES = range(1, 6)
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
BLUR = (1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32)
CONTRAST = (0.5, 0.4, 0.3, 0.2, 0.1)
OCCLUSION = (0.2, 0.3, 0.4, 0.5, 0.6)
PLAIN = ((100, 128), (500, 0))  # Grey and black images.
OWN, GREY, BLACK = slice(6), slice(7, 107), slice(107, None)


@functools.cache
def images():
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(6, 12, 16, 3)).astype(np.uint8)


@functools.cache
def corrupted(name, severity, seed=0):
    """The images, the first one once more, and of one shape with them plain ones."""
    plain = (np.full((n, 12, 16, 3), grey, np.uint8) for n, grey in PLAIN)
    given = np.concatenate([images(), images()[:1], *plain])
    before = given.copy()
    result = np.asarray(CORRUPTIONS[name](jax.random.key(seed), given, severity))
    np.testing.assert_array_equal(given, before)
    return result


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_stated_deviation(severity):
    noise = corrupted("gaussian_noise", severity)[GREY].astype(float) - 128
    # Clipping at black and white takes from the deviation; numpy clips as well.
    draws = np.random.default_rng(0).normal(0, 255 * NOISE[severity - 1], noise.shape)
    expected = np.clip(np.rint(draws), -128, 127)
    np.testing.assert_allclose(noise.std(), expected.std(), rtol=0.02)
    assert abs(noise.mean()) < 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_is_that_of_scipy(severity):
    deviation = BLUR[severity - 1] * 12
    expected = ndimage.gaussian_filter(
        images().astype(float),
        sigma=(0, deviation, deviation, 0),
        mode="nearest",
        radius=int(np.ceil(4 * deviation)),
    )
    np.testing.assert_allclose(corrupted("blur", severity)[OWN], expected, atol=0.51)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_is_that_of_numpy(severity):
    mean = images().mean((1, 2), keepdims=True)
    expected = mean + CONTRAST[severity - 1] * (images() - mean)
    actual = corrupted("contrast", severity)[OWN]
    np.testing.assert_allclose(actual, expected, atol=0.51)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_a_square_is_covered_somewhere_inside(severity):
    covered = corrupted("occlusion", severity)[BLACK]
    side = round(12 * OCCLUSION[severity - 1])
    assert set(np.unique(covered)) == {0, 128}
    places = set()
    for image in covered:
        rows, columns, _ = np.nonzero(image)
        assert len(rows) == 3 * side**2
        assert np.ptp(rows) == np.ptp(columns) == side - 1
        places.add((rows.min(), columns.min()))
    # Rarely is one of so few places missed by all.
    assert len(places) > 0.9 * (13 - side) * (17 - side) * (1 - np.exp(-3))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_grows_and_the_rest_is_kept(name):
    results = [corrupted(name, severity)[OWN] for severity in SEVERITIES]
    for result in results:
        assert (result.dtype, result.shape) == (np.uint8, images().shape)
    away = [np.abs(r.astype(float) - images()).mean() for r in results]
    assert (np.diff(away) >= 0).all()
    assert away[0] < away[-1]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_key_decides_and_images_differ(name):
    found, other = corrupted(name, 3), corrupted(name, 3, seed=1)
    again = corrupted.__wrapped__(name, 3)
    np.testing.assert_array_equal(found, again)
    is_random = name in ("gaussian_noise", "occlusion")
    assert (found[0] != found[6]).any() == is_random
    assert (other != again).any() == is_random


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("severity", [0, 6, -1])
def test_there_is_no_other_severity(name, severity):
    with pytest.raises(ValueError, match=f"severity from 1 to 5, got {severity}"):
        CORRUPTIONS[name](KEY, images(), severity)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_standardised_images_are_refused(name):
    with pytest.raises(ValueError, match=r"uint8 images .*got float32.*before they"):
        CORRUPTIONS[name](KEY, images().astype(np.float32), 3)
    with pytest.raises(ValueError, match=r"got uint8 of shape \(12, 16, 3\)"):
        CORRUPTIONS[name](KEY, images()[0], 3)
