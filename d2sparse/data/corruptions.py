"""Corrupted test images: noise, blur, low contrast, occlusion, at fixed severities.

Every corruption is a pure function of a key, of *raw* images, uint8 from 0 to 255, and
of a severity from 1 (slight) to 5 (severe), and returns raw images: a test set is
corrupted first and standardised like any other afterwards. Each image of a batch has
draws of its own. The kinds are among those of Hendrycks and Dietterich
(arXiv 1903.12261); the constants are ours and are stated with each function, lengths
being parts of the shorter side, so that 8 x 8 and 32 x 32 images suffer alike.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

Corruption = Callable[[jax.Array, jax.Array, int], jax.Array]

_NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
_BLUR = (1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32)
_CONTRAST = (0.5, 0.4, 0.3, 0.2, 0.1)
_OCCLUSION = (0.2, 0.3, 0.4, 0.5, 0.6)
_GREY = 128


@functools.partial(jax.jit, static_argnames="severity")
def gaussian_noise(key: jax.Array, images: jax.Array, severity: int) -> jax.Array:
    """Adds normal noise to every value; what leaves the range is clipped.

    The deviation is 0.08, 0.12, 0.18, 0.26, 0.38 of the range from black to white.

    Args:
      key: a `jax.random.key`.
      images: uint8[batch, h, w, c].
      severity: from 1 to 5.

    Returns:
      uint8[batch, h, w, c].

    Raises:
      ValueError: the images are not a uint8 batch, or there is no such severity.

    >>> images = jnp.full((2, 8, 8, 1), 128, jnp.uint8)
    >>> noisy = gaussian_noise(jax.random.key(0), images, severity=3)
    >>> noisy.shape, bool((noisy != images).any())
    ((2, 8, 8, 1), True)
    """
    deviation = 255 * _at(_NOISE, severity, images)
    noise = deviation * jax.random.normal(key, images.shape)
    return _to_uint8(images + noise)


@functools.partial(jax.jit, static_argnames="severity")
def blur(key: jax.Array, images: jax.Array, severity: int) -> jax.Array:
    """Averages neighbours by a normal kernel; the border is continued outwards.

    Its deviation is 1/64, 1/32, 3/64, 1/16, 3/32 of the shorter side (0.5 to 3 pixels
    of 32), and it reaches four deviations far. Nothing in it is random.

    Args:
      key: not used.
      images: uint8[batch, h, w, c].
      severity: from 1 to 5.

    Returns:
      uint8[batch, h, w, c].

    Raises:
      ValueError: as in `gaussian_noise`.

    >>> images = jnp.zeros((1, 32, 32, 1), jnp.uint8).at[0, 16, 16, 0].set(255)
    >>> blurred = blur(jax.random.key(0), images, severity=2)
    >>> blurred[0, 16, 14:19, 0].tolist()
    [5, 25, 41, 25, 5]
    """
    del key
    deviation = _at(_BLUR, severity, images) * min(images.shape[1:3])
    reach = math.ceil(4 * deviation)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    values = images.astype(jnp.float32)
    for axis in (1, 2):
        values = _average(values, weights / weights.sum(), axis)
    return _to_uint8(values)


@functools.partial(jax.jit, static_argnames="severity")
def contrast(key: jax.Array, images: jax.Array, severity: int) -> jax.Array:
    """Moves values towards the mean of their image: `m + c (x - m)`.

    The mean is that of each channel, and c is 0.5, 0.4, 0.3, 0.2, 0.1. Nothing in it is
    random.

    Args:
      key: not used.
      images: uint8[batch, h, w, c].
      severity: from 1 to 5.

    Returns:
      uint8[batch, h, w, c].

    Raises:
      ValueError: as in `gaussian_noise`.

    >>> images = jnp.array([0, 200], jnp.uint8).reshape(1, 1, 2, 1)
    >>> contrast(jax.random.key(0), images, severity=1).ravel().tolist()
    [50, 150]
    """
    del key
    factor = _at(_CONTRAST, severity, images)
    values = images.astype(jnp.float32)
    mean = values.mean((1, 2), keepdims=True)
    return _to_uint8(mean + factor * (values - mean))


@functools.partial(jax.jit, static_argnames="severity")
def occlusion(key: jax.Array, images: jax.Array, severity: int) -> jax.Array:
    """Covers a random square of every image with grey, the level 128.

    Its side is 0.2, 0.3, 0.4, 0.5, 0.6 of the shorter side, rounded to pixels. It lies
    inside of the image and is uniform over its places there.

    Args:
      key: a `jax.random.key`.
      images: uint8[batch, h, w, c].
      severity: from 1 to 5.

    Returns:
      uint8[batch, h, w, c].

    Raises:
      ValueError: as in `gaussian_noise`.

    >>> images = jnp.zeros((1, 10, 10, 1), jnp.uint8)
    >>> int((occlusion(jax.random.key(0), images, severity=2) == 128).sum())
    9
    """
    part = _at(_OCCLUSION, severity, images)
    batch, height, width, _ = images.shape
    side = round(part * min(height, width))
    covered = [
        _interval(own, batch, length, side)
        for own, length in zip(jax.random.split(key), (height, width), strict=True)
    ]
    rows, columns = covered[0][:, :, None, None], covered[1][:, None, :, None]
    return jnp.where(rows & columns, jnp.uint8(_GREY), images)


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "blur": blur,
    "contrast": contrast,
    "occlusion": occlusion,
}


def _at(constants: tuple[float, ...], severity: int, images: jax.Array) -> float:
    if images.ndim != 4 or images.dtype != jnp.uint8:
        raise ValueError(
            "expected uint8 images of shape (batch, h, w, c), got "
            f"{images.dtype} of shape {images.shape}; corrupt them before they are "
            "standardised"
        )
    if severity not in range(1, len(constants) + 1):
        raise ValueError(f"expected a severity from 1 to 5, got {severity}")
    return constants[severity - 1]


def _average(values: jax.Array, weights: np.ndarray, axis: int) -> jax.Array:
    reach, length = len(weights) // 2, values.shape[axis]
    around = [(0, 0)] * values.ndim
    around[axis] = (reach, reach)
    padded = jnp.pad(values, around, mode="edge")
    moved = [
        weight * jax.lax.slice_in_dim(padded, start, start + length, axis=axis)
        for start, weight in enumerate(weights.tolist())
    ]
    return functools.reduce(jnp.add, moved)


def _interval(key: jax.Array, batch: int, length: int, side: int) -> jax.Array:
    """bool[batch, length], `side` of them in a row."""
    first = jax.random.randint(key, (batch, 1), 0, length - side + 1)
    positions = jnp.arange(length).reshape(1, length)
    return (positions >= first) & (positions < first + side)


def _to_uint8(values: jax.Array) -> jax.Array:
    return jnp.round(jnp.clip(values, 0, 255)).astype(jnp.uint8)
