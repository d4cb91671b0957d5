"""LeNet-5 in the form shipped with Caffe."""

import jax
from flax import linen as nn

from d2sparse.models.base import Model, from_linen
from d2sparse.models.layers import (
    KAIMING_FAN_OUT,
    ReLU,
    check_images,
    dense,
    positive_int,
    scaled_size,
)

# Two rounds of "5x5 convolution without padding, halve" leave nothing of 15 pixels.
_MIN_SIDE = 16


class LeNet5(nn.Module):
    """Two unpadded 5x5 convolutions with max pooling, a hidden layer and a head.

    Attributes:
      channels: output channels of `conv1` and `conv2`.
      hidden: size of `dense1`.
      num_classes: size of `head`.
    """

    channels: tuple[int, int]
    hidden: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits float[batch, classes] of float[batch, height, width, channels]."""
        del train
        check_images(x)
        if min(x.shape[1:3]) < _MIN_SIDE:
            raise ValueError(
                f"lenet5 needs images of at least {_MIN_SIDE}x{_MIN_SIDE} pixels, got "
                f"shape {x.shape}; enlarge them or choose convnet_s, which pads"
            )
        for index, channels in enumerate(self.channels, start=1):
            x = nn.Conv(
                channels,
                (5, 5),
                padding="VALID",
                kernel_init=KAIMING_FAN_OUT,
                name=f"conv{index}",
            )(x)
            x = ReLU(name=f"relu{index}")(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = dense(self.hidden, name="dense1")(x.reshape(x.shape[0], -1))
        x = ReLU(name="relu3")(x)
        return dense(self.num_classes, name="head")(x)


def lenet5(num_classes: int = 10, width: float = 1.0) -> Model:
    """LeNet-5-Caffe: 5x5 convolutions of 20 and 50 channels, 500 units, a head.

    ReLU follows every hidden layer, as the pruning literature has it; Caffe's own
    definition has one after the dense layer alone. 431,080 parameters on 28x28x1
    images, 10 classes.

    Args:
      num_classes: number of logits.
      width: multiplier of the three hidden sizes 20, 50 and 500, above 0.

    Returns:
      A model for images of at least 16x16 pixels, with layers `conv1`, `conv2`,
      `dense1`, `head` and an empty state.

    Raises:
      ValueError: if an argument is out of range; from the model, if the images are
        too small.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 28, 28, 1))
      >>> params, _ = jax.eval_shape(lenet5().init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      431080
    """
    conv1, conv2, hidden = (scaled_size(size, width) for size in (20, 50, 500))
    num_classes = positive_int("num_classes", num_classes)
    return from_linen(LeNet5((conv1, conv2), hidden, num_classes))
