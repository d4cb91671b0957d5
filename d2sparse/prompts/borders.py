"""A border of trained pixels around the image."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.checks import check_choice
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

# Zero is a mid-grey border under both that bound it.
_SQUASH: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "clip": lambda theta: jnp.clip(theta + 0.5, 0.0, 1.0),
    "none": lambda theta: theta,
}


def border(
    canvas: Size,
    inner: Size | None,
    channels: int,
    mean: Statistics = 0.0,
    std: Statistics = 1.0,
    *,
    squash: str = "sigmoid",
    start: str = "zeros",
    open: np.ndarray | None = None,
) -> Prompt:
    """A trained border around the image, which keeps its pixels.

    With m the mask of the border and s the squash,

        P(x) = (pad(resize(x)) + s(theta) m - mean) / std

    of Chen et al. (arXiv 2211.11635). Where the difference of the sizes is odd, the
    left and the top side get the pixel that is left over. theta has the shape of the
    canvas; behind the window it is never used, see `effective_size`.

    Args:
      canvas: size of the images that the network was trained on.
      inner: size that images are resized to; None for that of the images themselves.
      channels: of the network's images.
      mean: of the network's normalisation, per channel or for all, on the scale of
        [0, 1].
      std: likewise.
      squash: of theta to pixels: "sigmoid"; "clip" of theta + 1/2, whose gradient
        vanishes at black and white; or "none".
      start: of theta, "zeros", which is a grey border, or "normal", N(0, 1).
      open: bool[height, width] of the window: pixels where the prompt is added to the
        image, as in the unused half of a symmetric matrix; it needs `inner`.

    Raises:
      ValueError: sizes, statistics or names that do not fit. When applied: images that
        are no floats in [0, 1] (values are not checked while tracing), have other
        channels, or are larger than the canvas without an `inner`.

    >>> prompt = border(canvas=5, inner=2, channels=1)
    >>> seen = prompt.apply(prompt.init(jax.random.key(0)), jnp.ones((1, 2, 2, 1)))
    >>> print(seen[0, :, :, 0])
    [[0.5 0.5 0.5 0.5 0.5]
     [0.5 0.5 0.5 0.5 0.5]
     [0.5 0.5 1.  1.  0.5]
     [0.5 0.5 1.  1.  0.5]
     [0.5 0.5 0.5 0.5 0.5]]
    """
    shape = shape_of(canvas, channels)
    normalise = make_normalisation(mean, std, channels)
    check_choice("squash", squash, _SQUASH)
    window = None if inner is None else pair("inner", inner)
    if window is not None:
        check_fits("inner", window, shape)
    opened = _opened(open, window)

    def apply(
        theta: jax.Array, images: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        del key
        x = with_channels(widened(images), channels)
        own = window or (x.shape[1], x.shape[2])
        check_fits("images, where no `inner` is given,", own, shape)
        x = jnp.pad(resized(x, own), ((0, 0), *_sides(own, shape), (0, 0)))
        mask = jnp.asarray(_around(own, shape, opened), x.dtype)
        pixels = _SQUASH[squash](theta).astype(x.dtype) * mask[..., None]
        return normalise(x + pixels[None]).astype(images.dtype)

    live = np.ones(shape[:2], bool)
    if window is not None:
        live = _around(window, shape, opened)
    return Prompt(make_start(start, shape), apply, shape, every_channel(live, channels))


def _around(
    window: tuple[int, int], shape: Shape, opened: np.ndarray | None
) -> np.ndarray:
    """The pixels of the border, and those that are open in the window."""
    (top, below), (left, right) = _sides(window, shape)
    inside = np.zeros(window, bool) if opened is None else opened
    return np.pad(inside, ((top, below), (left, right)), constant_values=True)


def _sides(window: tuple[int, int], shape: Shape) -> list[tuple[int, int]]:
    """Pixels before and after the window, along each axis."""
    free = [whole - own for whole, own in zip(shape[:2], window, strict=True)]
    return [((n + 1) // 2, n // 2) for n in free]


def _opened(open: Any, window: tuple[int, int] | None) -> np.ndarray | None:
    if open is None:
        return None
    found = np.asarray(open)
    if window is None or found.shape != window or found.dtype != bool:
        raise ValueError(
            f"expected bools of the shape of `inner`, {window}, as `open`, got "
            f"{found.dtype} of shape {found.shape}"
        )
    return found
