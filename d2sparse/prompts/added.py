"""Trained pixels that are added to the image: a frame, or a patch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.checks import check_choice, check_key, check_whole
from d2sparse.prompts.base import (
    Prompt,
    Shape,
    Size,
    check_fits,
    every_channel,
    make_start,
    pair,
    shape_of,
)
from d2sparse.prompts.images import (
    Statistics,
    make_normalisation,
    resized,
    widened,
    with_channels,
)


def frame(
    size: Size,
    pad: int,
    channels: int,
    mean: Statistics = 0.0,
    std: Statistics = 1.0,
    *,
    space: str = "normalised",
    start: str = "zeros",
) -> Prompt:
    """A trained frame that is added to the outer pixels of the image.

        P(x) = (resize(x) - mean) / std + theta m    in normalised space,
        P(x) = (resize(x) + theta m - mean) / std    in pixel space,

    with m the mask of a frame of `pad` pixels, and no clipping; of Bahng et al.
    (arXiv 2203.17274), in normalised space and 30 of 224 pixels wide.

    Args:
      size: of the network's images, to which others are resized.
      pad: width of the frame; half of the size makes it the whole image.
      channels: of the network's images.
      mean: of the network's normalisation, as in `border`.
      std: likewise.
      space: in which theta is added, "normalised" or "pixel".
      start: of theta, "zeros" or "normal".

    Raises:
      ValueError: as in `border`; the frame is wider than the image.

    >>> int(frame(size=224, pad=30, channels=3).live.sum())
    69840
    """
    shape = shape_of(size, channels)
    check_whole("pad", pad, least=1)
    pad = int(pad)
    if 2 * pad > min(shape[:2]):
        raise ValueError(
            f"expected a frame of at most {min(shape[:2]) // 2} pixels for images of "
            f"{shape[0]} x {shape[1]}, got pad={pad}; half of the size is all of it"
        )
    mask = np.ones(shape[:2], bool)
    mask[pad : shape[0] - pad, pad : shape[1] - pad] = False
    live = every_channel(mask, channels)

    def placed(theta: jax.Array, key: jax.Array | None) -> jax.Array:
        del key
        return theta * live.astype(theta.dtype)

    apply = _added(placed, shape, mean, std, space)
    return Prompt(make_start(start, shape), apply, shape, live)


def patch(
    size: Size,
    side: Size,
    channels: int,
    mean: Statistics = 0.0,
    std: Statistics = 1.0,
    *,
    space: str = "normalised",
    start: str = "zeros",
) -> Prompt:
    """A trained patch that is added to the top left corner of the image.

    Of Bahng et al. (arXiv 2203.17274); theta has the shape of the patch.

    Args:
      size: of the network's images, to which others are resized.
      side: of the patch.
      channels: of the network's images.
      mean: of the network's normalisation, as in `border`.
      std: likewise.
      space: in which theta is added, "normalised" or "pixel".
      start: of theta, "zeros" or "normal".

    Raises:
      ValueError: as in `border`; the patch is larger than the image.

    >>> prompt = patch(size=3, side=2, channels=1)
    >>> print(prompt.apply(jnp.ones((2, 2, 1)), jnp.zeros((1, 3, 3, 1)))[0, :, :, 0])
    [[1. 1. 0.]
     [1. 1. 0.]
     [0. 0. 0.]]
    """
    shape, own = _patch_shapes(size, side, channels)

    def placed(theta: jax.Array, key: jax.Array | None) -> jax.Array:
        del key
        right = [(0, whole - part) for whole, part in zip(shape, own, strict=True)]
        return jnp.pad(theta, right)

    apply = _added(placed, shape, mean, std, space)
    return Prompt(make_start(start, own), apply, shape, np.ones(own, bool))


def random_patch(
    size: Size,
    side: Size,
    channels: int,
    mean: Statistics = 0.0,
    std: Statistics = 1.0,
    *,
    space: str = "normalised",
    start: str = "zeros",
) -> Prompt:
    """A trained patch that is added to the image, each time in another place.

    The place is uniform over all places where the patch is inside of the image, one for
    all images of a forward pass. Without a key, in evaluation, it is the centre; where
    it cannot be, one pixel nearer to the top or the left. Of Bahng et al.
    (arXiv 2203.17274), who draw a place in evaluation as well. Arguments as in `patch`.

    Raises:
      ValueError: as in `patch`; when applied, the key is none.

    >>> prompt = random_patch(size=3, side=1, channels=1)
    >>> print(prompt.apply(jnp.ones((1, 1, 1)), jnp.zeros((1, 3, 3, 1)))[0, :, :, 0])
    [[0. 0. 0.]
     [0. 1. 0.]
     [0. 0. 0.]]
    """
    shape, own = _patch_shapes(size, side, channels)
    rows, columns = shape[0] - own[0], shape[1] - own[1]

    def placed(theta: jax.Array, key: jax.Array | None) -> jax.Array:
        place = jnp.array([rows // 2, columns // 2])
        if key is not None:
            check_key(key)
            most = jnp.array([rows + 1, columns + 1])
            place = jax.random.randint(key, (2,), 0, most)
        empty = jnp.zeros(shape, theta.dtype)
        corner = (place[0], place[1], jnp.zeros_like(place[0]))
        return jax.lax.dynamic_update_slice(empty, theta, corner)

    apply = _added(placed, shape, mean, std, space)
    return Prompt(
        make_start(start, own), apply, shape, np.ones(own, bool), is_random=True
    )


def _added(
    placed: Callable[[jax.Array, jax.Array | None], jax.Array],
    shape: Shape,
    mean: Statistics,
    std: Statistics,
    space: str,
) -> Callable[..., jax.Array]:
    """`Prompt.apply` of pixels that are added to the image."""
    check_choice("space", space, ("normalised", "pixel"))
    normalise = make_normalisation(mean, std, shape[2])

    def apply(
        theta: jax.Array, images: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        x = resized(with_channels(widened(images), shape[2]), shape[:2])
        pixels = placed(theta, key).astype(x.dtype)[None]
        if space == "pixel":
            return normalise(x + pixels).astype(images.dtype)
        return (normalise(x) + pixels).astype(images.dtype)

    return apply


def _patch_shapes(size: Any, side: Any, channels: int) -> tuple[Shape, Shape]:
    shape, own = shape_of(size, channels), pair("side", side)
    check_fits("side", own, shape)
    return shape, (*own, shape[2])
