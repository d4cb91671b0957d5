"""Layers shared by the model families: one initialiser, one set of norm constants."""

import jax
import jax.numpy as jnp
from flax import linen as nn

KAIMING_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
KAIMING_FAN_IN = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def conv(
    channels: int, kernel_size: int, *, name: str, stride: int = 1, bias: bool = False
) -> nn.Conv:
    """Square convolution padded by half a kernel, Kaiming-normal by fan-out.

    Kernels are drawn from N(0, 2 / (kernel_size^2 channels)) (He et al.,
    arXiv:1502.01852). The padding is the same on both sides at every stride (Flax's
    `"SAME"` is not), as in the published networks.

    Args:
      channels: output channels.
      kernel_size: odd side of the kernel.
      name: name of the layer in the parameter tree.
      stride: spatial stride; a side of n becomes ceil(n / stride).
      bias: whether to add a bias; leave it off when a norm follows.

    Returns:
      The layer, from float[batch, height, width, in] to float[..., channels].

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> layer = conv(16, 3, stride=2, name="conv1")
      >>> x = jnp.zeros((1, 7, 7, 3))
      >>> y, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
      >>> y.shape
      (1, 4, 4, 16)
    """
    return nn.Conv(
        channels,
        (kernel_size, kernel_size),
        strides=stride,
        padding=kernel_size // 2,
        use_bias=bias,
        kernel_init=KAIMING_FAN_OUT,
        name=name,
    )


def dense(features: int, *, name: str) -> nn.Dense:
    """Dense layer with a bias, Kaiming-normal by fan-in.

    Args:
      features: output features.
      name: name of the layer in the parameter tree.

    Returns:
      The layer, from float[batch, in] to float[batch, features].

    Example:
      >>> dense(10, name="head").features
      10
    """
    return nn.Dense(features, kernel_init=KAIMING_FAN_IN, name=name)


def batch_norm(*, train: bool, name: str) -> nn.BatchNorm:
    """Batch normalisation with momentum 0.9 and epsilon 1e-5.

    While training, the batch's own mean and (biased) variance normalise it, and the
    running statistics become `0.9 * old + 0.1 * batch`; otherwise the running
    statistics normalise (Ioffe and Szegedy, arXiv:1502.03167).

    Args:
      train: whether to use and record the statistics of the batch.
      name: name of the layer in the parameter and state trees.

    Returns:
      The layer; its statistics live in the collection `"batch_stats"`.

    Example:
      >>> batch_norm(train=False, name="norm1").use_running_average
      True
    """
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name
    )


class ReLU(nn.Module):
    """The rectifier as a layer with a name, at which `taps` can read and replace it.

    Example:
      >>> import jax.numpy as jnp
      >>> ReLU(name="relu1").apply({}, jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The positive part, of the shape of the input."""
        return nn.relu(x)


def projected(x: jax.Array, channels: int, stride: int, train: bool) -> jax.Array:
    """The shortcut by a 1x1 convolution with BatchNorm (option B), inside a block.

    Args:
      x: float[batch, height, width, in], the input of the block.
      channels: of the output of the block.
      stride: of the block.
      train: whether BatchNorm uses and records the statistics of the batch.

    Returns:
      float[batch, ceil(height / stride), ceil(width / stride), channels].
    """
    if stride == 1 and x.shape[-1] == channels:
        return x
    x = conv(channels, 1, stride=stride, name="shortcut_conv")(x)
    return batch_norm(train=train, name="shortcut_norm")(x)


def padded(x: jax.Array, channels: int, stride: int, train: bool) -> jax.Array:
    """The shortcut without weights (option A): every stride-th pixel, channels of zero.

    As many channels are added in front of those of the input as behind them.

    Arguments and value are those of `projected`.

    Example:
      >>> padded(jnp.ones((1, 2, 2, 2)), 4, 2, False).tolist()
      [[[[0.0, 1.0, 1.0, 0.0]]]]
    """
    added = channels - x.shape[-1]
    before = added // 2
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, added - before)))


def check_images(x: jax.Array) -> None:
    """Raises unless `x` is a batch of images.

    Flax convolutions accept a single unbatched image, and pooling over axes 1 and 2
    would then silently mix up rows and channels.

    Args:
      x: float[batch, height, width, channels].

    Raises:
      ValueError: if `x` does not have four axes.

    Example:
      >>> import jax.numpy as jnp
      >>> check_images(jnp.zeros((28, 28, 1)))
      Traceback (most recent call last):
      ...
      ValueError: expected images [batch, height, width, channels], got shape \
(28, 28, 1); add the missing axis, for a single image with x[None]
    """
    if x.ndim != 4:
        raise ValueError(
            "expected images [batch, height, width, channels], got shape "
            f"{x.shape}; add the missing axis, for a single image with x[None]"
        )


def positive_int(name: str, value: float) -> int:
    """Checks that a count, such as a width read from a float flag, is a whole number.

    Args:
      name: what is counted, for the message.
      value: a whole number of at least 1.

    Returns:
      The value as an int.

    Raises:
      ValueError: if the value is below 1, has a fraction, or is not finite.

    Example:
      >>> positive_int("width", 16.0)
      16
    """
    # Infinities and NaN have a remainder of NaN, which is true.
    if not value >= 1 or value % 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value}")
    return int(value)


def scaled_size(size: int, width: float) -> int:
    """The size of a hidden layer under a width multiplier, at least 1.

    Args:
      size: the size at `width=1`.
      width: a multiplier above 0.

    Returns:
      `max(1, round(size * width))`.

    Raises:
      ValueError: if the width is not a positive finite number.

    Example:
      >>> scaled_size(300, 0.5)
      150
    """
    if not 0 < width < float("inf"):
        raise ValueError(
            f"width multiplies the hidden sizes and must be > 0, got {width}"
        )
    return max(1, round(size * width))
