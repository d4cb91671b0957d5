"""Residual networks: the CIFAR family (8, 20, 32) and the ImageNet family (18 to 50).

He et al., "Deep residual learning for image recognition", arXiv:1512.03385. Where a
block changes the shape of its input the shortcut is a 1x1 convolution with BatchNorm
(option B of the paper) in both families: pruning then meets every path, and ResNet-8
of width 16 has about 77k kernel weights, 2,560 more than with option A, the shortcut
without weights that `models.pretrained` needs for published networks.
"""

from collections.abc import Callable
from typing import Any, Literal

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
    projected,
)

Stem = Literal["cifar", "imagenet"]
Shortcut = Callable[[jax.Array, int, int, bool], jax.Array]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them.

    Attributes:
      channels: output channels.
      stride: stride of the first convolution and of the shortcut.
      shortcut: makes the shortcut, `projected` or `padded`.
    """

    channels: int
    stride: int
    shortcut: Shortcut = projected

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features float[batch, height, width, in] to float[..., channels]."""
        y = conv(self.channels, 3, stride=self.stride, name="conv1")(x)
        y = ReLU(name="relu1")(batch_norm(train=train, name="norm1")(y))
        y = conv(self.channels, 3, name="conv2")(y)
        y = batch_norm(train=train, name="norm2")(y)
        y = y + self.shortcut(x, self.channels, self.stride, train)
        return ReLU(name="relu2")(y)


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 with a shortcut around them.

    The stride sits on the 3x3 convolution ("version 1.5"), not on the first 1x1 as in
    the paper: three quarters of the input are not thrown away, and common
    implementations and accuracy figures are of this form.

    Attributes:
      channels: channels of the 3x3 convolution; the output has 4 times as many.
      stride: stride of the 3x3 convolution and of the shortcut.
    """

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features float[batch, height, width, in] to float[..., 4 * channels]."""
        y = conv(self.channels, 1, name="conv1")(x)
        y = ReLU(name="relu1")(batch_norm(train=train, name="norm1")(y))
        y = conv(self.channels, 3, stride=self.stride, name="conv2")(y)
        y = ReLU(name="relu2")(batch_norm(train=train, name="norm2")(y))
        y = conv(4 * self.channels, 1, name="conv3")(y)
        y = batch_norm(train=train, name="norm3")(y)
        y = y + projected(x, 4 * self.channels, self.stride, train)
        return ReLU(name="relu3")(y)


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pooling and a linear head.

    Attributes:
      block: makes a block of so many channels, with a stride and a name: `BasicBlock`
        or `Bottleneck`, or `functools.partial` of one.
      depths: number of blocks in each stage; from the second stage on, the first
        block halves the image and the channels double.
      width: channels of the stem and of the first stage.
      num_classes: size of `head`.
      stem: `"cifar"`, a 3x3 convolution, or `"imagenet"`, a 7x7 convolution of
        stride 2 and 3x3 max pooling of stride 2.
      stem_stride: stride of the `"cifar"` stem.
    """

    block: Callable[..., Any]
    depths: tuple[int, ...]
    width: int
    num_classes: int
    stem: Stem = "cifar"
    stem_stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits float[batch, classes] of float[batch, height, width, channels]."""
        check_images(x)
        size, stride = (7, 2) if self.stem == "imagenet" else (3, self.stem_stride)
        x = conv(self.width, size, stride=stride, name="stem_conv")(x)
        x = ReLU(name="stem_relu")(batch_norm(train=train, name="stem_norm")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths, start=1):
            for index in range(1, depth + 1):
                stride = 2 if stage > 1 and index == 1 else 1
                name = f"stage{stage}_block{index}"
                block = self.block(self.width * 2 ** (stage - 1), stride, name=name)
                x = block(x, train=train)
        return dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


def resnet8(num_classes: int = 10, width: float = 16, stem_stride: int = 1) -> Model:
    """ResNet-8 for small images: 3 stages of one basic block.

    77,360 kernel weights for 3 channels, 10 classes (77,072 for 1 channel).

    Args:
      num_classes: number of logits.
      width: channels of the stem and the first stage, a whole number; the later
        stages have 2 and 4 times as many.
      stem_stride: 1, or 2 to start at half the resolution and a quarter of the cost
        (`"resnet8s"` in `make_model`).

    Returns:
      A model with layers `stem_conv`, `stem_norm`, `stage1_block1/conv1`, ...,
      `head`.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 32, 32, 3))
      >>> params, state = jax.eval_shape(resnet8().init, jax.random.key(0), x)
      >>> list(params["stage2_block1"])
      ['conv1', 'conv2', 'norm1', 'norm2', 'shortcut_conv', 'shortcut_norm']
      >>> list(state)
      ['batch_stats']
    """
    return _cifar_resnet((1, 1, 1), num_classes, width, stem_stride)


