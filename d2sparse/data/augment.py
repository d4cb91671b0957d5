"""Standardisation and augmentation of image batches on the device.

Every augmentation is a pure function of a key and of *standardised* images: float,
with zero the mean of each channel. Zero is therefore the neutral fill of `shift` and
`cutout`, and the unit of the jitter is one standard deviation. Each image of the batch
has draws of its own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Augment = Callable[[jax.Array, jax.Array], jax.Array]


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every channel, of images scaled to 0 ... 1.

    The sums are exact integers. The deviation is at least one grey level, 1/255, so
    that a constant channel standardises to zero.

    Args:
      images: uint8[n, h, w, c], the training images.

    Returns:
      float32[c] means and float32[c] deviations, as `standardize` wants them.

    Raises:
      ValueError: the images are not uint8[n, h, w, c] with n > 0.

    >>> mean, std = channel_statistics(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
    >>> float(mean[0]), float(std[0])
    (0.5, 0.5)
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
        raise ValueError(
            "expected uint8 images of shape (n, h, w, c), n > 0, got "
            f"{images.dtype} of shape {images.shape}"
        )
    levels = np.arange(256)
    counts = np.stack([_histogram(images[..., c]) for c in range(images.shape[-1])])
    pixels = counts.sum(axis=1)
    mean = counts @ levels / pixels
    variance = counts @ levels**2 / pixels - mean**2
    std = np.sqrt(np.maximum(variance, 1.0))
    return (mean / 255).astype(np.float32), (std / 255).astype(np.float32)


@jax.jit
def standardize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Images with mean 0 and deviation 1 per channel: `(images / 255 - mean) / std`.

    Args:
      images: uint8[..., h, w, c].
      mean: float[c], of images scaled to 0 ... 1; see `channel_statistics`.
      std: float[c], on the same scale.

    Returns:
      float32[..., h, w, c].

    Raises:
      ValueError: the images are not uint8, as when they were standardised before.

    >>> standardize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), 0.5, 0.25).round(3).item()
    2.0
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"expected uint8 images from 0 to 255, got {images.dtype}")
    mean, std = (_per_channel(x, images.ndim) for x in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


@functools.partial(jax.jit, static_argnames="padding")
def shift(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Random crop after zero padding: each image moves by up to `padding` pixels.

    The vertical and the horizontal shift are uniform on `-padding ... padding`.

    Args:
      key: a `jax.random.key`.
      images: float[batch, h, w, c], standardised.
      padding: zeros added on each side, at least 0 and less than h and w.

    Returns:
      float[batch, h, w, c].

    Raises:
      ValueError: the padding is out of range, or the images are not a float batch.

    >>> shift(jax.random.key(0), jnp.ones((2, 8, 8, 1)), padding=2).shape
    (2, 8, 8, 1)
    """
    _check_images(images)
    batch, height, width, channels = images.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(
            f"expected padding from 0 to {min(height, width) - 1} for images of "
            f"{height} x {width}, got {padding}"
        )
    around = (padding, padding)
    padded = jnp.pad(images, ((0, 0), around, around, (0, 0)))
    corners = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        origin = (corner[0], corner[1], jnp.zeros_like(corner[0]))
        return jax.lax.dynamic_slice(image, origin, (height, width, channels))

    return jax.vmap(crop)(padded, corners)


