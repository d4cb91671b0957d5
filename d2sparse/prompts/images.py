"""What prompts do to images: check, repeat channels, resize and normalise them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Statistics = float | Sequence[float] | np.ndarray | jax.Array  # One, or by channel.


def check_pixels(images: Any) -> None:
    """Raises where images are not in [0, 1], as when they were normalised before.

    Raises:
      ValueError: saying what they are.

    >>> check_pixels(jnp.full((1, 2, 2, 1), 0.5))
    """
    known = np.asarray(images)  # Not by JAX, which may be tracing something else.
    low, high = float(known.min()), float(known.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"expected images in [0, 1], got values from {low:g} to {high:g}; a prompt "
            "normalises them itself: give pixels divided by 255"
        )


def is_known(array: Any) -> bool:
    """Whether the values can be looked at: not while tracing, nor of other processes.

    >>> is_known(jnp.ones(2))
    True
    """
    if isinstance(array, jax.core.Tracer):
        return False
    return bool(getattr(array, "is_fully_addressable", True))


def widened(images: jax.Array) -> jax.Array:
    """Images in [0, 1], in float32 or wider.

    >>> widened(jnp.ones((1, 2, 2, 1), jnp.bfloat16)).dtype
    dtype('float32')
    """
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            "expected float images of shape (batch, h, w, c) in [0, 1], got "
            f"{images.dtype} of shape {images.shape}; divide uint8 images by 255"
        )
    if images.size and is_known(images):
        check_pixels(images)
    return jnp.asarray(images, jnp.promote_types(images.dtype, jnp.float32))


def with_channels(images: jax.Array, channels: int) -> jax.Array:
    """Images of one channel repeated for a network of several.

    >>> with_channels(jnp.ones((1, 2, 2, 1)), channels=3).shape
    (1, 2, 2, 3)
    """
    found = images.shape[3]
    if found not in (1, channels):
        raise ValueError(
            f"expected images of 1 or {channels} channels, as the network has, got "
            f"{found}; average them to one, or take a network of {found}"
        )
    return images if found == channels else jnp.repeat(images, channels, axis=3)


def resized(images: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Images of a height and a width, themselves where they have them.

    >>> resized(jnp.ones((1, 2, 2, 1)), (4, 3)).shape
    (1, 4, 3, 1)
    """
    if images.shape[1:3] == tuple(size):
        return images
    shape = (images.shape[0], *size, images.shape[3])
    return jax.image.resize(images, shape, "bilinear")


def make_normalisation(
    mean: Statistics, std: Statistics, channels: int
) -> Callable[[jax.Array], jax.Array]:
    """`(images - mean) / std` by channel.

    >>> make_normalisation(0.5, 0.25, channels=1)(jnp.ones((1, 1, 1, 1))).item()
    2.0
    """
    centre, scale = (
        _per_channel(name, given, channels)
        for name, given in (("mean", mean), ("std", std))
    )
    if not (scale > 0).all():
        raise ValueError(
            f"expected a deviation above 0 for every channel as `std`, got {std}"
        )

    def normalise(x: jax.Array) -> jax.Array:
        return (x - jnp.asarray(centre, x.dtype)) / jnp.asarray(scale, x.dtype)

    return normalise


def _per_channel(name: str, given: Any, channels: int) -> np.ndarray:
    values = np.asarray(given, np.float64)
    if values.ndim > 1 or values.size not in (1, channels):
        raise ValueError(
            f"expected one number or one for each of {channels} channels as `{name}`, "
            f"got shape {values.shape}"
        )
    return np.broadcast_to(values.reshape(-1), (channels,)).reshape(1, 1, 1, channels)
