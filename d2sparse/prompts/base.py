"""What a prompt is, its sizes, and how it begins."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.checks import check_choice, check_key, check_whole

Size = int | tuple[int, int]  # Of a square, or height and width.
Shape = tuple[int, int, int]  # Height, width, channels.


class Prompt(NamedTuple):
    """A prompt as two pure functions, and what is known of it before it is trained.

    Attributes:
      init: `key -> theta`, the trained pixels.
      apply: `(theta, images, key=None) -> float[batch, height, width, channels]`: from
        images in [0, 1] to what the network sees, normalised.
      shape: (height, width, channels) of what the network sees.
      live: bool[...] of the shape of theta: the numbers that anything depends on.
      is_random: whether `apply` looks at its key.
    """

    init: Callable[[jax.Array], jax.Array]
    apply: Callable[..., jax.Array]
    shape: Shape
    live: np.ndarray
    is_random: bool = False


def effective_size(prompt: Prompt) -> int:
    """The number of parameters that what the network sees depends on.

    theta of a border is stored for the whole canvas; this leaves out the window. Where
    the window is that of the images, `inner=None`, all of theta is counted.

    >>> from d2sparse.prompts import border
    >>> effective_size(border(canvas=32, inner=16, channels=3))
    2304
    """
    return int(prompt.live.sum())


def make_start(start: str, shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """`key -> theta` of a shape, of "zeros" or of N(0, 1) numbers, "normal"."""
    check_choice("start", start, ("zeros", "normal"))

    def init(key: jax.Array) -> jax.Array:
        check_key(key)
        if start == "zeros":
            return jnp.zeros(shape, jnp.float32)
        return jax.random.normal(key, shape, jnp.float32)

    return init


def shape_of(size: Any, channels: int) -> Shape:
    """Height, width and channels of what the network sees.

    >>> shape_of(32, channels=3)
    (32, 32, 3)
    """
    check_whole("channels", channels, least=1)
    return (*pair("size", size), int(channels))


def pair(name: str, size: Any) -> tuple[int, int]:
    """Height and width, of both or of the side of a square.

    >>> pair("inner", 16), pair("inner", (16, 8))
    ((16, 16), (16, 8))
    """
    sides = size if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"expected a side or (height, width) as `{name}`, got {size}")
    for side in sides:
        check_whole(name, side, least=1)
    return int(sides[0]), int(sides[1])


def check_fits(what: str, own: tuple[int, int], shape: Shape) -> None:
    """Raises where something is larger than what the network sees.

    >>> check_fits("inner", (16, 16), (32, 32, 3))
    """
    if own[0] > shape[0] or own[1] > shape[1]:
        raise ValueError(
            f"expected {what} of at most {shape[0]} x {shape[1]}, which the network "
            f"sees, got {own[0]} x {own[1]}; make it smaller"
        )


def every_channel(mask: np.ndarray, channels: int) -> np.ndarray:
    """A mask of pixels for the channels of each.

    >>> every_channel(np.ones((2, 2), bool), channels=3).shape
    (2, 2, 3)
    """
    return np.repeat(mask[..., None], channels, axis=2)