@jax.jit
def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2.

    Args:
      key: a `jax.random.key`.
      images: float[batch, h, w, c].

    Returns:
      float[batch, h, w, c].

    Raises:
      ValueError: the images are not a float batch.

    >>> flip(jax.random.key(0), jnp.ones((2, 8, 8, 1))).shape
    (2, 8, 8, 1)
    """
    _check_images(images)
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1, :], images)


@functools.partial(jax.jit, static_argnames="size")
def cutout(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """Sets a random square of each image to zero (DeVries and Taylor, 1708.04552).

    The centre is uniform over the pixels, so the square may reach over the border and
    hide less. It covers the rows from `centre - size // 2` to
    `centre - size // 2 + size - 1`, and columns likewise.

    Args:
      key: a `jax.random.key`.
      images: float[batch, h, w, c], standardised.
      size: side of the square in pixels, at least 0, at most h and w.

    Returns:
      float[batch, h, w, c].

    Raises:
      ValueError: the size is out of range, or the images are not a float batch.

    >>> cutout(jax.random.key(0), jnp.ones((2, 8, 8, 1)), size=0).sum().item()
    128.0
    """
    _check_images(images)
    batch, height, width, _ = images.shape
    if not 0 <= size <= min(height, width):
        raise ValueError(
            f"expected a cutout size from 0 to {min(height, width)} for images of "
            f"{height} x {width}, got {size}"
        )
    key_row, key_column = jax.random.split(key)
    rows = _interval(key_row, batch, height, size).reshape(batch, height, 1, 1)
    columns = _interval(key_column, batch, width, size).reshape(batch, 1, width, 1)
    return jnp.where(rows & columns, jnp.zeros((), images.dtype), images)


@functools.partial(jax.jit, static_argnames="strength")
def color_jitter(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Random brightness, contrast and saturation, in this order, without clipping.

    With u, v, w uniform on `-strength ... strength` for each image x:

        brightness:  x + u
        contrast:    m + (1 + v) (x - m), m the mean of the image
        saturation:  g + (1 + w) (x - g), g the mean over channels at each pixel

    An image with a single channel is its own g, so saturation leaves it as it is.

    Args:
      key: a `jax.random.key`.
      images: float[batch, h, w, c], standardised: brightness moves by up to `strength`
        standard deviations.
      strength: from 0 (identity) to 1.

    Returns:
      float[batch, h, w, c].

    Raises:
      ValueError: the strength is out of range, or the images are not a float batch.

    >>> images = jnp.ones((2, 8, 8, 3))
    >>> color_jitter(jax.random.key(0), images, strength=0.4).shape
    (2, 8, 8, 3)
    """
    _check_images(images)
    if not 0 <= strength <= 1:
        raise ValueError(f"expected a jitter strength from 0 to 1, got {strength}")
    shape = (3, images.shape[0], 1, 1, 1)
    brightness, contrast, saturation = jax.random.uniform(
        key, shape, images.dtype, minval=-strength, maxval=strength
    )
    images = images + brightness
    images = images + contrast * (images - images.mean((1, 2, 3), keepdims=True))
    return images + saturation * (images - images.mean(3, keepdims=True))


def make_augment(
    *, padding: int = 0, flip: bool = False, cutout: int = 0, jitter: float = 0.0
) -> Augment:
    """Composes the enabled augmentations: shift, flip, colour jitter, then cutout.

    Each of the four has its own stream of random numbers, so enabling one leaves the
    draws of the others as they were. With none enabled the result is the identity.

    Args:
      padding: for `shift`, in pixels.
      flip: whether to mirror with probability 1/2.
      cutout: side of the `cutout` square, in pixels.
      jitter: strength of `color_jitter`.

    Returns:
      A function of a key and float[batch, h, w, c] images. It raises ValueError at its
      first call where a setting does not suit the images.

    >>> augment = make_augment(padding=2, flip=True)
    >>> augment(jax.random.key(0), jnp.ones((2, 8, 8, 1))).shape
    (2, 8, 8, 1)
    """
    steps = _steps(padding, flip, cutout, jitter)

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        for stream, step in steps:
            images = step(jax.random.fold_in(key, stream), images)
        return images

    return augment


def _steps(
    padding: int, mirror: bool, hole: int, jitter: float
) -> list[tuple[int, Augment]]:
    steps: list[Augment | None] = [
        functools.partial(shift, padding=padding) if padding else None,
        flip if mirror else None,
        functools.partial(color_jitter, strength=jitter) if jitter else None,
        functools.partial(cutout, size=hole) if hole else None,
    ]
    return [(i, step) for i, step in enumerate(steps) if step is not None]


def _interval(key: jax.Array, batch: int, length: int, size: int) -> jax.Array:
    first = jax.random.randint(key, (batch, 1), 0, length) - size // 2
    positions = jnp.arange(length).reshape(1, length)
    return (positions >= first) & (positions < first + size)


def _per_channel(values: jax.Array, ndim: int) -> jax.Array:
    return jnp.reshape(jnp.asarray(values, jnp.float32), (1,) * (ndim - 1) + (-1,))


def _histogram(channel: np.ndarray) -> np.ndarray:
    # bincount widens its argument to 8 bytes, so it goes image by image.
    counts = np.zeros(256, np.int64)
    for image in channel:
        counts += np.bincount(image.ravel(), minlength=256)
    return counts


def _check_images(images: jax.Array) -> None:
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            "expected float images of shape (batch, h, w, c), got "
            f"{images.dtype} of shape {images.shape}; standardize them first"
        )
