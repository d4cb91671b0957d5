"""VGG networks with BatchNorm, in the form used on CIFAR."""

import jax
from flax import linen as nn

from d2sparse.models.base import Model, from_linen
from d2sparse.models.layers import (
    ReLU,
    batch_norm,
    check_images,
    conv,
    dense,
    positive_int,
)

# Channels of the five stages in multiples of the width (64, 128, 256, 512, 512).
_MULTIPLES = (1, 2, 4, 8, 8)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each ended by max pooling, and a linear head.

    Attributes:
      depths: number of convolutions in each stage.
      width: channels of the first stage.
      num_classes: size of `head`.
    """

    depths: tuple[int, int, int, int, int]
    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits float[batch, classes] of float[batch, height, width, channels]."""
        check_images(x)
        for stage, depth in enumerate(self.depths, start=1):
            channels = self.width * _MULTIPLES[stage - 1]
            for index in range(1, depth + 1):
                x = conv(channels, 3, name=f"stage{stage}_conv{index}")(x)
                x = batch_norm(train=train, name=f"stage{stage}_norm{index}")(x)
                x = ReLU(name=f"stage{stage}_relu{index}")(x)
            # Padded so that five halvings of fewer than 32 pixels do not end at 0.
            x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        return dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


def vgg11(num_classes: int = 10, width: float = 64) -> Model:
    """VGG-11 with BatchNorm and a single linear layer after global average pooling.

    Simonyan and Zisserman, arXiv:1409.1556, configuration A, without its two hidden
    dense layers, as is usual on CIFAR. 9,228,362 parameters for 3 channels, 10
    classes.

    Args:
      num_classes: number of logits.
      width: channels of the first stage, a whole number; the later stages have 2, 4,
        8 and 8 times as many.

    Returns:
      A model for images of any size (meant for 32x32), with layers `stage1_conv1`,
      `stage1_norm1`, ..., `head`.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 32, 32, 3))
      >>> params, _ = jax.eval_shape(vgg11().init, jax.random.key(0), x)
      >>> params["stage5_conv2"]["kernel"].shape
      (3, 3, 512, 512)
    """
    return _vgg((1, 1, 2, 2, 2), num_classes, width)


def vgg16(num_classes: int = 10, width: float = 64) -> Model:
    """VGG-16 with BatchNorm and a single linear layer after global average pooling.

    As `vgg11`, with configuration D of the paper: 13 convolutions and 14,724,042
    parameters for 3 channels, 10 classes.

    Args:
      num_classes: number of logits.
      width: channels of the first stage, a whole number; the later stages have 2, 4,
        8 and 8 times as many.

    Returns:
      A model for images of any size (meant for 32x32), with layers `stage1_conv1`,
      `stage1_norm1`, ..., `head`.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 28, 28, 1))
      >>> params, _ = jax.eval_shape(vgg16(width=8).init, jax.random.key(0), x)
      >>> params["stage5_conv3"]["kernel"].shape
      (3, 3, 64, 64)
    """
    return _vgg((2, 2, 3, 3, 3), num_classes, width)


def _vgg(
    depths: tuple[int, int, int, int, int], num_classes: int, width: float
) -> Model:
    width = positive_int("width", width)
    return from_linen(VGG(depths, width, positive_int("num_classes", num_classes)))