def resnet20(num_classes: int = 10, width: float = 16, stem_stride: int = 1) -> Model:
    """ResNet-20 for small images: 3 stages of 3 basic blocks.

    272,474 parameters for 3 channels, 10 classes. Arguments, layers and errors are
    those of `resnet8`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 32, 32, 3))
      >>> params, _ = jax.eval_shape(resnet20().init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      272474
    """
    return _cifar_resnet((3, 3, 3), num_classes, width, stem_stride)


def resnet32(num_classes: int = 10, width: float = 16, stem_stride: int = 1) -> Model:
    """ResNet-32 for small images: 3 stages of 5 basic blocks.

    466,906 parameters for 3 channels, 10 classes. Arguments, layers and errors are
    those of `resnet8`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 32, 32, 3))
      >>> params, _ = jax.eval_shape(resnet32().init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      466906
    """
    return _cifar_resnet((5, 5, 5), num_classes, width, stem_stride)


def resnet18(num_classes: int = 10, width: float = 64, stem: Stem = "cifar") -> Model:
    """ResNet-18: 4 stages of 2 basic blocks.

    11,173,962 parameters with the CIFAR stem for 3 channels, 10 classes.

    Args:
      num_classes: number of logits.
      width: channels of the stem and the first stage, a whole number; the later
        stages have 2, 4 and 8 times as many (all times 4 at the outputs of
        bottleneck blocks).
      stem: `"cifar"` (3x3 convolution) for small images, or `"imagenet"` (7x7
        convolution of stride 2, then 3x3 max pooling of stride 2).

    Returns:
      A model with layers `stem_conv`, `stem_norm`, `stage1_block1/conv1`, ...,
      `head`.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 32, 32, 3))
      >>> params, _ = jax.eval_shape(resnet18().init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      11173962
    """
    return _imagenet_resnet(BasicBlock, (2, 2, 2, 2), num_classes, width, stem)


def resnet34(num_classes: int = 10, width: float = 64, stem: Stem = "cifar") -> Model:
    """ResNet-34: stages of 3, 4, 6 and 3 basic blocks.

    21,282,122 parameters with the CIFAR stem for 3 channels, 10 classes. Arguments,
    layers and errors are those of `resnet18`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 32, 32, 3))
      >>> params, _ = jax.eval_shape(resnet34().init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      21282122
    """
    return _imagenet_resnet(BasicBlock, (3, 4, 6, 3), num_classes, width, stem)


def resnet50(num_classes: int = 10, width: float = 64, stem: Stem = "cifar") -> Model:
    """ResNet-50: stages of 3, 4, 6 and 3 bottleneck blocks.

    25,557,032 parameters with the ImageNet stem for 3 channels, 1000 classes.
    Arguments, layers and errors are those of `resnet18`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 224, 224, 3))
      >>> model = resnet50(num_classes=1000, stem="imagenet")
      >>> params, _ = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      25557032
    """
    return _imagenet_resnet(Bottleneck, (3, 4, 6, 3), num_classes, width, stem)


def _cifar_resnet(
    depths: tuple[int, ...], num_classes: int, width: float, stem_stride: int
) -> Model:
    if stem_stride not in (1, 2):
        raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride}")
    return from_linen(
        ResNet(
            BasicBlock,
            depths,
            width=positive_int("width", width),
            num_classes=positive_int("num_classes", num_classes),
            stem_stride=stem_stride,
        )
    )


def _imagenet_resnet(
    block: type[BasicBlock] | type[Bottleneck],
    depths: tuple[int, ...],
    num_classes: int,
    width: float,
    stem: Stem,
) -> Model:
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f'stem must be "cifar" or "imagenet", got {stem!r}')
    return from_linen(
        ResNet(
            block,
            depths,
            width=positive_int("width", width),
            num_classes=positive_int("num_classes", num_classes),
            stem=stem,
        )
    )
