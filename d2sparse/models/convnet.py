"""A small convolutional network without BatchNorm, for quick experiments."""

import math

import jax
from flax import linen as nn

from d2sparse.models.base import Model, from_linen
from d2sparse.models.layers import ReLU, check_images, conv, dense, positive_int


class ConvNet(nn.Module):
    """Three 3x3 stride-2 convolutions with GroupNorm and ReLU, and a linear head.

    Attributes:
      width: channels of the first layer; the others have 2 and 4 times as many.
      num_classes: size of `head`.
    """

    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits float[batch, classes] of float[batch, height, width, channels]."""
        del train
        check_images(x)
        # The same divisor of `width` everywhere: the last norm, which sees a single
        # pixel of an 8x8 image, then still has at least 4 values in a group.
        groups = math.gcd(self.width, 8)
        for index, channels in enumerate(
            (self.width, 2 * self.width, 4 * self.width), start=1
        ):
            x = conv(channels, 3, stride=2, name=f"conv{index}")(x)
            x = nn.GroupNorm(groups, epsilon=1e-5, name=f"norm{index}")(x)
            x = ReLU(name=f"relu{index}")(x)
        return dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


def convnet_s(num_classes: int = 10, width: float = 16) -> Model:
    """Three 3x3 stride-2 convolutions of 16, 32, 64 channels and a linear head.

    Each convolution is followed by GroupNorm (Wu and He, arXiv:1803.08494) and ReLU,
    the last one by global average pooling. Without batch statistics an example's
    logits do not depend on the rest of its batch, in training either. 23,824 kernel
    weights for 1 channel, 10 classes.

    Args:
      num_classes: number of logits.
      width: channels of the first convolution, a whole number; doubled twice.

    Returns:
      A model for images of any size (meant for 8x8 to 64x64), with layers `conv1`,
      `norm1` to `conv3`, `norm3`, `head` and an empty state.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 8, 8, 1))
      >>> params, state = jax.eval_shape(convnet_s().init, jax.random.key(0), x)
      >>> params["conv3"]["kernel"].shape, state
      ((3, 3, 32, 64), {})
    """
    return from_linen(
        ConvNet(
            width=positive_int("width", width),
            num_classes=positive_int("num_classes", num_classes),
        )
    )
